"""Numbers that are not finite never reach the weights, and a run says where they come from."""

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
    """In order; in the bad ones a pixel is not finite."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, size, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (count, size), generator=generator)
    images[list(bad), 0, 0, 0, 0] = by
    return DataLoader(TensorDataset(images.flatten(0, 1), labels.flatten()), batch_size=size)


def taught(**options: Any) -> TeacherModule:
    torch.manual_seed(1)
    return TeacherModule(network(), **options)


def distilled(teacher: nn.Module | None = None, **options: Any) -> DistillationModule:
    torch.manual_seed(1)
    return DistillationModule(network(), teacher or network(8), teacher_check="off", **options)


class Failing(nn.Module):
    """A teacher that is right ``calls`` times."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.body, self.calls = network(8), calls

    def forward(self, images: Tensor) -> Tensor:
        assert not images.isnan().all()  # so that it cannot be traced, and counts
        self.calls -= 1
        return self.body(images) * (1.0 if self.calls >= 0 else NAN)


class Steep(HardTargetLoss):
    """Finite, and its gradient is not, where the first pixel of a batch says so."""

    def forward(self, student: Any, teacher: Any, labels: Tensor) -> Tensor:
        zero = (student.logits - student.logits.detach()).sum()
        return super().forward(student, teacher, labels) + (zero.sqrt() if self.steep else zero)

    steep = False


class Record(pl.Callback):
    """The state after each batch, and that before the run."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states.append(state_of(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.states.append(state_of(trainer))


def state_of(trainer: pl.Trainer) -> dict[str, Tensor]:
    """Weights, buffers, and the state of the optimizer."""
    state = dict(trainer.lightning_module.state_dict())
    for number, group in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"{number} {name}": torch.as_tensor(value) for name, value in group.items() if value is not None}
    return {name: value.clone() for name, value in state.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def fit(make_trainer: Trainers, module: Any, loader: Any, **options: Any) -> tuple[pl.Trainer, list[dict[str, Tensor]]]:
    record = Record()
    trainer = make_trainer(callbacks=[record, *options.pop("callbacks", [])], **options)
    trainer.fit(module, loader)
    return trainer, record.states


# stop


@pytest.mark.parametrize("by", [NAN, INF, -INF])
def test_a_bad_image_stops_the_training_with_its_place_named(make_trainer: Trainers, by: float) -> None:
    module, record = taught(), Record()
    sentence = (
        r"Epoch 0, step 3: the term 'loss' is nan \(images in \[-[\d.]+, [\d.]+\] but for 1 of 256 values; logits in "
    )
    with pytest.raises(ValueError, match=sentence):
        make_trainer(callbacks=[record]).fit(module, batches(3, by=by))
    assert len(record.states) == 1 + 3
    for name, value in module.named_parameters():
        assert torch.equal(value, record.states[-1][name]), name


def test_a_teacher_that_breaks_is_named(make_trainer: Trainers) -> None:
    module, record = distilled(Failing(4)), Record()
    sentence = r"the term 'soft' is nan .*; the teacher's logits in \[\] but for 40 of 40 values;"
    with pytest.raises(ValueError, match=sentence):
        make_trainer(callbacks=[record]).fit(module, batches())
    assert len(record.states) > 1  # some steps were good
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_a_loss_that_explodes_though_its_terms_are_finite(make_trainer: Trainers) -> None:
    module = distilled(losses={"hard": HardTargetLoss(weight=3e38), "soft": SoftTargetLoss(4.0, weight=3e38)})
    with pytest.raises(ValueError, match="Epoch 0, step 0: the term 'loss' is inf"):
        make_trainer().fit(module, batches())


def test_a_gradient_that_is_not_finite_is_named(make_trainer: Trainers) -> None:
    loss = Steep()
    module = distilled(losses={"hard": loss}, on_nonfinite="stop")

    class Now(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            loss.steep = batch_idx == 2

    with pytest.raises(ValueError, match=r"step 2: the gradient of 'network\.conv1\.weight' is in \[\] but for"):
        make_trainer(callbacks=[Now()]).fit(module, batches())


def test_the_last_good_checkpoint_stays_and_none_is_saved_on_the_exception(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_exception=True)
    record = Record()
    with pytest.raises(ValueError, match="step 5"):
        make_trainer(callbacks=[record, saves], enable_checkpointing=True).fit(taught(), batches(5))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]
    for step in (2, 4):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert all(torch.equal(value, record.states[step][name]) for name, value in saved["state_dict"].items())
        assert saved["epoch_metrics"]["sums"].isfinite().all()


class Lost(HardTargetLoss):
    """Infinite, and its gradient is not."""

    def forward(self, student: Any, teacher: Any, labels: Tensor) -> Tensor:
        return super().forward(student, teacher, labels) + INF


def test_a_loss_that_is_not_finite_though_its_gradient_is(make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match="step 0: the term 'hard' is inf"):
        make_trainer().fit(distilled(losses={"hard": Lost()}), batches())


def test_a_module_can_be_copied_and_trained_again(make_trainer: Trainers) -> None:
    module = taught(on_nonfinite="skip")
    fit(make_trainer, module, batches(5))
    copy.deepcopy(module)
    guard = module.finite_guard
    assert not any(isinstance(value, Tensor) for value in vars(guard).values() if value is not guard.skipped)
    assert guard._snapshot is None
    fit(make_trainer, module, batches(), callbacks=[EMAWeightAveraging()])

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copy.deepcopy(pl_module.finite_guard)

    fit(make_trainer, module, batches(), accumulate_grad_batches=2, callbacks=[Copies()])


# skip


def crd() -> dict[str, Any]:
    return {"hard": HardTargetLoss(), "crd": ContrastiveLoss(queue_size=64, dimensions=8)}


SKIPPED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SGD": (taught, {}),
    "no fused kernel": (partial(taught, optimizer=SGD), {}),
    "Adam": (partial(taught, optimizer=partial(torch.optim.Adam, lr=0.01)), {}),
    "fused AdamW": (partial(taught, optimizer=partial(torch.optim.AdamW, lr=0.01, fused=True)), {}),
    "distillation": (distilled, {}),
    "clipping": (taught, {"gradient_clip_val": 0.5}),
    "clipping by value": (taught, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}),
    "averaged": (taught, {"callbacks": [EMAWeightAveraging()]}),
    "bfloat16": (distilled, {"precision": "bf16-mixed"}),
    "float64": (distilled, {"precision": "64-true"}),
}


@pytest.mark.parametrize("name", SKIPPED)
@pytest.mark.parametrize("bad", [(0,), (2, 3), (5,)])
def test_a_skipped_step_leaves_all_as_it_was(name: str, bad: tuple[int, ...], make_trainer: Trainers) -> None:
    build, options = SKIPPED[name]
    trainer, states = fit(make_trainer, build(on_nonfinite="skip"), batches(*bad), **options)
    for step in range(6):
        assert same(states[step], states[step + 1]) == (step in bad), step
    assert all(value.isfinite().all() for value in states[-1].values())
    assert trainer.callback_metrics["train/skipped_steps"] == len(bad)
    if "averaged" in name:  # the average of the run was put into the module
        assert all(value.isfinite().all() for value in trainer.lightning_module.state_dict().values())


def test_a_queue_is_put_back(make_trainer: Trainers) -> None:
    _, states = fit(make_trainer, distilled(losses=crd(), on_nonfinite="skip"), batches(2))
    assert same(states[2], states[3])
    assert not torch.equal(states[1]["losses.crd.queues"], states[2]["losses.crd.queues"])
    assert states[-1]["losses.crd.position"] == 5 * 4


def test_a_gradient_that_is_not_finite_is_skipped(make_trainer: Trainers) -> None:
    loss = Steep()

    class Now(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            loss.steep = batch_idx == 2

    module = distilled(losses={"hard": loss}, on_nonfinite="skip")
    trainer, states = fit(make_trainer, module, batches(), callbacks=[Now()])
    assert [same(states[step], states[step + 1]) for step in range(6)] == [step == 2 for step in range(6)]
    assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.parametrize("accumulated", [1, 2, 3, 4])
def test_means_are_those_of_the_good_steps(make_trainer: Trainers, accumulated: int) -> None:
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]) * accumulated)

    module = taught(on_nonfinite="skip")
    trainer, _ = fit(make_trainer, module, batches(3), accumulate_grad_batches=accumulated, callbacks=[Losses()])
    step = 3 // accumulated
    good = [loss for number, loss in enumerate(losses) if number // accumulated != step]
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(good) / len(good), rel=1e-5)
    assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.parametrize("bad", [2, 3])
def test_under_accumulation_the_whole_step_is_left_out(make_trainer: Trainers, bad: int) -> None:
    trainer, states = fit(make_trainer, taught(on_nonfinite="skip"), batches(bad), accumulate_grad_batches=2)
    assert same(states[2], states[4])
    assert not same(states[4], states[6])
    assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.parametrize("bad", [2, 3])
def test_under_accumulation_the_bad_batch_is_named(make_trainer: Trainers, bad: int) -> None:
    with pytest.raises(ValueError, match=r"step 1: the term 'loss' is nan \(images in \S+ \S+ but for 1 of"):
        make_trainer(accumulate_grad_batches=2).fit(taught(), batches(bad))


def test_an_epoch_without_a_good_step_is_an_error(make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match=r"No step of epoch 0 was finite; check the images and the teacher, or lower"):
        make_trainer().fit(taught(on_nonfinite="skip"), batches(*range(6)))


def test_counts_are_those_of_each_epoch(make_trainer: Trainers) -> None:
    counts: list[float] = []

    class Counts(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch:
                counts.append(float(trainer.callback_metrics["train/skipped_steps"]))

    looked_at_before = batches()
    loaders = iter([looked_at_before, batches(1, 2), batches(), batches(4), batches()])

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return next(loaders)

    trainer = make_trainer(max_epochs=4, reload_dataloaders_every_n_epochs=1, callbacks=[Counts()])
    trainer.fit(taught(on_nonfinite="skip", optimizer=SGD), Data())
    assert counts == [2, 0, 1]


def test_nothing_is_counted_where_nothing_is_skipped(make_trainer: Trainers) -> None:
    trainer, _ = fit(make_trainer, taught(), batches())
    assert "train/skipped_steps" not in trainer.callback_metrics


def test_a_cached_teacher_that_says_nan(make_trainer: Trainers) -> None:
    """Of one view; the steps of that epoch are skipped, and that is an error."""
    teacher = Failing(10**6)
    module = distilled(teacher, teacher_cache=True, on_nonfinite="skip")
    data = DigitsDataModule(batch_size=512, views=2)

    class Break(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.frozen_teacher.inference_network.calls = 0  # the copy that is asked

    with pytest.raises(ValueError, match="No step of epoch 1 was finite"):
        make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[Break()]).fit(module, data)
    assert all(value.isfinite().all() for value in module.state_dict().values())


class Save(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")


class ToyModule(pl.LightningDataModule):
    """A data module of a user's own whose loader resumes within an epoch."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = bad

    def train_dataloader(self) -> DataLoader:
        return Resumable(batches(*self.bad).dataset, batch_size=4)


class Resumable(DataLoader):
    taken = first = 0

    def __iter__(self) -> Any:
        self.taken, self.first = self.first, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= self.taken:
                self.taken += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["taken"]


@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize("build", [partial(taught), partial(distilled, losses=crd())], ids=["teacher", "queue"])
def test_a_run_that_is_cut_among_skipped_steps_goes_on_to_the_same_bits(
    build: Any, accumulated: int, make_trainer: Trainers, tmp_path: Path
) -> None:
    options, bad = {"accumulate_grad_batches": accumulated}, (4,) if accumulated == 3 else (1, 4)
    if "losses" in build.keywords:
        build = partial(distilled, losses=crd())  # losses that learn serve one module
    trainer, _ = fit(make_trainer, build(on_nonfinite="skip"), ToyModule(*bad), callbacks=[Save(tmp_path)], **options)
    whole, figures = state_of(trainer), trainer.callback_metrics
    for number in range(6):
        trainer = make_trainer(**options)
        if "losses" in build.keywords:
            build = partial(distilled, losses=crd())
        module = build(on_nonfinite="skip")
        trainer.fit(module, ToyModule(*bad), ckpt_path=tmp_path / f"{number}.ckpt", weights_only=True)
        assert same(whole, state_of(trainer)), number
        for name in ("train/loss", "train/accuracy", "train/skipped_steps"):
            assert torch.equal(trainer.callback_metrics[name], figures[name]), (name, number)


# labels


class Own(pl.LightningDataModule):
    """A user's own, which says its classes and does not look at its labels."""

    classes = tuple("abcdefghij")

    def __init__(self, loader: DataLoader) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> DataLoader:
        return self.loader


def set_label(loader: DataLoader, label: int) -> None:
    """Change the label of an image of the third batch."""
    assert isinstance(loader.dataset, TensorDataset)
    loader.dataset.tensors[1][9] = label


class Labels(pl.Callback):
    """Changes a label in the loader's data after an epoch."""

    def __init__(self, epoch: int, label: int) -> None:
        self.epoch, self.label = epoch, label

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch - 1:
            assert trainer.train_dataloader is not None
            set_label(trainer.train_dataloader, self.label)


@pytest.mark.parametrize("label", [-2, 10, 10**6])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("wrap", [lambda loader: loader, Own], ids=["a loader", "a data module"])
def test_labels_out_of_range_stop_the_training(
    label: int, epoch: int, wrap: Callable[[DataLoader], Any], make_trainer: Trainers
) -> None:
    loader = batches()
    if epoch == 0:
        set_label(loader, label)
    record = Record()
    with pytest.raises(ValueError, match=rf"Label {label} is outside \[0, 10\).*correct the labels"):
        make_trainer(max_epochs=2, callbacks=[record, Labels(epoch, label)]).fit(distilled(), wrap(loader))
    assert len(record.states) == 1 + 6 * epoch + 2  # the third batch was not learned from


def test_labels_out_of_range_after_a_resume(make_trainer: Trainers, tmp_path: Path) -> None:
    trainer, _ = fit(make_trainer, taught(), batches())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loader = batches()
    set_label(loader, 10)
    with pytest.raises(ValueError, match="Label 10 is outside"):
        make_trainer(max_epochs=2).fit(taught(), loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_where_a_look_waits_for_the_device_labels_are_read_in_the_first_epoch_of_a_run(
    make_trainer: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, resumed, checked = taught(), taught(), []
    trainer, _ = fit(make_trainer, fresh, batches())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    make_trainer(max_epochs=2).fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    monkeypatch.setattr(data_check, "check_labels", lambda labels, num_classes: checked.append(run.current_epoch))
    for module, first in ((fresh, 0), (resumed, 1)):
        callback = data_check.DataCheck()
        loader = SimpleNamespace(batch_size=4)
        unused = {"val_dataloaders": None, "limit_val_batches": 0, "datamodule": None}
        for epoch in (first, first + 1):
            run: Any = SimpleNamespace(current_epoch=epoch, train_dataloader=loader, **unused)
            if epoch == first:
                callback.on_train_start(run, module)
            labels = torch.tensor([0], device="meta")  # any device but the CPU
            callback.on_train_batch_start(run, module, (torch.rand(1, 1, 8, 8), labels), 0)
    assert checked == [0, 1]


# several ranks


class Keep(pl.Callback):
    """Writes the states of a rank, and what stopped it, to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, Record()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.record.on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.record.on_train_batch_end(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._write(trainer, "")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._write(trainer, str(exception))

    def _write(self, trainer: pl.Trainer, reason: str) -> None:
        figures = dict(trainer.callback_metrics)
        found = {"states": self.record.states, "figures": figures, "reason": reason}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


class Shares(pl.LightningDataModule):
    """Each rank's batches; the bad ones are those of rank 1."""

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


def in_two_processes(make_trainer: Trainers, folder: Path, module: Any, data: Any, **options: Any) -> list[Any]:
    trainer = make_trainer(
        strategy="ddp_fork", devices=2, callbacks=[Keep(folder)], use_distributed_sampler=False, **options
    )
    with suppress(ProcessRaisedException):
        trainer.fit(module, data)
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]


def weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without batch norm's statistics, which each rank has of its own."""
    return {name: value for name, value in state.items() if "running" not in name}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_both_ranks_skip_a_step_that_one_of_them_cannot_use(
    make_trainer: Trainers, tmp_path: Path, accumulated: int
) -> None:
    options = {"accumulate_grad_batches": accumulated}
    found = in_two_processes(make_trainer, tmp_path, taught(on_nonfinite="skip"), Shares(2), **options)
    for rank in found:
        assert rank["reason"] == ""
        assert rank["figures"]["train/skipped_steps"] == 1
        assert same(rank["states"][2], rank["states"][2 + accumulated])
        assert all(value.isfinite().all() for value in rank["states"][-1].values())
    for first, second in zip(*(rank["states"] for rank in found), strict=True):
        assert same(weights_of(first), weights_of(second))
    losses = [rank["figures"]["train/loss"] for rank in found]
    assert torch.equal(*losses)
    assert losses[0].isfinite()


def test_both_ranks_stop_where_one_of_them_cannot_go_on(make_trainer: Trainers, tmp_path: Path) -> None:
    found = in_two_processes(make_trainer, tmp_path, taught(), Shares(2))
    for rank in found:  # the first to end may have ended the other
        assert "Epoch 0, step 2, rank 1: the term 'loss' is nan (images in" in rank["reason"]
        assert "but for 1 of 256 values" in rank["reason"]


@pytest.mark.timeout(120)
def test_a_wrong_label_in_one_rank_hangs_nobody(make_trainer: Trainers, tmp_path: Path) -> None:
    found = in_two_processes(make_trainer, tmp_path, taught(), Shares(label=77))
    assert any("Label 77 is outside" in rank["reason"] for rank in found)


# a verdict that stays on a device


class Later:
    """What :class:`finite_guard.AsyncCopy` is, of the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.clone()

    def read(self) -> Tensor:
        return self._copy


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as if it were a device on which one does not wait; memory begins as NaN there."""
    monkeypatch.setattr(finite_guard, "_stays_on_device", lambda verdict: True)
    monkeypatch.setattr(finite_guard, "AsyncCopy", Later)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, NAN))


OBEDIENT = {
    "SGD": FUSED,
    "Adam": FUSED_ADAM,
    "AdamW": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01, fused=True),
}


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", OBEDIENT)
@pytest.mark.parametrize("bad", [(0,), (0, 1, 3), (5,)])
def test_a_fused_optimizer_leaves_the_update_out(name: str, bad: tuple[int, ...], make_trainer: Trainers) -> None:
    module = taught(optimizer=OBEDIENT[name], on_nonfinite="skip")
    trainer, states = fit(make_trainer, module, batches(*bad), gradient_clip_val=0.5)
    for step in range(6):
        kept = {key: value for key, value in states[step].items() if key in states[step + 1]}
        assert same(kept, {key: states[step + 1][key] for key in kept}) == (step in bad), step
    assert all(value.isfinite().all() for state in states for value in state.values())
    assert trainer.callback_metrics["train/skipped_steps"] == len(bad)


@pytest.mark.parametrize("name", OBEDIENT)
@pytest.mark.parametrize("bad", [(0,), (2, 4)])
def test_the_device_and_the_host_come_to_the_same_bits(
    name: str, bad: tuple[int, ...], make_trainer: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = partial(taught, optimizer=OBEDIENT[name], on_nonfinite="skip")
    host, _ = fit(make_trainer, build(), batches(*bad))
    monkeypatch.setattr(finite_guard, "_stays_on_device", lambda verdict: True)
    device, _ = fit(make_trainer, build(), batches(*bad))
    assert same(state_of(host), state_of(device))
    for figure in ("train/loss", "train/skipped_steps"):
        assert torch.equal(host.callback_metrics[figure], device.callback_metrics[figure])


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("bad", [2, 5])
def test_what_the_device_found_is_said_a_step_later(bad: int, make_trainer: Trainers) -> None:
    """Or at the end of the epoch; the weights are those from before that step."""
    module, record = taught(optimizer=FUSED), Record()
    with pytest.raises(
        ValueError, match=rf"Epoch 0, step {bad}: the term 'loss' is nan \(images in .* but for 1 of 256"
    ):
        make_trainer(callbacks=[record]).fit(module, batches(bad))
    for name, value in module.named_parameters():
        assert torch.equal(value, record.states[bad][name]), name


@pytest.mark.usefixtures("on_device")
def test_a_gradient_that_the_device_found(make_trainer: Trainers) -> None:
    loss = Steep()
    loss.steep = True
    module = distilled(losses={"hard": loss}, optimizer=FUSED)
    with pytest.raises(ValueError, match="Epoch 0, step 0: a gradient is not finite"):
        make_trainer().fit(module, batches())


@pytest.mark.usefixtures("on_device")
def test_nothing_is_saved_before_the_verdict_is_read(make_trainer: Trainers, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(callbacks=[saves], enable_checkpointing=True)
    with pytest.raises(ValueError, match="step 2"):
        trainer.fit(taught(optimizer=FUSED), batches(2))
    assert sorted(path.name for path in tmp_path.glob("*")) == ["step=1.ckpt", "step=2.ckpt"]


@pytest.mark.usefixtures("on_device")
def test_the_flag_is_that_of_the_step_and_in_no_checkpoint(make_trainer: Trainers, tmp_path: Path) -> None:
    module = taught(optimizer=FUSED_ADAM, on_nonfinite="skip")
    trainer, _ = fit(make_trainer, module, batches(5), callbacks=[Save(tmp_path)])
    assert trainer.optimizers[0].found_inf == 1  # type: ignore[attr-defined]
    state = torch.load(tmp_path / "5.ckpt", weights_only=True)["optimizer_states"][0]
    assert state.keys() == {"state", "param_groups"}
    assert all("found_inf" not in group for group in [*state["state"].values(), *state["param_groups"]])
    again, _ = fit(make_trainer, module, batches())
    assert again.callback_metrics["train/skipped_steps"] == 0


# a scaler, 16-mixed


def scaled(scale: float = 2.0**16) -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]


class Wide(pl.Callback):
    """Gradients that are too large for float16 times the scale, up to a batch."""

    def __init__(self, until: int) -> None:
        self.until = until

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fit_loop.batch_idx < self.until:
            gradient = next(pl_module.parameters()).grad
            assert gradient is not None
            gradient.fill_(INF)


@pytest.fixture(params=["on the host", "on a device"])
def anywhere(request: pytest.FixtureRequest) -> None:
    if request.param == "on a device":
        request.getfixturevalue("on_device")


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("optimizer", [FUSED, SGD, FUSED_ADAM], ids=["fused SGD", "SGD", "fused Adam"])
@pytest.mark.parametrize("until", [1, 3, 6])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_overflows_are_counted_and_not_fatal(until: int, optimizer: Any, mode: Any, make_trainer: Trainers) -> None:
    module = taught(optimizer=optimizer, on_nonfinite=mode)
    trainer, states = fit(make_trainer, module, batches(), plugins=scaled(2.0**4), callbacks=[Wide(until)])
    assert trainer.callback_metrics["train/skipped_steps"] == until
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert all(value.isfinite().all() for state in states for value in state.values())
    for step in range(6):
        weights = [
            {n: v for n, v in states[s].items() if n.startswith("network") and "running" not in n and "num" not in n}
            for s in (step, step + 1)
        ]
        assert same(*weights) == (step < until)
    assert isinstance(trainer.precision_plugin, MixedPrecision)
    assert trainer.precision_plugin.scaler is not None
    assert trainer.precision_plugin.scaler.get_scale() == 2.0 ** (4 - until)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("optimizer", [FUSED, SGD], ids=["fused", "not fused"])
def test_a_bad_image_is_no_overflow(optimizer: Any, make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match="Epoch 0, step 2: the term 'loss' is nan"):
        make_trainer(plugins=scaled(16.0)).fit(taught(optimizer=optimizer), batches(2))
    module = taught(optimizer=optimizer, on_nonfinite="skip")
    trainer, states = fit(make_trainer, module, batches(0, 2), plugins=scaled(16.0))
    assert trainer.callback_metrics["train/skipped_steps"] == 2
    assert same(states[2], states[3])
    assert all(value.isfinite().all() for state in states for value in state.values())


# unit


def test_the_guard_by_itself() -> None:
    layer, metrics = nn.Linear(2, 1), EpochMetrics()
    guard = FiniteGuard("skip", metrics)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = copy.deepcopy(layer.state_dict())
    for value in (1.0, NAN):
        guard.begin(layer)
        loss = layer(torch.tensor([value, 1.0])).sum()
        guard.observe(StepRecord("Here", {"loss": loss}, {}))
        metrics.means.add({"loss": loss}, {"loss": 1})
        optimizer.zero_grad()
        loss.backward()
        guard.check(layer, optimizer, scaled=False)
        optimizer.step()
        if value == 1.0:
            assert not same(before, layer.state_dict())
            before = copy.deepcopy(layer.state_dict())
    assert same(before, layer.state_dict())
    assert guard.skipped == 1
    assert metrics.means.compute()["loss"].isfinite()


class Copies(TorchDispatchMode):
    """Counts the operations that write or copy buffers of batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "operations"), [("stop", 0), ("skip", 40)])
def test_buffers_are_copied_in_few_operations_and_only_to_be_restored(mode: Any, operations: int) -> None:
    """However many there are; a view of a buffer is no kernel, but is counted here."""
    counts = []
    for layers in (1, 30):
        module = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(layers)))
        with Copies() as copies:
            FiniteGuard(mode, EpochMetrics()).begin(module)
        counts.append(copies.count)
    assert counts[0] <= operations
    views = 2 * 3 * 29  # detach and flatten each of the further buffers
    assert counts[1] <= counts[0] + (views if mode == "skip" else 0)


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^on_nonfinite must be 'stop' or 'skip', got 'ignore'\.$"):
        taught(on_nonfinite="ignore")


def test_every_gradient_is_looked_at() -> None:
    weights = [nn.Parameter(torch.zeros(3)) for _ in range(4)]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    for number in range(3):  # the last has none
        for value in (NAN, INF, -INF):
            gradients = torch.ones(3, 3)
            gradients[number, 1] = value
            for weight, gradient in zip(weights[:3], gradients, strict=True):
                weight.grad = gradient
            guard = FiniteGuard("stop", EpochMetrics())
            guard.begin(nn.Module())
            with pytest.raises(ValueError, match="A step: a gradient is not finite"):
                guard.check(nn.Module(), optimizer, scaled=False)


# GPU


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [FUSED, FUSED_ADAM, SGD], ids=["SGD", "Adam", "not fused"])
@pytest.mark.parametrize("bad", [(0,), (2, 5)])
def test_a_gpu_skips(optimizer: Any, bad: tuple[int, ...], make_trainer: Trainers) -> None:
    module = taught(optimizer=optimizer, on_nonfinite="skip")
    trainer, states = fit(make_trainer, module, batches(*bad), accelerator="gpu", devices=1)
    for step in range(6):
        kept = {key: value for key, value in states[step].items() if key in states[step + 1]}
        assert same(kept, {key: states[step + 1][key] for key in kept}) == (step in bad)
    assert trainer.callback_metrics["train/skipped_steps"] == len(bad)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [2, 5])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_gpu_stops(bad: int, precision: Any, make_trainer: Trainers) -> None:
    module, record = distilled(), Record()
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
def test_nothing_waits_for_a_gpu(mode: Any) -> None:
    layer, metrics = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).cuda(), EpochMetrics()
    guard = FiniteGuard(mode, metrics)
    optimizer, images = FUSED(layer.parameters()), torch.rand(8, 4, device="cuda")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # momentum begins in the first
        try:
            guard.begin(layer)
            loss = layer(images).square().mean()
            guard.observe(StepRecord("Here", {"loss": loss}, {"images": images}))
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
def test_overflows_on_a_gpu_are_counted_and_not_fatal(mode: Any, make_trainer: Trainers) -> None:
    trainer, states = fit(
        make_trainer,
        taught(optimizer=FUSED, on_nonfinite=mode),
        batches(),
        accelerator="gpu",
        devices=1,
        precision="16-mixed",
        callbacks=[Wide(2)],
    )
    assert trainer.callback_metrics["train/skipped_steps"] >= 2
    assert all(value.isfinite().all() for state in states for value in state.values())
