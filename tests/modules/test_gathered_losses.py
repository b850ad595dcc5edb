"""Losses that compare samples gather the batch of all ranks: two processes equal one, in float64."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from unusual_networks import with_group_norms

from kd_lightning import DigitsDataModule, DistillationModule
from kd_lightning.features import Outputs
from kd_lightning.losses import (
    CATKDLoss,
    ContrastiveLoss,
    CorrelationLoss,
    DistillationLoss,
    DistLoss,
    DistPlusLoss,
    HardDistillationLoss,
    HardTargetLoss,
    HeadLoss,
    MLLDLoss,
    OFALoss,
    ProbabilisticLoss,
    QueueKLLoss,
    RelationalLoss,
    RSDLoss,
    SimilarityLoss,
    SKDLoss,
    SoftTargetLoss,
    SRDLoss,
    USKDLoss,
    VkDLoss,
)
from kd_lightning.networks import ResNet

Networks = Callable[..., ResNet]
Losses = dict[str, DistillationLoss]
Fit = Callable[..., list[dict[str, Any]]]

STEPS = 3

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-13)
assert_close_in_float32 = partial(torch.testing.assert_close, rtol=1e-5, atol=0)  # logged metrics are float32

pytestmark = [
    pytest.mark.usefixtures("no_group_is_left"),
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|have no `val_dataloader`).*"),
]


def gathered_losses(gather: bool = True) -> Losses:
    """Return the losses that gather, weighted to be of similar size."""
    layers = ["layer2"]
    return {
        "similarity": SimilarityLoss(student_layers=layers, gather=gather),
        "probabilistic": ProbabilisticLoss(weight=1e7, gather=gather),
        "relational": RelationalLoss(gather=gather),
        "correlation": CorrelationLoss(dimensions=8, weight=1.0, gather=gather),
        "dist": DistLoss(gather=gather),
        "skd": SKDLoss(gather=gather),
        "uskd": USKDLoss(weight=10.0, gather=gather),
        "label_free": QueueKLLoss(queue_size=200, gather=gather),
        "dist_plus": DistPlusLoss(student_layers=layers, gather=gather),
        "mlld": MLLDLoss(gather=gather),
        "contrastive": ContrastiveLoss(dimensions=8, queue_size=200, gather=gather),  # between 64 and 3 * 128
        "rsd": RSDLoss(gather=gather),
        "srd": SRDLoss(weight=0.1, student_layers=layers, gather=gather),
    }


NAMES = list(gathered_losses())
OWN_ANCHORS = ("contrastive", "label_free")
"""Losses that gather a queue, and are means over the samples of a rank."""


class MeanOfHalves(DistillationLoss):
    """The mean of a loss over the halves of a batch, as two ranks compute it without gathering.

    Each half has its own buffers, as each rank has.
    """

    def __init__(self, loss: DistillationLoss) -> None:
        super().__init__(weight=loss.weight, student_layers=loss.student_layers)
        self.teacher_layers = loss.teacher_layers
        self.loss = loss
        self.buffers_of_halves: list[dict[str, Tensor]] = [{}, {}]

    def build(self, student: Outputs, teacher: Outputs, **networks: Any) -> None:
        self.loss.build(student, teacher, **networks)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        terms = []
        for half in range(2):
            for name, buffer in self.buffers_of_halves[half].items():
                setattr(self.loss, name, buffer)
            start = (
                {name: buffer.clone() for name, buffer in self.loss.named_buffers()}
                if not self.buffers_of_halves[half]
                else {}
            )
            terms.append(self.loss(_half(student, half), _half(teacher, half), labels.chunk(2)[half]))
            self.buffers_of_halves[half] = dict(self.loss.named_buffers())
            for name, buffer in start.items():
                setattr(self.loss, name, buffer)
        return torch.stack(terms).mean()


def _half(outputs: Outputs, half: int) -> Outputs:
    return Outputs(outputs.logits.chunk(2)[half], {n: f.chunk(2)[half] for n, f in outputs.features.items()})


class WriteRankSteps(pl.Callback):
    """Writes values and gradients of each step to a file that the parent process can read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, list[Tensor]] = {}
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for name, term in pl_module.losses.terms.items():
            self.values[name] = []
            term.register_forward_hook(partial(self._record_value, name))

    def _record_value(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.values[name].append(output.detach().clone())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Record the gradients, which DDP has averaged."""
        trained = {name: weight for name, weight in pl_module.named_parameters() if weight.requires_grad}
        assert all(weight.grad is not None for weight in trained.values())
        self.gradients.append({name: weight.grad.clone() for name, weight in trained.items()})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        values = {name: torch.stack(steps) for name, steps in self.values.items()}
        metrics = {k: v for k, v in trainer.callback_metrics.items() if k.split("/")[-1] in self.values}
        state = {"values": values, "gradients": self.gradients, "weights": pl_module.state_dict(), "metrics": metrics}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


def _cast_input(network: nn.Module, args: Any) -> Tensor:
    return args[0].to(next(network.parameters()).dtype)


def _without_batch_statistics(network: nn.Module) -> nn.Module:
    """Replace batch norms, so that a batch can be divided; float32 images are cast to the type of the weights."""
    with_group_norms(network)
    network.register_forward_pre_hook(_cast_input)
    return network


@pytest.fixture
def fit(small: Networks, make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> Fit:
    """Train the same student with some losses, and return the steps of each rank."""

    def run(world: int, losses: Losses, loader: DataLoader | None = None) -> list[dict[str, Any]]:
        torch.manual_seed(1)
        student, teacher = _without_batch_statistics(small()), _without_batch_statistics(small(8))
        module = DistillationModule(student, teacher, losses=losses, teacher_check="off", learning_rate=0.01)
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        # ddp_fork with a timeout, so that a rank that hangs is an error
        gloo = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=20))
        trainer = make_trainer(
            precision="64-true",
            callbacks=[WriteRankSteps(folder)],
            limit_train_batches=STEPS,
            limit_val_batches=0,
            devices=world,
            **({"strategy": gloo} if world > 1 else {}),
        )
        trainer.fit(module, DigitsDataModule(batch_size=128 // world) if loader is None else loader)
        ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
        for rank in ranks:
            assert len(rank["gradients"]) == STEPS
        return ranks

    return run


def assert_ranks_equal(first: dict[str, Any], second: dict[str, Any], except_for: tuple[str, ...] = ()) -> None:
    for key, value in first["weights"].items():
        different = not torch.equal(value, second["weights"][key])
        assert not different or any(part in key for part in except_for), f"the ranks differ in {key}"


def assert_same_training(rank: dict[str, Any], single: dict[str, Any], except_for: tuple[str, ...] = ()) -> None:
    for found, expected in zip(rank["gradients"], single["gradients"], strict=True):
        assert set(found) == {name.replace(".loss.", ".") for name in expected}
        for name, gradient in expected.items():
            assert_close(found[name.replace(".loss.", ".")], gradient, msg=f"{name}: {{}}".format)
    for name, weight in single["weights"].items():
        if not any(part in name for part in except_for):
            assert_close(rank["weights"][name.replace(".loss.", ".")], weight)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(fit: Fit, name: str) -> None:
    (single,) = fit(1, {"hard": HardTargetLoss(), name: gathered_losses()[name]})
    first, second = ranks = fit(2, {"hard": HardTargetLoss(), name: gathered_losses()[name]})
    assert single["gradients"][0]["network.conv1.weight"].dtype == torch.float64
    assert_ranks_equal(first, second)
    assert_same_training(first, single)
    assert_close((first["values"][name] + second["values"][name]) / 2, single["values"][name])
    for rank in ranks:
        if name not in OWN_ANCHORS:
            assert_close(rank["values"][name], single["values"][name])
        assert_close_in_float32(rank["metrics"][f"train/{name}"], single["metrics"][f"train/{name}"])
    weighted = gathered_losses()[name].weight * single["values"][name][1:]  # ContrastiveLoss is 0 in the first step
    assert (weighted > 0.02).all(), "the term is too small to show in the gradient"


def losses_of_samples() -> Losses:
    """Return losses that are means over samples, and need nothing of other ranks."""
    return {
        "catkd": CATKDLoss(student_layers=["layer2"]),
        "ofa": OFALoss(student_layers=["layer1", "layer2"], eps=1.5),
        "vkd": VkDLoss(student_layers=["layer2"]),
        "head": HeadLoss(HardDistillationLoss(), student_head="fc"),
    }


def test_means_over_the_samples_of_two_processes_equal_one(fit: Fit) -> None:
    (single,) = fit(1, losses_of_samples())
    first, second = fit(2, losses_of_samples())
    assert_ranks_equal(first, second)
    assert_same_training(first, single)
    for name in losses_of_samples():
        assert_close((first["values"][name] + second["values"][name]) / 2, single["values"][name])


@pytest.mark.parametrize("queue_size", [100, 128, 1000])
def test_all_ranks_have_the_queue_of_one_process(fit: Fit, queue_size: int) -> None:
    """With queues smaller than a batch, as large, and larger than all batches together."""

    def losses() -> Losses:
        return {"hard": HardTargetLoss(), "contrastive": ContrastiveLoss(dimensions=8, queue_size=queue_size)}

    (single,) = fit(1, losses())
    first, second = fit(2, losses())
    assert_ranks_equal(first, second)
    assert_same_training(first, single)  # compares the queues as well
    found = {name: first["weights"][f"losses.contrastive.{name}"] for name in ("queues", "queue_labels", "position")}
    assert int((found["queue_labels"] >= 0).sum()) == min(queue_size, 128 * STEPS)
    assert int((found["queues"].abs().sum((0, 1, 3)) > 0).sum()) == min(queue_size, 128 * STEPS)
    assert int(found["position"]) == (STEPS * min(queue_size, 128)) % queue_size


def test_without_gathering_each_rank_compares_its_own_samples(fit: Fit) -> None:
    (gathered,) = fit(1, {"hard": HardTargetLoss(), **gathered_losses()})
    halves: Losses = {name: MeanOfHalves(loss) for name, loss in gathered_losses().items()}
    (single,) = fit(1, {"hard": HardTargetLoss(), **halves})
    first, second = fit(2, {"hard": HardTargetLoss(), **gathered_losses(gather=False)})
    assert_ranks_equal(first, second, except_for=(".queue", ".norm.running_"))
    assert_same_training(first, single, except_for=(".queue", ".norm.running_", ".norm.num_batches_"))
    for name in NAMES:
        mean = (first["values"][name] + second["values"][name]) / 2
        assert_close(mean, single["values"][name])
        step = 1 if name == "contrastive" else 0  # its queue is empty in the first step
        for other in (first, second):
            difference = (gathered["values"][name] - other["values"][name])[step].abs()
            assert difference > 1e-5 * gathered["values"][name][step], f"{name} does not depend on gather"
    for name in ("queues", "queue_labels"):
        key = f"losses.contrastive.{name}"
        assert not torch.equal(first["weights"][key], second["weights"][key])


def test_all_losses_together_equal_one_process(fit: Fit) -> None:
    def losses() -> Losses:
        return {"hard": HardTargetLoss(weight=0.1), "soft": SoftTargetLoss(4.0, weight=0.9), **gathered_losses()}

    (single,) = fit(1, losses())
    first, second = fit(2, losses())
    assert_ranks_equal(first, second)
    assert_same_training(first, single)
    for name in losses():
        mean = (first["values"][name] + second["values"][name]) / 2
        assert_close(mean, single["values"][name])
        assert_close_in_float32(first["metrics"][f"train/{name}"], single["metrics"][f"train/{name}"])


class UnevenSampler(DistributedSampler):
    """Divides three batches of 40 samples between two ranks: 8 and 8, 8 and 8, 5 and 3."""

    def __init__(self) -> None:
        super().__init__(TensorDataset(torch.zeros(40)), num_replicas=2, rank=0)

    def __iter__(self) -> Iterator[int]:
        last = range(32, 37) if dist.get_rank() == 0 else range(37, 40)
        rows = range(8) if dist.get_rank() == 0 else range(8, 16)
        return iter([*rows, *(16 + row for row in rows), *last])

    def __len__(self) -> int:
        return 21 if dist.get_rank() == 0 else 19


def _user_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.rand(40, 1, 8, 8, generator=generator), torch.arange(40) % 10)


def test_a_last_batch_of_unequal_parts_equals_one_process(fit: Fit) -> None:
    """Of terms that gather; others are means over the samples of a rank."""

    def losses() -> Losses:
        return {name: loss for name, loss in gathered_losses().items() if name not in OWN_ANCHORS}

    (single,) = fit(1, losses(), DataLoader(_user_data(), batch_size=16))
    first, second = fit(2, losses(), DataLoader(_user_data(), batch_size=8, sampler=UnevenSampler()))
    assert_ranks_equal(first, second)
    assert_same_training(first, single)
    for name in losses():
        for rank in (first, second):
            assert_close(rank["values"][name], single["values"][name])
            assert_close_in_float32(rank["metrics"][f"train/{name}"], single["metrics"][f"train/{name}"])


def test_the_queue_accepts_batches_of_unequal_parts(fit: Fit) -> None:
    """Both ranks stay equal, and the queue has each sample once."""
    losses: Losses = {"hard": HardTargetLoss(), "soft": SoftTargetLoss(), **gathered_losses()}
    first, second = fit(2, losses, DataLoader(_user_data(), batch_size=8, sampler=UnevenSampler()))
    assert_ranks_equal(first, second)
    labels = first["weights"]["losses.contrastive.queue_labels"]
    assert labels[:40].tolist() == [i % 10 for i in range(40)]
    assert (labels[40:] < 0).all()
    assert int(first["weights"]["losses.contrastive.position"]) == 40
    assert all(value.isfinite().all() for value in first["weights"].values())
