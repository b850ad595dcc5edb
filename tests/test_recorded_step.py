"""What a recorded step does as a CUDA graph does it, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from on_other_device import on_other_device
from recorded_step import RecordStep
from torch import nn

CPU = torch.device("cpu")


def test_a_replay_reads_tensors_and_keeps_numbers() -> None:
    source, result, number = torch.ones(2), torch.zeros(2), 3.0
    with RecordStep(CPU) as recorded:
        result.copy_(source * number)
    source.fill_(2.0)
    number = 5.0
    recorded.replay()
    assert result.tolist() == [6.0, 6.0]


def test_a_replay_trains() -> None:
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    images = torch.rand(8, 3)

    def step(network: nn.Module) -> None:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, fused=True)
        network(images).square().sum().backward()
        optimizer.step()

    with RecordStep(CPU) as recorded:
        step(networks[0])
    recorded.replay()
    for _ in range(2):
        step(networks[1])
        networks[1].zero_grad()
    replayed, ordinary = (network.state_dict() for network in networks)
    assert replayed.keys() == ordinary.keys()
    assert all(torch.equal(value, ordinary[name]) for name, value in replayed.items())


def check_waiting(device: torch.device) -> None:
    total = torch.ones(2).sum().to(device)
    reads: list[Callable[[], object]] = [total.item, lambda: bool(total), lambda: float(total), lambda: int(total)]
    with RecordStep(device):
        for read in reads:
            with pytest.raises(RuntimeError, match="waits for the device"):
                read()


def test_waiting_is_refused() -> None:
    check_waiting(CPU)


@on_other_device
def test_waiting_is_refused_there() -> None:
    check_waiting(torch.device("other", 0))


@on_other_device
def test_copies_are_refused() -> None:
    device = torch.device("other", 0)
    there, here = torch.ones(2).to(device), torch.ones(2)
    with RecordStep(device) as recorded:
        for copy in (
            lambda: here.to(device),
            lambda: there.cpu(),
            lambda: there.copy_(here),
            lambda: there[here.long()],
        ):
            with pytest.raises(RuntimeError, match="copies between the host and the device"):
                copy()
        there.mul_(torch.tensor(3.0))  # a number may lie on the host
    recorded.replay()
    assert there.tolist() == [9.0, 9.0]
