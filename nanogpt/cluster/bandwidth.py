"""How fast the GPUs of a node copy to one another: `python -m nanogpt.cluster.bandwidth`.

Each GPU sends to the next, one pair at a time, by peer-to-peer copies. Prints a JSON list of GB/s, one way.
It is a separate process, so that no CUDA context is left when the run begins.
"""

from __future__ import annotations

import json
import subprocess
import sys

from nanogpt.errors import RunError

COPY_BYTES = 256 << 20
COPIES = 8
TIMEOUT_S = 60.0


def measure() -> list[float]:
    """GB/s from each GPU to the next, the last to the first; needs two CUDA devices."""
    import torch

    count = torch.cuda.device_count()
    sources = [torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{index}") for index in range(count)]
    rates = []
    for index, source in enumerate(sources):
        target = sources[(index + 1) % count]
        best = 0.0
        for _ in range(3):  # the first one sets up peer access
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(index):
                torch.cuda.synchronize(target.device)
                start.record()
                for _ in range(COPIES):
                    target.copy_(source, non_blocking=True)
                end.record()
                end.synchronize()
            best = max(best, COPIES * COPY_BYTES / (start.elapsed_time(end) * 1e6))
        rates.append(best)
    return rates


def measure_apart() -> list[float]:
    """`measure` in a separate process. Raises `RunError` with its last line if it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "nanogpt.cluster.bandwidth"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"copies between the GPUs took longer than {TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise RunError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    rates: list[float] = json.loads(done.stdout)
    return rates


if __name__ == "__main__":
    print(json.dumps(measure()))
