"""On a GPU: models drawn in a thread, and the zeros that helpers compile with."""

from __future__ import annotations

import pytest
import torch

from nanogpt.recipe import load_recipe
from nanogpt.training.ahead import begin_drawing
from nanogpt.training.build import build_model, draw_model, undrawn_model
from nanogpt.training.implementations import choose_implementations
from nanogpt.training.startup import StartUp

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("recipe", ["speedrun", "record89"])
def test_a_model_drawn_ahead_is_the_one_the_run_would_draw(recipe: str):
    """In spite of what the attention library and the precisions turn out to be, of which nothing is imported before."""
    spec, startup = load_recipe(recipe, on="1xh200"), StartUp()
    begin_drawing(spec, CUDA, startup)
    implementations, _ = choose_implementations(spec, CUDA)
    drawn = startup.begun(draw_model)
    assert drawn is not None
    ahead = build_model(spec, device=CUDA, implementations=implementations, drawn=drawn)
    assert ahead is drawn.model
    alone = build_model(spec, device=CUDA, implementations=implementations)
    zeros = undrawn_model(spec, device=CUDA, implementations=implementations)
    for one, other, empty in zip(
        (*ahead.named_parameters(), *ahead.named_buffers()),
        (*alone.named_parameters(), *alone.named_buffers()),
        (*zeros.named_parameters(), *zeros.named_buffers()),
        strict=True,
    ):
        (name, value), (_, same), (_, shaped) = one, other, empty
        assert torch.equal(value.double(), same.double()), name
        assert (shaped.shape, shaped.dtype, shaped.device, shaped.stride()) == (
            value.shape,
            value.dtype,
            value.device,
            value.stride(),
        ), name
