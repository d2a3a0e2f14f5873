#!/usr/bin/env bash
# Builds the image in a job, if login nodes are not for that, or here without sbatch:
#
#   sbatch slurm/build_sif.sh [FLAVOUR=cpu] [BASE=tree] [OUT=FILE] ...      like make sif; docs/container.md
#
# It is built on the node's own disk, in $TMPDIR or /tmp unless APPTAINER_TMPDIR names another place; this takes 14 GB.
#SBATCH --job-name=nanogpt-sif
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=01:00:00
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -e $here/in_image.sh ]]; then # Slurm runs a copy of a batch script: the others are beside the original
    read -r here <<< "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/build_sif\.sh\( .*\)\{0,1\}$|\1|p')"
fi
exec make --no-print-directory -C "$here/.." sif "$@"
