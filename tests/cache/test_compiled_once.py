"""Kernels that several processes ask Triton for at once."""

from __future__ import annotations

from pathlib import Path

from triton_interpreter import needs_triton, run_with_triton

HERE = Path(__file__).parent
MANAGER = "nanogpt.cache.compiled_once:CompiledOnce"


@needs_triton
def test_one_process_compiles_a_kernel_for_all(tmp_path: Path) -> None:
    compiled = run_with_triton(str(HERE / "kernel_for_all.py"), str(tmp_path), "4", "4", TRITON_CACHE_MANAGER=MANAGER)
    assert compiled.split() == ["4"]


@needs_triton
def test_a_kernel_is_waited_for_only_while_a_process_compiles_it(tmp_path: Path) -> None:
    run_with_triton(str(HERE / "claimed_kernels.py"), str(tmp_path))
