#!/usr/bin/env bash
# The step benchmark inside Apptainer with --nv against the same code bare, on one machine with a GPU.
#
#   tests/gpu/bench_in_image.sh IMAGE [PYTHON]
#
# IMAGE is an image of `make sif`, or of another Python environment that is bound in (see below); PYTHON is the bare
# environment's, with the same PyTorch (default: .venv/bin/python). Runs the benchmark three times each way, in turn,
# and fails where the median step inside takes more than 1.02 of the bare one, in any stage. 10 minutes on an H200.
#
# RECIPE, STAGES and APPTAINER_OPTIONS change what runs: a thin image that has no PyTorch of its own takes the machine's,
#   APPTAINER_OPTIONS="--bind /opt/torch,/usr/bin/python3.12,/usr/lib/python3.12" INSIDE=/opt/torch/.venv/bin/python ...
# How to carry Apptainer to a machine without it: docs/container.md.
set -euo pipefail
image=${1:?usage: bench_in_image.sh IMAGE [PYTHON]}
bare=${2:-.venv/bin/python}
inside=${INSIDE:-python}
recipe=${RECIPE:-1xh200}
read -r -a options <<< "${APPTAINER_OPTIONS:-}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cd "$here"

bench=(-m nanogpt bench step "$recipe" --steps 20 --warmup 6)
for turn in 1 2 3; do
    echo "turn $turn of 3: bare" >&2
    "$bare" "${bench[@]}" --out "$out/bare-$turn.json"
    echo "turn $turn of 3: inside" >&2
    NANOGPT_SRC=$here apptainer exec --nv --bind "$here,$out" "${options[@]}" "$image" \
        "$inside" "${bench[@]}" --out "$out/inside-$turn.json"
done

"$bare" - "$out" << 'PYTHON'
import json, statistics, sys
from pathlib import Path

def times(which):
    runs = [json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob(f"{which}-*.json"))]
    return [statistics.median(values) for values in zip(*[[stage["median_ms"] for stage in run["stages"]] for run in runs])]

worst = 0.0
for index, (bare, inside) in enumerate(zip(times("bare"), times("inside")), start=1):
    worst = max(worst, inside / bare)
    print(f"stage {index}: bare {bare:.1f} ms, inside {inside:.1f} ms, ratio {inside / bare:.4f}")
print("passed" if worst <= 1.02 else "failed", f"worst ratio {worst:.4f}, allowed 1.02")
sys.exit(worst > 1.02)
PYTHON
