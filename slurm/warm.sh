#!/usr/bin/env bash
# Compiles a recipe's code ahead of its runs, on one GPU of their type. Three ways:
#
#   slurm/warm.sh RECIPE [--on 8xh100] [--set KEY=VALUE]... [-- SBATCH OPTIONS]     submits a job for it
#   sbatch --gres=gpu:h100:1 slurm/warm.sh RECIPE [--on 8xh100] ...                 the same by hand
#   slurm/warm.sh RECIPE ...      in a job, or without sbatch: here
#
# Options as for nanogpt warm; --on names the hardware of the runs to come. The file goes where runs look for it:
# NANOGPT_CACHE, else cache beside the runs. --dry-run and --parsable: as in slurm/run.sh.
#SBATCH --job-name=nanogpt-warm
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=00:15:00
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    # shellcheck source=slurm/use_site.sh
    . "$here/use_site.sh"
    use_site "$here"
    if command -v sbatch > /dev/null; then exec "$here/nanogpt.sh" job submit-warm "$@"; fi
fi
if [[ ! -e $here/in_image.sh ]]; then # Slurm runs a copy of a batch script: the others are beside the original
    read -r here <<< "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/warm\.sh\( .*\)\{0,1\}$|\1|p')"
fi
exec "$here/in_image.sh" nanogpt warm "$@"
