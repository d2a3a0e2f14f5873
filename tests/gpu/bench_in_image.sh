#!/usr/bin/env bash
# Compare the step benchmark inside Apptainer with --nv to the same code bare, on one machine with a GPU.
#
#   tests/gpu/bench_in_image.sh IMAGE [PYTHON]
#
# IMAGE is made by `make sif`, or has another Python environment bound in (docs/container.md); PYTHON is the
# bare environment's, with the same PyTorch (default: .venv/bin/python). Runs the benchmark each way in turn, prints
# the ratios after each turn, and fails if in any stage the median step inside takes more than 1.02 of the bare one.
#
# RECIPE             1xh200
# BENCH_OPTIONS      --steps 20 --warmup 6; for example --set runtime.attention=varlen
# TURNS              3, with one run each way
# LIMIT_S            none; seconds: no turn is started that would not end by then
# INSIDE             python; the image's
# APPTAINER_OPTIONS  none; for example --userns --bind /opt/torch
# NANOGPT_CACHE      a directory for this call; its compiled code serves both ways if C library and Python are alike
set -euo pipefail
image=${1:?usage: bench_in_image.sh IMAGE [PYTHON]}
bare=${2:-.venv/bin/python}
inside=${INSIDE:-python}
turns=${TURNS:-3}
limit=${LIMIT_S:-0}
read -r -a options <<< "${APPTAINER_OPTIONS:-}"
read -r -a bench <<< "-m nanogpt bench step ${RECIPE:-1xh200} ${BENCH_OPTIONS:---steps 20 --warmup 6}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export NANOGPT_CACHE=${NANOGPT_CACHE:-$out/cache}
binds="$here,$out"
if [[ $NANOGPT_CACHE != off ]]; then
    mkdir -p "$NANOGPT_CACHE"
    binds+=",$NANOGPT_CACHE"
fi
cd "$here"

ratios() {
    "$bare" - "$out" << 'PYTHON'
import json, statistics, sys
from pathlib import Path

def times(which):
    runs = [json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob(f"{which}-*.json"))]
    return [[stage["median_ms"] for stage in run["stages"]] for run in runs]

worst = 0.0
for index, stage in enumerate(zip(zip(*times("bare")), zip(*times("inside"))), start=1):
    bare, inside = map(statistics.median, stage)
    worst = max(worst, inside / bare)
    each = "; ".join(" ".join(f"{time:.2f}" for time in side) for side in stage)
    print(f"stage {index}: bare {bare:.2f} ms, inside {inside:.2f} ms, ratio {inside / bare:.4f} (each run: {each})")
print("passed" if worst <= 1.02 else "failed", f"worst ratio {worst:.4f}, allowed 1.02")
sys.exit(worst > 1.02)
PYTHON
}

run() { # what it is, then the command; sets `took`, in seconds
    local name="turn $turn of $turns: $1" started=$SECONDS
    shift
    echo "$name" >&2
    "$@"
    took=$((SECONDS - started))
    echo "$name: took $took s" >&2
}

failed=0
for ((turn = 1; turn <= turns; turn++)); do
    if ((turn > 1 && limit > 0 && SECONDS + turn_took > limit)); then
        echo "ends after $((turn - 1)) turns of $turns: another would not end within $limit s" >&2
        break
    fi
    run bare "$bare" "${bench[@]}" --out "$out/bare-$turn.json"
    turn_took=$took
    NANOGPT_SRC=$here run inside apptainer exec --nv --bind "$binds" "${options[@]}" "$image" \
        "$inside" "${bench[@]}" --out "$out/inside-$turn.json"
    # The first bare run compiles; the next one takes as long as the one inside.
    turn_took=$((took + (turn == 1 ? took : turn_took)))
    failed=0
    ratios || failed=$?
done
exit "$failed"
