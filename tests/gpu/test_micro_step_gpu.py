"""On a GPU: rows added to tables by the Triton kernels, and micro-steps that are captured as CUDA graphs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_specs import relative_error
from tiny_runs import GPU_SIZES, losses, make_data, newest_state, tiny_spec, train

from nanogpt.kernels.row_gradients import RowOrder, add_rows, row_order

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

VOCAB, WIDTH = 50_304, 768
ROWS = {
    "as in text": lambda: (VOCAB ** torch.rand(49_152)).long().clamp(max=VOCAB - 1),
    "one row": lambda: torch.full((16_384,), 7),
    "each row once": lambda: torch.randperm(VOCAB)[:16_384],
    "few, odd number": lambda: torch.randint(3, (333,)),
    "one token": lambda: torch.tensor([VOCAB - 1]),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_against_fp64(case):
    torch.manual_seed(0)
    rows = ROWS[case]().cuda()
    table, grads = (torch.randn(n, WIDTH, device="cuda").bfloat16() for n in (VOCAB, len(rows)))
    expected = table.double().index_add(0, rows, grads.double())
    found = []
    for _ in range(2):
        whole = torch.full((3 * VOCAB, WIDTH), 9.0, device="cuda", dtype=torch.bfloat16)  # poison around it
        part = whole[VOCAB : 2 * VOCAB]
        part.copy_(table)
        add_rows(part, row_order(rows.int()), grads)
        assert (whole[:VOCAB] == 9).all() and (whole[2 * VOCAB :] == 9).all()
        found.append(part.clone())
    assert torch.equal(*found), "the same every time"
    touched = torch.zeros(VOCAB, dtype=torch.bool, device="cuda").index_fill_(0, rows, True)
    assert torch.equal(found[0][~touched], table[~touched])
    error, rounding = relative_error(found[0], expected), relative_error(expected.bfloat16(), expected)
    print(f"{case}: error {error:.2e}, of rounding alone {rounding:.2e}")
    assert error < 1.01 * rounding + 1e-5


def test_rows_in_a_captured_graph():
    table = torch.zeros(100, 64, device="cuda", dtype=torch.bfloat16)
    rows, grads = torch.zeros(500, dtype=torch.int32, device="cuda"), torch.ones_like(table[:1]).repeat(500, 1)
    add_rows(table, row_order(rows), grads)
    table.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        order: RowOrder = row_order(rows)
        add_rows(table, order, grads)
    rows.copy_(torch.arange(500) % 100)
    graph.replay()
    assert (table == 5).all()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("tiny") / "data", (200_000,), val_tokens=20_000)


ONE = "hardware={gpu: h100, gpus_per_node: 1}"


@pytest.mark.long
def test_captured_micro_steps_compute_what_others_do(data: Path, tmp_path: Path) -> None:
    """A whole run, with warm-up, stages, YaRN, the head's split; and one that is resumed in the middle of a stage."""
    runtime = "runtime={{dtype: bf16, compile: 'on', attention: varlen, cuda_graphs: {}}}"
    for name in ("off", "auto"):
        train(tiny_spec(*GPU_SIZES, ONE, runtime.format(name)), data, tmp_path / name)
    logs = {name: (tmp_path / name / "log.txt").read_text().splitlines() for name in ("off", "auto")}
    said = {name: [line for line in lines if line.startswith("CUDA graphs:")] for name, lines in logs.items()}
    captured = ["CUDA graphs: 4 micro-steps captured", "CUDA graphs: updates of banks, 2 captured"]
    assert said == {"off": [], "auto": captured}
    off, auto = losses(tmp_path / "off"), losses(tmp_path / "auto")
    assert auto[0] == pytest.approx(off[0], abs=5e-3)
    assert auto[1] == pytest.approx(off[1], abs=5e-3)

    spec = tiny_spec(*GPU_SIZES, ONE, runtime.format("auto"))
    last = copy.deepcopy(newest_state(tmp_path / "auto"))
    whole = tmp_path / "auto"
    for checkpoint in sorted((whole / "checkpoints").iterdir())[1:]:
        checkpoint.unlink()
    train(spec, data, whole, resume=True)
    for name, value in newest_state(whole)["model"].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert relative_error(value, last["model"][name]) < 0.05, name
