#!/usr/bin/env bash
# Runs a command inside the image: slurm/in_image.sh COMMAND [ARGUMENT]...
#
#   NANOGPT_SIF=FILE   the image (default: nanogpt.sif here, or beside the project's folder slurm/)
#   NANOGPT_SITE=FILE  sourced first, for what a site needs: module load apptainer, export HTTPS_PROXY=..., ...
#                      (default: site.sh beside this script, if there is one; see sites/)
#   NANOGPT_SIF_SHA256, NANOGPT_SIF_KEY   refuse any other image, or one without that signature: see check_image.sh
#   APPTAINER=COMMAND  default: apptainer, or singularity if there is no apptainer
#   APPTAINER_BIND=... further directories to bind, in Apptainer's syntax
#
# Only the variables in PASS go inside, so that your conda environment or modules change nothing.
set -euo pipefail

say() { echo "in_image.sh on $(hostname): $*" >&2; }

here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/use_site.sh
. "$here/use_site.sh"
use_site "$here"

PASS='^(SLURM|SLURMD|SBATCH|NCCL|NANOGPT|NVIDIA|CUDA|OMP|TORCH|PYTORCH|TRITON|UCX|GLOO|WANDB|TRACKIO|HF)_|^(FINEWEB_CHUNKS|GPU_TYPE|NUM_GPUS|GPU_DEVICE_ORDINAL|USER|LOGNAME|TERM|COLUMNS|LINES|TZ|NO_COLOR|TMPDIR|(https?|no|all)_proxy|(HTTPS?|NO|ALL)_PROXY|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE)$'
# The site's directories that recipes and NANOGPT_* may name, as in $SCRATCH/shards: bound under the same names.
PLACES='^[A-Z]*(SCRATCH|WORK|WORKDIR|PROJECT)$'
root=${here%/*}

if [[ -n ${TMPDIR:-} && ! (-d $TMPDIR && -w $TMPDIR) ]]; then # often the login node's, which a job has brought along
    say "TMPDIR=$TMPDIR: no directory here that can be written to; /tmp is used. export TMPDIR=one that nodes have"
    export TMPDIR=/tmp
fi

if [[ -z ${APPTAINER:-} ]]; then
    APPTAINER=$(command -v apptainer || command -v singularity) || {
        say "neither apptainer nor singularity is on PATH. If it comes as a module, put 'module load apptainer' in a" \
            "file and export NANOGPT_SITE=that file; or export APPTAINER=/path/to/it"
        exit 2
    }
fi
sif=${NANOGPT_SIF:-nanogpt.sif}
if [[ -z ${NANOGPT_SIF:-} && ! -e $sif ]]; then sif=$root/nanogpt.sif; fi
if [[ ! -r $sif ]]; then
    say "there is no image $sif. Make one with 'make sif' in $root, fetch one with 'make pull', or name one that this machine can read:" \
        "export NANOGPT_SIF=/path/to/nanogpt.sif"
    exit 2
fi
if [[ -n ${NANOGPT_STAGED_BELOW:-} ]]; then # a copy in a place that others write to: theirs is not run
    part=$sif
    while [[ $part == "$NANOGPT_STAGED_BELOW"/* ]]; do
        if [[ ! -O $part || -h $part || -n $(find "$part" -maxdepth 0 -perm /022) ]]; then
            say "NANOGPT_STAGE: $part is a link, another's, or open to others: not run. Name a directory of your own" \
                "on the node's disk, or unset NANOGPT_STAGE"
            exit 2
        fi
        part=${part%/*}
    done
fi

NANOGPT_SIF=$(realpath "$sif")
export NANOGPT_SIF APPTAINER
"$root/slurm/check_image.sh" "$NANOGPT_SIF" || exit

prefix=APPTAINERENV_
places=()
if [[ ${APPTAINER##*/} == singularity* ]]; then prefix=SINGULARITYENV_; fi
while IFS= read -r name; do
    if [[ $name =~ $PASS ]]; then export "$prefix$name=${!name}"; fi
    if [[ $name =~ $PLACES && ${!name} == /* ]]; then
        export "$prefix$name=${!name}"
        places+=("${!name}")
    fi
done < <(compgen -e)
if [[ -n ${NANOGPT_SRC:-} ]]; then export "${prefix}PYTHONPATH=$NANOGPT_SRC"; fi

options=(--cleanenv --pwd "$PWD")
if [[ -e /dev/nvidiactl ]]; then options+=(--nv); fi
# Apptainer takes home from the user database, where it may be another directory, or the same under another name.
if [[ -d ${HOME:-} && $HOME != *:* && $HOME != "$(getent passwd "$EUID" | cut -d : -f 6)" ]]; then
    options+=(--home "$HOME")
fi

# Apptainer binds home, /tmp and the current directory; the rest must be named. For a directory that does not exist yet,
# its nearest existing parent is bound, and for a link also its target.
declare -A shown=()
bind() {
    local quoted=${1//\"/\"\"}
    if [[ -n ${shown[$1]:-} || $1 == / ]]; then return; fi
    shown[$1]=yes
    case $1 in
        *[:,\"]*) options+=(--mount "type=bind,\"src=$quoted\",\"dst=$quoted\"") ;; # which mean something in --bind
        *) options+=(--bind "$1") ;;
    esac
}
show() {
    local path
    for path in "$(realpath -ms -- "$1")" "$(realpath -m -- "$1")"; do
        while [[ ! -d $path ]]; do path=$(dirname "$path"); done
        bind "$path"
    done
}
# The directories that links in a directory lead to, such as shards in a common store; one link may lead to another.
declare -A led=()
show_targets() {
    local target base hops
    while IFS= read -r -d '' target; do
        base=$1
        for ((hops = 0; hops < 40; hops++)); do
            if [[ $target != /* ]]; then target=$base/$target; fi
            base=${target%/*}/
            if [[ ! -d $base ]]; then break; fi
            if [[ -z ${led[$base]:-} ]]; then show "$base"; fi
            led[$base]=yes
            if [[ ! -h $target ]]; then break; fi
            target=$(readlink -- "$target")
        done
    done < <(find -H "$1/" -maxdepth 1 -type l -printf '%l\0' 2> /dev/null)
}

# What arguments name is treated like what variables name: values of options, and existing paths. A run also leads to its shards.
data=("${NANOGPT_DATA:-data}" "${NANOGPT_DATA:-data/fineweb10B}") named=()
SYSTEM='^/(proc|sys|dev|etc|run|bin|sbin|lib|lib64|usr|opt|var)?$|^/(proc|sys|dev|etc|run|usr/(bin|lib|share))/'
name() { # a value; whether it may be still to be made
    if [[ -z $1 || $(realpath -m -- "$1") =~ $SYSTEM ]]; then return; fi
    if [[ -n ${2:-} || -e $1 || -h $1 ]]; then named+=("$1"); fi
    if [[ -f $1/record.json ]]; then
        data+=("$(sed -n '/^ *"data": {/,/}/s/^ *"directory": "\(.*\)",\{0,1\}$/\1/p' "$1/record.json" | head -n 1)")
    fi
}
if [[ ${1:-} =~ ^(nanogpt|prep-fineweb|prep-text|build-flash-attn)$ ]]; then
    for ((index = 2; index <= $#; index++)); do
        word=${!index} before=$((index - 1))
        case $word in
            --data=* | --dir=*) data+=("${word#*=}") ;;
            --out=* | --runs=* | --resume=* | --traces=*) name "${word#*=}" yes ;;
            --*=*) name "${word#*=}" ;;
            -*) ;;
            *)
                case ${!before} in
                    --data | --dir) data+=("$word") ;;
                    --out | --runs | --resume | --traces) name "$word" yes ;;
                    *) name "$word" ;;
                esac
                ;;
        esac
    done
fi
for directory in "$PWD" "$root" "${data[@]}" "${named[@]}" "${NANOGPT_RUNS:-runs}" "${NANOGPT_CACHE:-}" \
    "${NANOGPT_STAGE:-}" "${NANOGPT_RELAY:-}" "${NANOGPT_SRC:-}" "${NANOGPT_FLASH_ATTN:-}" "${NANOGPT_EXTRA:-}" \
    "$(dirname "$NANOGPT_SIF")"; do
    if [[ -n $directory ]]; then show "$directory"; fi
done
for directory in "${data[@]}"; do if [[ -n $directory ]]; then show_targets "$directory"; fi; done
for file in "${TMPDIR:-}" "${HF_HOME:-}" "${HF_TOKEN_PATH:-}" "${SSL_CERT_FILE:-}" "${SSL_CERT_DIR:-}" \
    "${REQUESTS_CA_BUNDLE:-}" "${CURL_CA_BUNDLE:-}" "${places[@]}"; do
    if [[ -d $file ]]; then
        show "$file" && show_targets "$file"
    elif [[ -e $file ]]; then
        bind "$(realpath -s -- "$file")"
    fi
done
exec "$APPTAINER" --silent exec "${options[@]}" "$NANOGPT_SIF" "$@"
