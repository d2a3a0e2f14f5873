#!/usr/bin/env bash
# Checks that an image is the intended one: slurm/check_image.sh FILE. It is checked from outside, before anything
# in it runs. Nothing is checked unless a variable asks for it; a refusal ends with exit code 2.
#
#   NANOGPT_SIF_SHA256=HEX   the file's sha256
#   NANOGPT_SIF_KEY=FILE     it is signed with the key in this public key file (PEM), or, if the value is keyring,
#                            with a key in your Apptainer keyring (apptainer key import FILE)
set -euo pipefail
sif=$1

refuse() {
    echo "check_image.sh on $(hostname): $sif: $*. It is not run" >&2
    exit 2
}

if [[ -d $sif && -n ${NANOGPT_SIF_SHA256:-}${NANOGPT_SIF_KEY:-} ]]; then
    refuse "an unpacked image, of which neither sha256 nor signature can be checked; name a .sif, or unset" \
        "NANOGPT_SIF_SHA256 and NANOGPT_SIF_KEY"
fi
if [[ -n ${NANOGPT_SIF_SHA256:-} ]]; then
    read -r found _ < <(sha256sum < "$sif")
    wanted=${NANOGPT_SIF_SHA256#sha256:}
    if [[ $found != "${wanted,,}" ]]; then
        refuse "its sha256 is $found, and NANOGPT_SIF_SHA256 says $wanted; fetch that one (make pull), or correct the variable"
    fi
fi
if [[ -n ${NANOGPT_SIF_KEY:-} ]]; then
    if [[ $NANOGPT_SIF_KEY == keyring ]]; then
        key=(--local)
    elif [[ -r $NANOGPT_SIF_KEY ]]; then
        key=(--key "$NANOGPT_SIF_KEY")
    else
        refuse "NANOGPT_SIF_KEY=$NANOGPT_SIF_KEY names no file that can be read; expected a public key (PEM), or keyring"
    fi
    apptainer=${APPTAINER:-$(command -v apptainer || command -v singularity)} ||
        refuse "there is no apptainer to check its signature with; module load apptainer"
    if ! said=$("$apptainer" verify "${key[@]}" "$sif" 2>&1); then
        refuse "no signature of NANOGPT_SIF_KEY=$NANOGPT_SIF_KEY: $(sed -n 's/^FATAL: *//p' <<< "$said" | head -n 1)"
    fi
fi
