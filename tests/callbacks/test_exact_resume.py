"""Randomness is a function of (seed, step, rank), and a resumed run restores it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.callbacks import ExactResume
from kd_lightning.callbacks.rank_state import select_rank
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]


class Dropping(nn.Module):
    """Keeps the mask of each training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(64, 10), nn.Dropout(0.5)
        self.masks: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        mask = self.drop(torch.ones(64))
        if self.training:
            self.masks.append(mask)
        return self.fc(images.flatten(1) * mask)


def dropping() -> TeacherModule:
    torch.manual_seed(1)
    return TeacherModule(Dropping())


class Masks(pl.Callback):
    """The mask of each batch; written to a file, where another process can read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.network.masks = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx + 1}.ckpt")
        torch.save(torch.stack(pl_module.network.masks), self.folder / f"masks{trainer.global_rank}.pt")


def run(trainer: pl.Trainer, path: Path | None = None, seed: int = 7, batch_size: int = 256) -> None:
    module = dropping()
    torch.manual_seed(seed)
    trainer.fit(module, DigitsDataModule(batch_size=batch_size), ckpt_path=path, weights_only=True)


def masks(folder: Path, rank: int = 0) -> Tensor:
    return torch.load(folder / f"masks{rank}.pt", weights_only=True)


def test_dropout_differs_between_steps_and_seeds_and_is_the_same_after_a_resume(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    found = {}
    for name, seed, path in (("whole", 7, None), ("other", 8, None), ("again", 99, "whole/3.ckpt")):
        (tmp_path / name).mkdir()
        trainer = make_trainer(max_epochs=2, callbacks=[Masks(tmp_path / name)])
        run(trainer, None if path is None else tmp_path / path, seed)
        found[name] = masks(tmp_path / name)
    steps = len(found["whole"])
    assert steps >= 8
    assert len(found["whole"].unique(dim=0)) == steps
    assert not torch.equal(found["whole"][0], found["other"][0])
    assert torch.equal(found["again"], found["whole"][3:])


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*")
def test_dropout_differs_between_ranks_and_a_resume_with_other_ranks_works(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    found, options = {}, {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": 2}
    saved = tmp_path / "whole" / "3.ckpt"  # within an accumulation: it has gradients
    for name, path in (("whole", None), ("again", saved)):
        (tmp_path / name).mkdir()
        run(make_trainer(callbacks=[Masks(tmp_path / name)], **options), path, batch_size=64)
        found[name] = [masks(tmp_path / name, rank) for rank in range(2)]
    assert not (found["whole"][0] == found["whole"][1]).all(1).any()
    for whole, again in zip(found["whole"], found["again"], strict=True):
        assert torch.equal(whole[3:], again)
        assert len(again) >= 2
    alone = make_trainer(accumulate_grad_batches=2)
    run(alone, saved, batch_size=64)
    assert alone.callback_metrics["train/loss"].isfinite()
    assert alone.current_epoch == 1


def test_the_seed_is_a_function_of_seed_step_and_rank() -> None:
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
def test_it_is_attached_once(given: int, make_trainer: Trainers) -> None:
    own = [ExactResume() for _ in range(given)]
    trainer = make_trainer(callbacks=list(own), max_epochs=1)
    for _ in range(2):  # a trainer may fit twice
        run(trainer)
        attached = [callback for callback in trainer.callbacks if isinstance(callback, ExactResume)]  # type: ignore[attr-defined]
        assert len(attached) == 1
        assert not own or attached == own


def test_a_checkpoint_that_is_tested_leaves_no_trace_in_the_next_fit(make_trainer: Trainers, tmp_path: Path) -> None:
    run(make_trainer(callbacks=[Masks(tmp_path)]), seed=3)
    steps = len(masks(tmp_path))
    for command in ("validate", "test", "predict"):
        expected, trainer = make_trainer(), make_trainer()
        getattr(trainer, command)(dropping(), datamodule=DigitsDataModule(), ckpt_path=tmp_path / f"{steps}.ckpt")
        for one in (expected, trainer):
            run(one)
        assert trainer.global_step == steps
        for first, second in zip(*(one.lightning_module.parameters() for one in (expected, trainer)), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_of_weights_only_can_be_tested(weights_only: bool, make_trainer: Trainers, tmp_path: Path) -> None:
    trainer = make_trainer()
    run(trainer)
    trainer.save_checkpoint(tmp_path / "saved.ckpt", weights_only=weights_only)
    assert make_trainer().test(dropping(), DigitsDataModule(), ckpt_path=tmp_path / "saved.ckpt")


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|have no `val_dataloader`).*")
def test_a_users_own_loader_that_cannot_resume_within_an_epoch_raises_a_warning(
    make_trainer: Trainers, tmp_path: Path
) -> None:
    def fit(path: Path | None = None) -> pl.Trainer:
        torch.manual_seed(1)
        module = TeacherModule(ResNet([1], [4], in_channels=1))
        images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        loader = DataLoader(TensorDataset(images, torch.arange(24) % 10), batch_size=4)
        trainer = make_trainer(callbacks=[Save(tmp_path)])
        trainer.fit(module, loader, ckpt_path=path, weights_only=True)
        return trainer

    class Save(pl.Callback):
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    fit()
    with pytest.warns(UserWarning, match="dataloader is not resumable"):
        assert fit(tmp_path / "2.ckpt").global_step == 6


def test_a_checkpoint_without_that_state_is_resumed(make_trainer: Trainers, tmp_path: Path) -> None:
    trainer = make_trainer()
    run(trainer)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    for key in ("exact_resume", "epoch_metrics", "finite_guard"):
        del content[key]
    torch.save(content, tmp_path / "saved.ckpt")
    again = make_trainer(max_epochs=2)
    run(again, tmp_path / "saved.ckpt")
    assert again.current_epoch == 2


@pytest.mark.parametrize(("world", "expected"), [(2, [1.0, 3.0]), (1, [2.0]), (3, [2.0, 2.0, 2.0])])
def test_what_ranks_kept_is_each_ones_own_or_the_mean_for_other_ranks(world: int, expected: list[float]) -> None:
    kept = torch.tensor([[1.0], [3.0]])
    for rank in range(world):
        trainer: Any = SimpleNamespace(world_size=world, global_rank=rank)
        assert select_rank(kept, trainer, torch.device("cpu")).tolist() == [expected[rank]]
