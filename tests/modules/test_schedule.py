import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from kd_lightning.modules.optim import init_momentum_buffers
from kd_lightning.modules.parameter_groups import layerwise_decay_groups, parameter_groups
from kd_lightning.modules.schedule import one_cycle


@pytest.mark.parametrize("steps", [7, 10, 100, 1001])
@pytest.mark.parametrize("rise", [0.3, 0.5])
def test_one_cycle_equals_torchs_onecyclelr(steps: int, rise: float) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    torch_optimizer, ours = torch.optim.SGD([parameter], lr=0.1), torch.optim.SGD([parameter], lr=0.1)
    cycle = OneCycleLR(torch_optimizer, max_lr=0.1, total_steps=steps, pct_start=rise, cycle_momentum=False)
    curve = LambdaLR(ours, partial(one_cycle, total_steps=steps, rise=rise))
    for step in range(steps):
        rates = (ours.param_groups[0]["lr"], torch_optimizer.param_groups[0]["lr"])
        assert rates[0] == pytest.approx(rates[1], rel=1e-9), step
        for optimizer, schedule in ((torch_optimizer, cycle), (ours, curve)):
            if step < steps - 1:
                optimizer.step()
                schedule.step()


@pytest.mark.parametrize("steps", [4, 5, 6, 10, 391, 78_200])
def test_one_cycle_rises_to_one_and_falls(steps: int) -> None:
    curve = [one_cycle(step, steps) for step in range(steps)]
    peak = max(range(steps), key=curve.__getitem__)
    assert curve[0] == pytest.approx(1 / 25)
    assert curve[-1] == pytest.approx(4e-6)
    assert 0.9 < curve[peak] <= 1
    assert 0 < peak < steps - 1
    assert curve[: peak + 1] == sorted(curve[: peak + 1])
    assert curve[peak:] == sorted(curve[peak:], reverse=True)
    assert min(curve) > 0


@pytest.mark.parametrize("total", [math.inf, 1, 3])
def test_one_cycle_is_constant_if_the_steps_are_unknown_or_too_few(total: float) -> None:
    assert {one_cycle(step, total) for step in (0, 1, 2, 10**6)} == {1.0}


def test_one_cycle_keeps_its_last_value() -> None:
    assert one_cycle(10, 10) == one_cycle(10**6, 10) == pytest.approx(4e-6)


def test_one_cycle_stretches_with_the_number_of_steps() -> None:
    assert one_cycle(9, 10) == pytest.approx(4e-6)
    assert one_cycle(9, 30) > 0.9


def test_norms_and_biases_do_not_decay() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    decayed, rest = parameter_groups(network.parameters())
    assert decayed == {"params": [network[0].weight, network[3].weight]}
    assert rest["params"] == [network[0].bias, network[1].weight, network[1].bias, network[3].bias]
    assert rest["weight_decay"] == 0


def test_each_trainable_parameter_is_in_one_group_and_frozen_ones_in_none() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    network[0].requires_grad_(False)
    grouped = [id(p) for group in parameter_groups(network.parameters()) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert len(set(grouped)) == len(grouped) == 4


def test_empty_groups_are_left_out() -> None:
    matrices = parameter_groups(nn.Linear(2, 3, bias=False).parameters())
    assert [set(group) for group in matrices] == [{"params"}]
    vectors = parameter_groups(nn.BatchNorm1d(3).parameters())
    assert [group["weight_decay"] for group in vectors] == [0.0]
    assert parameter_groups([]) == []


def test_an_optimizer_decays_only_the_first_group() -> None:
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(parameter_groups(layer.parameters()), lr=0.5, weight_decay=0.1)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer(torch.zeros(1, 2)).sum().mul(0).backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight, weight * (1 - 0.5 * 0.1))
    torch.testing.assert_close(layer.bias, bias)


def test_layerwise_decay_lowers_the_rate_from_part_to_part() -> None:
    """Shared weights, and those outside of all parts, are in one group each."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 3))
            self.first, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
            self.again, self.last = self.first, nn.Linear(3, 2)

    network = Network()
    groups = layerwise_decay_groups(network, 0.5)
    scales = {weight: group["lr_scale"] for group in groups for weight in group["params"]}
    assert scales == {
        network.token: 0.5,
        network.first.weight: 0.5,
        network.first.bias: 0.5,
        network.last.weight: 1.0,
        network.last.bias: 1.0,
    }
    assert {weight for group in groups if "weight_decay" in group for weight in group["params"]} == {
        network.first.bias,
        network.last.bias,
    }


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fused_sgd_equals_plain_sgd_for_a_weight_without_gradients_at_first(nesterov: bool) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(4, 2, 5)
    found = []
    for fused in (True, False):
        weights = [nn.Parameter(torch.ones(5)) for _ in range(2)]
        optimizer = SGD(weights, nesterov=nesterov, fused=fused, foreach=False)
        for step, rows in enumerate(gradients):
            weights[0].grad, weights[1].grad = rows[0].clone(), rows[1].clone() if step >= 2 else None
            init_momentum_buffers(optimizer)
            if fused:
                assert len(optimizer.state) == (2 if step >= 2 else 1)
            optimizer.step()
        found.append(weights)
    for fused_weight, weight in zip(*found, strict=True):
        torch.testing.assert_close(fused_weight, weight, rtol=1e-6, atol=1e-6)


def test_initialized_momentum_buffers_give_torchs_first_step_bit_for_bit() -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(50, 3)), nn.Parameter(torch.randn(7))]
        optimizer = SGD(weights, nesterov=True, fused=True)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            if ours:
                init_momentum_buffers(optimizer)
            optimizer.step()
        found.append([*weights, *(optimizer.state[weight]["momentum_buffer"] for weight in weights)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_skipped_first_step_leaves_zero_momentum() -> None:
    weight = nn.Parameter(torch.ones(1000))
    optimizer = SGD([weight], fused=True)
    weight.grad = torch.full_like(weight, math.inf)
    init_momentum_buffers(optimizer)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert (optimizer.state[weight]["momentum_buffer"] == 0).all()
    assert (weight == 1).all()


@pytest.mark.parametrize("optimizer", [partial(SGD, fused=False), partial(torch.optim.AdamW, fused=True)])
def test_other_optimizers_get_no_momentum_buffers(optimizer: Any) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    built = optimizer([weight])
    init_momentum_buffers(built)
    assert not built.state
