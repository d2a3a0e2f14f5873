#!/usr/bin/env bash
# Runs nanogpt inside the image, with access to Slurm's commands, which the image lacks:
#
#   slurm/nanogpt.sh status          my jobs and their runs
#   slurm/nanogpt.sh watch JOB       a job, live
#   slurm/nanogpt.sh cancel JOB
#   slurm/nanogpt.sh COMMAND ...     any other command of nanogpt
#
# Environment variables: see slurm/in_image.sh.
set -euo pipefail
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/use_site.sh
. "$here/use_site.sh"
use_site "$here"

if [[ -n ${TMPDIR:-} && ! (-d $TMPDIR && -w $TMPDIR) ]]; then # often the login node's, which a job has brought along
    echo "nanogpt.sh on $(hostname): TMPDIR=$TMPDIR: no directory here that can be written to; /tmp is used." \
        "export TMPDIR=one that nodes have" >&2
    export TMPDIR=/tmp
fi
place=${TMPDIR:-/tmp}

# My directories that a killed script left behind: nobody holds their lock. An empty word ends what answers there.
while IFS= read -r -d '' old; do
    if flock --nonblock "$old" true; then
        # shellcheck disable=SC2016
        timeout 1 bash -c ': > "$1"' _ "$old/ask" || true
        rm -rf "$old"
    fi
done < <(find "$place" -maxdepth 1 -type d -name 'nanogpt-relay.*' -user "$EUID" -mmin +1 -print0) 2> /dev/null

relay_pid='' relay=''
clean_up() {
    if [[ -n $relay_pid ]]; then
        kill "$relay_pid" 2> /dev/null || true # it may have had the signal, too
        wait "$relay_pid" 2> /dev/null || true
    fi
    if [[ -n $relay ]]; then rm -rf "$relay"; fi
}
trap clean_up EXIT
relay=$(mktemp -d "$place/nanogpt-relay.XXXXXX") || {
    echo "nanogpt.sh on $(hostname): nothing can be made in $place; free some space there, or export TMPDIR=elsewhere" >&2
    exit 2
}
exec {lock}< "$relay"
flock --nonblock "$lock" 2> /dev/null || true
mkfifo "$relay/ask" "$relay/answer"
export NANOGPT_SCRIPTS=$here

# Runs the commands requested inside (see nanogpt/cluster/outside.py), one after the other.
answer() {
    local -a command
    local code
    while mapfile -d '' -t command < "$relay/ask"; do
        if ((${#command[@]} == 0)) && [[ ! -e /proc/$$ ]]; then break; fi
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
answer 2> /dev/null {lock}<&- &
relay_pid=$!
NANOGPT_RELAY=$relay "$here/in_image.sh" nanogpt "$@"
