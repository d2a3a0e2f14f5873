"""Asks for a kernel that nobody, a living, a dead and a forgotten process has claimed.

python tests/cache/claimed_kernels.py DIR
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from nanogpt.cache.compiled_once import LONGEST_S, CompiledOnce

os.environ["TRITON_CACHE_DIR"] = sys.argv[1]


def claim_of(key: str) -> Path:
    return Path(sys.argv[1], key, ".claim")


first, other = CompiledOnce("KERNEL"), CompiledOnce("KERNEL")
assert first.get_group("kernel.json") is None
assert claim_of("KERNEL").read_text() == str(os.getpid())
found: list[dict[str, str] | None] = []
waiting = threading.Thread(target=lambda: found.append(other.get_group("kernel.json")))
waiting.start()
time.sleep(0.2)
assert not found, "it waits"
group = {name: first.put(b"code", name) for name in ("kernel.json", "kernel.cubin")}
time.sleep(0.1)
assert not found, "for all of it"
first.put_group("kernel.json", group)
waiting.join(10)
assert found == [group] and not claim_of("KERNEL").exists()
assert first.get_group("kernel.json") == group and not claim_of("KERNEL").exists()

dead = subprocess.Popen([sys.executable, "-c", ""])
dead.wait()
for key, process, age in (("DEAD", dead.pid, 0.0), ("FORGOTTEN", os.getpid(), LONGEST_S + 1)):
    cache = CompiledOnce(key)
    claim_of(key).write_text(str(process))
    then = time.time() - age
    os.utime(claim_of(key), (then, then))
    assert cache.get_group("kernel.json") is None, key
    cache.put_group("kernel.json", {"kernel.json": cache.put(b"{}", "kernel.json")})
    assert not claim_of(key).exists() and cache.get_group("kernel.json"), key

cache = CompiledOnce("LATE")
look = cache._is_awaited


def left_meanwhile() -> bool:
    """Another process leaves the kernel between this one's look and its claim."""
    CompiledOnce("LATE").put_group("kernel.json", {"kernel.json": cache.put(b"{}", "kernel.json")})
    return look()


cache._is_awaited = left_meanwhile  # type: ignore[method-assign]
assert cache.get_group("kernel.json") and not claim_of("LATE").exists()
