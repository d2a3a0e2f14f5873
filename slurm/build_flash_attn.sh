#!/usr/bin/env bash
# Builds FlashAttention from source inside the image, on a CPU node, or here without sbatch:
#
#   sbatch slurm/build_flash_attn.sh SOURCE --out DIR     like build-flash-attn; then export NANOGPT_FLASH_ATTN=DIR
#SBATCH --job-name=nanogpt-flash-attn
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=01:00:00
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -e $here/in_image.sh ]]; then # Slurm runs a copy of a batch script: the others are beside the original
    read -r here <<< "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/build_flash_attn\.sh\( .*\)\{0,1\}$|\1|p')"
fi
exec "$here/in_image.sh" build-flash-attn "$@"
