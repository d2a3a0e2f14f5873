#!/usr/bin/env bash
# Runs a command inside the image: slurm/in_image.sh COMMAND [ARGUMENT]...
#
#   NANOGPT_SIF=FILE   the image (default: nanogpt.sif here, or beside the project's folder slurm/)
#   NANOGPT_SITE=FILE  is sourced first, for what a site needs: module load apptainer, export HTTPS_PROXY=..., ...
#   NANOGPT_SIF_SHA256, NANOGPT_SIF_KEY   refuse any other image, or one without that signature: see check_image.sh
#   APPTAINER=COMMAND  default: apptainer, or singularity where there is no apptainer
#   APPTAINER_BIND=... more directories to show inside, as Apptainer knows it
#
# Of the environment only what PASS names goes in, so that a conda environment or modules of yours change nothing.
set -euo pipefail

say() { echo "in_image.sh on $(hostname): $*" >&2; }

# A site's file is written for a login shell: nothing in it may end this script without a word, change the directory or
# write into the command's output.
if [[ -n ${NANOGPT_SITE:-} ]]; then
    nanogpt_site=$NANOGPT_SITE nanogpt_directory=$PWD nanogpt_failed=
    if [[ ! -f $nanogpt_site || ! -r $nanogpt_site ]]; then
        say "NANOGPT_SITE=$nanogpt_site: no such file, or not readable. Name one that this machine can read, or unset it"
        exit 2
    fi
    if [[ $nanogpt_site != */* ]]; then nanogpt_site=./$nanogpt_site; fi # or PATH is searched
    nanogpt_site_failed() { # exit code, file, line, command
        if [[ $2 != "$nanogpt_site" ]]; then return; fi
        nanogpt_failed=yes
        say "NANOGPT_SITE=$nanogpt_site, line $3: \`$4\` failed (exit code $1); going on without it"
    }
    nanogpt_no_module() {
        say "there is no command 'module' here. Put the line that defines it before its first use in $nanogpt_site:" \
            ". DIRECTORY/init/bash, where a login shell's \$LMOD_PKG or \$MODULESHOME names the directory"
        return 127
    }
    set +eu +o pipefail
    if grep -Eqw 'module|ml' "$nanogpt_site" && ! type module > /dev/null 2>&1; then # as in a batch job's shell
        for nanogpt_init in ${LMOD_PKG:+"$LMOD_PKG/init/bash"} ${MODULESHOME:+"$MODULESHOME/init/bash"} \
            /etc/profile.d/{modules,lmod,z00_lmod}.sh /usr/share/{lmod/lmod,modules,Modules}/init/bash; do
            # shellcheck disable=SC1090
            if [[ -r $nanogpt_init ]]; then . "$nanogpt_init" >&2; fi
            if type module > /dev/null 2>&1; then break; fi
        done
        type module > /dev/null 2>&1 || module() { nanogpt_no_module; }
        type ml > /dev/null 2>&1 || ml() { module "$@"; }
    fi
    trap 'say "NANOGPT_SITE=$nanogpt_site has ended the script (exit code $?): take its \`exit\` out"; exit 2' EXIT
    trap 'nanogpt_site_failed "$?" "${BASH_SOURCE[0]}" "$LINENO" "$BASH_COMMAND"' ERR
    # shellcheck disable=SC1090
    . "$nanogpt_site" >&2
    nanogpt_code=$?
    trap - ERR EXIT
    if ((nanogpt_code)) && [[ -z $nanogpt_failed ]]; then
        say "NANOGPT_SITE=$nanogpt_site: ended early (exit code $nanogpt_code); what it says is above. Going on"
    fi
    unset IFS CDPATH
    set -euo pipefail
    cd "$nanogpt_directory"
fi

PASS='^(SLURM|SLURMD|SBATCH|NCCL|NANOGPT|NVIDIA|CUDA|OMP|TORCH|PYTORCH|TRITON|UCX|GLOO|WANDB|HF)_|^(FINEWEB_CHUNKS|GPU_TYPE|NUM_GPUS|GPU_DEVICE_ORDINAL|USER|LOGNAME|TERM|COLUMNS|LINES|TZ|NO_COLOR|TMPDIR|(https?|no|all)_proxy|(HTTPS?|NO|ALL)_PROXY|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE)$'
# Directories of the site that recipes and NANOGPT_* may name, as $SCRATCH/shards: shown inside under the same names.
PLACES='^[A-Z]*(SCRATCH|WORK|WORKDIR|PROJECT)$'
root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

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
    say "there is no image $sif. Make one with 'make sif' in $root, or name one that this machine can read:" \
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

# Apptainer shows home, /tmp and the current directory; the rest is to be named. A directory that is still to be made
# is shown by the nearest one that exists, a link by what it leads to as well.
declare -A shown=()
bind() {
    if [[ -z ${shown[$1]:-} && $1 != / ]]; then options+=(--bind "$1"); fi
    shown[$1]=yes
}
show() {
    local path
    for path in "$(realpath -ms -- "$1")" "$(realpath -m -- "$1")"; do
        while [[ ! -d $path ]]; do path=$(dirname "$path"); done
        bind "$path"
    done
}
# The directories that links in a directory lead to, such as shards of a common store; one link may lead to another.
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

data=("${NANOGPT_DATA:-data}" "${NANOGPT_DATA:-data/fineweb10B}")
for ((index = 1; index <= $#; index++)); do
    case ${!index} in
        --data | --dir) if ((index < $#)); then next=$((index + 1)) && data+=("${!next}"); fi ;;
        --data=* | --dir=*) data+=("${!index#*=}") ;;
    esac
done
for directory in "$PWD" "$root" "${data[@]}" "${NANOGPT_RUNS:-runs}" "${NANOGPT_CACHE:-}" \
    "${NANOGPT_STAGE:-}" "${NANOGPT_RELAY:-}" "${NANOGPT_SRC:-}" "${NANOGPT_FLASH_ATTN:-}" "$(dirname "$NANOGPT_SIF")"; do
    if [[ -n $directory ]]; then show "$directory"; fi
done
for directory in "${data[@]}"; do show_targets "$directory"; done
for file in "${TMPDIR:-}" "${HF_HOME:-}" "${HF_TOKEN_PATH:-}" "${SSL_CERT_FILE:-}" "${SSL_CERT_DIR:-}" \
    "${REQUESTS_CA_BUNDLE:-}" "${CURL_CA_BUNDLE:-}" "${places[@]}"; do
    if [[ -d $file ]]; then
        show "$file" && show_targets "$file"
    elif [[ -e $file ]]; then
        bind "$(realpath -s -- "$file")"
    fi
done
exec "$APPTAINER" --silent exec "${options[@]}" "$NANOGPT_SIF" "$@"
