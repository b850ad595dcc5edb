"""Everything that trains or reads a network keeps its tensors on one device (see ``other_device.py``).

The recipes run there in ``test_recipes.py``.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from inspect import isabstract
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from made_photographs import photograph, write_several_classes
from on_other_device import OTHER_DEVICE, call, on_other_device
from recipe_runs import fit_arguments, save_network
from recorded_step import ReplayStep
from resume_check import check_resume
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from unusual_networks import WithDropout

from kd_lightning import (
    AdaptationModule,
    Augmentation,
    DigitsDataModule,
    DistillationModule,
    DomainPairDataModule,
    ImageFolderDataModule,
    TeacherModule,
)
from kd_lightning import losses as kd_losses
from kd_lightning import networks as kd_networks
from kd_lightning.callbacks import (
    FreezeLayers,
    GapClosed,
    MaskWeights,
    PredictionWriter,
    PruneNetwork,
    QuantizationAwareTraining,
    RunSummary,
    TensorBoardImages,
)
from kd_lightning.features import FeatureTap, Outputs
from kd_lightning.losses import CorrelationLoss
from kd_lightning.networks import (
    DataConfig,
    EnsembleTeacher,
    LeNet,
    ResNet,
    from_checkpoint,
    replace_head,
    reuse_teacher_classifier,
    set_data_config,
)

LOSSES = [
    kind
    for kind in map(kd_losses.__dict__.get, kd_losses.__all__)
    if isinstance(kind, type) and issubclass(kind, kd_losses.Term) and not isabstract(kind)
]


def network(width: int = 4, num_classes: int = 10) -> ResNet:
    return ResNet([1, 1, 1], [width, 2 * width, 4 * width], num_classes, in_channels=1)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    from other_device import OtherDevice

    defaults: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults |= {"strategy": OtherDevice(), "default_root_dir": folder, "log_every_n_steps": 1}
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **defaults, **options})


def trainers(folder: Path, **options: Any) -> Callable[..., pl.Trainer]:
    return lambda callbacks: trainer(folder, *callbacks, max_epochs=3, **options)


def digits(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(batch_size=32, **options)


# the device itself


@on_other_device
def test_devices_are_not_mixed() -> None:
    cpu = torch.rand(2, 3)
    other = cpu.to("other")
    assert str((other + 1).device) == "other:0"
    assert torch.equal((other * cpu.sum()).cpu(), cpu * cpu.sum())  # a scalar may come from the CPU
    assert torch.equal(other[torch.tensor([1])].cpu(), cpu[1:])  # and so may an index
    index = torch.zeros(1, dtype=torch.int64)
    for mixed in (
        lambda: other + cpu,
        lambda: cpu * other.sum(),
        lambda: torch.stack([other.sum(), cpu.sum()]),
        lambda: cpu[index.to("other")],
        lambda: other.index_select(0, index),
        lambda: nn.Linear(3, 2)(other),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert torch.arange(3, device="other").shape == (3,)
    with pytest.raises(TypeError, match="can't convert other:0"):
        other.numpy()
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.rand(2, device="other", generator=torch.Generator())


# losses

POOLED = ("RelationalLoss", "ProbabilisticLoss", "CorrelationLoss", "ContrastiveLoss")
LAST = ("CATKDLoss", "SDDKDLoss", "SDDDKDLoss", "DistPlusLoss")
READS = {name: ["layer3"] for name in LAST} | {name: ["avgpool"] for name in POOLED} | {"USKDLoss": ["layer2"]}


@pytest.mark.parametrize("name", [kind.__name__ for kind in LOSSES])
@on_other_device
def test_a_loss_is_computed_where_its_inputs_are(name: str) -> None:
    kind = getattr(kd_losses, name)
    options: dict[str, Any] = {}
    if "student_layers" in kind.__init__.__annotations__:
        options = {"student_layers": READS.get(name, ["layer1", "layer2"])}
    if kind is kd_losses.HeadLoss:
        options = {"loss": kd_losses.SoftTargetLoss(), "student_head": "fc"}
    between_domains = issubclass(kind, kd_losses.AlignmentLoss)
    student, teacher = network(), network() if between_domains else network(8)
    read = ["layer1", "layer2", "layer3", "avgpool", "fc"]
    images, labels = torch.rand(8, 1, 8, 8, device="other"), torch.arange(8, device="other")
    if kind.multi_label:
        labels = torch.eye(10)[:8].to("other")
    student.to("other"), teacher.to("other")
    taught, said = FeatureTap(student, read)(images), FeatureTap(teacher, read)(images)
    loss = kind(**options)
    networks = {"network": student} if between_domains else {"student_network": student, "teacher_network": teacher}
    loss.build(to_cpu(taught), to_cpu(said), **networks)
    loss.to("other").progress = torch.tensor(0.5, device="other")
    for _ in range(2):  # the second time with a full queue
        value = loss(taught, said, labels)
    value.backward()
    assert str(value.device) == "other:0"
    assert value.isfinite()
    assert all(str(part.device) == "other:0" for part in loss.buffers())
    assert any(weight.grad is not None for weight in student.parameters())


def to_cpu(outputs: Outputs) -> Outputs:
    return Outputs(outputs.logits.cpu(), {name: value.cpu() for name, value in outputs.features.items()})


# fits


@pytest.mark.parametrize("kind", [DistillationModule, AdaptationModule])
@on_other_device
def test_learned_parts_of_losses_are_built_beside_the_weights(kind: Any, tmp_path: Path) -> None:
    """Before Lightning moves the module as a whole, nothing of it is elsewhere."""
    places: list[set[str]] = []

    class Watched(kind):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            places.append({str(part.device) for part in chain(self.parameters(), self.buffers())})

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            places.append({str(part.device) for part in chain(self.parameters(), self.buffers())})

    def module() -> Any:
        if kind is AdaptationModule:
            return Watched(network(), {"hard": kd_losses.HardTargetLoss(), "domain": kd_losses.AdversarialLoss()})
        return Watched(network(), network(8), losses={"vid": kd_losses.VariationalLoss()}, teacher_check="off")

    def data() -> Any:
        return DomainPairDataModule(digits(), digits()) if kind is AdaptationModule else digits()

    first = trainer(tmp_path, max_epochs=1)
    first.fit(module(), data())
    first.save_checkpoint(tmp_path / "first.ckpt")
    trainer(tmp_path).fit(module(), data(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert places == [{"cpu"}] * 3


@pytest.mark.parametrize("layers", [[], ["avgpool"]])
@pytest.mark.parametrize("trained_there", [False, True])
@on_other_device
def test_teacher_and_student_may_lie_anywhere_before_a_fit(
    layers: list[str], trained_there: bool, tmp_path: Path
) -> None:
    losses: dict[str, kd_losses.DistillationLoss] | None = None
    teacher: nn.Module = EnsembleTeacher([network(), network(8)], average="probabilities", weights=[1, 2])
    if layers:
        losses = {"hard": kd_losses.HardTargetLoss(), "cc": CorrelationLoss(student_layers=layers)}
        teacher = network(8)
    student = network()
    if trained_there:
        student.to("other"), teacher.to("other")
    module = DistillationModule(student, teacher, losses=losses, teacher_check="warn")
    trainer(tmp_path).fit(module, digits())
    trainer(tmp_path).fit(module, digits())  # its weights came back to the CPU
    figures = trainer(tmp_path).test(module, digits(), verbose=False)[0]
    assert 0 <= figures["test/agreement"] <= 1


@pytest.mark.parametrize("place", [True, "logits"])
@on_other_device
def test_cached_logits(place: bool | str, tmp_path: Path) -> None:
    folder = str(tmp_path / place) if isinstance(place, str) else place
    module = DistillationModule(network(), network(8), teacher_cache=folder, teacher_check="off")
    trainer(tmp_path, max_epochs=3).fit(module, digits(views=2))
    if place is not True:  # a CPU would round otherwise
        again = DistillationModule(network(), module.teacher, teacher_cache=folder, teacher_check="off")
        with pytest.raises(ValueError, match=r"were computed differently \(different: device\)"):
            trainer(tmp_path, strategy="auto", accelerator="cpu").fit(again, digits(views=2))


@pytest.mark.parametrize("cached", [False, True])
@on_other_device
def test_two_views_of_each_image(cached: bool, tmp_path: Path) -> None:
    data = digits(views=2, second_view=Augmentation(preset="light", trivial_augment=True, erasing=0.5))
    losses: dict[str, kd_losses.DistillationLoss] = {"levels": kd_losses.MLLDLoss(two_views=True)}
    module = DistillationModule(network(), network(8), losses=losses, teacher_cache=cached, teacher_check="off")
    trainer(tmp_path, max_epochs=3).fit(module, data)


@on_other_device
def test_cached_features(tmp_path: Path) -> None:
    module = TeacherModule(replace_head(network(), 10), feature_cache=True)
    trainer(tmp_path, FreezeLayers(), max_epochs=3).fit(module, digits(views=2))


@on_other_device
def test_with_few_labels_views_are_drawn_and_the_gap_is_measured(tmp_path: Path) -> None:
    module = DistillationModule(network(), network(8), teacher_check="off")
    logger = TensorBoardLogger(tmp_path)
    data = digits(labels_per_class=10)
    trainer(tmp_path, TensorBoardImages(), GapClosed(0.0), logger=logger, limit_val_batches=8).fit(module, data)
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    assert {"train/views", "val/confusion", "val/per_class"} <= set(found.Tags()["images"])
    assert len(found.Scalars("val/gap_closed")) == 2


@on_other_device
def test_frozen_layers_thaw(tmp_path: Path) -> None:
    frozen = FreezeLayers(until_epoch={"conv1": None, "layer1": 2, "layer2": 1})
    module = TeacherModule(network(), layer_decay=0.7)
    trainer(tmp_path, frozen, max_epochs=3).fit(module, digits(augmentation=Augmentation(mixup=0.2, cutmix=1.0)))


@pytest.mark.parametrize("cached", [False, True])
@on_other_device
def test_photographs_of_two_sizes_are_cut_recoloured_and_mixed(tmp_path: Path, cached: bool) -> None:
    for number in range(24):
        file = tmp_path / "train" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(40 + number, 60 - number, seed=number).save(file)
    data = ImageFolderDataModule(
        str(tmp_path),
        image_size=16,
        teacher_size=24,
        batch_size=6,
        val_fraction=0.25,
        views=2,
        augmentation=Augmentation(preset="strong", grey=0.2, blur=0.2, hue=0.1, vertical_flip=True),
    )
    student, teacher = (ResNet([1, 1, 1], [4, 8, 16], 2) for _ in range(2))
    module = DistillationModule(student, teacher, teacher_check="off", teacher_cache=cached)
    trainer(tmp_path).fit(module, data)
    assert data.teacher_shape == (3, 24, 24)


@on_other_device
def test_photographs_of_several_classes(tmp_path: Path) -> None:
    write_several_classes(tmp_path / "photos", 60, unlabelled=4)

    def several() -> ImageFolderDataModule:
        return ImageFolderDataModule(
            str(tmp_path / "photos"),
            labels="labels.csv",
            image_size=16,
            batch_size=8,
            augmentation=Augmentation(mixup=0.5),
        )

    student, teacher = (ResNet([1, 1], [4, 8], 3) for _ in range(2))
    module = DistillationModule(student, teacher, teacher_check="warn", class_weights="balanced")
    logger = TensorBoardLogger(tmp_path)
    trainer(tmp_path, TensorBoardImages(), logger=logger).fit(module, several())
    figures = trainer(tmp_path, RunSummary(0.01), logger=logger).test(module, several(), verbose=False)[0]
    assert 0 <= figures["test/map"] <= 1
    predicted = trainer(tmp_path, PredictionWriter(str(tmp_path / "a.csv"))).predict(module, several())
    assert predicted is not None
    assert predicted[0].labels.shape[1] == 3  # type: ignore[union-attr]
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    assert {"train/images", "train/views", "val/per_label", "teacher/softened"} <= set(found.Tags()["images"])


@pytest.mark.parametrize(
    "callback",
    [
        PruneNetwork(0.5, importance="taylor", epochs=[1, 2]),
        PruneNetwork(0.5, measure="parameters", epochs=[0]),
        MaskWeights(0.5, epochs=[0, 1]),
        MaskWeights(pattern="2:4"),
        QuantizationAwareTraining(1),
    ],
    ids=lambda callback: type(callback).__name__,
)
@on_other_device
def test_changed_networks_resume_within_an_epoch(callback: pl.Callback, tmp_path: Path) -> None:
    check_resume(trainers(tmp_path), tmp_path, digits, TeacherModule, [callback], network=network)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adagrad"])
@on_other_device
def test_optimizers_resume_within_an_epoch(optimizer: str, tmp_path: Path) -> None:
    factory = partial(getattr(torch.optim, optimizer), lr=0.01)
    check_resume(trainers(tmp_path), tmp_path, digits, TeacherModule, network=network, optimizer=lambda: factory)


def network_of_other_data(width: int) -> ResNet:
    made = network(width)
    set_data_config(made, DataConfig.of([0.1 * width], [0.4]))
    return made


@on_other_device
def test_a_distillation_with_converted_inputs_resumes_within_an_epoch(tmp_path: Path) -> None:
    student, teacher = (partial(network_of_other_data, width) for width in (4, 8))
    kind = partial(DistillationModule, teacher_check="warn")
    check_resume(trainers(tmp_path), tmp_path, digits, kind, student=student, teacher=teacher)


@on_other_device
def test_replayed_steps_resume_within_an_epoch(tmp_path: Path) -> None:
    kind = partial(DistillationModule, teacher_check="off")
    replay: list[pl.Callback] = [ReplayStep()]
    check_resume(trainers(tmp_path), tmp_path, digits, kind, replay, student=network, teacher=lambda: network(8))


@on_other_device
def test_a_distillation_with_a_queue_resumes_within_an_epoch(tmp_path: Path) -> None:
    def terms() -> dict[str, kd_losses.DistillationLoss]:
        queue = kd_losses.ContrastiveLoss(queue_size=64, student_layers=["avgpool"])
        learned = {"vid": kd_losses.VariationalLoss(), "ctkd": kd_losses.CTKDLoss(), "uskd": kd_losses.USKDLoss()}
        return {
            "hard": kd_losses.HardTargetLoss(),
            "crd": queue,
            "label_free": kd_losses.QueueKLLoss(queue_size=64),
            **learned,
        }

    fits = trainers(tmp_path, accumulate_grad_batches=2)
    kind = partial(DistillationModule, teacher_check="off")
    check_resume(fits, tmp_path, digits, kind, student=network, teacher=lambda: network(8), losses=terms)


@on_other_device
def test_an_adaptation_resumes_within_an_epoch(tmp_path: Path) -> None:
    def terms() -> dict[str, Any]:
        adversary = kd_losses.AdversarialLoss(layers=["embedding"], conditional=True, entropy_weighted=True, hidden=8)
        return {"hard": kd_losses.HardTargetLoss(), "adversary": adversary}

    def pair() -> DomainPairDataModule:
        return DomainPairDataModule(digits(), digits(), size=16)

    check_resume(
        trainers(tmp_path), tmp_path, pair, AdaptationModule, network=partial(LeNet, image_size=16), losses=terms
    )


@on_other_device
def test_dropout_resumes_within_an_epoch(tmp_path: Path) -> None:
    check_resume(trainers(tmp_path), tmp_path, digits, TeacherModule, network=WithDropout)


@on_other_device
def test_steps_that_are_not_finite_are_skipped(tmp_path: Path) -> None:
    batches = [(torch.rand(4, 1, 8, 8), torch.arange(4)) for _ in range(5)]
    batches[2][0].fill_(math.nan)
    fitted = trainer(tmp_path, max_epochs=1, limit_train_batches=5, gradient_clip_val=1.0)
    module = TeacherModule(WithDropout(), on_nonfinite="skip")
    fitted.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert fitted.callback_metrics["train/skipped_steps"] == 1
    with pytest.raises(ValueError, match="Epoch 0, step 2: "):
        trainer(tmp_path, max_epochs=1, limit_train_batches=5).fit(
            TeacherModule(WithDropout()),
            torch.utils.data.DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        )


# commands


@pytest.mark.parametrize("recipe", ["digits/ema", "digits/prune", "digits/qat", "adapt/cdan"])
@on_other_device
def test_what_was_fitted_there_is_used_everywhere(recipe: str, tmp_path: Path) -> None:
    call(tmp_path, *fit_arguments(recipe, tmp_path), *OTHER_DEVICE)
    run = tmp_path / f"lightning_logs/{recipe}/version_0"
    printed = call(tmp_path, "test", "-c", recipe, "--trainer.limit_test_batches=2")
    assert "test/accuracy" in printed
    assert json.loads((run / "test.json").read_text())["device"] == "other:0"
    layer = "embedding" if recipe == "adapt/cdan" else "avgpool"
    call(tmp_path, "predict", "-c", recipe, f"--features.layers=[{layer}]")
    features = np.load(run / "features.npz")
    assert len(features[layer]) == len(features["labels"])
    on_cpu = ["--trainer.strategy=auto", "--trainer.accelerator=cpu", "--trainer.limit_test_batches=2"]
    assert figures(call(tmp_path, "test", "-c", recipe, *on_cpu)) == figures(printed)
    call(tmp_path, "fit", "-c", recipe, "--ckpt_path=last", "--trainer.max_epochs=2")


@on_other_device
def test_what_was_fitted_there_is_validated_exported_and_reported(tmp_path: Path) -> None:
    call(tmp_path, *fit_arguments("digits/distill", tmp_path), *OTHER_DEVICE)
    assert "val/accuracy" in call(tmp_path, "validate", "-c", "digits/distill")
    call(tmp_path, "export", "digits/distill", "-o", "network.onnx")
    call(tmp_path, "report", "digits/distill", "network.onnx", "-o", "report")
    assert (tmp_path / "report/index.html").is_file()


def figures(printed: str) -> list[str]:
    """Pick the lines of a table of test figures."""
    return [line for line in printed.splitlines() if "test/" in line and "images" not in line]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ResNet", {"blocks": [1, 1], "widths": [8, 16], "shortcut": "A"}),
        ("ResNet", {"blocks": [1, 1], "widths": [8, 16], "bottleneck": True}),
        ("WideResNet", {"depth": 10, "widen": 1}),
        ("VGG", {"blocks": [1, 1, 1, 1, 1]}),
        ("MobileNetV2", {"width": 0.125}),
        ("ShuffleNetV1", {"widths": [48, 96, 192], "blocks": [2, 1, 1]}),
        ("ShuffleNetV2", {"widths": [16, 32, 64], "blocks": [2, 1, 1], "last_width": 64}),
        ("LeNet", {"image_size": 16}),
    ],
)
@on_other_device
def test_a_network_computes_where_its_weights_are(name: str, options: dict[str, Any]) -> None:
    made = getattr(kd_networks, name)(in_channels=1, **options).eval()
    images = torch.rand(2, 1, 16, 16)
    expected = made(images)
    logits = made.to("other")(images.to("other"))
    assert str(logits.device) == "other:0"
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    assert {str(weight.grad.device) for weight in made.parameters()} == {"other:0"}


@on_other_device
def test_networks_made_of_others_lie_where_those_lie() -> None:
    members = [network().to("other"), network(8).to("other")]
    set_data_config(members[1], DataConfig.of([0.3], [0.4]))
    images = torch.rand(2, 1, 8, 8, device="other")
    assert str(EnsembleTeacher(members, average="probabilities", weights=[1, 2])(images).device) == "other:0"
    assert str(reuse_teacher_classifier(members[0], network(8))(images).device) == "other:0"


@on_other_device
def test_a_network_on_another_device_is_filled_and_exported(tmp_path: Path) -> None:
    from kd_lightning.export import export_network

    path = save_network("digits", "student", tmp_path)
    student = from_checkpoint(ResNet([1, 1, 1], [2, 4, 8], in_channels=1).to("other"), path, mean=[0.3], std=[0.4])
    replaced = replace_head(student, 3)
    assert {str(weight.device) for weight in replaced.parameters()} == {"other:0"}
    images = torch.rand(4, 1, 8, 8)
    export_network(replaced, tmp_path / "network.onnx", images)
    export_network(replaced, tmp_path / "network.pt2", images, format="torch")
    export_network(replaced, tmp_path / "network.safetensors", images, format="safetensors")
    assert {str(weight.device) for weight in replaced.parameters()} == {"other:0"}
