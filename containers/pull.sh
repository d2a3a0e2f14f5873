#!/usr/bin/env bash
# Fetch an image: containers/pull.sh oras://REGISTRY/NAME:TAG [FILE], or make pull FROM=... Needs curl, and
# Apptainer for the signature, but neither Python nor squashfs-tools.
#
# It lands beside FILE (default: nanogpt.sif) under a temporary name, continues an earlier, interrupted call, and
# gets its name once it is right: it has the sha256 that the registry names, and passes slurm/check_image.sh.
#
#   NANOGPT_SIF_SHA256=HEX   the sha256 that the image must have. A tag can be moved, a hash cannot
#   NANOGPT_SIF_KEY=FILE     whose signature it must have: see slurm/check_image.sh; by default any key in your keyring
#   UNSIGNED=yes             accepts an image without checking its signature
#
# NAME@sha256:HEX names one manifest instead of a tag. If the registry needs a login: apptainer registry login.
set -euo pipefail
root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
from=${1:-} out=${2:-nanogpt.sif}

say() { echo "pull: $*" >&2; }
fail() { # message, exit code
    say "$1"
    exit "${2:-1}"
}

if [[ ! $from =~ ^oras://([^/]+)/([a-z0-9._/-]+)(:([A-Za-z0-9_][A-Za-z0-9._-]*)|@(sha256:[0-9a-f]{64}))?$ ]]; then
    fail "FROM=$from is not the address of an image; expected oras://REGISTRY/NAME:TAG (make pull FROM=oras://...)" 2
fi
host=${BASH_REMATCH[1]} name=${BASH_REMATCH[2]} digest=${BASH_REMATCH[5]:-} reference=${BASH_REMATCH[5]:-${BASH_REMATCH[4]:-latest}}
scheme=https
if [[ $host =~ ^(localhost|127(\.[0-9]+){3})(:[0-9]+)?$ ]]; then scheme=http; fi # as Docker does
for tool in curl sha256sum flock; do
    command -v "$tool" > /dev/null || fail "there is no $tool on this machine; copy an image by other means and verify it" 2
done
directory=$(dirname "$out")
[[ -d $directory && -w $directory ]] || fail "OUT=$out: $directory is not a directory that you can write to" 2
[[ ! -d $out ]] || fail "OUT=$out is a directory; name a file" 2

work=$(mktemp -d)
part='' children=()
clean_up() {
    if ((${#children[@]})); then kill "${children[@]}" 2> /dev/null || true; fi
    if [[ -n $part && ! -s $part ]]; then rm -f "$part"; fi
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

field() { # of JSON without line breaks: the first value of this name
    grep -o "\"$1\" *: *\"\{0,1\}[^\",}]*" | head -n 1 | sed 's/^[^:]*: *"\{0,1\}//' || true
}

# Secrets go to curl through a pipe: other users see the command line.
authorization=
get() { # options of curl
    curl --silent --show-error --location --connect-timeout 30 \
        --config <(if [[ -n $authorization ]]; then printf 'header = "Authorization: %s"\n' "$authorization"; fi) "$@"
}

# User and password of `apptainer registry login`, as base64; empty without a login.
login() {
    local file=${APPTAINER_CONFIGDIR:-${HOME:-}/.apptainer}/docker-config.json
    if [[ -n ${APPTAINER_DOCKER_USERNAME:-} ]]; then
        printf %s "$APPTAINER_DOCKER_USERNAME:${APPTAINER_DOCKER_PASSWORD:-}" | base64 -w 0
    elif [[ -r $file ]]; then
        tr -d ' \t\r\n' < "$file" | grep -o "\"$host\":{[^}]*}" | field auth
    fi
}

authorize() { # by the answer's headers
    local challenge credentials
    challenge=$(tr -d '\r' < "$work/headers" | grep -i '^www-authenticate:' | tail -n 1)
    credentials=$(login)
    parameter() { sed -n "s/.*[ ,]$1=\"\([^\"]*\)\".*/\1/p" <<< "$challenge"; }
    case ${challenge,,} in
        *bearer*)
            if [[ -n $credentials ]]; then authorization="Basic $credentials"; else authorization=; fi
            get --get --data-urlencode "service=$(parameter service)" --data-urlencode "scope=repository:$name:pull" \
                --output "$work/token" "$(parameter realm)" || return 1
            authorization="Bearer $(tr -d '\n' < "$work/token" | field '\(access_\)\{0,1\}token')"
            ;;
        *basic*) authorization="Basic $credentials" ;;
        *) return 1 ;;
    esac
}

manifest_code() {
    get --dump-header "$work/headers" --output "$work/manifest" --write-out '%{http_code}' \
        --header 'Accept: application/vnd.oci.image.manifest.v1+json' "$scheme://$host/v2/$name/manifests/$reference"
}

open() { # the manifest, and whatever the registry needs for it
    local code
    code=$(manifest_code) || fail "$host cannot be reached; check the network and the proxy (HTTPS_PROXY)"
    if [[ $code == 401 ]] && authorize; then code=$(manifest_code); fi
    case $code in
        200) ;;
        401 | 403) fail "$host does not let you read $name ($code). Log in: apptainer registry login --username ME oras://$host" ;;
        404) fail "$host has no $name:$reference" ;;
        *) fail "$host answers $code to the request for $name:$reference" ;;
    esac
}

open
if [[ -n $digest && $digest != "sha256:$(sha256sum < "$work/manifest" | cut -d ' ' -f 1)" ]]; then
    fail "$host sends a manifest other than $digest. Nothing was fetched"
fi
layer=$(tr -d '\n' < "$work/manifest" | sed -n 's/.*"layers" *: *\[ *\({[^}]*\).*/\1/p')
sha256=$(field digest <<< "$layer") size=$(field size <<< "$layer")
sha256=${sha256#sha256:}
[[ $layer == *vnd.sylabs.sif.layer* && $sha256 =~ ^[0-9a-f]{64}$ && $size =~ ^[0-9]+$ ]] ||
    fail "$name:$reference is not an Apptainer image (make push makes one); apptainer pull docker://... fetches others" 2
if [[ -n ${NANOGPT_SIF_SHA256:-} && $sha256 != "${NANOGPT_SIF_SHA256#sha256:}" ]]; then
    fail "$name:$reference is not the image that NANOGPT_SIF_SHA256 names: $sha256. Nothing was fetched" 2
fi

part=$out.part-${sha256:0:16}
exec {lock}>> "$part"
signature() { # of a file that has the right sha256
    if [[ ${UNSIGNED:-} == yes ]]; then return; fi
    NANOGPT_SIF_KEY=${NANOGPT_SIF_KEY:-keyring} "$root/slurm/check_image.sh" "$1" && return
    say "$1 has the right sha256 but not the required signature. Name the key that it should have:" \
        "make pull KEY=PUBLIC.pem; or accept it anyway: make pull UNSIGNED=yes, which does not fetch it again"
    exit 2
}
flock --nonblock "$lock" || (($? != 1)) || fail "another pull is writing $part; wait for it" # other codes: no locks there
have() { stat -c %s "$part"; }
mb() { echo "$(($1 / 1000000)) MB"; }

if [[ -f $out && $(stat -c %s "$out") == "$size" && $(sha256sum < "$out" | cut -d ' ' -f 1) == "$sha256" ]]; then
    signature "$out"
    say "$out is already that image, sha256 $sha256"
    exit
fi
if (($(have) > size)); then : > "$part"; fi
free=$(($(df --output=avail --block-size=1 "$directory" | tail -n 1) + $(have)))
((free >= size)) || fail "$directory has $(mb "$free") free, but the image needs $(mb "$size"); name another place: OUT=FILE"

quiet=(--silent --show-error)
if [[ -t 2 ]]; then quiet=(--progress-bar); fi
((size == 0 || $(have) == size)) || say "$name:$reference, $(mb "$size"), at $(mb "$(have)")"
if [[ ! -t 2 ]]; then
    while sleep 10 {lock}>&- > /dev/null 2>&1; do say "$(mb "$(have)") of $(mb "$size")"; done {lock}>&- &
    children=("$!")
fi
attempts=0
while (($(have) < size)); do
    before=$(have) code=0
    # A connection that brings nothing for a minute is dropped. curl's own --retry would start again where this call did.
    curl "${quiet[@]}" --fail --location --connect-timeout 30 --speed-limit 1000 --speed-time 60 --continue-at - \
        --config <(if [[ -n $authorization ]]; then printf 'header = "Authorization: %s"\n' "$authorization"; fi) \
        --output "$part" "$scheme://$host/v2/$name/blobs/sha256:$sha256" &
    children[1]=$!
    wait "$!" || code=$? # in the background, so that a signal ends both
    if ((code == 33)); then : > "$part"; fi # the server cannot begin in the middle
    if (($(have) > before)); then attempts=0; else attempts=$((attempts + 1)); fi
    if ((code == 0)); then break; fi
    ((code != 23)) || fail "$part cannot be written to: is a quota used up? Free some space, then run the same command: it continues there"
    ((attempts < 5)) || fail "the connection to $host broke at $(mb "$(have)") of $(mb "$size"); run the same command: it continues there"
    say "the connection broke at $(mb "$(have)") of $(mb "$size"); continuing"
    sleep $((attempts * attempts))
    if [[ $(manifest_code) == 401 ]]; then authorize || true; fi # a registry's permission lasts minutes
done

found=$(sha256sum < "$part" | cut -d ' ' -f 1)
if [[ $found != "$sha256" ]]; then
    rm -f "$part"
    fail "what $host sent has sha256 $found, but its manifest says $sha256: damaged or changed. It was removed"
fi
signature "$part"
chmod +x "$part"
mv -f "$part" "$out"
say "$out: $(mb "$size"), sha256 $sha256"
say "to refuse any other in jobs: export NANOGPT_SIF_SHA256=$sha256"
