#!/usr/bin/env bash
# Runs a recipe on a Slurm cluster: nanogpt launch inside the image, one container per node. Two ways:
#
#   sbatch slurm/run.sh RECIPE [--on 8xh200] [--set KEY=VALUE]...    with the resources below: 8 GPUs on one node
#   slurm/run.sh [--runs N[%M]] [--dry-run] RECIPE [--on 4xh200] [--set KEY=VALUE]... [-- SBATCH OPTIONS]
#       checks the recipe, works out the resources, prints the sbatch command and submits it; --dry-run only prints,
#       --runs N submits an array of N runs, each with its own seed; --runs 10%2: two at a time
#   both take --resume RUN instead of RECIPE: the run continues from its newest checkpoint
#   --on 4xh200, or 2x4xh100 for two nodes: replaces the recipe's hardware; an existing job knows its own
#   --parsable: prints only the job's id, as sbatch does
#
# Partition and account: SBATCH_PARTITION, SBATCH_ACCOUNT (in slurm/site.sh: see sites/), or sbatch's options. GPU_TYPE and NUM_GPUS (per node) change
# the recipe's hardware without --on. NCCL_*, OMP_NUM_THREADS and FINEWEB_CHUNKS are passed on; NCCL_IB_DISABLE is 1 by default on one node.
# NANOGPT_STAGE=DIR copies image and shards to DIR on each node first. Image and site: see slurm/in_image.sh. More:
# docs/cluster.md.
#SBATCH --job-name=nanogpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:h200:8
#SBATCH --cpus-per-task=64
#SBATCH --mem=192G
#SBATCH --time=00:40:00
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -uo pipefail

here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${SLURM_JOB_ID:-} || " $* " == *" --dry-run "* ]]; then exec "$here/nanogpt.sh" submit "$@"; fi
if [[ ! -e $here/nanogpt.sh ]]; then # Slurm runs a copy of a batch script: the others are beside the original
    read -r here <<< "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/run\.sh\( .*\)\{0,1\}$|\1|p')"
    here=$(cd -P "${here:-slurm}" && pwd) || exit 2
fi
# shellcheck source=slurm/use_site.sh
. "$here/use_site.sh"
use_site "$here"
export NANOGPT_SCRIPTS=$here
export SLURM_EXPORT_ENV=ALL # of srun: what `sbatch --export` has let in is passed to every node

mapfile -d '' -t step < <("$here/nanogpt.sh" job plan "$@")
wait "$!" || exit
((${#step[@]})) || exit 0
one_per_node=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
if [[ -n ${NANOGPT_STAGE:-} ]]; then srun "${one_per_node[@]}" "$here/in_image.sh" nanogpt job stage "$@" || exit; fi

# The launcher's process number, in its node's /tmp, under a name that nobody can have created before.
NANOGPT_PID_FILE=/tmp/nanogpt-$SLURM_JOB_ID-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export NANOGPT_PID_FILE

# Before the time limit Slurm signals this script alone, which tells the launchers: if Slurm signalled the step itself,
# it would also end the process that mounts the image, and the run could not write its checkpoint.
# shellcheck disable=SC2016,SC2329
tell_launchers() {
    told=yes
    echo "run.sh: time is nearly up, the run is asked for a checkpoint" >&2
    srun --overlap "${one_per_node[@]}" bash -c "$tell_launcher" _ "$NANOGPT_PID_FILE"
}
# The file and the process it names must be this user's, or nothing is signalled: -1 would mean all processes.
# shellcheck disable=SC2016
tell_launcher='file=$1.$SLURM_NODEID pid=
    if [[ -f $file && -O $file && ! -h $file ]]; then read -r pid < "$file"; fi
    if [[ $pid =~ ^[1-9][0-9]*$ ]] && ((pid > 1)) && [[ -O /proc/$pid ]]; then kill -USR1 "$pid"
    else echo "run.sh on $(hostname): $file names no process of this run: it is not asked for a checkpoint" >&2; fi'
trap tell_launchers USR1
"${step[@]}" &
while
    told=
    wait "$!"
    code=$?
    [[ -n $told ]]
do :; done # a signal ends `wait` early
trap '' USR1

# Slurm requeues a job whose first node is lost. The run notices the loss of another node minutes before Slurm does, and a
# script that ended by then would have failed: so the job requeues itself.
lost_nodes() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        timeout --kill-after=5 60 srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --gres=none --mem=0 \
            --nodelist="$node" true < /dev/null > /dev/null 2>&1 || echo "$node" &
    done
    wait
}
lost=()
if ((code != 0 && code != 75 && SLURM_JOB_NUM_NODES > 1)); then mapfile -t lost < <(lost_nodes); fi
if ((code != 75 && !${#lost[@]})); then exit "$code"; fi
mapfile -t again < <("$here/nanogpt.sh" job requeue "${lost[@]/#/--lost=}" "$@")
wait "$!" || exit "$code"
trap '' TERM # which `scontrol requeue` sends to the whole job, before all is done
if ! scontrol requeue "${again[0]}"; then
    echo "run.sh: not requeued${again[2]:+; by hand: ${again[2]}}" >&2
# Slurm itself makes a requeued job wait two minutes, but not one that ends with a node going down: its other nodes refuse a
# job that comes back in the second in which they ended it, and it fails. While this script runs, it cannot start.
elif [[ -n ${again[1]} ]] && scontrol update "JobId=${again[0]}" "ExcNodeList=${again[1]}" StartTime=now+120; then
    echo "run.sh: without ${again[1]}; scontrol update JobId=${again[0]} ExcNodeList= lets all in again" >&2
fi
exit "$code"
