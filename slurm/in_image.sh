#!/usr/bin/env bash
# Runs a command inside the image: slurm/in_image.sh COMMAND [ARGUMENT]...
#
#   NANOGPT_SIF=FILE   the image (default: nanogpt.sif here, or beside the project's folder slurm/)
#   NANOGPT_SITE=FILE  is sourced first, for what a site needs: module load apptainer, export HTTPS_PROXY=..., ...
#   APPTAINER=COMMAND  default: apptainer, or singularity where there is no apptainer
#   APPTAINER_BIND=... more directories to show inside, as Apptainer knows it
#
# Of the environment only what PASS names goes in, so that a conda environment or modules of yours change nothing.
set -euo pipefail
PASS='^(SLURM|SLURMD|SBATCH|NCCL|NANOGPT|NVIDIA|CUDA|OMP|TORCH|PYTORCH|TRITON|UCX|GLOO|WANDB|HF)_|^(FINEWEB_CHUNKS|GPU_TYPE|NUM_GPUS|GPU_DEVICE_ORDINAL|USER|LOGNAME|TERM|COLUMNS|LINES|TZ|NO_COLOR|TMPDIR|https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY)$'

root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC1090
if [[ -n ${NANOGPT_SITE:-} ]]; then . "$NANOGPT_SITE"; fi

if [[ -z ${APPTAINER:-} ]]; then
    APPTAINER=$(command -v apptainer || command -v singularity) || {
        echo "${0##*/}: neither apptainer nor singularity is on PATH of $(hostname). If it comes as a module, put" \
            "'module load apptainer' in a file and export NANOGPT_SITE=that file; or export APPTAINER=/path/to/it" >&2
        exit 2
    }
fi
sif=${NANOGPT_SIF:-nanogpt.sif}
if [[ -z ${NANOGPT_SIF:-} && ! -e $sif ]]; then sif=$root/nanogpt.sif; fi
if [[ ! -r $sif ]]; then
    echo "${0##*/}: there is no image $sif on $(hostname). Make one with 'make sif' in $root, or name one that this" \
        "machine can read: export NANOGPT_SIF=/path/to/nanogpt.sif" >&2
    exit 2
fi

NANOGPT_SIF=$(realpath "$sif")
export NANOGPT_SIF

prefix=APPTAINERENV_
if [[ ${APPTAINER##*/} == singularity* ]]; then prefix=SINGULARITYENV_; fi
while IFS= read -r name; do
    if [[ $name =~ $PASS ]]; then export "$prefix$name=${!name}"; fi
done < <(compgen -e)
if [[ -n ${NANOGPT_SRC:-} ]]; then export "${prefix}PYTHONPATH=$NANOGPT_SRC"; fi

options=(--cleanenv --pwd "$PWD")
if [[ -e /dev/nvidiactl ]]; then options+=(--nv); fi
# Apptainer shows home, /tmp and the current directory; the rest is to be named. A directory that is still to be made
# is shown by the nearest one that exists, a link by what it leads to as well.
for directory in "$PWD" "$root" "${NANOGPT_DATA:-data}" "${NANOGPT_RUNS:-runs}" "${NANOGPT_CACHE:-}" \
    "${NANOGPT_STAGE:-}" "${NANOGPT_RELAY:-}" "${NANOGPT_SRC:-}" "${NANOGPT_FLASH_ATTN:-}" "$(dirname "$NANOGPT_SIF")"; do
    if [[ -z $directory ]]; then continue; fi
    for path in "$(realpath -ms "$directory")" "$(realpath -m "$directory")"; do
        while [[ ! -d $path ]]; do path=$(dirname "$path"); done
        if [[ $path != / ]]; then options+=(--bind "$path"); fi
    done
done
exec "$APPTAINER" --silent exec "${options[@]}" "$NANOGPT_SIF" "$@"
