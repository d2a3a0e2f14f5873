"""Training losses on a GPU: the host does not wait for them."""

from __future__ import annotations

import pytest
import torch

from nanogpt.training.loss_monitor import LossMonitor, SeenLoss


@pytest.mark.gpu
def test_losses_on_a_gpu_arrive_without_a_wait() -> None:
    monitor = LossMonitor()
    monitor.put(0, torch.full((), 1.5, device="cuda") * 1)
    assert monitor.take(wait=True) == [SeenLoss(0, 1.5)]  # what is loaded or allocated once may wait for the device
    torch.cuda._sleep(2_000_000_000)  # about a second
    monitor.put(1, torch.full((), 2.5, device="cuda") * 1)
    assert monitor.take() == []
    assert monitor.take(wait=True) == [SeenLoss(1, 2.5)]
