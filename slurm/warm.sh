#!/usr/bin/env bash
# A recipe's code compiled ahead of its runs, on one GPU of their type, or here and now without sbatch:
#
#   sbatch slurm/warm.sh RECIPE [--on 8xh100] [--set KEY=VALUE]...      as nanogpt warm; --on: of the runs to come
#
# The file goes where runs look for it: NANOGPT_CACHE, else cache beside the runs. Name the GPU type where a cluster has
# several: sbatch --gres=gpu:h100:1 slurm/warm.sh record89 --on 8xh100
#SBATCH --job-name=nanogpt-warm
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=00:15:00
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -e $here/in_image.sh ]]; then # Slurm runs a copy of a batch script: the others are beside the original
    here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/warm\.sh\( .*\)\{0,1\}$|\1|p')
fi
exec "$here/in_image.sh" nanogpt warm "$@"
