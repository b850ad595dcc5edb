"""A source and a target in one data module, of different lengths, image sizes and channels."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from grouped_options import grouped
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from reading import in_epoch, in_memory, on_rank
from torch import Tensor, nn

from kd_lightning import Augmentation, DigitsDataModule, DomainPairDataModule, TeacherModule
from kd_lightning.callbacks import ExactResume, FeatureWriter, PredictionWriter
from kd_lightning.data import Batch, ImageDataModule
from kd_lightning.data.augmentation.crops import normalize
from kd_lightning.data.image_set import ImageSet
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.modules.evaluation import Prediction

Trainers = Callable[..., pl.Trainer]


class Domain(ImageDataModule):
    """``count`` training images of three classes and their own validation and test images."""

    def __init__(
        self,
        count: int = 24,
        channels: int = 1,
        side: int = 6,
        names: tuple[str, ...] = ("ant", "bee", "cat"),
        labels: list[int] | None = None,
        own_val: bool = True,
        **options: Any,
    ) -> None:
        defaults = {"batch_size": 8, "val_fraction": 0.25, "seed": 0, "view_seed": 0, "padding": 1, "flip": False}
        more = {"mean": (0.5,) * channels, "std": (0.2,) * channels, "mixup": 0.0, "cutmix": 0.0, "num_workers": 0}
        super().__init__(**grouped(**(defaults | more | options)))
        self.count, self.channels, self.side, self.names, self.own_val = count, channels, side, names, own_val
        self.labels = [i % 3 for i in range(count)] if labels is None else labels
        self.called: list[Any] = []

    @property
    def classes(self) -> tuple[str, ...]:
        return self.names

    def prepare_data(self) -> None:
        self.called.append("prepare")

    def load(self, split: str) -> ImageSet | None:
        self.called.append(split)
        if split == "val" and not self.own_val:
            return None
        labels = torch.tensor(self.labels if split == "train" else [2, 1, 0, 1, 2])
        shape = (len(labels), self.channels, self.side, self.side)
        generator = torch.Generator().manual_seed(len(split) + 10 * self.channels)
        return ImageSet(labels, torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))

    def teardown(self, stage: str) -> None:
        self.called.append(("teardown", stage))

    def on_exception(self, exception: BaseException) -> None:
        self.called.append(exception)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.called.append(state_dict)


class RecordingModule(ClassificationModule):
    """Trains on the source, pulls the target's mean logits to the source's, and records its batches."""

    takes_pairs = True

    def __init__(self, channels: int = 1) -> None:
        network = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * channels, 3))
        super().__init__(network, weight_decay=0.0, lr_interval="step")
        self.seen: dict[Any, list[Any]] = {"train": [], 0: [], 1: [], "test": []}

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        self.seen["train"].append(batch)
        source, target = self(batch["source"].images), self(batch["target"].images)
        loss = F.cross_entropy(source, batch["source"].labels) + (source.mean(0) - target.mean(0)).square().sum()
        self.log_step(loss, {}, source, batch["source"].labels, {})
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen[dataloader_idx].append(batch)
        super().validation_step(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["test"].append(batch)
        super().test_step(batch, batch_idx, dataloader_idx)


def epoch_ids(pair: DomainPairDataModule, epoch: int, world: int = 1, rank: int = 0) -> list[dict[str, list[int]]]:
    """The samples of each batch of an epoch."""
    loader = on_rank(pair, world, rank).train_dataloader()
    for part in loader.flattened:
        in_epoch(part, epoch)
    return [{domain: part.ids.tolist() for domain, part in batch.items()} for batch, _, _ in loader]


def fit(make_trainer: Trainers, pair: DomainPairDataModule, channels: int = 1, **options: Any) -> RecordingModule:
    torch.manual_seed(1)
    module = RecordingModule(channels)
    make_trainer(**options).fit(module, pair)
    return module


@pytest.mark.parametrize("count", [3, 10, 24, 50, 100])
def test_an_epoch_is_one_pass_over_the_source_and_shows_target_images_equally_often(count: int) -> None:
    pair, seen = DomainPairDataModule(Domain(26), Domain(count)), Counter[int]()
    for epoch in range(10):
        batches = epoch_ids(pair, epoch)
        assert [len(batch[domain]) for batch in batches for domain in ("source", "target")] == [8] * 6
        assert len({sample for batch in batches for sample in batch["source"]}) == 24
        seen.update(sample for batch in batches for sample in batch["target"])
        assert max(seen.values()) - min(seen[sample] for sample in range(count)) <= 1


def test_ranks_split_each_global_batch_of_both_domains() -> None:
    for epoch in (0, 3):
        whole = epoch_ids(DomainPairDataModule(Domain(26, batch_size=8), Domain(11)), epoch)
        ranks = [
            epoch_ids(DomainPairDataModule(Domain(26, batch_size=4), Domain(11)), epoch, 2, rank) for rank in (0, 1)
        ]
        assert len(whole) == len(ranks[0]) == 3
        for domain in ("source", "target"):
            halves = [a[domain] + b[domain] for a, b in zip(*ranks, strict=True)]
            assert halves == [batch[domain] for batch in whole]


def test_domains_of_equal_length_and_seed_are_shuffled_differently() -> None:
    pair = DomainPairDataModule(Domain(24), Domain(24))
    for epoch in range(4):
        assert all(batch["source"] != batch["target"] for batch in epoch_ids(pair, epoch))


def test_target_batches_have_the_sources_size_and_the_targets_seed() -> None:
    base = epoch_ids(DomainPairDataModule(Domain(), Domain(50)), 1)
    assert epoch_ids(DomainPairDataModule(Domain(), Domain(50, batch_size=3)), 1) == base
    other = epoch_ids(DomainPairDataModule(Domain(), Domain(50, seed=1)), 1)
    assert [batch["source"] for batch in other] == [batch["source"] for batch in base]
    assert [batch["target"] for batch in other] != [batch["target"] for batch in base]


def test_training_does_not_see_target_labels(make_trainer: Trainers) -> None:
    modules = []
    for labels in ([0, 1, 2] * 8, [2, 0, 0, 1] * 6):
        pair = DomainPairDataModule(Domain(), Domain(labels=labels))
        stored = next(iter(pair.train_dataloader()))[0]["target"]
        assert stored.labels.tolist() == [-1] * 8  # hidden before the batch reaches the module
        modules.append(fit(make_trainer, pair, max_epochs=2))
    shown = [batch["target"] for batch in modules[0].seen["train"]]
    assert len(shown) == 6
    assert all((batch.labels == -1).all() for batch in shown)
    for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert pair.target.splits["train"].labels.tolist() == labels  # which evaluation shows


def test_each_domain_is_augmented_by_its_own_data_module(make_trainer: Trainers) -> None:
    pair = DomainPairDataModule(Domain(), Domain(50, mean=(0.3,), std=(0.1,), view_seed=4))
    alone = {"source": Domain(), "target": Domain(50, mean=(0.3,), std=(0.1,), view_seed=4)}
    module = fit(make_trainer, pair, max_epochs=2)
    assert [list(batch) for batch in module.seen["train"]] == [["source", "target"]] * 6
    for number, batch in enumerate(module.seen["train"]):
        for domain, data in alone.items():
            loader, ours = data.train_dataloader(), batch[domain]
            stored = next(iter(loader))._replace(ids=ours.ids, epoch=number // 3, places=None)
            assert isinstance(ours, Batch)
            assert torch.equal(ours.images, data.augment(stored).images)
            labels = torch.full((8,), -1) if domain == "target" else ours.ids % 3
            assert torch.equal(ours.labels, labels)


@pytest.mark.parametrize(
    ("source", "target", "size", "shape"),
    [
        (Domain(channels=1, side=6), Domain(channels=3, side=9), None, (3, 9, 9)),
        (Domain(channels=3, side=9), Domain(channels=1, side=6), None, (3, 9, 9)),
        (Domain(channels=1, side=6), Domain(channels=1, side=9), None, (1, 9, 9)),
        (Domain(channels=1, side=6), Domain(channels=3, side=9), 4, (3, 4, 4)),
        (Domain(channels=2, side=6), Domain(channels=2, side=6), None, (2, 6, 6)),
    ],
)
def test_images_of_both_domains_get_the_same_shape(
    source: Domain, target: Domain, size: int | None, shape: tuple[int, int, int]
) -> None:
    pair = DomainPairDataModule(source, target, size=size)
    pair.setup("fit")
    assert pair.image_shape == shape
    assert len(pair.mean) == len(pair.std) == shape[0]
    for loader, part in zip(pair.val_dataloader(), (source, target), strict=True):
        plain = normalize(in_memory(part.splits["val"]).pixels, mean=part.mean, std=part.std)
        expected = F.interpolate(plain, shape[1:], mode="bilinear", antialias=True).expand(-1, shape[0], -1, -1)
        batch = pair.augment(next(iter(loader)))
        torch.testing.assert_close(batch.images, expected, rtol=0, atol=1e-6)
    batch = next(iter(pair.train_dataloader()))[0]
    assert [pair.augment(batch[domain]).images.shape for domain in ("source", "target")] == [(8, *shape)] * 2


def test_mean_and_std_are_those_of_the_target() -> None:
    pair = DomainPairDataModule(Domain(channels=3), Domain(mean=(0.3,), std=(0.1,)))
    assert (pair.mean, pair.std) == ((0.3,) * 3, (0.1,) * 3)


def test_validation_uses_both_domains_and_testing_the_target(make_trainer: Trainers) -> None:
    source, target = Domain(batch_size=2, side=6), Domain(batch_size=3, side=9)
    pair, module = DomainPairDataModule(source, target), RecordingModule()
    trainer = make_trainer(num_sanity_val_steps=0)
    trainer.fit(module, pair)
    assert "test" not in source.called + target.called
    trainer.test(module, pair, verbose=False)
    assert "test" in target.called
    assert "test" not in source.called
    predictions = cast("list[Prediction]", trainer.predict(module, pair))
    assert torch.cat([batch.ids for batch in predictions if batch.ids is not None]).tolist() == list(range(5))
    keys: list[tuple[int | str, int, Domain]] = [(0, 2, source), (1, 3, target), ("test", 3, target)]
    for key, size, plain in keys:
        batches = module.seen[key]
        assert all(isinstance(batch, Batch) for batch in batches)
        assert [len(batch.ids) for batch in batches] == ([2, 2, 1] if size == 2 else [3, 2])
        assert torch.cat([batch.labels for batch in batches]).tolist() == [2, 1, 0, 1, 2]
        pixels = in_memory(plain.splits["test" if key == "test" else "val"]).pixels
        images = F.interpolate(normalize(pixels, mean=(0.5,), std=(0.2,)), (9, 9), mode="bilinear", antialias=True)
        torch.testing.assert_close(torch.cat([batch.images for batch in batches]), images, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "ours", "theirs"),
    [
        ("fit", {"train", "val"}, {"train", "val"}),
        (None, {"train", "val"}, {"train", "val"}),
        (TrainerFn.VALIDATING, {"val"}, {"val"}),
        (TrainerFn.TESTING, set(), {"test"}),
        ("predict", set(), {"predict"}),
    ],
)
def test_each_stage_reads_only_the_splits_it_needs(stage: Any, ours: set[str], theirs: set[str]) -> None:
    source, target = Domain(), Domain()
    DomainPairDataModule(source, target, size=8).setup(stage)
    assert (set(source.called), set(target.called)) == (ours, theirs)


def test_hooks_and_the_trainer_are_passed_to_both_domains(make_trainer: Trainers, tmp_path: Path) -> None:
    domains = source, target = Domain(), Domain()
    pair, trainer = DomainPairDataModule(source, target), make_trainer()
    assert pair.trainer is pair.source.trainer is None
    trainer.fit(RecordingModule(), pair)
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    for part in domains:
        assert part.trainer is pair.trainer is trainer
        assert part.called[0] == "prepare"
        assert ("teardown", TrainerFn.FITTING) in part.called
    resumed = Domain(7), Domain(8)
    make_trainer(max_epochs=2).fit(RecordingModule(), DomainPairDataModule(*resumed), ckpt_path=path, weights_only=True)
    assert all({"count": 24} in part.called for part in resumed)
    error = ValueError("x")
    pair.on_exception(error)
    assert source.called[-1] is target.called[-1] is error
    states = DomainPairDataModule(Domain(7), Domain(8)).state_dict()
    assert states == {"source": {"count": 7}, "target": {"count": 8}}
    pair.load_state_dict(states)
    assert source.called[-1] == {"count": 7}
    assert target.called[-1] == {"count": 8}


def test_attributes_used_by_modules_and_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = DomainPairDataModule(
        Domain(batch_size=4, mixup=0.2, cutmix=0.1, views=3), Domain(names=(), labels=[-1] * 24, own_val=False)
    )
    assert (pair.classes, pair.num_classes, pair.batch_size) == (("ant", "bee", "cat"), 3, 4)
    assert (pair.views, pair.mixes_images, pair.yields_pairs) == (None, True, True)
    batch = (torch.rand(2, 1, 6, 6), torch.tensor([0, 1]))
    assert pair.on_after_batch_transfer(batch) is batch
    pair.setup("validate")
    assert set(pair.splits) == {"source/val", "target/train"}
    assert pair.splits["target/train"] is pair.target.splits["train"]
    pair.predict_split = "train"
    assert pair.target.predict_split == pair.predict_split == "train"
    monkeypatch.setattr(pair.target, "image_name", lambda split, sample: f"{split} {sample}")
    assert pair.image_name("predict", 3) == "predict 3"


def test_mixup_applies_to_the_source_only() -> None:
    pair = DomainPairDataModule(Domain(mixup=0.4), Domain())
    batch = next(iter(pair.train_dataloader()))[0]
    assert pair.augment(batch["source"]).labels.shape == (8, 3)
    assert pair.augment(batch["target"]).labels.tolist() == [-1] * 8


def test_each_domain_has_the_augmentation_of_its_own_preset() -> None:
    source = DigitsDataModule(batch_size=30, augmentation=Augmentation(preset="strong"))
    target = DigitsDataModule(batch_size=30, augmentation=Augmentation(preset="standard"), view_seed=5)
    pair = DomainPairDataModule(source, target)
    for batch, _, _ in pair.train_dataloader():
        images, labels, ids, _ = pair.augment(batch["source"])
        assert torch.equal(images, source.augment(batch["source"]).images)
        torch.testing.assert_close(labels.sum(1), torch.ones(30))
        assert ids.tolist() == batch["source"].ids.tolist()
        plan = batch["target"].plan
        assert plan.mixing is None
        assert plan.colours is not None
        shown = pair.augment(batch["target"])
        assert shown.labels.tolist() == [-1] * 30
        again = target.augment(batch["target"]._replace(domain=""))
        assert torch.equal(shown.images, again.images)


def test_a_module_without_domains_tests_and_predicts_on_the_target(make_trainer: Trainers, tmp_path: Path) -> None:
    pair, module = DomainPairDataModule(DigitsDataModule(), DigitsDataModule(batch_size=256), size=9), linear_module(81)
    features = FeatureWriter(["1"], str(tmp_path / "features.npz"), split="val")
    trainer = make_trainer(callbacks=[PredictionWriter(str(tmp_path / "p.csv")), features])
    figures = trainer.test(module, pair, verbose=False)[0]
    assert module.data.mean == pair.mean
    plain = DomainPairDataModule(DigitsDataModule(), DigitsDataModule(batch_size=64), size=9)
    assert make_trainer().test(module, plain, verbose=False)[0] == pytest.approx(figures)
    trainer.predict(module, pair)
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 1 + 287  # of the validation images
    assert features.written


def linear_module(inputs: int) -> TeacherModule:
    return TeacherModule(nn.Sequential(nn.Flatten(), nn.Linear(inputs, 10)))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_images_have_the_dtype_of_the_precision(make_trainer: Trainers, precision: str) -> None:
    module = fit(make_trainer, DomainPairDataModule(Domain(side=9), Domain(side=6)), precision=precision)
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    for batch in (*module.seen["train"][0].values(), module.seen[1][0]):
        assert batch.images.dtype == expected
        assert batch.labels.dtype == torch.int64


def test_validation_includes_an_unlabelled_target(make_trainer: Trainers) -> None:
    pair = DomainPairDataModule(Domain(), Domain(labels=[-1] * 24, names=(), own_val=False))
    module = fit(make_trainer, pair, num_sanity_val_steps=0)
    (batch,) = module.seen[1]
    assert batch.labels.tolist() == [-1] * 6
    trained = {sample for shown in module.seen["train"] for sample in shown["target"].ids.tolist()}
    assert sorted(trained | set(batch.ids.tolist())) == list(range(24))
    assert not trained & set(batch.ids.tolist())


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            {},
            {"names": ("bee", "ant", "cat")},
            r"The source has 3 classes \(ant, bee, cat\) and the target 3 \(bee, ant, cat\); give both the same names "
            r"in the same order\.",
        ),
        (
            {},
            {"names": tuple("abcdefg")},
            r"The source has 3 classes \(ant, bee, cat\) and the target 7 \(a, b, c, d, e and 2 more\); give both .*",
        ),
        (
            {"channels": 2},
            {"channels": 3},
            r"The source's images have 2 channels and the target's 3; only grey images can get more channels\.",
        ),
    ],
)
def test_incompatible_domains_are_refused_before_images_are_read(
    source: dict[str, Any], target: dict[str, Any], message: str
) -> None:
    domains = Domain(**source), Domain(**target)
    with pytest.raises(ValueError, match=f"^{message}$"):
        DomainPairDataModule(*domains).setup("fit")
    assert [part.called for part in domains] == [[], []]


@pytest.mark.parametrize("options", [{"mixup": 0.2}, {"cutmix": 1.0}])
def test_mixup_of_the_target_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^mixup and CutMix mix labels, but the target has none; set both to 0"):
        DomainPairDataModule(Domain(), Domain(**options))


def test_affine_augmentation_applies_to_training_images_only() -> None:
    source, target = Domain(padding=0), Domain(padding=0)
    for part in (source, target):
        part.setup("fit")
    plain, rotated = (
        DomainPairDataModule(source, target, **grouped(rotation=angle, scaling=angle / 100)) for angle in (0, 20)
    )
    training, validation = next(iter(plain.train_dataloader()))[0], [next(iter(x)) for x in plain.val_dataloader()]
    for domain in ("source", "target"):
        seen, moved = plain.augment(training[domain]).images, rotated.augment(training[domain]).images
        assert torch.equal(moved, rotated.augment(training[domain]).images)
        assert (seen - moved).abs().flatten(1).amax(1).min() > 0.1
        assert moved.min() >= -2.5001  # black is the darkest
        again = rotated.augment(training[domain]._replace(epoch=1)).images
        assert not torch.equal(again, moved)
    for batch in validation:
        assert torch.equal(plain.augment(batch).images, rotated.augment(batch).images)


def test_concat_joins_training_batches_and_validates_on_the_source(make_trainer: Trainers) -> None:
    pair = DomainPairDataModule(Domain(), Domain(count=40), concat=True)
    seen: list[Batch] = []

    class Recording(TeacherModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    module = Recording(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, pair)
    apart = DomainPairDataModule(Domain(), Domain(count=40))
    apart.setup("fit")
    for joint, (kept, _, _) in zip(seen, apart.train_dataloader(), strict=True):
        source, target = apart.augment(kept["source"]), apart.augment(kept["target"])
        assert torch.equal(joint.images, torch.cat([source.images, target.images]))
        assert joint.labels.tolist() == source.labels.tolist() + [-1] * len(target.labels)
    assert trainer.num_val_batches == [1]
    assert not module.evaluations.finish().values
    assert "val/accuracy" in trainer.callback_metrics


def test_concat_refuses_mixup() -> None:
    with pytest.raises(ValueError, match="With concat a batch has class indices"):
        DomainPairDataModule(Domain(mixup=0.2), Domain(), concat=True)


def test_a_module_without_domains_refuses_pairs(make_trainer: Trainers) -> None:
    with pytest.raises(ValueError, match="does not train on pairs of domains; set concat: true"):
        make_trainer(max_epochs=1).fit(linear_module(36), DomainPairDataModule(Domain(), Domain()))


@pytest.mark.parametrize("options", [{"rotation": -1.0}, {"rotation": 181.0}, {"scaling": 1.0}, {"scaling": -0.1}])
def test_affine_ranges_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"augmentation\.(rotation|scaling) must be in"):
        DomainPairDataModule(Domain(), Domain(), **grouped(**options))


def test_a_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^size must be >= 1, .* got 0\.$"):
        DomainPairDataModule(Domain(), Domain(), size=0)


def test_checkpoints_hold_plain_hyper_parameters_of_both_domains(make_trainer: Trainers, tmp_path: Path) -> None:
    pair = DomainPairDataModule(DigitsDataModule(batch_size=500), DigitsDataModule(seed=3))
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(TenClasses(inputs=64), pair)
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert (saved["source"]["batch_size"], saved["target"]["seed"], saved["size"]) == (500, 3, None)


CONFIGURATION = """
data:
  class_path: kd_lightning.DomainPairDataModule
  init_args:
    source: {class_path: kd_lightning.DigitsDataModule, init_args: {batch_size: 500}}
    target: {class_path: kd_lightning.DigitsDataModule, init_args: {augmentation: {padding: 0}}}
    size: 9
"""


def test_a_pair_built_from_yaml_saves_plain_hyper_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x"])
    (tmp_path / "pair.yaml").write_text(CONFIGURATION)
    options = ["max_steps=1", "accelerator=cpu", "enable_progress_bar=false", "enable_model_summary=false"]
    arguments = [f"--trainer.{option}" for option in [*options, "logger=false", f"default_root_dir={tmp_path}"]]
    cli = LightningCLI(
        TenClasses,
        pl.LightningDataModule,
        subclass_mode_data=True,
        seed_everything_default=False,
        save_config_callback=None,
        args=["--config", str(tmp_path / "pair.yaml"), *arguments],
        run=False,
    )
    assert (cli.datamodule.batch_size, cli.datamodule.target.augmentation.padding) == (500, 0)
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert saved["source"]["init_args"]["batch_size"] == 500
    assert saved["size"] == 9


class TenClasses(RecordingModule):
    """A module for images of ten classes."""

    def __init__(self, inputs: int = 81) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 10))


class SaveAfterEachBatch(pl.Callback):
    """Saves a checkpoint after each batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.paths.append(self.folder / f"{len(self.paths)}.ckpt")
        trainer.save_checkpoint(self.paths[-1])


@pytest.mark.parametrize("count", [10, 50])
def test_a_run_resumed_within_an_epoch_gives_identical_batches_and_weights(
    count: int, make_trainer: Trainers, tmp_path: Path
) -> None:
    def run(callbacks: list[pl.Callback], path: Path | None = None) -> RecordingModule:
        torch.manual_seed(1 if path is None else 99)
        module = RecordingModule()
        pair = DomainPairDataModule(Domain(26), Domain(count, padding=2))
        make_trainer(max_epochs=3, callbacks=callbacks).fit(module, pair, ckpt_path=path, weights_only=True)
        callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
        assert any(isinstance(callback, ExactResume) for callback in callbacks)
        return module

    save = SaveAfterEachBatch(tmp_path)
    whole = run([save])
    assert len(save.paths) == len(whole.seen["train"]) == 9
    for taken, path in enumerate(save.paths, start=1):
        rest = run([], path)
        shown = [(batch["source"], batch["target"]) for batch in rest.seen["train"]]
        assert len(shown) == 9 - taken
        for batch, expected in zip(rest.seen["train"], whole.seen["train"][taken:], strict=True):
            for domain in ("source", "target"):
                assert all(torch.equal(a, b) for a, b in zip(batch[domain][:3], expected[domain][:3], strict=True))
        for key, value in whole.state_dict().items():
            assert torch.equal(value, rest.state_dict()[key]), (path, key)


class WriteIds(pl.Callback):
    """Writes what a rank saw to a file, where the parent process can read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        seen = pl_module.seen
        batches = [{domain: part.ids for domain, part in batch.items()} for batch in seen["train"]]
        evaluated: dict[Any, Tensor] = {key: torch.cat([batch.ids for batch in seen[key]]) for key in (0, 1)}
        torch.save({"train": batches} | evaluated, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded|barrier|nn.parallel).*")
def test_two_processes_together_see_the_batches_of_one(make_trainer: Trainers, tmp_path: Path) -> None:
    found: dict[int, list[dict[Any, Any]]] = {}
    settings: dict[int, dict[str, Any]] = {1: {}, 2: {"strategy": "ddp_fork", "devices": 2}}
    for world, options in settings.items():
        folder = tmp_path / str(world)
        folder.mkdir()
        pair = DomainPairDataModule(Domain(26, batch_size=8 // world), Domain(11))
        fit(make_trainer, pair, max_epochs=2, num_sanity_val_steps=0, callbacks=[WriteIds(folder)], **options)
        found[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    (one,), ranks = found[1], found[2]
    assert len(one["train"]) == 6
    for step, batch in enumerate(one["train"]):
        for domain, ids in batch.items():
            assert torch.equal(ids, torch.cat([rank["train"][step][domain] for rank in ranks]))
    for key in (0, 1):
        assert torch.cat([rank[key] for rank in ranks]).bincount().tolist() == [2] * 5  # once an epoch
