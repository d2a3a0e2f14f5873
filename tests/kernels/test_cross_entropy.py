import pytest
import torch

from nanogpt.kernels import cross_entropy as ce


def inputs(tokens=37, width=16, vocab=96, *, terms=3, dtype=torch.float64, spread=3.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()
    w = (torch.randn(width, vocab, generator=gen, dtype=torch.float64) * spread / width**0.5).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=gen)
    weights = torch.tensor([1.0, 0.5, 0.25][:terms])
    return x, w.requires_grad_(), targets, weights


def relative(out, ref):
    return ((out.double() - ref.double()).norm() / ref.double().norm()).item()


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 37, 300])
def test_equals_reference(tokens, terms):
    x, w, targets, weights = inputs(tokens, terms=terms)
    ref = ce.head_loss_reference(x, w, targets, weights)
    ref_grads = torch.autograd.grad(ref * 0.125, (x, w))
    loss = ce.head_loss(x, w, targets, weights)
    grads = torch.autograd.grad(loss * 0.125, (x, w))
    assert relative(loss, ref) < 1e-13
    assert all(relative(g, r) < 1e-12 for g, r in zip(grads, ref_grads, strict=True))


def test_gradcheck():
    x, w, targets, weights = inputs(7, 4, 11)
    assert torch.autograd.gradcheck(lambda x, w: ce.head_loss(x, w, targets, weights), (x, w))
