#!/usr/bin/env bash
# Stands in for Apptainer where there is none: `exec` runs the command on this machine, with the environment that
# Apptainer would give it. The image may be any file. FAKE_IMAGE_PATH is the PATH "inside".
set -euo pipefail
[[ $1 == --silent ]] && shift
[[ $1 == exec ]] && shift
while [[ $1 == --* ]]; do
    case $1 in
        --pwd) cd "$2" && shift 2 ;;
        --mount | --home) shift 2 ;;
        --bind) [[ -e $2 ]] && shift 2 ;;
        --cleanenv | --nv) shift ;;
        *) echo "fake apptainer: unknown option $1" >&2 && exit 1 ;;
    esac
done
image=$1
shift
inside=("PATH=${FAKE_IMAGE_PATH:?}" "HOME=$HOME" "APPTAINER_CONTAINER=$image")
while IFS= read -r name; do
    if [[ $name == APPTAINERENV_* ]]; then inside+=("${name#APPTAINERENV_}=${!name}"); fi
done < <(compgen -e)
exec env -i "${inside[@]}" "$@"
