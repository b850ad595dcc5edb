"""Properties of all losses between domains, and the vectors that they read."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import jsonargparse
import pytest
import torch
from random_inputs import autocast_if, random_outputs
from torch import Tensor

from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.losses import (
    AdversarialLoss,
    AlignmentLoss,
    CoralLoss,
    KernelMeanMatchingLoss,
    MMDLoss,
    ReweightedLoss,
)
from kd_lightning.losses._pairs import as_rows, domain_vectors
from kd_lightning.networks import ResNet

_MODULES: dict[str, Callable[[], AlignmentLoss]] = {
    "mmd": lambda: MMDLoss(layers=["map", "vector"]),
    "biased mmd": lambda: MMDLoss(layers=["map", "vector"], unbiased=False),
    "coral": lambda: CoralLoss(layers=["map", "vector"]),
    "dann": lambda: AdversarialLoss(layers=["map", "vector"], hidden=4),
    "cdan": lambda: AdversarialLoss(layers=["map", "vector"], conditional=True, hidden=4),
    "random cdan": lambda: AdversarialLoss(
        layers=["map"], conditional=True, entropy_weighted=True, hidden=4, largest_product=3, random_dimensions=6
    ),
    "reweighted": lambda: ReweightedLoss(layer="map"),
    "reweighted, hidden": lambda: ReweightedLoss(layer="vector", hidden=4),
    "kernel mean matching": lambda: KernelMeanMatchingLoss(layer="map"),
}
_REWEIGHTING = ("reweighted", "reweighted, hidden", "kernel mean matching")


outputs = partial(random_outputs, requires_grad=True, map=(3, 2, 4), vector=(6,))


def build_loss(name: str, progress: float = 0.5) -> AlignmentLoss:
    loss = _MODULES[name]()
    loss.build(outputs(2), outputs(2))
    loss.progress = torch.tensor(progress)
    for parameter in loss.parameters():  # some start at zero
        torch.nn.init.normal_(parameter)
    return loss


def _check_and_build(loss: AlignmentLoss, outputs: Outputs) -> None:
    loss.check(outputs, outputs)
    loss.build(outputs, outputs)


def make_labels(rows: int) -> Tensor:
    return torch.arange(rows) % 6 - 1


def test_domain_vectors_are_pooled_and_keep_their_gradients() -> None:
    source, target = outputs(4), outputs(6)
    (s, t), (vector, other) = domain_vectors(MMDLoss(layers=["map", "vector"]), source, target)
    torch.testing.assert_close(s, source.features["map"].flatten(2).mean(2))
    torch.testing.assert_close(t, target.features["map"].flatten(2).mean(2))
    assert torch.equal(vector, source.features["vector"])
    assert torch.equal(other, target.features["vector"])
    assert all(tensor.requires_grad for tensor in (s, t, vector, other))


def test_as_rows_flattens_samples() -> None:
    source, target = as_rows(torch.randn(4, 3, 2, 2), torch.randn(5, 12))
    assert (source.shape, target.shape) == ((4, 12), (5, 12))


@pytest.mark.parametrize("loss", [MMDLoss, CoralLoss, AdversarialLoss])
def test_missing_layers_and_scalar_features_are_refused(loss: Callable[..., AlignmentLoss]) -> None:
    name = loss(layers=["a"])
    with pytest.raises(
        ValueError, match=rf"^{type(name).__name__} compares features; name at least one layer in layers\.$"
    ):
        _check_and_build(loss(layers=[]), outputs(2))
    number = Outputs(torch.randn(2, 5), {"a": torch.randn(2)})
    with pytest.raises(ValueError, match=r"needs more than one number \(B,\) of layer 'a'; name another\.$"):
        _check_and_build(name, number)


@pytest.mark.parametrize("loss", [ReweightedLoss, KernelMeanMatchingLoss])
def test_reweighting_refuses_scalar_features(loss: Callable[..., AlignmentLoss]) -> None:
    number = Outputs(torch.randn(2, 5), {"a": torch.randn(2)})
    with pytest.raises(ValueError, match=r"needs more than one number \(B,\) of layer 'a'; name another\.$"):
        _check_and_build(loss(layer="a"), number)


@pytest.mark.parametrize("name", list(_MODULES))
def test_alignment_losses_read_layers_and_need_no_teacher(name: str) -> None:
    loss = _MODULES[name]()
    assert loss.layers != ()
    assert not loss.compares_logits
    assert not loss.needs_teacher


@pytest.mark.parametrize("name", list(_MODULES))
def test_gradients_reach_the_expected_tensors(name: str) -> None:
    """Alignment moves the features of both domains; reweighting moves only the source's logits."""
    loss, source, target = build_loss(name), outputs(5), outputs(7)
    loss(source, target, make_labels(5)).backward()
    moved = [source.logits] if name in _REWEIGHTING else [o.features[n] for o in (source, target) for n in loss.layers]
    for tensor in (*moved, *loss.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0
    if name in _REWEIGHTING:
        others = [target.logits, *source.features.values(), *target.features.values()]
        assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize("rows", [(4, 4), (1, 3), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("name", list(_MODULES))
@pytest.mark.parametrize(
    ("features", "weights", "autocast"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.bfloat16, torch.float32, False),
        (torch.float16, torch.float32, False),
        (torch.float64, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float64, torch.float64, False),
    ],
)
def test_all_precisions_and_batch_sizes_give_finite_values(
    name: str, features: torch.dtype, weights: torch.dtype, autocast: bool, rows: tuple[int, int]
) -> None:
    loss = build_loss(name).to(weights)
    source, target = outputs(rows[0], dtype=features), outputs(rows[1], dtype=features)
    with autocast_if(autocast):
        term = loss(source, target, make_labels(rows[0]))
    if features == weights or features != torch.float64:
        assert term.dtype == (torch.float64 if features == torch.float64 else torch.float32)
    assert term.shape == ()
    assert term.isfinite()
    assert all(value.isfinite() for value in loss.metrics.values())
    term.backward()
    gradients = [t.grad for o in (source, target) for t in (o.logits, *o.features.values()) if t.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in loss.parameters())


@pytest.mark.parametrize("factor", [0.0, 1e-6, 300.0, 1e4])
@pytest.mark.parametrize("name", list(_MODULES))
def test_small_and_large_features_give_finite_values(name: str, factor: float) -> None:
    loss = build_loss(name)
    for other in (factor, 1.0):
        source, target = outputs(5, factor=factor), outputs(7, factor=other)
        loss.zero_grad()
        term = loss(source, target, make_labels(5))
        term.backward()
        assert term.isfinite()
        for tensor in (*source.features.values(), *target.features.values(), source.logits, *loss.parameters()):
            assert tensor.grad is None or tensor.grad.isfinite().all()


@pytest.mark.parametrize("name", list(_MODULES))
def test_the_order_of_the_samples_does_not_matter(name: str) -> None:
    loss, source, target = build_loss(name), outputs(5, dtype=torch.float64), outputs(7, dtype=torch.float64)
    loss.double()
    labels, order, other = make_labels(5), torch.randperm(5), torch.randperm(7)
    term = loss(source, target, labels)
    moved = [
        Outputs(o.logits[rows], {n: f[rows] for n, f in o.features.items()})
        for o, rows in ((source, order), (target, other))
    ]
    torch.testing.assert_close(loss(*moved, labels[order]), term, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", _REWEIGHTING)
def test_reweighting_accepts_missing_labels_and_probabilities(name: str) -> None:
    loss, source, target = build_loss(name), outputs(5), outputs(7)
    none = loss(source, target, torch.full((5,), -1))
    (gradient,) = torch.autograd.grad(none, source.logits)
    assert (gradient == 0).all()
    labels = torch.tensor([0, 4, 2, 2, 1])
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(loss(source, target, one_hot), loss(source, target, labels))


@pytest.mark.parametrize("name", list(_MODULES))
def test_losses_can_be_copied_after_a_step(name: str) -> None:
    loss, source, target = build_loss(name), outputs(5), outputs(7)
    term = loss(source, target, make_labels(5))
    assert all(value.shape == () and value.grad_fn is None for value in loss.metrics.values())
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(copied(source, target, make_labels(5)), term)
        assert copied.progress == 0.5
    size = ["effective_sample_size"] if name in _REWEIGHTING else []
    accuracy = ["domain_accuracy"] if [*loss.parameters()] else []
    assert list(loss.metrics) == size + accuracy


@pytest.mark.parametrize("name", list(_MODULES))
def test_a_loss_built_from_shapes_loads_a_state_dict(name: str) -> None:
    loss = build_loss(name)
    meta = [Outputs(torch.zeros(2, 5), {"map": torch.zeros(2, 3, 2, 4), "vector": torch.zeros(2, 6)})] * 2
    other = _MODULES[name]()
    other.build(*meta)
    other.load_state_dict(loss.state_dict())
    other.progress = loss.progress
    source, target = outputs(5), outputs(7)
    assert torch.equal(other(source, target, make_labels(5)), loss(source, target, make_labels(5)))


def test_default_layers_fit_a_network() -> None:
    network = ResNet([1, 1], [4, 8], 5, in_channels=1)
    losses = [MMDLoss(), CoralLoss(), AdversarialLoss(), ReweightedLoss(), KernelMeanMatchingLoss()]
    tap = FeatureTap(network, [name for loss in losses for name in loss.layers])
    source, target = tap(torch.rand(6, 1, 8, 8)), tap(torch.rand(8, 1, 8, 8))
    for loss in losses:
        loss.build(source, target)
    torch.stack([loss(source, target, make_labels(6)) for loss in losses]).sum().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MMDLoss", {"layers": ["a"], "bandwidths": [1.0, 2.0], "unbiased": False, "warmup_epochs": 2}),
        ("CoralLoss", {"weight": 0.5, "gather": False}),
        ("AdversarialLoss", {"conditional": True, "entropy_weighted": True, "hidden": 8, "strength": 0.5}),
        ("ReweightedLoss", {"layer": "a", "bound": 5.0, "penalty": 0.1, "hidden": 3}),
        ("KernelMeanMatchingLoss", {"layer": "a", "tolerance": 0.0, "ridge": 0.1, "bandwidths": [1.0]}),
    ],
)
def test_losses_are_built_by_jsonargparse(name: str, options: dict[str, object]) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--losses", type=dict[str, AlignmentLoss])
    config = parser.parse_object({"losses": {"term": {"class_path": name, "init_args": options}}})
    loss = parser.instantiate_classes(config).losses["term"]
    assert type(loss).__name__ == name
    found = {key: getattr(loss, "layers" if key in ("layer", "layers") else key) for key in options}
    wanted = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    wanted |= {"layer": ("a",)} if "layer" in options else {}
    assert found == wanted
