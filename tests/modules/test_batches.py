"""What the modules accept from a user's own loaders, in each stage."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from on_other_device import on_other_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kd_lightning import AdaptationModule, DistillationModule, TeacherModule
from kd_lightning.callbacks.feature_writer import FeatureWriter
from kd_lightning.callbacks.prediction_writer import PredictionWriter
from kd_lightning.callbacks.run_summary import RunSummary
from kd_lightning.errors import UserError
from kd_lightning.modules.classification import ClassificationModule
from kd_lightning.networks import ResNet

Trainers = Callable[..., pl.Trainer]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|smaller than the logging|no `val_dataloader`|Total length of).*"
)

X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8)
ONE_HOT = torch.eye(10)[Y]


def network() -> ResNet:
    torch.manual_seed(0)
    return ResNet([1, 1], [4, 8], 10, in_channels=1)


MODULES: dict[str, Callable[[], ClassificationModule]] = {
    "teacher": lambda: TeacherModule(network()),
    "distillation": lambda: DistillationModule(network(), network(), teacher_check="off"),
    "adaptation": lambda: AdaptationModule(network()),
}


def loader(*columns: Tensor, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*columns), batch_size=batch_size, **options)


def fetched(*batches: Any) -> DataLoader:
    """Batches as they are."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def run(kind: str, stage: str, data: Any, trainer: pl.Trainer) -> dict[str, Any]:
    """Show the data to a new module in a stage, and return the metrics."""
    module, good = MODULES[kind](), loader(X, Y)
    if stage == "fit":
        trainer.fit(module, {"source": data, "target": loader(X)} if kind == "adaptation" else data, good)
    elif stage == "validation of fit":
        trainer.fit(module, {"source": good, "target": loader(X)} if kind == "adaptation" else good, data)
    else:
        getattr(trainer, stage)(module, data, verbose=False)
    return {
        name: value
        for name, value in trainer.callback_metrics.items()
        if name not in ("train/images_per_second", "train/waiting_for_data")
    }


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return zip(X, Y.tolist(), strict=True)


STAGES = ["fit", "validation of fit", "validate", "test"]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("labels", [torch.eye(10)[Y] + torch.eye(10)[Y + 1], torch.zeros(8, 10)], ids=["two", "none"])
def test_multi_hot_labels_are_refused(make_trainer: Trainers, kind: str, stage: str, labels: Tensor) -> None:
    with pytest.raises(UserError, match=r"sum to 1, but one sums to [20]; .*declare multi_label"):
        run(kind, stage, loader(X, labels), make_trainer())


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_the_form_of_labels_and_images_does_not_matter(make_trainer: Trainers, kind: str, stage: str) -> None:
    paths = [f"{number}.png" for number in range(4)]
    same = [
        loader(X, Y[:, None]),
        loader(X, Y.int()),
        loader(X, Y.byte()),
        loader(X, ONE_HOT),
        loader(X, ONE_HOT.bfloat16()),
        loader(X.double(), Y),
        loader(X, Y, Y + 70, X),
        fetched((X[:4], Y[:4], Y[:4], paths), [X[4:], Y[4:], paths, None]),
    ]
    expected = run(kind, stage, loader(X, Y), make_trainer(log_every_n_steps=50))
    for data in same:
        torch.testing.assert_close(
            run(kind, stage, data, make_trainer(log_every_n_steps=50)), expected, check_dtype=False
        )


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("stage", [*STAGES, "predict"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (fetched({"image": X, "label": Y}), "got a dict of 'image', 'label'; change what the data set returns"),
        (fetched(((X, Y), 1)), r"got \[\[float32"),
        (loader((255 * X).byte(), Y), "images of a batch are uint8"),
        (loader(X[:, 0], Y), r"got \[float32 \(4, 8, 8\)"),
    ],
    ids=["dict", "nested", "uint8", "no channels"],
)
def test_batches_that_cannot_be_read(make_trainer: Trainers, kind: str, stage: str, data: Any, message: str) -> None:
    if stage == "predict":
        with pytest.raises(UserError, match=message):
            make_trainer().predict(MODULES[kind](), data)
    else:
        with pytest.raises(UserError, match=message):
            run(kind, stage, data, make_trainer())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_double_images_and_soft_labels_in_any_precision(make_trainer: Trainers, precision: Any) -> None:
    trainer, data = make_trainer(precision=precision), loader(X.double(), ONE_HOT.double())
    trainer.fit(MODULES["distillation"](), data, data)
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
@pytest.mark.parametrize("batch", [X, [X], (X, ["a"] * 8), (X, ONE_HOT, ["a"] * 8)])
def test_predict_needs_images_only(make_trainer: Trainers, batch: Any) -> None:
    expected: list[Any] = []  # of one batch each
    found: list[Any] = []
    writer, features = PredictionWriter(), FeatureWriter(["avgpool"])
    for data, predictions, callbacks in ((fetched((X, Y)), expected, []), (fetched(batch), found, [writer, features])):
        predictions += make_trainer(callbacks=callbacks).predict(MODULES["distillation"](), data) or []
    assert found[0].ids is None
    torch.testing.assert_close(found[0][1:], expected[0][1:])
    assert writer.written is not None
    assert writer.written.read_text().splitlines()[8].startswith("7,")
    assert features.written is not None
    assert features.written.exists()


# several loaders


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("stage", ["test", "validate", "validation of fit"])
def test_each_loader_has_its_metrics(make_trainer: Trainers, kind: str, stage: str) -> None:
    if (kind, stage) in (("adaptation", "validate"), ("adaptation", "validation of fit")):
        return  # its second validation loader is the target's
    first, second = loader(X, Y), loader(-X, Y.flip(0))
    split = "test" if stage == "test" else "val"
    alone = [run(kind, stage, one, make_trainer(log_every_n_steps=50)) for one in (first, second)]
    for loaders in (
        [first, second],
        (first, second),
        {"a": first, "b": second},
        CombinedLoader([first, second], "sequential"),
    ):
        metrics = run(kind, stage, loaders, make_trainer(log_every_n_steps=50))
        for name, value in alone[0].items():
            if name.startswith(split):
                torch.testing.assert_close(metrics[name], value)
                torch.testing.assert_close(metrics[f"{name}/dataloader_idx_1"], alone[1][name])


@pytest.mark.parametrize("kind", MODULES)
def test_the_results_of_a_test_are_those_of_each_loader(make_trainer: Trainers, kind: str) -> None:
    loaders = [loader(X, Y), loader(-X, Y.flip(0))]
    found = make_trainer().test(MODULES[kind](), loaders, verbose=False)
    for number, (one, suffix) in enumerate(zip(loaders, ("", "/dataloader_idx_1"), strict=True)):
        (alone,) = make_trainer().test(MODULES[kind](), one, verbose=False)
        assert found[number] == {f"{name}{suffix}": value for name, value in alone.items()}


def test_the_end_of_each_of_several_loaders_must_be_known(make_trainer: Trainers) -> None:
    streams = [DataLoader(Stream(), batch_size=4), loader(X, Y)]
    with pytest.raises(UserError, match="One of several loaders to evaluate on has no length"):
        make_trainer().fit(MODULES["teacher"](), loader(X, Y), streams)
    limited = make_trainer(limit_test_batches=1).test(MODULES["teacher"](), streams, verbose=False)
    assert list(limited[1]) == [f"{name}/dataloader_idx_1" for name in limited[0]]


def test_the_summary_of_a_test_names_all_loaders(make_trainer: Trainers, tmp_path: Any) -> None:
    module = MODULES["teacher"]()
    make_trainer(callbacks=[RunSummary(0.0)]).test(module, [loader(X, Y), loader(X, Y)], verbose=False)
    assert '"accuracy/dataloader_idx_1"' in (tmp_path / "test.json").read_text()
    assert module.confusion is not None
    assert module.confusion.sum() == 8


def test_predictions_of_several_loaders(make_trainer: Trainers) -> None:
    found = make_trainer().predict(MODULES["teacher"](), [loader(X), loader(X[:4])])
    assert found is not None
    assert [len(batches) for batches in found] == [2, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["teacher", "distillation"])
@pytest.mark.parametrize("several", [list, CombinedLoader])
def test_one_loader_is_trained_on(make_trainer: Trainers, kind: str, several: Any) -> None:
    with pytest.raises(UserError, match="give one loader, not several that are read together"):
        make_trainer().fit(MODULES[kind](), several([loader(X, Y), loader(X, Y)]))


# domains


def test_a_dict_of_plain_loaders_is_adapted_to(make_trainer: Trainers) -> None:
    trainer, module = make_trainer(), AdaptationModule(network())
    trainer.fit(module, {"source": loader(X, Y), "target": fetched(X)}, [loader(X, Y), loader(X)])
    assert {"val/criterion", "val/mutual_information"} <= trainer.callback_metrics.keys()
    assert not any(name.startswith("oracle") for name in trainer.callback_metrics)


@pytest.mark.parametrize("data", [loader(X, Y), [loader(X, Y), loader(X)], {"src": loader(X, Y), "tgt": loader(X)}])
def test_other_loaders_are_not_pairs_of_domains(make_trainer: Trainers, data: Any) -> None:
    with pytest.raises(UserError, match="dict of two loaders with these keys, or a DomainPairDataModule"):
        make_trainer().fit(AdaptationModule(network()), data)


def test_there_are_two_domains_to_validate_on(make_trainer: Trainers) -> None:
    with pytest.raises(UserError, match="validates on two loaders"):
        make_trainer().validate(AdaptationModule(network()), [loader(X, Y)] * 3)


def test_labels_of_the_target_are_checked_too(make_trainer: Trainers) -> None:
    with pytest.raises(UserError, match=r"Label 12 is outside \[0, 10\)"):
        make_trainer().validate(AdaptationModule(network()), [loader(X, Y), loader(X, Y + 5)])


# what only shows later


def test_a_stream_without_a_length_is_read_from_its_start(make_trainer: Trainers) -> None:
    expected = run("teacher", "fit", loader(X, Y), make_trainer())
    found = run("teacher", "fit", DataLoader(Stream(), batch_size=4), make_trainer())
    assert found["train/loss"] == expected["train/loss"]


def test_a_generator_is_refused_as_it_would_train_nothing(make_trainer: Trainers) -> None:
    with pytest.raises(UserError, match="training loader is a generator"):
        make_trainer().fit(MODULES["teacher"](), ((X, Y) for _ in range(3)))  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["fit", "validation of fit", "validate", "test"])
@pytest.mark.parametrize("data", [loader(X, Y, batch_size=16, drop_last=True), []])
def test_empty_loaders_are_refused(make_trainer: Trainers, stage: str, data: Any) -> None:
    name = {"fit": "training", "test": "test"}.get(stage, "validation")
    with pytest.raises(UserError, match=f"The {name} loader yields no batch"):
        run("teacher", stage, data, make_trainer())


class Empty(pl.LightningDataModule):
    def predict_dataloader(self) -> DataLoader:
        return fetched()


@pytest.mark.parametrize("data", [{"dataloaders": fetched()}, {"datamodule": Empty()}])
def test_nothing_to_predict_is_refused(make_trainer: Trainers, data: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="The prediction loader yields no batch"):
        make_trainer().predict(MODULES["teacher"](), **data)


@pytest.mark.parametrize("stage", STAGES)
def test_other_channels_in_a_later_batch(make_trainer: Trainers, stage: str) -> None:
    data = fetched((X, Y), (X.repeat(1, 3, 1, 1), Y))
    with pytest.raises(UserError, match=r"images of 3 channels, but those before had 1; .*convert\('L'\)"):
        run("distillation", stage, data, make_trainer())


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_network_is_tried_on_the_first_batch(make_trainer: Trainers, stage: str) -> None:
    data, trainer = loader(X.repeat(1, 3, 1, 1), Y), make_trainer()
    with pytest.raises(UserError, match=r"ResNet fails for float32 images of shape \(3, 8, 8\)"):
        getattr(trainer, stage)(MODULES["teacher"](), data)


def test_a_network_for_one_size_names_the_size_that_it_fails_on(make_trainer: Trainers) -> None:
    module = TeacherModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(RuntimeError) as raised:
        make_trainer().validate(module, fetched((X, Y), (torch.rand(8, 1, 9, 9), Y)))
    assert "images of shape (1, 9, 9), where the first had the shape (1, 8, 8)" in raised.value.__notes__[0]


def test_a_network_that_was_tried_in_inference_mode_trains(make_trainer: Trainers) -> None:
    module = TeacherModule(ResNet([1, 1], [16, 32], 10))  # three channels: convolutions change their memory format
    data = loader(X.repeat(1, 3, 1, 1), Y)
    make_trainer().predict(module, data)
    make_trainer().fit(module, data)
    assert module.network.get_parameter("conv1.weight").is_contiguous(memory_format=torch.channels_last)


@on_other_device
def test_a_users_loader_on_another_device() -> None:
    from other_device import OtherDevice

    for kind in MODULES:
        trainer = pl.Trainer(
            strategy=OtherDevice(), max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        data = loader(X.double(), ONE_HOT.double())
        assert torch.isfinite(run(kind, "fit", data, trainer)["train/loss"])
        assert trainer.predict(MODULES[kind](), fetched(X))
