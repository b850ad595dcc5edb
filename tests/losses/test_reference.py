"""The values of released implementations, and the published formulas written out in loops."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from math import ceil, log, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from random_inputs import Array
from scipy.special import rel_entr, softmax
from scipy.stats import norm
from torch import Tensor

from kd_lightning.losses import (
    attention_loss,
    contrastive_loss,
    coral_loss,
    correlation_loss,
    decoupled_loss,
    dist_loss,
    hierarchical_context_loss,
    hint_loss,
    mmd_loss,
    neuron_selectivity_loss,
    probabilistic_loss,
    relational_loss,
    similarity_loss,
    soft_target_loss,
    variational_loss,
)

Loss = Callable[[Tensor, Tensor], Tensor]

# inputs in float64; values and gradients were computed in float64 with mdistiller, RepDistiller, DIST_KD and
# logit-standardization-KD, and for domain adaptation (the student is the source) with Transfer-Learning-Library, the
# gradients then rounded to float32
_REFERENCE: dict[str, Array] = dict(np.load(Path(__file__).with_name("reference.npz")))
_TARGET = torch.from_numpy(_REFERENCE["target"])
_TEMPERATURE = float(_REFERENCE["temperature"])


@pytest.mark.parametrize(
    ("name", "inputs", "loss"),
    [
        ("kd", "logits", lambda s, t: soft_target_loss(s, t, temperature=_TEMPERATURE)),
        (
            "kd_logit_standardized",
            "logits",
            lambda s, t: soft_target_loss(s, t, temperature=_TEMPERATURE, standardize=True),
        ),
        (
            "dkd_alpha1_beta8",
            "logits",
            lambda s, t: decoupled_loss(s, t, _TARGET, alpha=1.0, beta=8.0, temperature=_TEMPERATURE),
        ),
        ("dist_beta1_gamma1", "logits", lambda s, t: dist_loss(s, t, beta=1.0, gamma=1.0, temperature=_TEMPERATURE)),
        ("fitnet_same_shape", "fmap2", hint_loss),
        ("hcl_same_shape", "fmap2", hierarchical_context_loss),
        ("at_p2", "fmap", attention_loss),
        ("nst", "fmap", neuron_selectivity_loss),
        ("sp", "fmap", similarity_loss),
        ("pkt", "embed", probabilistic_loss),
        ("rkd_d25_a50", "embed", relational_loss),
        ("cc_repdistiller", "embed", correlation_loss),
    ],
)
def test_matches_the_released_implementation(name: str, inputs: str, loss: Loss) -> None:
    student, teacher = (torch.from_numpy(_REFERENCE[f"{inputs}_{side}"]) for side in ("student", "teacher"))
    student.requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(_REFERENCE[f"{name}/loss"].item(), rel=1e-6)
    expected = torch.from_numpy(_REFERENCE[f"{name}/grad"]).double()
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def coral_as_released(source: Tensor, target: Tensor) -> Tensor:
    return 4 * coral_loss(source, target) + (source.mean(0) - target.mean(0)).square().mean()


def mmd_as_released(source: Tensor, target: Tensor) -> Tensor:
    return mmd_loss(source, target) + 2 / (len(source) - 1)


@pytest.mark.parametrize(
    ("name", "loss", "error"),
    [
        ("coral_tllib", coral_as_released, 1e-12),
        ("mkmmd_tllib_alpha_0.5_1_2", mmd_as_released, 2e-6),  # the released value was rounded to float32
    ],
)
def test_matches_the_released_adaptation_code(name: str, loss: Loss, error: float) -> None:
    source, target = (torch.from_numpy(_REFERENCE[f"embed_{side}"]) for side in ("student", "teacher"))
    source.requires_grad_()
    value = loss(source, target)
    (gradient,) = torch.autograd.grad(value, source)
    assert value.item() == pytest.approx(_REFERENCE[f"{name}/loss"].item(), abs=error)
    expected = torch.from_numpy(_REFERENCE[f"{name}/grad"]).double()
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def make_labels(logits: Tensor) -> Tensor:
    """Return labels of which one is -1, except for a batch of one."""
    rows, classes = logits.shape
    labels = (3 * torch.arange(rows) + 1) % classes
    labels[1:2] = -1
    return labels


def make_negatives(anchors: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = anchors.shape
    generator = torch.Generator().manual_seed(1)
    negatives = torch.randn(5, width, dtype=torch.float64, generator=generator)
    return negatives, (torch.arange(5) + torch.arange(rows)[:, None]) % 3 == 0


def make_scales(means: Tensor) -> Tensor:
    return torch.linspace(-1, 2, means.shape[1], dtype=torch.float64)


def average_pooled(maps: Array, height: int, width: int) -> Array:
    """Average maps over windows, as adaptive pooling does."""
    result = np.empty((*maps.shape[:2], height, width))
    for i, j in product(range(height), range(width)):
        rows = slice(i * maps.shape[2] // height, ceil((i + 1) * maps.shape[2] / height))
        columns = slice(j * maps.shape[3] // width, ceil((j + 1) * maps.shape[3] / width))
        result[:, :, i, j] = maps[:, :, rows, columns].mean((2, 3))
    return result


def pooled_to_equal_size(*maps: Array) -> Iterator[Array]:
    height, width = (min(sides) for sides in zip(*(m.shape[2:] for m in maps), strict=True))
    return (average_pooled(m, height, width) for m in maps)


def divergence(teacher: Array, student: Array) -> float:
    return float(rel_entr(teacher, student).sum())


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def cosine(a: Array, b: Array) -> float:
    length = sqrt(a @ a) * sqrt(b @ b)
    return float(a @ b) / length if length else 0.0


def soft_target(student: Array, teacher: Array) -> float:
    rows = zip(student, teacher, strict=True)
    return 9 * float(np.mean([divergence(softmax(t / 3), softmax(s / 3)) for s, t in rows]))


def standardized(student: Array, teacher: Array) -> float:
    scores = [(z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7) for z in (student, teacher)]
    return soft_target(*scores)


def decoupled(student: Array, teacher: Array) -> float:
    rows = []
    for label, s, t in zip(make_labels(torch.from_numpy(student)).tolist(), student, teacher, strict=True):
        if label >= 0:
            p, q = softmax(t / 2), softmax(s / 2)
            others = [np.delete(probabilities, label) for probabilities in (p, q)]
            target = divergence(np.array([p[label], others[0].sum()]), np.array([q[label], others[1].sum()]))
            rows.append(0.7 * target + 5 * divergence(*(other / other.sum() for other in others)))
    return 4 * float(np.mean(rows))


def dist(student: Array, teacher: Array) -> float:
    def distance(a: Array, b: Array) -> float:
        a, b = a - a.mean(), b - b.mean()
        return 1 - float(a @ b) / (sqrt(a @ a) * sqrt(b @ b) + 1e-8)

    p, q = ([softmax(row / 3) for row in logits] for logits in (student, teacher))
    samples = [distance(a, b) for a, b in zip(p, q, strict=True)]
    classes = [distance(a, b) for a, b in zip(np.transpose(p), np.transpose(q), strict=True)]
    return 9 * float(2 * np.mean(samples) + 3 * np.mean(classes))


def hint(student: Array, teacher: Array) -> float:
    pairs = zip(student.ravel().tolist(), teacher.ravel().tolist(), strict=True)
    return sum((s - t) ** 2 for s, t in pairs) / student.size


def hierarchical_context(student: Array, teacher: Array) -> float:
    levels = [student.shape[2:], *((k, k) for k in (4, 2, 1) if k < student.shape[2])]
    weights = [2.0**-k for k in range(len(levels))]
    errors = [hint(average_pooled(student, *level), average_pooled(teacher, *level)) for level in levels]
    return float(np.average(errors, weights=weights))


def attention(student: Array, teacher: Array) -> float:
    total = 0.0
    for s, t in zip(*pooled_to_equal_size(student, teacher), strict=True):
        where = [sum(channel.ravel() ** 2 for channel in maps) for maps in (s, t)]
        unit = [maps / sqrt(maps @ maps) for maps in where]
        total += sum((a - b) ** 2 for a, b in zip(*unit, strict=True))
    return total / len(student) / where[0].size


def neuron_selectivity(student: Array, teacher: Array) -> float:
    def mean_kernel(a: Array, b: Array) -> float:
        return sum(cosine(x.ravel(), y.ravel()) ** 2 for x in a for y in b) / len(a) / len(b)

    samples = zip(*pooled_to_equal_size(student, teacher), strict=True)
    return float(np.mean([mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t) for s, t in samples]))


def similarity(student: Array, teacher: Array) -> float:
    total = 0.0
    for i in range(len(student)):
        rows = [np.array([np.vdot(f[i], other) for other in f]) for f in (student, teacher)]
        total += sum((a - b) ** 2 for a, b in zip(*(row / sqrt(row @ row) for row in rows), strict=True))
    return total / len(student) ** 2


def probabilistic(student: Array, teacher: Array) -> float:
    def probabilities(f: Array, i: int) -> Array:
        unit = [row.ravel() / (sqrt(np.vdot(row, row)) + 1e-7) for row in f]
        kernel = np.array([(unit[i] @ other + 1) / 2 for other in unit])
        return kernel / kernel.sum()

    total = 0.0
    for i in range(len(student)):
        for p, q in zip(probabilities(teacher, i), probabilities(student, i), strict=True):
            total += p * log((p + 1e-7) / (q + 1e-7))
    return total / len(student) ** 2


def relational(student: Array, teacher: Array) -> float:
    count = len(student)
    pairs = [(i, j) for i, j in product(range(count), repeat=2) if i != j]

    def relations(f: Array) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int, int], float]]:
        f = f.reshape(count, -1)
        lengths = {(i, j): sqrt(((f[i] - f[j]) ** 2).sum()) for i, j in pairs}
        mean = sum(lengths.values()) / len(pairs) if pairs else 1.0
        angles = {(i, j, k): cosine(f[j] - f[i], f[k] - f[i]) for i, j in pairs for k in range(count)}
        return {pair: length / mean for pair, length in lengths.items()}, angles

    (lengths, angles), (other_lengths, other_angles) = relations(student), relations(teacher)
    distance = sum(huber(lengths[key] - other_lengths[key]) for key in lengths) / count**2
    return 20 * distance + 30 * sum(huber(angles[key] - other_angles[key]) for key in angles) / count**3


def correlation(student: Array, teacher: Array) -> float:
    errors = [abs(s - t).ravel() for s, t in zip(student, teacher, strict=True)]
    neighbours = [float(a @ b) for a, b in pairwise(errors)]
    return float(np.mean(neighbours)) if neighbours else 0.0


def variational(means: Array, teacher: Array) -> float:
    variances = np.log1p(np.exp(make_scales(torch.from_numpy(means)).numpy())) + 1e-5
    channels = zip(np.moveaxis(means, 1, 0), np.moveaxis(teacher, 1, 0), variances, strict=True)
    likelihoods = [norm.logpdf(t, loc=mean, scale=sqrt(variance)) for mean, t, variance in channels]
    return -float(np.mean(likelihoods)) - log(sqrt(2 * np.pi))


def contrastive(anchors: Array, positives: Array) -> float:
    negatives, excluded = (tensor.numpy() for tensor in make_negatives(torch.from_numpy(anchors)))
    total = 0.0
    for anchor, positive, without in zip(anchors, positives, excluded, strict=True):
        candidates = [positive, *(n for n, left_out in zip(negatives, without, strict=True) if not left_out)]
        total -= log(softmax([anchor @ candidate / 0.5 for candidate in candidates])[0])
    return total / len(anchors)


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


class Method(NamedTuple):
    loss: Loss
    formula: Callable[[Array, Array], float]
    shapes: Sequence[Shapes]
    """Shapes of student and teacher; the first pair is small enough for gradcheck."""


_LOGITS: list[Shapes] = [(shape, shape) for shape in [(3, 4), (1, 2), (2, 2), (7, 3), (2, 100), (5, 100)]]
_VECTORS: list[Shapes] = [
    ((3, 4), (3, 2)),
    ((1, 3), (1, 5)),
    ((2, 5), (2, 3)),
    ((9, 2), (9, 7)),
    ((4, 3, 2, 3), (4, 5)),
]
_SAME: list[Shapes] = [(shape, shape) for shape in [(3, 4), (1, 3), (2, 1), (7, 5), (3, 4, 2, 3)]]
_MAPS: list[Shapes] = [
    ((2, 3, 2, 3), (2, 2, 2, 3)),
    ((1, 4, 3, 5), (1, 1, 3, 5)),
    ((3, 2, 8, 8), (3, 5, 4, 4)),
    ((3, 5, 4, 6), (3, 2, 8, 12)),
    ((2, 3, 7, 5), (2, 4, 3, 5)),
    ((2, 3, 6, 2), (2, 3, 3, 4)),
    ((5, 3, 7, 7), (5, 2, 4, 4)),
]
_LEVELS: list[tuple[int, ...]] = [
    (2, 3, 3, 3),
    (3, 2, 1, 1),
    (1, 4, 2, 2),
    (2, 3, 4, 4),
    (3, 1, 7, 7),
    (2, 2, 16, 16),
    (2, 3, 6, 5),
]

_METHODS: dict[str, Method] = {
    "soft_target": Method(lambda s, t: soft_target_loss(s, t, temperature=3.0), soft_target, _LOGITS),
    "standardized": Method(
        lambda s, t: soft_target_loss(s, t, temperature=3.0, standardize=True), standardized, _LOGITS
    ),
    "decoupled": Method(
        lambda s, t: decoupled_loss(s, t, make_labels(s), alpha=0.7, beta=5.0, temperature=2.0), decoupled, _LOGITS
    ),
    "dist": Method(lambda s, t: dist_loss(s, t, beta=2.0, gamma=3.0, temperature=3.0), dist, _LOGITS),
    "hint": Method(hint_loss, hint, _SAME),
    "hierarchical_context": Method(
        hierarchical_context_loss, hierarchical_context, [(shape, shape) for shape in _LEVELS]
    ),
    "attention": Method(attention_loss, attention, _MAPS),
    "neuron_selectivity": Method(neuron_selectivity_loss, neuron_selectivity, _MAPS),
    "similarity": Method(similarity_loss, similarity, [*_VECTORS, *_MAPS]),
    "probabilistic": Method(probabilistic_loss, probabilistic, _VECTORS),
    "relational": Method(
        lambda s, t: relational_loss(s, t, distance_weight=20.0, angle_weight=30.0), relational, _VECTORS
    ),
    "correlation": Method(correlation_loss, correlation, _SAME),
    "variational": Method(
        lambda s, t: variational_loss(s, t, make_scales(s)),
        variational,
        [(shape, shape) for shape in [(2, 3, 2, 2), (1, 1, 1, 1), (3, 5, 4, 2), (1, 4, 7, 7)]],
    ),
    "contrastive": Method(
        lambda s, t: contrastive_loss(s, t, *make_negatives(s), temperature=0.5), contrastive, _SAME[:4]
    ),
}


def pair(shapes: Shapes) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return student, teacher


@pytest.mark.parametrize(
    ("name", "shapes"), [(name, shapes) for name, method in _METHODS.items() for shapes in method.shapes]
)
def test_matches_the_published_formula(name: str, shapes: Shapes) -> None:
    student, teacher = pair(shapes)
    if name == "standardized" and shapes == ((1, 2), (1, 2)):  # z-scores of two classes differ only in order
        student, teacher = torch.tensor([[[1.0, 3.0]], [[7.0, 2.0]]], dtype=torch.float64)
    value = _METHODS[name].loss(student, teacher)
    assert value.dtype == torch.float64
    assert value.shape == ()
    expected = _METHODS[name].formula(student.numpy(), teacher.numpy())
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", list(_METHODS))
def test_gradients_pass_gradcheck(name: str) -> None:
    student, teacher = (features.requires_grad_() for features in pair(_METHODS[name].shapes[0]))
    assert torch.autograd.gradcheck(_METHODS[name].loss, (student, teacher), atol=1e-8)
