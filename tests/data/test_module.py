"""Splits, loaders and augmentation, on two-channel images that all differ."""

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

from kd_lightning.data import Augmentation, Batch, DigitsDataModule, ImageDataModule
from kd_lightning.data.augmentation.crops import normalize
from kd_lightning.data.batch import RawBatch
from kd_lightning.data.image_set import ImageSet
from kd_lightning.losses.hard_target import hard_target_loss

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


def augmented_images(data: Toy, epoch: int, ranks: int = 1) -> dict[int, Tensor]:
    """Return the augmented image of each sample of an epoch."""
    seen: dict[int, Tensor] = {}
    for rank in range(ranks):
        for batch in train_batches(data, epoch, ranks, rank):
            seen |= dict(zip(batch.ids.tolist(), data.pixels(batch), strict=True))
    return seen


def sample_ids(loader: DataLoader[RawBatch]) -> list[int]:
    return [sample for batch in loader for sample in batch.ids.tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size must be >= 1, got 0\."),
        ({"val_fraction": 0.0}, r"val_fraction must be between 0 and 1, got 0\.0\."),
        ({"val_fraction": 1.0}, r"val_fraction must be between 0 and 1, got 1\.0\."),
        ({"padding": -1}, r"augmentation\.padding must be an integer >= 0, got -1\."),
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


def test_validation_is_a_stratified_fraction_disjoint_from_training() -> None:
    data = Toy(batch_size=1)
    train, val = sample_ids(data.train_dataloader()), sample_ids(data.val_dataloader())
    assert sorted(train + val) == list(range(40))
    assert torch.tensor(LABELS)[val].bincount().tolist() == [5, 3, 2]


def test_the_split_depends_only_on_the_seed() -> None:
    first, again, other = (sample_ids(Toy(seed=seed).val_dataloader()) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first == sample_ids(Toy(seed=0, batch_size=7, view_seed=5).val_dataloader())


def test_split_seed_fixes_the_split_while_seed_changes_the_order() -> None:
    first, other = Toy(seed=0, batch_size=1), Toy(seed=1, split_seed=0, batch_size=1)
    assert sample_ids(first.val_dataloader()) == sample_ids(other.val_dataloader())
    orders = [sample_ids(data.train_dataloader()) for data in (first, other)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_unlabelled_images_are_used_for_training_and_not_for_validation() -> None:
    data = Toy(labels=[-1, 0, 0, 0, 0, -1, -1, -1], batch_size=1)
    assert len(sample_ids(data.val_dataloader())) == 1
    assert {0, 5, 6, 7} <= set(sample_ids(data.train_dataloader()))


def test_a_data_set_without_labels_is_split_too() -> None:
    data = Toy(labels=[-1] * 12, batch_size=1)
    train, val = sample_ids(data.train_dataloader()), sample_ids(data.val_dataloader())
    assert (len(train), len(val)) == (9, 3)
    assert sorted(train + val) == list(range(12))


def test_with_a_validation_set_all_training_images_are_used() -> None:
    data = Toy(own_val=True)
    assert sorted(sample_ids(data.train_dataloader())) == list(range(40))
    assert sample_ids(data.val_dataloader()) == list(range(9))


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
def test_each_stage_reads_only_the_splits_it_needs(stage: Any, own_val: bool, loaded: set[str]) -> None:
    data = Toy(own_val=own_val)
    data.setup(stage)
    assert set(data.loaded) == loaded
    data.setup(stage)
    assert data.loaded.count("train") <= 1


class Recorder(pl.LightningModule):
    """Trains nothing and records its batches."""

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


def test_the_trainer_gets_each_epochs_batches_and_reads_no_test_images_before_test(trainer: pl.Trainer) -> None:
    data, recorder = Toy(), Recorder()
    trainer.fit(recorder, data)
    assert "test" not in data.loaded
    assert "predict" not in data.loaded
    assert len(recorder.seen["train"]) == 14
    for epoch, half in enumerate((recorder.seen["train"][:7], recorder.seen["train"][7:])):
        expected = [data.augment(batch) for batch in train_batches(Toy(), epoch)]
        for ours, theirs in zip(half, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    trainer.test(recorder, data, verbose=False)
    trainer.predict(recorder, data)
    for stage in ("test", "predict"):
        assert torch.cat([batch.ids for batch in recorder.seen[stage]]).tolist() == list(range(9))


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches_shows_the_same_batches_in_each_epoch(make_trainer: Callable[..., pl.Trainer]) -> None:
    data, recorder = Toy(views=2), Recorder()
    make_trainer(overfit_batches=2, max_epochs=2, num_sanity_val_steps=0).fit(recorder, data)
    for stage in ("train", "val"):
        assert len(recorder.seen[stage]) == 4
        for ours, theirs in zip(recorder.seen[stage][:2], recorder.seen[stage][2:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    shown = torch.cat([batch.ids for batch in recorder.seen["train"][:2]])
    assert shown.tolist() == [2 * sample for sample in data.train_samples[:8].tolist()], "the first of two views"
    plain = [data.augment(batch) for batch in list(Toy().val_dataloader())[:2]]
    assert torch.equal(
        torch.cat([batch.images for batch in recorder.seen["val"][:2]]), torch.cat([b.images for b in plain])
    )


def test_ids_are_indices_into_the_full_stored_set() -> None:
    data = Toy(padding=0, flip=False)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for stored in loader:
            batch = data.augment(stored)
            pixels = in_memory(data.splits["train"]).pixels[batch.ids]
            assert torch.equal(batch.images, normalize(pixels, mean=data.mean, std=data.std))
            assert batch.labels.tolist() == [LABELS[sample] for sample in batch.ids]
            assert batch.ids.dtype == torch.int64


def test_evaluation_shows_unaugmented_images_in_order() -> None:
    data = Toy(own_val=True)
    for split in ("val", "test", "predict"):
        loader = getattr(data, f"{split}_dataloader")()
        batches = [data.augment(batch) for batch in loader]
        expected = normalize(in_memory(data.splits[split]).pixels, mean=data.mean, std=data.std)
        assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
        assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(9))


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"seed": 3}, {"num_workers": 2}])
def test_augmentation_depends_only_on_sample_and_epoch(options: dict[str, Any]) -> None:
    base, other = Toy(own_val=True), Toy(own_val=True, **options)
    for epoch in (0, 3):
        assert_same_images(augmented_images(base, epoch), augmented_images(other, epoch))


def test_augmentation_does_not_depend_on_the_rank() -> None:
    base = augmented_images(Toy(own_val=True), 1)
    for ranks in (2, 5):
        assert_same_images(base, augmented_images(Toy(own_val=True, batch_size=4 if ranks == 2 else 8), 1, ranks))


def test_ranks_split_each_global_batch() -> None:
    whole = train_batches(Toy(own_val=True, batch_size=8), 2)
    ranks = [train_batches(Toy(own_val=True, batch_size=4), 2, world=2, rank=rank) for rank in range(2)]
    assert [batch.ids.tolist() for batch in whole] == [
        first.ids.tolist() + second.ids.tolist() for first, second in zip(*ranks, strict=True)
    ]


def test_augmentation_differs_between_epochs_and_view_seeds() -> None:
    base = augmented_images(Toy(own_val=True, padding=2), 0)
    others = [
        augmented_images(Toy(own_val=True, padding=2), 1),
        augmented_images(Toy(own_val=True, padding=2, view_seed=1), 0),
    ]
    for other in others:
        differing = [sample for sample in base if not torch.equal(base[sample], other[sample])]
        assert len(differing) > 30


def test_training_batches_have_equal_size() -> None:
    assert [len(batch.ids) for batch in train_batches(Toy(own_val=True, batch_size=7), 0)] == [7] * 5


def test_a_batch_size_above_the_set_size_gives_one_batch() -> None:
    data = Toy(batch_size=1000)
    assert [len(batch.ids) for batch in data.train_dataloader()] == [30]
    assert [len(batch.ids) for batch in data.val_dataloader()] == [10]
    assert [len(batch.ids) for batch in train_batches(data, 0, world=4, rank=3)] == [7]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_shows_each_image_once_on_any_number_of_ranks(world: int) -> None:
    seen = []
    for rank in range(world):
        seen += sample_ids(on_rank(Toy(batch_size=2), world, rank).test_dataloader())
    assert sorted(seen) == list(range(9))


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_labels_are_mixed_in_training_only(alphas: dict[str, Any]) -> None:
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


def test_unlabelled_images_are_not_mixed_nor_mixed_in() -> None:
    data = Toy(labels=[0, 1, 2, -1] * 10, mixup=0.4, cutmix=1.0, padding=0, flip=False, val_fraction=0.2)
    stored = in_memory(data.splits.read("train"))
    plain = normalize(stored.pixels, mean=data.mean, std=data.std)
    drawn = set()
    for batch in data.train_dataloader():
        drawn |= set(batch.plan.mixing.partners.tolist())
        shown = data.augment(batch)
        unlabelled = stored.labels[shown.ids] < 0
        assert (shown.labels[unlabelled] == -1).all()
        assert torch.equal(shown.images[unlabelled], plain[shown.ids[unlabelled]])
        torch.testing.assert_close(shown.labels[~unlabelled].sum(1), torch.ones(int((~unlabelled).sum())))
    labelled = {sample for sample in data.train_samples.tolist() if stored.labels[sample] >= 0}
    assert drawn <= labelled
    assert len(drawn) > 8


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_labels_have_one_form_also_where_no_row_of_a_batch_has_one(alphas: dict[str, Any]) -> None:
    """So ranks can gather them, and a step sees one shape."""
    data = Toy(labels=[0, 1, 2, *[-1] * 37], batch_size=2, **alphas)
    batches = [data.augment(batch) for batch in data.train_dataloader()]
    assert {batch.labels.shape for batch in batches} == {(2, 3)}
    rows = torch.cat([batch.labels for batch in batches])
    assert int((rows == -1).all(1).sum()) == len(rows) - len(set(data.train_samples.tolist()) & {0, 1, 2})
    assert (hard_target_loss(torch.randn(2, 3), batches[0].labels) >= 0).all()


@pytest.mark.parametrize("options", [{"preset": "standard"}, {"brightness": 0.2}, {"grey": 0.5}, {"rand_augment": 1}])
def test_operations_on_colours_are_refused_for_two_channels(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match=r"^augmentation\.\w+ is for images of one or three channels, but mean and std are given for 2;",
    ):
        Toy(padding=None, **options)
    Toy(padding=None, preset="standard", trivial_augment=False, blur=0.5).train_dataloader()


def test_operations_on_colours_are_refused_for_grey_images_unless_a_preset_has_them() -> None:
    for name in ("saturation", "hue", "grey"):
        given: dict[str, Any] = {name: 0.3}
        with pytest.raises(
            ValueError,
            match=rf"^augmentation\.{name} is for images of three channels, but mean and std are given for one;",
        ):
            DigitsDataModule(augmentation=Augmentation(**given))
    data = DigitsDataModule(augmentation=Augmentation(preset="strong", hue=0.0))
    assert data.augmentation.saturation == 0.2
    assert DigitsDataModule(**data.hparams).augmentation == data.augmentation


def test_mixing_refuses_data_without_labels() -> None:
    with pytest.raises(ValueError, match=r"^mixup and CutMix mix labels, but no training image is labelled; set both"):
        Toy(labels=[-1] * 4, mixup=0.2).train_dataloader()


@pytest.mark.parametrize("label", [3, -2])
def test_labels_outside_the_classes_are_refused_at_setup(label: int) -> None:
    with pytest.raises(ValueError, match=rf"^Label {label} of the 'train' images is outside \[0, 3\) .*; correct"):
        Toy(labels=[0, 1, label, -1]).setup("fit")


def test_a_missing_split_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"^The data module has no 'test' images; use another command or other data\.$"
    ):
        Toy(tests=0).setup("test")


def test_a_val_fraction_that_leaves_a_split_empty_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^No validation image is left of 4 by val_fraction=0\.1 of each class; "):
        Toy(labels=[0, 0, 1, 1], val_fraction=0.1).val_dataloader()
    with pytest.raises(ValueError, match=r"^No training image is left of 4 by val_fraction=0\.9 of each class; "):
        Toy(labels=[0, 0, 1, 1], val_fraction=0.9).train_dataloader()


def test_more_processes_than_images_are_refused() -> None:
    data = on_rank(Toy(), 10, 0)
    with pytest.raises(ValueError, match=r"^9 'test' images are too few for 10 processes; use fewer\.$"):
        data.test_dataloader()


def test_image_shape_and_names_are_known_after_setup() -> None:
    data = Toy()
    data.setup("fit")
    assert data.image_shape == (2, 5, 6)
    assert data.num_classes == 3
    assert data.image_name("train", 7) == "7"


def test_batches_of_other_loaders_are_not_changed() -> None:
    batch = (torch.rand(2, 2, 5, 6), torch.tensor([0, 1]))
    assert Toy().on_after_batch_transfer(batch) is batch


@pytest.mark.gpu
def test_augmentation_on_a_gpu_equals_that_on_the_cpu() -> None:
    data = Toy(own_val=True, padding=2)
    for stored in train_batches(data, 3):
        there = RawBatch(stored.pixels, stored.labels, stored.ids.cuda(), stored.epoch, stored.split)
        assert torch.equal(data.pixels(there).cpu(), data.pixels(stored))
        torch.testing.assert_close(data.augment(there).images.cpu(), data.augment(stored).images, rtol=1.2e-7, atol=0)


def assert_same_images(first: dict[int, Tensor], second: dict[int, Tensor]) -> None:
    both = first.keys() & second.keys()
    assert len(both) >= 30
    assert all(torch.equal(first[sample], second[sample]) for sample in both)
