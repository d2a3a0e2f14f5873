#!/usr/bin/env bash
# Push an image to a registry: containers/push.sh FILE oras://REGISTRY/NAME:TAG, or make push TO=...
#
# The image must be signed (make sign), unless UNSIGNED=yes. If the registry needs a login: apptainer registry login.
set -euo pipefail
root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
sif=$1 to=${2:-}
if [[ ! $to =~ ^oras://([^/]+)/[a-z0-9._/-]+:[A-Za-z0-9_][A-Za-z0-9._-]*$ ]]; then
    echo "push: TO=$to is not the address of an image; expected oras://REGISTRY/NAME:TAG (make push TO=oras://...)" >&2
    exit 2
fi
host=${BASH_REMATCH[1]}
if [[ ! -f $sif ]]; then
    echo "push: there is no image $sif; make sif builds it, SIF=FILE names another" >&2
    exit 2
fi
if [[ ${UNSIGNED:-} != yes ]]; then
    NANOGPT_SIF_KEY=${NANOGPT_SIF_KEY:-keyring} "$root/slurm/check_image.sh" "$sif" || {
        echo "push: make sign signs it, with your key or KEY=PRIVATE.pem; UNSIGNED=yes pushes it as it is" >&2
        exit 2
    }
fi
options=()
if [[ $host =~ ^(localhost|127(\.[0-9]+){3})(:[0-9]+)?$ ]]; then options+=(--no-https); fi # as Docker does
"${APPTAINER:-apptainer}" push "${options[@]}" "$sif" "$to"
echo "push: sha256 $(sha256sum < "$sif" | cut -d ' ' -f 1)" >&2
echo "push: to fetch it: make pull FROM=$to" >&2
