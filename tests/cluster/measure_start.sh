#!/usr/bin/env bash
# How long `import torch` takes from an image, against the same files unpacked in a directory, on this machine.
#
#   tests/cluster/measure_start.sh IMAGE [ARGUMENTS OF MKSQUASHFS]...
#
# Prints a row per way of packing: size, time to pack, one import, eight at once in one container; medians of five and of
# three, with a warm page cache. Each further argument repacks the same files, for example "-comp lz4" "-comp zstd -b 1M".
# Needs a quiet machine, and space for the files (6 GB) and each packing in TMPDIR. Run it as an ordinary user.
set -euo pipefail
image=${1:?usage: measure_start.sh IMAGE [ARGUMENTS OF MKSQUASHFS]...}
shift
work=$(mktemp -d)
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
eight='import subprocess, sys
started = [subprocess.Popen([sys.executable, "-c", "import torch"]) for _ in range(8)]
sys.exit(max(process.wait() for process in started))'

median() { sort -n | sed -n "$((($1 + 1) / 2))p"; }

seconds() {
    local start=$EPOCHREALTIME
    "$@" > /dev/null 2>&1
    awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.2f\n", b - a }'
}

row() { # name, what apptainer runs, seconds to pack
    local one many
    seconds apptainer exec "$2" python -c 'import torch' > /dev/null
    one=$(for _ in 1 2 3 4 5; do seconds apptainer exec "$2" python -c 'import torch'; done | median 5)
    many=$(for _ in 1 2 3; do seconds apptainer exec "$2" python -c "$eight"; done | median 3)
    echo "| $1 | $(du -sm "$2" | cut -f 1) MB | $3 | $one s | $many s |"
}

echo "| packing | size | time to pack | import torch | eight at once |"
echo "| --- | --- | --- | --- | --- |"
row "the image" "$image" ""
apptainer build --sandbox "$work/tree" "$image" > /dev/null 2>&1
row "unpacked" "$work/tree" ""
for packing in "$@"; do
    read -r -a options <<< "$packing"
    took=$(seconds mksquashfs "$work/tree" "$work/packed.sqfs" -noappend -no-progress -quiet -no-xattrs "${options[@]}")
    row "\`$packing\`" "$work/packed.sqfs" "$took s"
    rm "$work/packed.sqfs"
done
