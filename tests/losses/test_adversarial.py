import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_inputs import random_outputs
from torch import Tensor, nn

from kd_lightning.features import Outputs
from kd_lightning.losses import AdversarialLoss, adversarial_loss, reverse_gradient
from kd_lightning.losses._multilinear import MultilinearMap
from kd_lightning.losses.adversarial import entropy_weights, reversal_strength

_LABELS = torch.tensor([3, -1, 0, 1, 2])


outputs = partial(random_outputs, classes=4, requires_grad=True)


def build_loss(loss: AdversarialLoss, source: Outputs, target: Outputs, progress: float = 1.0) -> AdversarialLoss:
    loss.build(source, target)
    loss.progress = torch.tensor(progress)
    return loss


def discriminate(loss: AdversarialLoss, vectors: Tensor, layer: int = 0) -> Tensor:
    """Apply a discriminator, written with matrix products."""
    state = loss.state_dict()
    for depth in (0, 2, 4):
        weight, bias = (state[f"discriminators.{layer}.{depth}.{name}"] for name in ("weight", "bias"))
        vectors = (vectors.relu() if depth else vectors) @ weight.T + bias
    return vectors[:, 0]


def test_gradient_reversal_is_the_identity_and_scales_gradients_negatively() -> None:
    features, factors = torch.randn(2, 3, 4, dtype=torch.float64)
    features.requires_grad_()
    reversed_features = reverse_gradient(features, strength=0.3)
    assert torch.equal(reversed_features, features)
    (gradient,) = torch.autograd.grad((factors * reversed_features).sum(), features, retain_graph=True)
    assert torch.equal(gradient, -0.3 * factors)
    (gradient,) = torch.autograd.grad((factors * reverse_gradient(features)).sum(), features)
    assert torch.equal(gradient, -factors)
    (gradient,) = torch.autograd.grad(reverse_gradient(features, strength=0.0).sum(), features)
    assert (gradient == 0).all()


def test_gradient_reversal_supports_nesting_and_second_derivatives() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        reverse_gradient(reverse_gradient(x, strength=2.0), strength=0.5).pow(3).sum(), x, create_graph=True
    )
    torch.testing.assert_close(gradient, 3 * x.square())
    (second,) = torch.autograd.grad(reverse_gradient(x, strength=1.0).pow(2).sum(), x, create_graph=True)
    torch.testing.assert_close(second, -2 * x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradient_reversal_keeps_the_dtype(dtype: torch.dtype) -> None:
    features = torch.randn(3).to(dtype).requires_grad_()
    reversed_features = reverse_gradient(features, strength=0.5)
    reversed_features.sum().backward()
    assert reversed_features.dtype == dtype
    assert features.grad is not None
    assert features.grad.dtype == dtype
    assert (features.grad == -0.5).all()


def test_the_reversal_strength_follows_dann() -> None:
    for progress in (0.0, 0.05, 0.3, 1.0):
        strength = reversal_strength(torch.tensor(progress, dtype=torch.float64))
        assert strength.item() == pytest.approx(2 / (1 + math.exp(-10 * progress)) - 1)
    assert reversal_strength(torch.tensor(0.0)) == 0


def test_the_loss_is_binary_cross_entropy_with_source_as_one() -> None:
    source, target = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    domains = torch.cat([torch.ones(5), torch.zeros(5)]).double()
    expected = F.binary_cross_entropy_with_logits(torch.cat([source, target]), domains)
    torch.testing.assert_close(adversarial_loss(source, target), expected)
    assert adversarial_loss(torch.full((3,), 50.0), torch.full((2,), -50.0)) < 1e-6
    assert adversarial_loss(torch.full((3,), -50.0), torch.full((2,), 50.0)).item() == pytest.approx(50)


def test_domains_count_equally_and_weights_are_normalized() -> None:
    source, target = torch.randn(2, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    sides = F.softplus(-source), F.softplus(target)
    torch.testing.assert_close(adversarial_loss(source, target), (sides[0].mean() + sides[1].mean()) / 2)
    weights = torch.rand(2).double(), torch.rand(7).double()
    parts = [(w * side).sum() / w.sum() for w, side in zip(weights, sides, strict=True)]
    torch.testing.assert_close(adversarial_loss(source, target, *weights), (parts[0] + parts[1]) / 2)
    torch.testing.assert_close(adversarial_loss(source, target, 3 * weights[0], weights[1]), (parts[0] + parts[1]) / 2)


def test_gradients_treat_the_sum_of_weights_as_constant() -> None:
    source, target, weights, others = (torch.rand(n, dtype=torch.float64, requires_grad=True) for n in (3, 4, 3, 4))
    assert torch.autograd.gradcheck(
        lambda s, t: adversarial_loss(s, t, weights.detach(), others.detach()), (source, target)
    )
    adversarial_loss(source, target, weights, others).backward()
    torch.testing.assert_close(weights.grad, (F.softplus(-source) / weights.sum() / 2).detach())
    torch.testing.assert_close(others.grad, (F.softplus(target) / others.sum() / 2).detach())


def test_entropy_weights_match_cdan_e() -> None:
    logits = 3 * torch.randn(5, 4, dtype=torch.float64)
    p = logits.softmax(1)
    torch.testing.assert_close(entropy_weights(logits), 1 + (p * p.log()).sum(1).exp())
    torch.testing.assert_close(entropy_weights(torch.zeros(1, 4)), torch.tensor([1.25]))
    assert torch.autograd.gradcheck(entropy_weights, logits.requires_grad_())
    for dtype in (torch.float16, torch.bfloat16):
        saturated = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
        weights = entropy_weights(saturated)
        weights.sum().backward()
        assert weights.dtype == torch.float32
        assert weights == 2
        assert saturated.grad is not None
        assert saturated.grad.isfinite().all()


def test_dann_discriminates_features() -> None:
    source, target = outputs(5, a=(3, 2, 4), b=(6,)), outputs(7, a=(3, 2, 4), b=(6,))
    loss = build_loss(AdversarialLoss(layers=["a", "b"], hidden=8), source, target)
    shapes = {name: tuple(value.shape) for name, value in loss.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "discriminators.0.0.weight": (8, 3),
        "discriminators.0.2.weight": (8, 8),
        "discriminators.0.4.weight": (1, 8),
        "discriminators.1.0.weight": (8, 6),
        "discriminators.1.2.weight": (8, 8),
        "discriminators.1.4.weight": (1, 8),
    }
    pooled = [outputs.features["a"].mean((2, 3)) for outputs in (source, target)]
    expected = adversarial_loss(*(discriminate(loss, vectors) for vectors in pooled))
    expected += adversarial_loss(*(discriminate(loss, outputs.features["b"], 1) for outputs in (source, target)))
    torch.testing.assert_close(loss(source, target, _LABELS), expected)
    copy = build_loss(AdversarialLoss(layers=["a", "b"], hidden=8), source, target)
    assert copy(source, target, _LABELS) != loss(source, target, _LABELS)
    copy.load_state_dict(loss.state_dict())
    assert copy(source, target, _LABELS) == loss(source, target, _LABELS)


@pytest.mark.parametrize("largest", [12, 11])
@pytest.mark.parametrize("weighted", [False, True])
def test_cdan_discriminates_products_of_features_and_predictions(largest: int, weighted: bool) -> None:
    source, target = outputs(5, a=(3,)), outputs(7, a=(3,))
    loss = AdversarialLoss(
        weight=1.0,
        layers=["a"],
        conditional=True,
        entropy_weighted=weighted,
        hidden=8,
        largest_product=largest,
        random_dimensions=20,
    )
    build_loss(loss, source, target)
    condition = MultilinearMap(3, 4, largest, 20)
    sides = [discriminate(loss, condition(o.features["a"], o.logits)) for o in (source, target)]
    weights = [entropy_weights(o.logits) for o in (source, target)] if weighted else []
    torch.testing.assert_close(loss(source, target, _LABELS), adversarial_loss(*sides, *weights))
    assert loss.state_dict()["discriminators.0.0.weight"].shape == (8, 20 if largest < 12 else 12)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("progress", [0.0, 0.1, 1.0])
def test_the_network_gets_the_reversed_gradient_and_the_discriminator_the_plain_one(
    progress: float, conditional: bool
) -> None:
    source, target = outputs(5, a=(3,)), outputs(7, a=(3,))
    loss = build_loss(
        AdversarialLoss(layers=["a"], conditional=conditional, hidden=8, strength=0.7), source, target, progress
    )
    loss(source, target, _LABELS).backward()
    learned = [parameter.grad for parameter in loss.parameters()]
    condition = MultilinearMap(3, 4, 4096, 1) if conditional else lambda features, _: features
    leaves = [o.features["a"].detach().requires_grad_() for o in (source, target)]
    logits = [o.logits.detach() for o in (source, target)]
    sides = [loss.discriminators[0](condition(x, z)).squeeze(1) for x, z in zip(leaves, logits, strict=True)]
    plain = torch.autograd.grad(adversarial_loss(*sides), [*leaves, *loss.parameters()])
    strength = 0.7 * (2 / (1 + math.exp(-10 * progress)) - 1)
    for outputs_, gradient in zip((source, target), plain[:2], strict=True):
        torch.testing.assert_close(outputs_.features["a"].grad, -strength * gradient)
        assert outputs_.logits.grad is None or (outputs_.logits.grad == 0).all()  # predictions are detached
    for found, gradient in zip(learned, plain[2:], strict=True):
        assert found is not None
        torch.testing.assert_close(found, gradient)
        assert found.abs().sum() > 0


def test_the_gradient_through_the_entropy_weights_is_reversed() -> None:
    source, target = outputs(5, a=(3,)), outputs(7, a=(3,))
    loss = build_loss(AdversarialLoss(layers=["a"], conditional=True, entropy_weighted=True, hidden=8), source, target)
    loss(source, target, _LABELS).backward()
    leaves = [o.logits.detach().requires_grad_() for o in (source, target)]
    sides = [
        discriminate(loss, loss.conditions[0](o.features["a"], o.logits).detach()).detach() for o in (source, target)
    ]
    plain = torch.autograd.grad(adversarial_loss(*sides, *map(entropy_weights, leaves)), leaves)
    for outputs_, gradient in zip((source, target), plain, strict=True):
        torch.testing.assert_close(outputs_.logits.grad, -math.tanh(5) * gradient)


def test_domain_accuracy_is_the_mean_over_both_domains() -> None:
    source, target = outputs(3, a=(1,)), outputs(50, a=(1,))
    loss = build_loss(AdversarialLoss(layers=["a"], hidden=1), source, target)
    last = loss.get_submodule("discriminators.0.4")
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.fill_(1.0 if parameter.dim() == 2 else 0.0)
        last.bias.fill_(-1.0)  # features above 1 are classified as source
        source.features["a"].copy_(torch.tensor([[2.0], [2.0], [0.0]]))
        target.features["a"].fill_(0.0)[:10] = 2.0
    loss(source, target, _LABELS[:3])
    assert loss.metrics["domain_accuracy"].item() == pytest.approx((2 / 3 + 40 / 50) / 2)


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_adversarial_training_aligns_the_domains(strength: float) -> None:
    """A linear network on two domains that differ along one direction."""
    network = torch.nn.Linear(2, 2, bias=False)
    loss = AdversarialLoss(layers=["a"], hidden=16, strength=strength)

    def step() -> tuple[Outputs, Outputs]:
        images = torch.randn(128, 2), torch.randn(128, 2) + torch.tensor([3.0, 0.0])
        source, target = (Outputs(torch.zeros(128, 2), {"a": network(x)}) for x in images)
        return source, target

    def distance() -> float:
        source, target = (o.features["a"].detach() for o in step())
        return ((source.mean(0) - target.mean(0)).norm() / source.std()).item()

    build_loss(loss, *step())
    start = distance()
    optimizer = torch.optim.SGD([*network.parameters(), *loss.parameters()], 0.1)
    for i in range(400):
        loss.progress = torch.tensor(i / 400)
        optimizer.zero_grad()
        loss(*step(), torch.zeros(128, dtype=torch.long)).backward()
        optimizer.step()
    assert (distance() < start / 5) is (strength == 1)
    assert (loss.metrics["domain_accuracy"].item() < 0.65) is (strength == 1)


def test_defaults_match_the_released_code() -> None:
    loss = AdversarialLoss()
    assert (loss.weight, loss.warmup_epochs, loss.layers, loss.gather) == (1.0, 0, ("avgpool",), True)
    assert (loss.conditional, loss.entropy_weighted, loss.hidden, loss.strength) == (False, False, 1024, 1.0)
    assert (loss.largest_product, loss.random_dimensions) == (4096, 1024)
    assert AdversarialLoss(weight=2.0, warmup_epochs=4).weight_at(0) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.5}, r"^strength must be >= 0, got -0\.5\.$"),
        ({"strength": float("nan")}, r"^strength must be >= 0, got nan\.$"),
        ({"hidden": 0}, "^hidden, largest_product and random_dimensions must be >= 1, got 0, 4096 and 1024"),
        ({"largest_product": 0}, "got 1024, 0 and 1024"),
        ({"random_dimensions": 0}, "got 1024, 4096 and 0"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialLoss(**options)


def test_a_loss_that_was_not_built_is_refused() -> None:
    with pytest.raises(RuntimeError, match="learned parts of AdversarialLoss are not built yet"):
        AdversarialLoss(layers=["a"])(outputs(5, a=(3,)), outputs(5, a=(3,)), _LABELS)
