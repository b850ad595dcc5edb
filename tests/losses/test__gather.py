"""Gathering rows of all ranks, in forked processes; a hang becomes an error of gloo after 20 seconds."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kd_lightning.features import Outputs
from kd_lightning.losses import (
    AdversarialLoss,
    AlignmentLoss,
    ContrastiveLoss,
    CoralLoss,
    CorrelationLoss,
    DistillationLoss,
    DistLoss,
    DistPlusLoss,
    KernelMeanMatchingLoss,
    MLLDLoss,
    MMDLoss,
    ProbabilisticLoss,
    QueueKLLoss,
    RelationalLoss,
    ReweightedLoss,
    SimilarityLoss,
    SKDLoss,
    USKDLoss,
)
from kd_lightning.losses._gather import all_gather_grad

Work = Callable[[int], Any]

SIZES = [(4, 4), (3, 5), (1, 4), (0, 3), (2, 5, 1)]
"""Rows of each rank."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded).*"),
    pytest.mark.timeout(90),
    pytest.mark.usefixtures("no_group_is_left"),
]


@pytest.fixture
def run_on_ranks(tmp_path: Path) -> Callable[[int, Work], list[Any]]:
    """Call ``work(rank)`` in several processes and return their results."""

    def run(world: int, work: Work) -> list[Any]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        mp.start_processes(_rank, (world, work, folder), nprocs=world, daemon=True, start_method="fork")
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return run


def _rank(rank: int, world: int, work: Work, folder: Path) -> None:
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", meeting, timedelta(seconds=20), world, rank)
    dist.barrier()  # a rank without work must not exit before the others have connected
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


RunOnRanks = Callable[[int, Work], list[Any]]


def pairwise_loss(vectors: Tensor) -> Tensor:
    """Return a loss that compares all pairs of rows and depends on their order."""
    place = torch.arange(1, len(vectors) + 1, dtype=vectors.dtype)
    return ((vectors @ vectors.T).square() * (place[:, None] + place.square())).mean()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_are_gathered_in_the_order_of_ranks(run_on_ranks: RunOnRanks, sizes: tuple[int, ...]) -> None:
    count = sum(sizes)
    full = {
        "vectors": torch.randn(count, 3),
        "maps": torch.randn(count, 2, 4, 4, dtype=torch.float64),
        "channels_last": torch.randn(count, 2, 4, 4).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, count).T,
        "labels": torch.arange(count) - 1,
        "bytes": torch.arange(count, dtype=torch.uint8),
        "flags": torch.arange(count) % 2 == 0,
    }

    def work(rank: int) -> dict[str, Tensor]:
        parts = [tensor.split(sizes)[rank] for tensor in full.values()]
        return dict(zip(full, all_gather_grad(*parts), strict=True))

    for found in run_on_ranks(len(sizes), work):
        for name, tensor in full.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_mean_gradient_over_ranks_equals_that_of_one_process(
    run_on_ranks: RunOnRanks, sizes: tuple[int, ...]
) -> None:
    """DDP averages the gradients of the weights, which are the same on all ranks."""
    images, weight = torch.randn(sum(sizes), 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    teacher = torch.randn(sum(sizes), 3, dtype=torch.float64)

    def work(rank: int) -> dict[str, Tensor]:
        own = weight.clone().requires_grad_()
        student, fixed = all_gather_grad((images.split(sizes)[rank] @ own).tanh(), teacher.split(sizes)[rank])
        assert student.requires_grad
        assert not fixed.requires_grad
        loss = pairwise_loss(student - fixed)
        loss.backward()
        assert own.grad is not None
        dist.all_reduce(own.grad)
        return {"loss": loss.detach(), "gradient": own.grad / len(sizes)}

    single = weight.clone().requires_grad_()
    loss = pairwise_loss((images @ single).tanh() - teacher)
    loss.backward()
    for found in run_on_ranks(len(sizes), work):
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found["gradient"], single.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_backward_sums_the_gradients_of_all_ranks(run_on_ranks: RunOnRanks, sizes: tuple[int, ...]) -> None:
    """Each rank computes a different loss; its rows get the gradients of all of them."""
    world, count = len(sizes), sum(sizes)
    full, factors = torch.randn(count, 3), torch.randn(world, count, 3)

    def work(rank: int) -> Tensor:
        own = full.split(sizes)[rank].clone().requires_grad_()
        (all_gather_grad(own)[0] * factors[rank]).sum().backward()
        assert own.grad is not None
        return own.grad

    torch.testing.assert_close(torch.cat(run_on_ranks(world, work)), factors.sum(0))


def test_the_gradient_matches_finite_differences(run_on_ranks: RunOnRanks) -> None:
    """The sum of the losses of all ranks is differentiated by finite differences."""
    sizes, step = (3, 5), 1e-6
    full = torch.randn(8, 2, dtype=torch.float64)

    def total(rank: int, rows: Tensor) -> Tensor:
        return (rank + 1) * pairwise_loss(all_gather_grad(rows)[0])

    def work(rank: int) -> list[Tensor]:
        own = full.split(sizes)[rank].clone().requires_grad_()
        total(rank, own).backward()
        differences = torch.zeros_like(full)
        for i in range(16):
            change = torch.zeros(16, dtype=torch.float64)
            change[i] = step
            up, down = (full + sign * change.view(8, 2) for sign in (1, -1))
            losses = torch.stack([total(rank, rows.split(sizes)[rank]) for rows in (up, down)])
            dist.all_reduce(losses)
            differences.view(-1)[i] = (losses[0] - losses[1]) / (2 * step)
        assert own.grad is not None
        return [own.grad, differences.split(sizes)[rank]]

    for gradient, differences in run_on_ranks(2, work):
        torch.testing.assert_close(gradient, differences, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(run_on_ranks: RunOnRanks, dtype: torch.dtype) -> None:
    """The sum over ranks is then taken in float32: in half precision 2049 - 2048 would be 0."""
    full = torch.randn(5, 3).to(dtype)

    def work(rank: int) -> dict[str, Tensor]:
        own = full.split((2, 3))[rank].clone().requires_grad_()
        rows, labels = all_gather_grad(own, torch.full((len(own),), rank))
        (rows * torch.tensor([2049.0, -2048.0])[rank]).sum().backward()
        assert own.grad is not None
        return {"rows": rows.detach(), "labels": labels, "gradient": own.grad}

    for found in run_on_ranks(2, work):
        assert found["rows"].dtype == torch.float32
        assert torch.equal(found["rows"], full.float())
        assert found["labels"].tolist() == [0, 0, 1, 1, 1]
        assert found["gradient"].dtype == dtype
        assert (found["gradient"] == 1).all()


def test_inactive_gathering_returns_the_same_tensors(run_on_ranks: RunOnRanks) -> None:
    """Ranks that do not gather need not wait for each other: only one of them calls."""

    def work(rank: int) -> bool:
        rows, labels = torch.randn(3, 2, dtype=torch.float16), torch.arange(3)
        found = all_gather_grad(rows, labels, active=False) if rank == 0 else (rows, labels)
        return found[0] is rows and found[1] is labels and found[0].dtype == torch.float16

    assert run_on_ranks(2, work) == [True, True]


LOSSES: list[DistillationLoss | AlignmentLoss] = [
    SimilarityLoss(student_layers=["avgpool"]),
    ProbabilisticLoss(),
    RelationalLoss(),
    CorrelationLoss(dimensions=4),
    DistLoss(),
    DistPlusLoss(student_layers=["avgpool"]),
    MLLDLoss(),
    SKDLoss(),
    USKDLoss(student_layers=["avgpool"]),
    QueueKLLoss(queue_size=8),
    ContrastiveLoss(dimensions=4, queue_size=8),
    MMDLoss(),
    CoralLoss(),
    AdversarialLoss(hidden=4),
    ReweightedLoss(),
    KernelMeanMatchingLoss(),
]

Adaptation = MMDLoss | CoralLoss | AdversarialLoss | ReweightedLoss | KernelMeanMatchingLoss
ADAPTATION: list[Adaptation] = [
    MMDLoss(layers=["a", "b"]),
    CoralLoss(layers=["a"]),
    AdversarialLoss(layers=["a", "b"], hidden=4),
    AdversarialLoss(layers=["a"], conditional=True, entropy_weighted=True, hidden=4),
    ReweightedLoss(layer="a", hidden=4),
    KernelMeanMatchingLoss(layer="a"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_losses_do_not_gather_in_eval_mode(run_on_ranks: RunOnRanks, loss: DistillationLoss | AlignmentLoss) -> None:
    """Ranks may evaluate different numbers of batches: only one of them calls here."""
    student, teacher = (Outputs(torch.randn(6, 5), {"avgpool": torch.randn(6, 3)}) for _ in range(2))
    loss.build(student, teacher)
    loss.eval()

    def work(rank: int) -> Tensor:
        return loss(student, teacher, torch.arange(6) % 5).detach() if rank == 0 else torch.zeros(())

    found, _ = run_on_ranks(2, work)
    assert torch.equal(found, loss(student, teacher, torch.arange(6) % 5))


@pytest.mark.parametrize("loss", ADAPTATION, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("sizes", [((4, 4), (4, 4)), ((3, 5), (6, 2))], ids=str)
def test_alignment_losses_on_two_ranks_equal_those_of_one_process(
    run_on_ranks: RunOnRanks, loss: Adaptation, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """Value, metrics and the gradient of the network and of the learned parts, after DDP's averaging."""
    images, weight = torch.randn(2, 8, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0])
    loss.progress = torch.tensor(0.3)
    loss.build(*(Outputs(torch.zeros(2, 3), {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}) for _ in range(2)))
    loss.double()
    for parameter in loss.parameters():  # some start at zero
        torch.nn.init.normal_(parameter)

    def step(source: Tensor, target: Tensor, given: Tensor) -> list[Tensor]:
        loss.zero_grad()
        own = weight.clone().requires_grad_()
        logits = [(x @ own).tanh() for x in (source, target)]
        value = loss(*(Outputs(2 * z, {"a": z, "b": z.square()}) for z in logits), given)
        value.backward()
        gradients = [parameter.grad for parameter in (own, *loss.parameters())]
        assert all(gradient is not None for gradient in gradients)
        return [value.detach(), *loss.metrics.values(), *(g for g in gradients if g is not None)]

    def work(rank: int) -> list[Tensor]:
        parts = [rows.split(s)[rank] for rows, s in zip((*images, labels), (*sizes, sizes[0]), strict=True)]
        found = step(*parts)
        for tensor in found:
            dist.all_reduce(tensor)
            tensor /= 2
        return found

    single = step(images[0], images[1], labels)
    for found in run_on_ranks(2, work):
        for tensor, expected in zip(found, single, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-12)
    if type(loss) is not AdversarialLoss:  # which is a mean over samples
        loss.gather = False
        assert not torch.allclose(run_on_ranks(2, work)[0][0], single[0], rtol=1e-6)
        loss.gather = True


def test_a_group_of_one_returns_the_same_tensors(run_on_ranks: RunOnRanks) -> None:
    def work(rank: int) -> bool:
        rows = torch.randn(3, 2, dtype=torch.float16)
        return all_gather_grad(rows)[0] is rows

    assert run_on_ranks(1, work) == [True]


def test_without_a_process_group_the_same_tensors_are_returned() -> None:
    rows, labels = torch.randn(3, 2, dtype=torch.float16, requires_grad=True), torch.arange(3)
    for active in (True, False):
        found = all_gather_grad(rows, labels, active=active)
        assert found[0] is rows
        assert found[1] is labels
