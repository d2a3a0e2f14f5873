#!/usr/bin/env bash
# How many CPUs a GPU needs: runs on one GPU with fewer and fewer CPUs of this machine, by taskset.
#
#   tests/gpu/cpus_per_gpu.sh DATA [PYTHON]      shards; default .venv/bin/python
#
# For each number of CPUs: a run that compiles everything, then TURNS runs that find it compiled. After each it prints a row:
# CPUs, seconds to the first timed step, milliseconds a step. A lower default is right if its steps take less than
# 1.01 of those on 15, and a longer start costs no more than the shorter wait in the queue saves.
#
# RECIPE   record89 --on 1xh200
# STEPS    100
# CPUS     15 8 4
# TURNS    1
set -euo pipefail
data=${1:?usage: cpus_per_gpu.sh DATA [PYTHON]}
python=${2:-.venv/bin/python}
read -r -a recipe <<< "${RECIPE:-record89 --on 1xh200}"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH=$here

row='import sys
from pathlib import Path
from nanogpt.runs.listing import run_row
from nanogpt.runs.record import read_record
path = next(Path(sys.argv[1]).glob("*/record.json")).parent
start = read_record(path).starts[-1]
print(f"| {sys.argv[2]} | {(start.clock_started - start.time).total_seconds():.1f} | {run_row(path).ms_per_step:.2f} |")'

echo "| CPUs | start, s | ms/step |"
echo "| --- | --- | --- |"
for cpus in ${CPUS:-15 8 4}; do
    for turn in compiling $(seq "${TURNS:-1}"); do
        NANOGPT_CACHE=$out/cache-$cpus taskset --cpu-list "0-$((cpus - 1))" "$python" -m nanogpt train "${recipe[@]}" \
            --steps "${STEPS:-100}" --data "$data" --out "$out/$cpus-$turn" > "$out/log" 2>&1 || { cat "$out/log" && exit 1; }
        "$python" -c "$row" "$out/$cpus-$turn" "$cpus, $turn"
    done
done
