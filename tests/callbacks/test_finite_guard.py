"""NaN and infinity never reach the weights, and the error names where they come from."""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from resume_check import SaveAfterEachBatch
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import data_check, finite_guard
from kd_lightning.callbacks.epoch_metrics import EpochMetrics
from kd_lightning.callbacks.finite_guard import FiniteGuard, StepRecord
from kd_lightning.losses import ContrastiveLoss, HardTargetLoss, SoftTargetLoss
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|have no `val_dataloader`|drop_last).*"),
]
SGD: Any = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
FUSED: Any = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, fused=True)
FUSED_ADAM: Any = partial(torch.optim.Adam, lr=0.01, fused=True)
NAN, INF = float("nan"), float("inf")


def network(width: int = 4) -> ResNet:
    return ResNet([1], [width], in_channels=1)


def batches(*bad: int, count: int = 6, by: float = NAN, size: int = 4) -> DataLoader:
    """Return a loader that does not shuffle; in the bad batches one pixel has the given value."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, size, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (count, size), generator=generator)
    images[list(bad), 0, 0, 0, 0] = by
    return DataLoader(TensorDataset(images.flatten(0, 1), labels.flatten()), batch_size=size)


def teacher_module(**options: Any) -> TeacherModule:
    torch.manual_seed(1)
    return TeacherModule(network(), **options)


def distillation_module(teacher: nn.Module | None = None, **options: Any) -> DistillationModule:
    torch.manual_seed(1)
    return DistillationModule(network(), teacher or network(8), teacher_check="off", **options)


class TeacherFailingAfter(nn.Module):
    """Returns NaN after a number of calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.body, self.calls = network(8), calls

    def forward(self, images: Tensor) -> Tensor:
        assert not images.isnan().all()  # cannot be traced, so the teacher is not folded
        self.calls -= 1
        return self.body(images) * (1.0 if self.calls >= 0 else NAN)


class LossWithNanGradient(HardTargetLoss):
    """A finite loss, whose gradient is NaN while it is active."""

    def forward(self, student: Any, teacher: Any, labels: Tensor) -> Tensor:
        zero = (student.logits - student.logits.detach()).sum()
        return super().forward(student, teacher, labels) + (zero.sqrt() if self.active else zero)

    active = False


class RecordStates(pl.Callback):
    """Records the state before training and after each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states.append(state_of(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.states.append(state_of(trainer))


def state_of(trainer: pl.Trainer) -> dict[str, Tensor]:
    """Return copies of weights, buffers, and the state of the optimizer."""
    state = dict(trainer.lightning_module.state_dict())
    for number, group in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"{number} {name}": torch.as_tensor(value) for name, value in group.items() if value is not None}
    return {name: value.clone() for name, value in state.items()}


def states_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def fit(make_trainer: Trainers, module: Any, loader: Any, **options: Any) -> tuple[pl.Trainer, list[dict[str, Tensor]]]:
    record = RecordStates()
    trainer = make_trainer(callbacks=[record, *options.pop("callbacks", [])], **options)
    trainer.fit(module, loader)
    return trainer, record.states


# --- on_nonfinite="stop"


@pytest.mark.parametrize("by", [NAN, INF, -INF])
def test_a_nonfinite_image_stops_training_and_the_error_names_the_step(make_trainer: Trainers, by: float) -> None:
    module, record = teacher_module(), RecordStates()
    sentence = (
        r"Epoch 0, step 3: the term 'loss' is nan \(images in \[-[\d.]+, [\d.]+\] but for 1 of 256 values; logits in "
    )
    with pytest.raises(ValueError, match=sentence):
        make_trainer(callbacks=[record]).fit(module, batches(3, by=by))
    assert len(record.states) == 1 + 3
    for name, value in module.named_parameters():
        assert torch.equal(value, record.states[-1][name]), name


def test_nonfinite_logits_of_the_teacher_are_named(make_trainer: Trainers) -> None:
    module, record = distillation_module(TeacherFailingAfter(4)), RecordStates()
    sentence = r"the term 'soft' is nan .*; the teacher's logits in \[\] but for 40 of 40 values;"
    with pytest.raises(ValueError, match=sentence):
        make_trainer(callbacks=[record]).fit(module, batches())
    assert len(record.states) > 1  # some steps were finite
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_an_infinite_loss_of_finite_terms_stops_training(make_trainer: Trainers) -> None:
    module = distillation_module(losses={"hard": HardTargetLoss(weight=3e38), "soft": SoftTargetLoss(4.0, weight=3e38)})
    with pytest.raises(ValueError, match="Epoch 0, step 0: the term 'loss' is inf"):
        make_trainer().fit(module, batches())


def test_a_nonfinite_gradient_stops_training_and_is_named(make_trainer: Trainers) -> None:
    loss = LossWithNanGradient()
    module = distillation_module(losses={"hard": loss}, on_nonfinite="stop")

    class ActivateInThirdBatch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            loss.active = batch_idx == 2

    with pytest.raises(ValueError, match=r"step 2: the gradient of 'network\.conv1\.weight' is in \[\] but for"):
        make_trainer(callbacks=[ActivateInThirdBatch()]).fit(module, batches())


def test_the_last_finite_checkpoint_is_kept_and_none_is_saved_on_the_exception(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_exception=True)
    record = RecordStates()
    with pytest.raises(ValueError, match="step 5"):
        make_trainer(callbacks=[record, saves], enable_checkpointing=True).fit(teacher_module(), batches(5))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]
    for step in (2, 4):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert all(torch.equal(value, record.states[step][name]) for name, value in saved["state_dict"].items())
        assert saved["epoch_metrics"]["sums"].isfinite().all()


class InfiniteLoss(HardTargetLoss):
    """An infinite loss with a finite gradient."""

    def forward(self, student: Any, teacher: Any, labels: Tensor) -> Tensor:
        return super().forward(student, teacher, labels) + INF


def test_an_infinite_loss_with_a_finite_gradient_stops_training(make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match="step 0: the term 'hard' is inf"):
        make_trainer().fit(distillation_module(losses={"hard": InfiniteLoss()}), batches())


def test_a_module_can_be_copied_and_trained_again(make_trainer: Trainers) -> None:
    module = teacher_module(on_nonfinite="skip")
    fit(make_trainer, module, batches(5))
    copy.deepcopy(module)
    guard = module.finite_guard
    assert all(value.dim() == 0 for value in vars(guard).values() if isinstance(value, Tensor))
    assert guard._snapshot is None
    fit(make_trainer, module, batches(), callbacks=[EMAWeightAveraging()])

    class CopyGuard(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copy.deepcopy(pl_module.finite_guard)

    fit(make_trainer, module, batches(), accumulate_grad_batches=2, callbacks=[CopyGuard()])


# --- on_nonfinite="skip"


def losses_with_queue() -> dict[str, Any]:
    return {"hard": HardTargetLoss(), "crd": ContrastiveLoss(queue_size=64, dimensions=8)}


SKIP_CONFIGURATIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SGD": (teacher_module, {}),
    "no fused kernel": (partial(teacher_module, optimizer=SGD), {}),
    "Adam": (partial(teacher_module, optimizer=partial(torch.optim.Adam, lr=0.01)), {}),
    "fused AdamW": (partial(teacher_module, optimizer=partial(torch.optim.AdamW, lr=0.01, fused=True)), {}),
    "distillation": (distillation_module, {}),
    "clipping": (teacher_module, {"gradient_clip_val": 0.5}),
    "clipping by value": (teacher_module, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}),
    "averaged": (teacher_module, {"callbacks": [EMAWeightAveraging()]}),
    "bfloat16": (distillation_module, {"precision": "bf16-mixed"}),
    "float64": (distillation_module, {"precision": "64-true"}),
}


@pytest.mark.parametrize("name", SKIP_CONFIGURATIONS)
@pytest.mark.parametrize("bad", [(0,), (2, 3), (5,)])
def test_a_skipped_step_changes_no_state(name: str, bad: tuple[int, ...], make_trainer: Trainers) -> None:
    build, options = SKIP_CONFIGURATIONS[name]
    trainer, states = fit(make_trainer, build(on_nonfinite="skip"), batches(*bad), **options)
    for step in range(6):
        assert states_equal(states[step], states[step + 1]) == (step in bad), step
    assert all(value.isfinite().all() for value in states[-1].values())
    assert trainer.callback_metrics["train/skipped_steps"] == len(bad)
    if "averaged" in name:  # the module now has the averaged weights
        assert all(value.isfinite().all() for value in trainer.lightning_module.state_dict().values())


def test_a_skipped_step_restores_the_queue(make_trainer: Trainers) -> None:
    _, states = fit(make_trainer, distillation_module(losses=losses_with_queue(), on_nonfinite="skip"), batches(2))
    assert states_equal(states[2], states[3])
    assert not torch.equal(states[1]["losses.crd.queues"], states[2]["losses.crd.queues"])
    assert states[-1]["losses.crd.position"] == 5 * 4


def test_a_step_with_a_nonfinite_gradient_is_skipped(make_trainer: Trainers) -> None:
    loss = LossWithNanGradient()

    class ActivateInThirdBatch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            loss.active = batch_idx == 2

    module = distillation_module(losses={"hard": loss}, on_nonfinite="skip")
    trainer, states = fit(make_trainer, module, batches(), callbacks=[ActivateInThirdBatch()])
    assert [states_equal(states[step], states[step + 1]) for step in range(6)] == [step == 2 for step in range(6)]
    assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.parametrize("accumulated", [1, 2, 3, 4])
def test_epoch_means_leave_out_skipped_steps(make_trainer: Trainers, accumulated: int) -> None:
    losses: list[float] = []

    class RecordLosses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]) * accumulated)

    module = teacher_module(on_nonfinite="skip")
    trainer, _ = fit(make_trainer, module, batches(3), accumulate_grad_batches=accumulated, callbacks=[RecordLosses()])
    step = 3 // accumulated
    good = [loss for number, loss in enumerate(losses) if number // accumulated != step]
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(good) / len(good), rel=1e-5)
    assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.parametrize("bad", [2, 3])
def test_under_accumulation_all_batches_of_a_step_are_skipped(make_trainer: Trainers, bad: int) -> None:
    trainer, states = fit(make_trainer, teacher_module(on_nonfinite="skip"), batches(bad), accumulate_grad_batches=2)
    assert states_equal(states[2], states[4])
    assert not states_equal(states[4], states[6])
    assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.parametrize("bad", [2, 3])
def test_under_accumulation_the_error_describes_the_nonfinite_batch(make_trainer: Trainers, bad: int) -> None:
    with pytest.raises(ValueError, match=r"step 1: the term 'loss' is nan \(images in \S+ \S+ but for 1 of"):
        make_trainer(accumulate_grad_batches=2).fit(teacher_module(), batches(bad))


def test_an_epoch_in_which_every_step_is_skipped_is_an_error(make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match=r"No step of epoch 0 was finite; check the images and the teacher, or lower"):
        make_trainer().fit(teacher_module(on_nonfinite="skip"), batches(*range(6)))


def test_skipped_steps_are_counted_per_epoch(make_trainer: Trainers) -> None:
    counts: list[float] = []

    class RecordSkippedSteps(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch:
                counts.append(float(trainer.callback_metrics["train/skipped_steps"]))

    estimation_loader = batches()
    loaders = iter([estimation_loader, batches(1, 2), batches(), batches(4), batches()])

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return next(loaders)

    trainer = make_trainer(max_epochs=4, reload_dataloaders_every_n_epochs=1, callbacks=[RecordSkippedSteps()])
    trainer.fit(teacher_module(on_nonfinite="skip", optimizer=SGD), Data())
    assert counts == [2, 0, 1]


def test_skipped_steps_are_not_logged_when_training_stops_instead(make_trainer: Trainers) -> None:
    trainer, _ = fit(make_trainer, teacher_module(), batches())
    assert "train/skipped_steps" not in trainer.callback_metrics


def test_cached_nan_logits_of_one_view_are_an_error(make_trainer: Trainers) -> None:
    """All steps of the epoch that shows the view are skipped."""
    teacher = TeacherFailingAfter(10**6)
    module = distillation_module(teacher, teacher_cache=True, on_nonfinite="skip")
    data = DigitsDataModule(batch_size=512, views=2)

    class BreakTeacher(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.frozen_teacher.inference_network.calls = 0  # the copy that computes the cache

    with pytest.raises(ValueError, match="No step of epoch 1 was finite"):
        make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[BreakTeacher()]).fit(module, data)
    assert all(value.isfinite().all() for value in module.state_dict().values())


class ResumableData(pl.LightningDataModule):
    """A data module whose loader can resume within an epoch."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = bad

    def train_dataloader(self) -> DataLoader:
        return ResumableLoader(batches(*self.bad).dataset, batch_size=4)


class ResumableLoader(DataLoader):
    position = first = 0

    def __iter__(self) -> Any:
        self.position, self.first = self.first, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= self.position:
                self.position += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["taken"]


@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize(
    "build",
    [partial(teacher_module), partial(distillation_module, losses=losses_with_queue())],
    ids=["teacher", "queue"],
)
def test_a_run_with_skipped_steps_resumes_to_identical_state(
    build: Any, accumulated: int, make_trainer: Trainers, tmp_path: Path
) -> None:
    options, bad = {"accumulate_grad_batches": accumulated}, (4,) if accumulated == 3 else (1, 4)
    if "losses" in build.keywords:
        build = partial(distillation_module, losses=losses_with_queue())  # losses with state belong to one module
    trainer, _ = fit(
        make_trainer,
        build(on_nonfinite="skip"),
        ResumableData(*bad),
        callbacks=[SaveAfterEachBatch(tmp_path)],
        **options,
    )
    expected, metrics = state_of(trainer), trainer.callback_metrics
    for number in range(1, 7):
        trainer = make_trainer(**options)
        if "losses" in build.keywords:
            build = partial(distillation_module, losses=losses_with_queue())
        module = build(on_nonfinite="skip")
        trainer.fit(module, ResumableData(*bad), ckpt_path=tmp_path / f"{number}.ckpt", weights_only=True)
        assert states_equal(expected, state_of(trainer)), number
        for name in ("train/loss", "train/accuracy", "train/skipped_steps"):
            assert torch.equal(trainer.callback_metrics[name], metrics[name]), (name, number)


# --- labels


class UserDataModule(pl.LightningDataModule):
    """Has class names, and does not check its labels."""

    classes = tuple("abcdefghij")

    def __init__(self, loader: DataLoader) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> DataLoader:
        return self.loader


def set_label(loader: DataLoader, label: int) -> None:
    """Set the label of an image of the third batch."""
    assert isinstance(loader.dataset, TensorDataset)
    loader.dataset.tensors[1][9] = label


class ChangeLabel(pl.Callback):
    """Sets a label before an epoch."""

    def __init__(self, epoch: int, label: int) -> None:
        self.epoch, self.label = epoch, label

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch - 1:
            assert trainer.train_dataloader is not None
            set_label(trainer.train_dataloader, self.label)


@pytest.mark.parametrize("label", [-2, 10, 10**6])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("wrap", [lambda loader: loader, UserDataModule], ids=["loader", "data module"])
def test_labels_out_of_range_stop_training(
    label: int, epoch: int, wrap: Callable[[DataLoader], Any], make_trainer: Trainers
) -> None:
    loader = batches()
    if epoch == 0:
        set_label(loader, label)
    record = RecordStates()
    with pytest.raises(ValueError, match=rf"Label {label} is outside \[0, 10\).*correct the labels"):
        make_trainer(max_epochs=2, callbacks=[record, ChangeLabel(epoch, label)]).fit(
            distillation_module(), wrap(loader)
        )
    assert len(record.states) == 1 + 6 * epoch + 2  # training stopped before the third batch


def test_labels_out_of_range_after_a_resume(make_trainer: Trainers, tmp_path: Path) -> None:
    trainer, _ = fit(make_trainer, teacher_module(), batches())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loader = batches()
    set_label(loader, 10)
    with pytest.raises(ValueError, match="Label 10 is outside"):
        make_trainer(max_epochs=2).fit(teacher_module(), loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_labels_on_a_gpu_are_checked_only_in_the_first_epoch_of_a_run(
    make_trainer: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, resumed, checked = teacher_module(), teacher_module(), []
    trainer, _ = fit(make_trainer, fresh, batches())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    make_trainer(max_epochs=2).fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    monkeypatch.setattr(data_check, "check_labels", lambda labels, **_: checked.append(run.current_epoch))
    for module, first in ((fresh, 0), (resumed, 1)):
        callback = data_check.DataCheck()
        loader = SimpleNamespace(batch_size=4)
        unused = {"val_dataloaders": None, "limit_val_batches": 0, "datamodule": None}
        for epoch in (first, first + 1):
            run: Any = SimpleNamespace(current_epoch=epoch, train_dataloader=loader, **unused)
            if epoch == first:
                callback.on_train_start(run, module)
            labels = torch.tensor([0], device="meta")  # stands for any device but the CPU
            callback.on_train_batch_start(run, module, (torch.rand(1, 1, 8, 8), labels), 0)
    assert checked == [0, 1]


# --- several ranks


class WriteRankStates(RecordStates):
    """Writes the states of a rank, and the error that stopped it, to a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._write(trainer, "")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._write(trainer, str(exception))

    def _write(self, trainer: pl.Trainer, reason: str) -> None:
        metrics = dict(trainer.callback_metrics)
        found = {"states": self.states, "metrics": metrics, "reason": reason}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


class BadBatchesOnRank1(pl.LightningDataModule):
    """The same batches on each rank, but for bad ones, or a label, on rank 1."""

    def __init__(self, *bad: int, label: int | None = None) -> None:
        super().__init__()
        self.bad, self.label = bad, label

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        rank = self.trainer.global_rank
        loader = batches(*(self.bad if rank == 1 else ()))
        if rank == 1 and self.label is not None:
            set_label(loader, self.label)
        return loader


def fit_in_two_processes(make_trainer: Trainers, folder: Path, module: Any, data: Any, **options: Any) -> list[Any]:
    trainer = make_trainer(
        strategy="ddp_fork", devices=2, callbacks=[WriteRankStates(folder)], use_distributed_sampler=False, **options
    )
    with suppress(ProcessRaisedException):
        trainer.fit(module, data)
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]


def without_running_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the statistics of batch norms, which differ between ranks."""
    return {name: value for name, value in state.items() if "running" not in name}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_both_ranks_skip_a_step_that_is_nonfinite_on_one(
    make_trainer: Trainers, tmp_path: Path, accumulated: int
) -> None:
    options = {"accumulate_grad_batches": accumulated}
    found = fit_in_two_processes(
        make_trainer, tmp_path, teacher_module(on_nonfinite="skip"), BadBatchesOnRank1(2), **options
    )
    for rank in found:
        assert rank["reason"] == ""
        assert rank["metrics"]["train/skipped_steps"] == 1
        assert states_equal(rank["states"][2], rank["states"][2 + accumulated])
        assert all(value.isfinite().all() for value in rank["states"][-1].values())
    for first, second in zip(*(rank["states"] for rank in found), strict=True):
        assert states_equal(without_running_statistics(first), without_running_statistics(second))
    losses = [rank["metrics"]["train/loss"] for rank in found]
    assert torch.equal(*losses)
    assert losses[0].isfinite()


def test_both_ranks_stop_at_a_step_that_is_nonfinite_on_one(make_trainer: Trainers, tmp_path: Path) -> None:
    found = fit_in_two_processes(make_trainer, tmp_path, teacher_module(), BadBatchesOnRank1(2))
    for rank in found:  # whichever rank stops first
        assert "Epoch 0, step 2, rank 1: the term 'loss' is nan (images in" in rank["reason"]
        assert "but for 1 of 256 values" in rank["reason"]


@pytest.mark.timeout(120)
def test_a_label_out_of_range_on_one_rank_does_not_hang_the_other(make_trainer: Trainers, tmp_path: Path) -> None:
    found = fit_in_two_processes(make_trainer, tmp_path, teacher_module(), BadBatchesOnRank1(label=77))
    assert any("Label 77 is outside" in rank["reason"] for rank in found)


# --- asynchronous checks, as on a GPU


class CopyOnCPU:
    """Stands for :class:`finite_guard.AsyncCopy`, which needs a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.clone()

    def read(self) -> Tensor:
        return self._copy


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check asynchronously, as on a GPU; uninitialized memory is NaN."""
    monkeypatch.setattr(finite_guard, "_stays_on_device", lambda verdict: True)
    monkeypatch.setattr(finite_guard, "AsyncCopy", CopyOnCPU)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, NAN))


FUSED_OPTIMIZERS = {
    "SGD": FUSED,
    "Adam": FUSED_ADAM,
    "AdamW": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01, fused=True),
}


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("name", FUSED_OPTIMIZERS)
@pytest.mark.parametrize("bad", [(0,), (0, 1, 3), (5,)])
def test_a_fused_optimizer_skips_the_update_on_the_device(
    name: str, bad: tuple[int, ...], make_trainer: Trainers
) -> None:
    module = teacher_module(optimizer=FUSED_OPTIMIZERS[name], on_nonfinite="skip")
    trainer, states = fit(make_trainer, module, batches(*bad), gradient_clip_val=0.5)
    for step in range(6):
        kept = {key: value for key, value in states[step].items() if key in states[step + 1]}
        assert states_equal(kept, {key: states[step + 1][key] for key in kept}) == (step in bad), step
    assert all(value.isfinite().all() for state in states for value in state.values())
    assert trainer.callback_metrics["train/skipped_steps"] == len(bad)


@pytest.mark.parametrize("name", FUSED_OPTIMIZERS)
@pytest.mark.parametrize("bad", [(0,), (2, 4)])
def test_skipping_on_the_device_and_on_the_host_gives_identical_state(
    name: str, bad: tuple[int, ...], make_trainer: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = partial(teacher_module, optimizer=FUSED_OPTIMIZERS[name], on_nonfinite="skip")
    host, _ = fit(make_trainer, build(), batches(*bad))
    monkeypatch.setattr(finite_guard, "_stays_on_device", lambda verdict: True)
    device, _ = fit(make_trainer, build(), batches(*bad))
    assert states_equal(state_of(host), state_of(device))
    for metric in ("train/loss", "train/skipped_steps"):
        assert torch.equal(host.callback_metrics[metric], device.callback_metrics[metric])


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("bad", [2, 5])
def test_an_asynchronous_check_stops_one_step_later(bad: int, make_trainer: Trainers) -> None:
    """Or at the end of the epoch; the weights are those before the nonfinite step."""
    module, record = teacher_module(optimizer=FUSED), RecordStates()
    with pytest.raises(
        ValueError, match=rf"Epoch 0, step {bad}: the term 'loss' is nan \(images in .* but for 1 of 256"
    ):
        make_trainer(callbacks=[record]).fit(module, batches(bad))
    for name, value in module.named_parameters():
        assert torch.equal(value, record.states[bad][name]), name


@pytest.mark.usefixtures("asynchronous")
def test_an_asynchronous_check_finds_a_nonfinite_gradient(make_trainer: Trainers) -> None:
    loss = LossWithNanGradient()
    loss.active = True
    module = distillation_module(losses={"hard": loss}, optimizer=FUSED)
    with pytest.raises(ValueError, match="Epoch 0, step 0: a gradient is not finite"):
        make_trainer().fit(module, batches())


@pytest.mark.usefixtures("asynchronous")
def test_no_checkpoint_is_saved_before_the_asynchronous_check_is_read(make_trainer: Trainers, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(callbacks=[saves], enable_checkpointing=True)
    with pytest.raises(ValueError, match="step 2"):
        trainer.fit(teacher_module(optimizer=FUSED), batches(2))
    assert sorted(path.name for path in tmp_path.glob("*")) == ["step=1.ckpt", "step=2.ckpt"]


@pytest.mark.usefixtures("asynchronous")
def test_found_inf_is_set_per_step_and_not_saved(make_trainer: Trainers, tmp_path: Path) -> None:
    module = teacher_module(optimizer=FUSED_ADAM, on_nonfinite="skip")
    trainer, _ = fit(make_trainer, module, batches(5), callbacks=[SaveAfterEachBatch(tmp_path)])
    assert trainer.optimizers[0].found_inf == 1  # type: ignore[attr-defined]
    state = torch.load(tmp_path / "6.ckpt", weights_only=True)["optimizer_states"][0]
    assert state.keys() == {"state", "param_groups"}
    assert all("found_inf" not in group for group in [*state["state"].values(), *state["param_groups"]])
    again, _ = fit(make_trainer, module, batches())
    assert again.callback_metrics["train/skipped_steps"] == 0


# --- with a gradient scaler (16-mixed)


def grad_scaler(scale: float = 2.0**16) -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]


class OverflowingGradients(pl.Callback):
    """Makes gradients infinite in the first batches, as where the scale is too large."""

    def __init__(self, until: int) -> None:
        self.until = until

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fit_loop.batch_idx < self.until:
            gradient = next(pl_module.parameters()).grad
            assert gradient is not None
            gradient.fill_(INF)


@pytest.fixture(params=["on the host", "asynchronous"])
def host_or_device(request: pytest.FixtureRequest) -> None:
    if request.param == "asynchronous":
        request.getfixturevalue("asynchronous")


@pytest.mark.usefixtures("host_or_device")
@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("optimizer", [FUSED, SGD, FUSED_ADAM], ids=["fused SGD", "SGD", "fused Adam"])
@pytest.mark.parametrize("until", [1, 3, 6])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_overflows_under_a_grad_scaler_are_counted_and_do_not_stop_training(
    until: int, optimizer: Any, mode: Any, make_trainer: Trainers
) -> None:
    module = teacher_module(optimizer=optimizer, on_nonfinite=mode)
    trainer, states = fit(
        make_trainer, module, batches(), plugins=grad_scaler(2.0**4), callbacks=[OverflowingGradients(until)]
    )
    assert trainer.callback_metrics["train/skipped_steps"] == until
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert all(value.isfinite().all() for state in states for value in state.values())
    for step in range(6):
        weights = [
            {n: v for n, v in states[s].items() if n.startswith("network") and "running" not in n and "num" not in n}
            for s in (step, step + 1)
        ]
        assert states_equal(*weights) == (step < until)
    assert isinstance(trainer.precision_plugin, MixedPrecision)
    assert trainer.precision_plugin.scaler is not None
    assert trainer.precision_plugin.scaler.get_scale() == 2.0 ** (4 - until)


@pytest.mark.usefixtures("host_or_device")
@pytest.mark.parametrize("optimizer", [FUSED, SGD], ids=["fused", "not fused"])
def test_a_nonfinite_image_is_not_taken_for_an_overflow(optimizer: Any, make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match="Epoch 0, step 2: the term 'loss' is nan"):
        make_trainer(plugins=grad_scaler(16.0)).fit(teacher_module(optimizer=optimizer), batches(2))
    module = teacher_module(optimizer=optimizer, on_nonfinite="skip")
    trainer, states = fit(make_trainer, module, batches(0, 2), plugins=grad_scaler(16.0))
    assert trainer.callback_metrics["train/skipped_steps"] == 2
    assert states_equal(states[2], states[3])
    assert all(value.isfinite().all() for state in states for value in state.values())


# --- without a trainer


def test_the_guard_restores_the_weights_without_a_trainer() -> None:
    layer, metrics = nn.Linear(2, 1), EpochMetrics()
    guard = FiniteGuard("skip", metrics)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = copy.deepcopy(layer.state_dict())
    for value in (1.0, NAN):
        guard.begin(layer)
        loss = layer(torch.tensor([value, 1.0])).sum()
        guard.observe(StepRecord(0, 3, {"loss": loss}, {}))
        metrics.means.add({"loss": loss}, {"loss": 1})
        optimizer.zero_grad()
        loss.backward()
        guard.check(layer, optimizer, scaled=False)
        optimizer.step()
        if value == 1.0:
            assert not states_equal(before, layer.state_dict())
            before = copy.deepcopy(layer.state_dict())
    assert states_equal(before, layer.state_dict())
    assert guard.skipped == 1
    assert metrics.means.compute()["loss"].isfinite()


class CountOperations(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "operations"), [("stop", 0), ("skip", 40)])
def test_buffers_are_copied_in_few_operations_and_only_in_skip_mode(mode: Any, operations: int) -> None:
    """The number of kernels does not grow with the number of buffers; only their views do."""
    counts = []
    for layers in (1, 30):
        module = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(layers)))
        with CountOperations() as operators:
            FiniteGuard(mode, EpochMetrics()).begin(module)
        counts.append(operators.count)
    assert counts[0] <= operations
    views = 2 * 3 * 29  # detaching and flattening each of the other buffers
    assert counts[1] <= counts[0] + (views if mode == "skip" else 0)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^on_nonfinite must be 'stop' or 'skip', got 'ignore'\.$"):
        teacher_module(on_nonfinite="ignore")


def test_every_gradient_is_checked() -> None:
    weights = [nn.Parameter(torch.zeros(3)) for _ in range(4)]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    for number in range(3):  # the last weight has no gradient
        for value in (NAN, INF, -INF):
            gradients = torch.ones(3, 3)
            gradients[number, 1] = value
            for weight, gradient in zip(weights[:3], gradients, strict=True):
                weight.grad = gradient
            guard = FiniteGuard("stop", EpochMetrics())
            guard.begin(nn.Module())
            with pytest.raises(ValueError, match="A step: a gradient is not finite"):
                guard.check(nn.Module(), optimizer, scaled=False)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [FUSED, FUSED_ADAM, SGD], ids=["SGD", "Adam", "not fused"])
@pytest.mark.parametrize("bad", [(0,), (2, 5)])
def test_a_gpu_skips_nonfinite_steps(optimizer: Any, bad: tuple[int, ...], make_trainer: Trainers) -> None:
    module = teacher_module(optimizer=optimizer, on_nonfinite="skip")
    trainer, states = fit(make_trainer, module, batches(*bad), accelerator="gpu", devices=1)
    for step in range(6):
        kept = {key: value for key, value in states[step].items() if key in states[step + 1]}
        assert states_equal(kept, {key: states[step + 1][key] for key in kept}) == (step in bad)
    assert trainer.callback_metrics["train/skipped_steps"] == len(bad)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [2, 5])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_gpu_stops_at_a_nonfinite_step(bad: int, precision: Any, make_trainer: Trainers) -> None:
    module, record = distillation_module(), RecordStates()
    trainer = make_trainer(callbacks=[record], accelerator="gpu", devices=1, precision=precision)
    with pytest.raises(
        ValueError, match=rf"Epoch 0, step {bad}: the term 'hard' is nan \(images in .* but for 1 of 256"
    ):
        trainer.fit(module, batches(bad))
    for name, value in module.named_parameters():
        assert torch.equal(value.cpu(), record.states[bad][name].cpu()), name


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_the_check_does_not_synchronize_with_the_gpu(mode: Any) -> None:
    layer, metrics = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).cuda(), EpochMetrics()
    guard = FiniteGuard(mode, metrics)
    optimizer, images = FUSED(layer.parameters()), torch.rand(8, 4, device="cuda")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step creates the momentum buffers
        try:
            guard.begin(layer)
            loss = layer(images).square().mean()
            guard.observe(StepRecord(0, 3, {"loss": loss}, {"images": images}))
            metrics.means.add({"loss": loss}, {"loss": 8})
            optimizer.zero_grad()
            loss.backward()
            guard.check(layer, optimizer, scaled=False)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_overflows_on_a_gpu_are_counted_and_do_not_stop_training(mode: Any, make_trainer: Trainers) -> None:
    trainer, states = fit(
        make_trainer,
        teacher_module(optimizer=FUSED, on_nonfinite=mode),
        batches(),
        accelerator="gpu",
        devices=1,
        precision="16-mixed",
        callbacks=[OverflowingGradients(2)],
    )
    assert trainer.callback_metrics["train/skipped_steps"] >= 2
    assert all(value.isfinite().all() for state in states for value in state.values())
