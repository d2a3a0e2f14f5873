#!/usr/bin/env bash
# nanogpt inside the image, with Slurm's commands at hand, which the image does not have:
#
#   slurm/nanogpt.sh status          my jobs and their runs
#   slurm/nanogpt.sh watch JOB       a job live
#   slurm/nanogpt.sh cancel JOB
#   slurm/nanogpt.sh COMMAND ...     any other command of nanogpt
#
# The environment counts as described in slurm/in_image.sh.
set -euo pipefail
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)

relay=$(mktemp -d "${TMPDIR:-/tmp}/nanogpt-relay.XXXXXX")
mkfifo "$relay/ask" "$relay/answer"
export NANOGPT_SCRIPTS=$here

# Runs what is asked for inside (see nanogpt/cluster/outside.py), one command after the other.
answer() {
    local -a command
    local code
    while mapfile -d '' -t command < "$relay/ask"; do
        code=0
        : > "$relay/out"
        case ${command[0]:-} in
            squeue | sacct | scancel | scontrol | sbatch | sinfo | getent)
                "${command[@]}" < /dev/null > "$relay/out" 2> "$relay/err" || code=$? ;;
            *) code=127 && echo "${command[0]:-}: not a command of Slurm" > "$relay/err" ;;
        esac
        echo "$code" > "$relay/answer"
    done
}
answer 2> /dev/null &
relay_pid=$!
trap 'kill "$relay_pid" 2> /dev/null; rm -rf "$relay"' EXIT
NANOGPT_RELAY=$relay "$here/in_image.sh" nanogpt "$@"
