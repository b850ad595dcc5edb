"""Splits, loaders and the views that a module sees, on two-channel toys of which every image is another one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from grouped_options import grouped
from lightning.pytorch.trainer.states import TrainerFn
from reading import in_epoch, in_memory, on_rank
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning.data import Batch, ImageDataModule
from kd_lightning.data.augmentation.crops import normalize
from kd_lightning.data.batch import RawBatch
from kd_lightning.data.image_set import ImageSet

LABELS = [0] * 20 + [1] * 12 + [2] * 8


class Toy(ImageDataModule):
    classes = ("ant", "bee", "cat")

    def __init__(self, labels: list[int] = LABELS, own_val: bool = False, tests: int = 9, **options: Any) -> None:
        defaults = {"batch_size": 4, "val_fraction": 0.25, "seed": 0, "view_seed": 0, "padding": 1, "flip": True}
        more = {"mean": (0.5, 0.4), "std": (0.2, 0.3), "mixup": 0.0, "cutmix": 0.0, "num_workers": 0}
        super().__init__(**grouped(**(defaults | more | options)))
        self.labels, self.own_val, self.tests = labels, own_val, tests
        self.loaded: list[str] = []

    def load(self, split: str) -> ImageSet | None:
        self.loaded.append(split)
        if (split == "val" and not self.own_val) or (split != "train" and not self.tests):
            return None
        labels = torch.tensor(self.labels if split == "train" else [i % 3 for i in range(self.tests)])
        generator = torch.Generator().manual_seed(len(split))
        return ImageSet(labels, torch.randint(0, 256, (len(labels), 2, 5, 6), dtype=torch.uint8, generator=generator))


def train_batches(data: Toy, epoch: int, world: int = 1, rank: int = 0) -> list[RawBatch]:
    return list(in_epoch(on_rank(data, world, rank).train_dataloader(), epoch))


def views(data: Toy, epoch: int, ranks: int = 1) -> dict[int, Tensor]:
    """The view of each sample of an epoch."""
    seen: dict[int, Tensor] = {}
    for rank in range(ranks):
        for batch in train_batches(data, epoch, ranks, rank):
            seen |= dict(zip(batch.ids.tolist(), data.pixels(batch), strict=True))
    return seen


def ids(loader: DataLoader[RawBatch]) -> list[int]:
    return [sample for batch in loader for sample in batch.ids.tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size must be >= 1, got 0\."),
        ({"val_fraction": 0.0}, r"val_fraction must be between 0 and 1, got 0\.0\."),
        ({"val_fraction": 1.0}, r"val_fraction must be between 0 and 1, got 1\.0\."),
        ({"padding": -1}, r"augmentation\.padding must be >= 0, got -1\."),
        ({"mixup": -0.1}, r"augmentation\.mixup must be >= 0, got -0\.1\."),
        ({"cutmix": -0.1}, r"augmentation\.cutmix must be >= 0, got -0\.1\."),
        ({"rotation": 5.0}, r"Toy does not apply augmentation\.rotation; set it in a DomainPairDataModule\."),
        ({"num_workers": -1}, r"num_workers must be >= 0, got -1\."),
        ({"mean": (0.5,)}, r"mean and std need one value for each channel, std above 0; got \(0\.5,\) and .*"),
        ({"std": (0.5, 0.0)}, r"mean and std need one value for each channel, std above 0; got .*"),
    ],
)
def test_arguments_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Toy(**options)


def test_validation_is_a_share_of_each_class_disjoint_from_training() -> None:
    data = Toy(batch_size=1)
    train, val = ids(data.train_dataloader()), ids(data.val_dataloader())
    assert sorted(train + val) == list(range(40))
    assert torch.tensor(LABELS)[val].bincount().tolist() == [5, 3, 2]


def test_the_split_depends_on_the_seed_alone() -> None:
    first, again, other = (ids(Toy(seed=seed).val_dataloader()) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first == ids(Toy(seed=0, batch_size=7, view_seed=5).val_dataloader())


def test_the_split_can_stay_while_the_order_changes() -> None:
    first, other = Toy(seed=0, batch_size=1), Toy(seed=1, split_seed=0, batch_size=1)
    assert ids(first.val_dataloader()) == ids(other.val_dataloader())
    orders = [ids(data.train_dataloader()) for data in (first, other)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_unlabelled_images_are_trained_on_and_not_validated_on() -> None:
    data = Toy(labels=[-1, 0, 0, 0, 0, -1, -1, -1], batch_size=1)
    assert len(ids(data.val_dataloader())) == 1
    assert {0, 5, 6, 7} <= set(ids(data.train_dataloader()))


def test_without_any_label_unlabelled_images_are_validated_on() -> None:
    data = Toy(labels=[-1] * 12, batch_size=1)
    train, val = ids(data.train_dataloader()), ids(data.val_dataloader())
    assert (len(train), len(val)) == (9, 3)
    assert sorted(train + val) == list(range(12))


def test_a_validation_set_of_its_own_leaves_training_whole() -> None:
    data = Toy(own_val=True)
    assert sorted(ids(data.train_dataloader())) == list(range(40))
    assert ids(data.val_dataloader()) == list(range(9))


@pytest.mark.parametrize(
    ("stage", "own_val", "loaded"),
    [
        ("fit", False, {"train", "val"}),
        (None, False, {"train", "val"}),
        (TrainerFn.FITTING, True, {"train", "val"}),
        ("validate", False, {"train", "val"}),
        (TrainerFn.VALIDATING, True, {"val"}),
        ("test", False, {"test"}),
        (TrainerFn.PREDICTING, False, {"predict"}),
    ],
)
def test_a_stage_reads_what_it_needs_and_no_more(stage: Any, own_val: bool, loaded: set[str]) -> None:
    data = Toy(own_val=own_val)
    data.setup(stage)
    assert set(data.loaded) == loaded
    data.setup(stage)
    assert data.loaded.count("train") <= 1


class Probe(pl.LightningModule):
    """Trains nothing and remembers its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Batch]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch: Batch) -> Tensor:
        self.seen["train"].append(batch)
        return self.weight * batch.images.mean()

    def validation_step(self, batch: Batch) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Batch) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: Batch) -> Tensor:
        self.seen["predict"].append(batch)
        return batch.ids

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trainer(tmp_path: Path) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )


def test_a_trainer_sees_batches_of_the_epoch_and_no_test_image_before_test(trainer: pl.Trainer) -> None:
    data, probe = Toy(), Probe()
    trainer.fit(probe, data)
    assert "test" not in data.loaded
    assert "predict" not in data.loaded
    assert len(probe.seen["train"]) == 14
    for epoch, half in enumerate((probe.seen["train"][:7], probe.seen["train"][7:])):
        expected = [data.augment(batch) for batch in train_batches(Toy(), epoch)]
        for ours, theirs in zip(half, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    trainer.test(probe, data, verbose=False)
    trainer.predict(probe, data)
    for stage in ("test", "predict"):
        assert torch.cat([batch.ids for batch in probe.seen[stage]]).tolist() == list(range(9))


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_shows_the_same_batches_in_each_epoch(make_trainer: Callable[..., pl.Trainer]) -> None:
    data, probe = Toy(views=2), Probe()
    make_trainer(overfit_batches=2, max_epochs=2, num_sanity_val_steps=0).fit(probe, data)
    for stage in ("train", "val"):
        assert len(probe.seen[stage]) == 4
        for ours, theirs in zip(probe.seen[stage][:2], probe.seen[stage][2:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    shown = torch.cat([batch.ids for batch in probe.seen["train"][:2]])
    assert shown.tolist() == [2 * sample for sample in data.train_samples[:8].tolist()], "the first of two views"
    plain = [data.augment(batch) for batch in list(Toy().val_dataloader())[:2]]
    assert torch.equal(
        torch.cat([batch.images for batch in probe.seen["val"][:2]]), torch.cat([b.images for b in plain])
    )


def test_ids_number_the_full_stored_set() -> None:
    data = Toy(padding=0, flip=False)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for stored in loader:
            batch = data.augment(stored)
            pixels = in_memory(data.splits["train"]).pixels[batch.ids]
            assert torch.equal(batch.images, normalize(pixels, mean=data.mean, std=data.std))
            assert batch.labels.tolist() == [LABELS[sample] for sample in batch.ids]
            assert batch.ids.dtype == torch.int64


def test_evaluation_shows_plain_images_in_order() -> None:
    data = Toy(own_val=True)
    for split in ("val", "test", "predict"):
        loader = getattr(data, f"{split}_dataloader")()
        batches = [data.augment(batch) for batch in loader]
        expected = normalize(in_memory(data.splits[split]).pixels, mean=data.mean, std=data.std)
        assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
        assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(9))


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"seed": 3}, {"num_workers": 2}])
def test_views_depend_on_the_sample_and_the_epoch_and_nothing_else(options: dict[str, Any]) -> None:
    base, other = Toy(own_val=True), Toy(own_val=True, **options)
    for epoch in (0, 3):
        assert_equal(views(base, epoch), views(other, epoch))


def test_views_do_not_depend_on_the_rank() -> None:
    base = views(Toy(own_val=True), 1)
    for ranks in (2, 5):
        assert_equal(base, views(Toy(own_val=True, batch_size=4 if ranks == 2 else 8), 1, ranks))


def test_ranks_see_the_rows_of_the_global_batch() -> None:
    whole = train_batches(Toy(own_val=True, batch_size=8), 2)
    ranks = [train_batches(Toy(own_val=True, batch_size=4), 2, world=2, rank=rank) for rank in range(2)]
    assert [batch.ids.tolist() for batch in whole] == [
        first.ids.tolist() + second.ids.tolist() for first, second in zip(*ranks, strict=True)
    ]


def test_each_epoch_and_view_seed_shows_other_views() -> None:
    base = views(Toy(own_val=True, padding=2), 0)
    others = [views(Toy(own_val=True, padding=2), 1), views(Toy(own_val=True, padding=2, view_seed=1), 0)]
    for other in others:
        differing = [sample for sample in base if not torch.equal(base[sample], other[sample])]
        assert len(differing) > 30


def test_training_batches_are_of_equal_size() -> None:
    assert [len(batch.ids) for batch in train_batches(Toy(own_val=True, batch_size=7), 0)] == [7] * 5


def test_a_batch_larger_than_the_set_is_the_set() -> None:
    data = Toy(batch_size=1000)
    assert [len(batch.ids) for batch in data.train_dataloader()] == [30]
    assert [len(batch.ids) for batch in data.val_dataloader()] == [10]
    assert [len(batch.ids) for batch in train_batches(data, 0, world=4, rank=3)] == [7]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_counts_each_image_once_on_any_number_of_ranks(world: int) -> None:
    seen = []
    for rank in range(world):
        seen += ids(on_rank(Toy(batch_size=2), world, rank).test_dataloader())
    assert sorted(seen) == list(range(9))


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_labels_are_shares_in_training_only(alphas: dict[str, Any]) -> None:
    data, plain = Toy(**alphas), Toy()
    for loader in (data.val_dataloader(), data.test_dataloader()):
        for stored in loader:
            assert data.augment(stored).labels.dtype == torch.int64
    differing = 0
    for stored, unmixed in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        batch, images = data.augment(stored), plain.augment(unmixed).images
        assert (batch.labels.dtype, batch.labels.shape) == (torch.float32, (4, 3))
        torch.testing.assert_close(batch.labels.sum(1), torch.ones(4))
        assert batch.ids.tolist() == unmixed.ids.tolist()
        differing += int((batch.images != images).flatten(1).any(1).sum())
    assert differing > 15


def test_mixing_refuses_unlabelled_images() -> None:
    for labels in ([0, 0, -1, 1], [-1] * 4):
        with pytest.raises(ValueError, match=r"^mixup and CutMix mix labels, but some images are unlabelled; set both"):
            Toy(labels=labels, mixup=0.2).train_dataloader()


@pytest.mark.parametrize("label", [3, -2])
def test_labels_outside_the_classes_are_refused_at_setup(label: int) -> None:
    with pytest.raises(ValueError, match=rf"^Label {label} of the 'train' images is outside \[0, 3\) .*; correct"):
        Toy(labels=[0, 1, label, -1]).setup("fit")


def test_a_set_that_is_not_there_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^The data module has no 'test' images; use another command or other data\.$"
    ):
        Toy(tests=0).setup("test")


def test_a_share_without_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^No validation image is left of 4 by val_fraction=0\.1 of each class; "):
        Toy(labels=[0, 0, 1, 1], val_fraction=0.1).val_dataloader()
    with pytest.raises(ValueError, match=r"^No training image is left of 4 by val_fraction=0\.9 of each class; "):
        Toy(labels=[0, 0, 1, 1], val_fraction=0.9).train_dataloader()


def test_more_processes_than_images_are_refused() -> None:
    data = on_rank(Toy(), 10, 0)
    with pytest.raises(ValueError, match=r"^9 'test' images are too few for 10 processes; use fewer\.$"):
        data.test_dataloader()


def test_shape_classes_and_names_are_known_once_a_set_is_read() -> None:
    data = Toy()
    data.setup("fit")
    assert data.image_shape == (2, 5, 6)
    assert data.num_classes == 3
    assert data.image_name("train", 7) == "7"


def test_batches_of_other_loaders_pass_untouched() -> None:
    batch = (torch.rand(2, 2, 5, 6), torch.tensor([0, 1]))
    assert Toy().on_after_batch_transfer(batch) is batch


@pytest.mark.gpu
def test_views_on_a_gpu_are_those_on_the_cpu() -> None:
    data = Toy(own_val=True, padding=2)
    for stored in train_batches(data, 3):
        there = RawBatch(stored.pixels, stored.labels, stored.ids.cuda(), stored.epoch, stored.split)
        assert torch.equal(data.pixels(there).cpu(), data.pixels(stored))
        torch.testing.assert_close(data.augment(there).images.cpu(), data.augment(stored).images, rtol=1.2e-7, atol=0)


def assert_equal(first: dict[int, Tensor], second: dict[int, Tensor]) -> None:
    both = first.keys() & second.keys()
    assert len(both) >= 30
    assert all(torch.equal(first[sample], second[sample]) for sample in both)
