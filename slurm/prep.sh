#!/usr/bin/env bash
# Makes token shards on a CPU node with internet, or here without sbatch:
#
#   sbatch slurm/prep.sh [OPTION]...                  FineWeb's, like prep-fineweb: --chunks N (FINEWEB_CHUNKS), --dir DIR
#   sbatch slurm/prep.sh text PATH... --dir DIR       of your own text, like prep-text; --embedded: the prose in the package
#
# If compute nodes have no internet, run slurm/prep.sh on the login node.
#SBATCH --job-name=nanogpt-prep
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=02:00:00
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -e $here/in_image.sh ]]; then # Slurm runs a copy of a batch script: the others are beside the original
    read -r here <<< "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/prep\.sh\( .*\)\{0,1\}$|\1|p')"
fi
program=prep-fineweb
if [[ ${1:-} == text ]]; then
    program=prep-text
    shift
fi
exec "$here/in_image.sh" "$program" "$@"
