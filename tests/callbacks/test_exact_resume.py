"""Randomness is a function of (seed, step, rank), and a resumed run restores it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from resume_check import SaveAfterEachBatch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import ExactResume
from kd_lightning.callbacks.rank_state import select_rank
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]


class RecordedDropout(nn.Module):
    """Records the dropout mask of each training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(64, 10), nn.Dropout(0.5)
        self.masks: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        mask = self.drop(torch.ones(64))
        if self.training:
            self.masks.append(mask)
        return self.fc(images.flatten(1) * mask)


def module_with_dropout() -> TeacherModule:
    torch.manual_seed(1)
    return TeacherModule(RecordedDropout())


class WriteMasks(SaveAfterEachBatch):
    """Writes the masks to a file too, which the parent process can read."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.network.masks = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        super().on_train_batch_end(trainer)
        torch.save(torch.stack(pl_module.network.masks), self.folder / f"masks{trainer.global_rank}.pt")


def run(trainer: pl.Trainer, path: Path | None = None, seed: int = 7, batch_size: int = 256) -> None:
    module = module_with_dropout()
    torch.manual_seed(seed)
    trainer.fit(module, DigitsDataModule(batch_size=batch_size), ckpt_path=path, weights_only=True)


def masks(folder: Path, rank: int = 0) -> Tensor:
    return torch.load(folder / f"masks{rank}.pt", weights_only=True)


def test_dropout_differs_between_steps_and_seeds_and_is_equal_after_a_resume(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    masks_of = {}
    for name, seed, path in (("whole", 7, None), ("other", 8, None), ("again", 99, "whole/3.ckpt")):
        (tmp_path / name).mkdir()
        trainer = make_trainer(max_epochs=2, callbacks=[WriteMasks(tmp_path / name)])
        run(trainer, None if path is None else tmp_path / path, seed)
        masks_of[name] = masks(tmp_path / name)
    steps = len(masks_of["whole"])
    assert steps >= 8
    assert len(masks_of["whole"].unique(dim=0)) == steps
    assert not torch.equal(masks_of["whole"][0], masks_of["other"][0])
    assert torch.equal(masks_of["again"], masks_of["whole"][3:])


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*")
def test_dropout_differs_between_ranks_and_a_run_resumes_on_another_number_of_ranks(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    masks_of, options = {}, {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": 2}
    saved = tmp_path / "whole" / "3.ckpt"  # within an accumulation: it has gradients
    for name, path in (("whole", None), ("again", saved)):
        (tmp_path / name).mkdir()
        run(make_trainer(callbacks=[WriteMasks(tmp_path / name)], **options), path, batch_size=64)
        masks_of[name] = [masks(tmp_path / name, rank) for rank in range(2)]
    assert not (masks_of["whole"][0] == masks_of["whole"][1]).all(1).any()
    for uninterrupted, resumed in zip(masks_of["whole"], masks_of["again"], strict=True):
        assert torch.equal(uninterrupted[3:], resumed)
        assert len(resumed) >= 2
    alone = make_trainer(accumulate_grad_batches=2)
    run(alone, saved, batch_size=64)
    assert alone.callback_metrics["train/loss"].isfinite()
    assert alone.current_epoch == 1


def test_random_numbers_depend_only_on_seed_step_and_rank() -> None:
    callback, seen = ExactResume(), set()
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    for callback.seed in (0, 1):
        for step in range(3):
            for rank in range(3):
                trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=step), global_rank=rank)
                draws = []
                for _ in range(2):
                    torch.rand(5)
                    callback.on_train_batch_start(trainer, module, None, 0)
                    draws.append(tuple(torch.rand(4).tolist()))
                assert draws[0] == draws[1]
                seen.add(draws[0])
    assert len(seen) == 2 * 3 * 3


@pytest.mark.parametrize("given", [0, 1])
def test_the_callback_is_attached_once(given: int, make_trainer: Trainers) -> None:
    own = [ExactResume() for _ in range(given)]
    trainer = make_trainer(callbacks=list(own), max_epochs=1)
    for _ in range(2):  # a trainer may be fitted twice
        run(trainer)
        attached = [callback for callback in trainer.callbacks if isinstance(callback, ExactResume)]  # type: ignore[attr-defined]
        assert len(attached) == 1
        assert not own or attached == own


def test_evaluating_a_checkpoint_does_not_change_the_next_fit(make_trainer: Trainers, tmp_path: Path) -> None:
    run(make_trainer(callbacks=[WriteMasks(tmp_path)]), seed=3)
    steps = len(masks(tmp_path))
    for command in ("validate", "test", "predict"):
        expected, trainer = make_trainer(), make_trainer()
        getattr(trainer, command)(
            module_with_dropout(), datamodule=DigitsDataModule(), ckpt_path=tmp_path / f"{steps}.ckpt"
        )
        for one in (expected, trainer):
            run(one)
        assert trainer.global_step == steps
        for first, second in zip(*(one.lightning_module.parameters() for one in (expected, trainer)), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_weights_only_checkpoint_can_be_tested(weights_only: bool, make_trainer: Trainers, tmp_path: Path) -> None:
    trainer = make_trainer()
    run(trainer)
    trainer.save_checkpoint(tmp_path / "saved.ckpt", weights_only=weights_only)
    assert make_trainer().test(module_with_dropout(), DigitsDataModule(), ckpt_path=tmp_path / "saved.ckpt")


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|have no `val_dataloader`).*")
def test_a_loader_that_cannot_resume_within_an_epoch_warns(make_trainer: Trainers, tmp_path: Path) -> None:
    def fit(path: Path | None = None) -> pl.Trainer:
        torch.manual_seed(1)
        module = TeacherModule(ResNet([1], [4], in_channels=1))
        images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        loader = DataLoader(TensorDataset(images, torch.arange(24) % 10), batch_size=4)
        trainer = make_trainer(callbacks=[SaveAfterEachBatch(tmp_path)])
        trainer.fit(module, loader, ckpt_path=path, weights_only=True)
        return trainer

    fit()
    with pytest.warns(UserWarning, match="dataloader is not resumable"):
        assert fit(tmp_path / "2.ckpt").global_step == 6


def test_a_checkpoint_without_the_state_of_our_callbacks_is_resumed(make_trainer: Trainers, tmp_path: Path) -> None:
    trainer = make_trainer()
    run(trainer)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    for key in ("exact_resume", "epoch_metrics", "finite_guard"):
        del content[key]
    torch.save(content, tmp_path / "saved.ckpt")
    resumed = make_trainer(max_epochs=2)
    run(resumed, tmp_path / "saved.ckpt")
    assert resumed.current_epoch == 2


@pytest.mark.parametrize(("world", "expected"), [(2, [1.0, 3.0]), (1, [2.0]), (3, [2.0, 2.0, 2.0])])
def test_select_rank_returns_the_rank_s_state_or_the_mean_for_another_world_size(
    world: int, expected: list[float]
) -> None:
    states = torch.tensor([[1.0], [3.0]])
    for rank in range(world):
        trainer: Any = SimpleNamespace(world_size=world, global_rank=rank)
        assert select_rank(states, trainer, torch.device("cpu")).tolist() == [expected[rank]]
