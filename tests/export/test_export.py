"""Exported files give the checkpoint's results; invalid options and files are refused and overwrite nothing."""

import csv
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from faults import run_command
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from kd_lightning import Checkpoint, DigitsDataModule, DistillationModule
from kd_lightning.export import Inference, OnnxClassifier, export_network
from kd_lightning.export.network import SUFFIXES, Format
from kd_lightning.networks import (
    DataConfig,
    ResNet,
    data_config,
    from_checkpoint,
    reuse_teacher_classifier,
    set_data_config,
)
from kd_lightning.runs.run import Run

Command = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student that was distilled and tested by the command line."""
    folder = tmp_path_factory.mktemp("exported")
    quick = ["--trainer.max_epochs=6", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    wide = ["--model.student.widths=[8,16,32]"]
    for arguments in (
        ["fit", "-c", "digits/teacher", *quick, "--model.network.blocks=[1,1,1]"],
        ["fit", "-c", "digits/distill", *quick, *wide, "--model.teacher.network.blocks=[1,1,1]"],
        ["test", "-c", "digits/distill", *wide],
    ):
        run_command(folder, *arguments)
    return folder / "lightning_logs/digits/distill/version_0"


@pytest.fixture(scope="module")
def best(run: Path) -> Path:
    return run / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def images_and_logits(best: Path) -> tuple[Tensor, Tensor]:
    """The test images in [0, 1], and the trained network's logits for them."""
    data = DigitsDataModule(batch_size=360)
    data.setup("test")
    (batch,) = data.test_dataloader()
    network = DistillationModule.load_from_checkpoint(best, teacher=None).eval()
    with torch.no_grad():
        return data.pixels(batch).float() / 255, network(data.augment(batch).images)


def small_network(blocks: list[int], widths: list[int]) -> ResNet:
    network = ResNet(blocks, widths, in_channels=1).eval()
    set_data_config(network, DataConfig.of([0.5], [0.25]))
    return network


def label_agreement(logits: np.ndarray, expected: Tensor) -> float:
    """Return the fraction of images with the same predicted label."""
    return float((logits.argmax(1) == expected.numpy().argmax(1)).mean())


def test_the_onnx_file_gives_the_checkpoints_logits(
    best: Path, images_and_logits: tuple[Tensor, Tensor], kd: Command, tmp_path: Path
) -> None:
    images, expected = images_and_logits
    output = kd("export", str(best), "-o", str(tmp_path / "student.onnx"))
    assert "100.00% of the labels on validation images of the run" in output
    classifier = OnnxClassifier(tmp_path / "student.onnx", threads=1)
    for count in (1, 3, 64):
        torch.testing.assert_close(
            torch.from_numpy(classifier(images[:count].numpy())), expected[:count], atol=1e-4, rtol=1e-4
        )
    as_bytes = (images * 255).round().to(torch.uint8).numpy()
    np.testing.assert_allclose(classifier(as_bytes), expected.numpy(), atol=1e-3)
    assert classifier.classes == list("0123456789")
    assert classifier.shape == (1, 8, 8)


def test_only_the_student_is_exported_with_metadata_of_its_checkpoint(
    best: Path, run: Path, kd: Command, tmp_path: Path
) -> None:
    kd("export", str(run), "-o", str(tmp_path / "student.onnx"))  # a run stands for its best checkpoint
    model = onnx.load(tmp_path / "student.onnx")
    onnx.checker.check_model(model)
    weights = sum(int(np.prod(value.dims)) for value in model.graph.initializer)
    parameters = sum(value.numel() for value in ResNet([1, 1, 1], [8, 16, 32], in_channels=1).parameters())
    assert weights < 1.05 * parameters
    known = {entry.key: entry.value for entry in model.metadata_props}
    assert known["checkpoint"].endswith("distill/version_0/checkpoints/best.ckpt")
    accuracy = json.loads((run / "test.json").read_text())["accuracy"]
    assert float(known["test_accuracy_of_the_checkpoint"]) == accuracy
    assert (tmp_path / "student.onnx").stat().st_size < 4 * parameters + 25_000


@pytest.mark.parametrize("name", ["best", "last"])
def test_the_test_accuracy_is_stored_only_for_the_tested_checkpoint(
    name: str, run: Path, kd: Command, tmp_path: Path
) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    kd("export", str(moved / f"checkpoints/{name}.ckpt"), "--format", "safetensors")
    with safe_open(moved / f"checkpoints/{name}.safetensors", "pt") as file:
        assert ("test_accuracy_of_the_checkpoint" in file.metadata()) == (name == "best")


@pytest.mark.parametrize("damaged", ["{", "[1]"])
def test_a_damaged_test_result_is_not_stored(damaged: str, run: Path, kd: Command, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    (copied / "test.json").write_text(damaged)
    kd("export", str(copied), "--format", "safetensors", "-o", str(tmp_path / "x.safetensors"))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert "test_accuracy_of_the_checkpoint" not in file.metadata()


@pytest.mark.parametrize(
    ("options", "name"),
    [([], "best.onnx"), (["--int8"], "best-int8.onnx"), (["--uint8", "--fp16"], "best-fp16-uint8.onnx")],
)
def test_the_default_file_name_contains_the_options(
    options: list[str], name: str, run: Path, kd: Command, tmp_path: Path
) -> None:
    checkpoints = shutil.copytree(run, tmp_path / "run") / "checkpoints"
    before = set(checkpoints.iterdir())
    kd("export", str(tmp_path / "run"), *options)
    assert set(checkpoints.iterdir()) - before == {checkpoints / name}


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
@pytest.mark.parametrize("format", SUFFIXES)
def test_files_of_every_format_respect_the_umask(format: Format, tmp_path: Path) -> None:
    path = tmp_path / f"student{SUFFIXES[format]}"
    before = os.umask(0o027)
    try:
        export_network(small_network([1], [4]), path, torch.rand(4, 1, 8, 8), format=format)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(("width", "larger"), [(4, True), (64, False)])
def test_the_result_shows_whether_int8_makes_the_file_larger(width: int, larger: bool, tmp_path: Path) -> None:
    network, images = small_network([1], [width]), torch.rand(64, 1, 8, 8)
    result = export_network(network, tmp_path / "small.onnx", images, calibration=images)
    export_network(network, tmp_path / "float.onnx", images)
    size = (tmp_path / "float.onnx").stat().st_size
    assert ((tmp_path / "small.onnx").stat().st_size > size) == larger
    assert result.float32_size == size
    assert (result.size > size) == larger


@pytest.mark.parametrize("options", [["--int8"], ["--int8", "--uint8"], ["--fp16"], ["--uint8"]])
def test_int8_and_half_precision_keep_the_predicted_labels(
    options: list[str], best: Path, images_and_logits: tuple[Tensor, Tensor], kd: Command, tmp_path: Path
) -> None:
    images, expected = images_and_logits
    kd("export", str(best), *options, "-o", str(tmp_path / "small.onnx"))
    classifier = OnnxClassifier(tmp_path / "small.onnx")
    assert label_agreement(classifier(images.numpy()), expected) > (0.95 if "--int8" in options else 0.995)
    operators = {node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node}
    assert ("QuantizeLinear" in operators) == ("--int8" in options)


def test_int8_is_calibrated_on_training_images(
    best: Path, kd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    images, load = Run.images, DigitsDataModule.load

    def recorded_images(run: Run, split: str, **count: Any) -> Any:
        read.append(split)
        return images(run, split, **count)

    def recorded_load(data: DigitsDataModule, split: str) -> Any:
        read.append(split)
        return load(data, split)

    monkeypatch.setattr(Run, "images", recorded_images)
    monkeypatch.setattr(DigitsDataModule, "load", recorded_load)
    kd("export", str(best), "--int8", "-o", str(tmp_path / "small.onnx"))
    assert set(read) == {"train", "val"}
    seen = Run.find(best).images("train", count=200)
    assert seen is not None
    assert seen[0].shape == (200, 1, 8, 8)


def test_torch_and_safetensors_files_hold_the_checkpoints_network(
    best: Path, images_and_logits: tuple[Tensor, Tensor], kd: Command, tmp_path: Path
) -> None:
    images, expected = images_and_logits
    kd("export", str(best), "--format", "torch", "-o", str(tmp_path / "student.pt2"))
    files = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "student.pt2", extra_files=files)
    torch.testing.assert_close(program.module()(images), expected, atol=1e-4, rtol=1e-4)
    assert json.loads(json.loads(files["metadata.json"])["classes"]) == list("0123456789")
    kd("export", str(best), "--format", "torch", "--fp16", "-o", str(tmp_path / "half.pt2"))
    halved = torch.export.load(tmp_path / "half.pt2")
    assert {weight.dtype for weight in halved.state_dict.values() if weight.is_floating_point()} >= {torch.bfloat16}
    assert (halved.module()(images).argmax(1) == expected.argmax(1)).float().mean() > 0.97
    assert (tmp_path / "half.pt2").stat().st_size < (tmp_path / "student.pt2").stat().st_size
    kd("export", str(best), "--format", "safetensors", "-o", str(tmp_path / "student.safetensors"))
    network = from_checkpoint(ResNet([1, 1, 1], [8, 16, 32], in_channels=1), tmp_path / "student.safetensors")
    for name, weight in Checkpoint(best).network().state_dict().items():
        assert torch.equal(weight, network.state_dict()[name])
    assert data_config(network) == data_config(Checkpoint(best).network()) != DataConfig()
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        assert "checkpoint_sha256" in file.metadata()


def test_classify_predicts_the_labels_of_image_files(
    best: Path, images_and_logits: tuple[Tensor, Tensor], kd: Command, tmp_path: Path
) -> None:
    images, expected = images_and_logits
    kd("export", str(best), "-o", str(tmp_path / "student.onnx"))
    (tmp_path / "images").mkdir()
    for number in range(5):
        pixels = (images[number, 0] * 255).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    surest = int(expected.softmax(1).amax(1).argmax())
    large = Image.fromarray((images[surest, 0] * 255).round().byte().numpy()).resize((24, 24), 0)
    large.convert("RGB").save(tmp_path / "images" / "large.png")
    kd("classify", str(tmp_path / "student.onnx"), str(tmp_path / "images"), "-o", str(tmp_path / "labels.csv"))
    with (tmp_path / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    answers = [str(label) for label in expected[:5].argmax(1).tolist()]
    assert [row["label"] for row in rows] == [*answers, str(int(expected[surest].argmax()))]
    probability = float(expected[0].softmax(0).max())
    assert float(rows[0]["probability"]) == pytest.approx(probability, abs=1e-3)
    output = kd("classify", str(tmp_path / "student.onnx"), str(tmp_path / "images" / "0.png"))
    assert output.split()[1] == answers[0]


@pytest.fixture(scope="module")
def small_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of an untrained network."""
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    export_network(small_network([1], [4]), path, torch.rand(64, 1, 8, 8))
    return path


@pytest.mark.parametrize("written", [True, False])
def test_classify_skips_and_names_unreadable_images(
    written: bool, small_onnx: Path, kd: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8), dtype=np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:60])
    Image.fromarray(images[68].astype(np.uint16) * 257).save(tmp_path / "68.png")
    with pytest.raises(SystemExit) as exited:
        kd("classify", str(small_onnx), str(tmp_path), *(["-o", "folder/labels.csv"] if written else []))
    assert str(exited.value).splitlines() == [
        "kd-lightning classify: 2 of 70 images are left out.",
        f"{str(tmp_path / '03.png')!r} cannot be read as an image; fix or remove it.",
        f"{str(tmp_path / '68.png')!r} has more than 8 bits a pixel of grey; save it with 8 bits.",
    ]
    output = capsys.readouterr().out
    lines = Path("folder/labels.csv").read_text().splitlines()[1:] if written else output.splitlines()
    assert [Path(re.split(",|  ", line)[0]).stem for line in lines] == [
        f"{i:02}" for i in range(70) if i not in (3, 68)
    ]


@pytest.mark.parametrize("existing", ["file", "folder"])
def test_classify_refuses_an_existing_output_before_reading_images(
    existing: str, small_onnx: Path, kd: Command, tmp_path: Path
) -> None:
    output = tmp_path / "labels.csv"
    output.write_text("mine") if existing == "file" else output.mkdir()
    with pytest.raises(SystemExit, match=r"labels\.csv' exists; delete it, or name another file with -o\.$"):
        kd("classify", str(small_onnx), str(tmp_path / "no images"), "-o", str(output))


def test_a_student_with_a_reused_classifier_is_exported(tmp_path: Path) -> None:
    backbone, teacher = ResNet([1, 1], [4, 8], in_channels=1), ResNet([1, 1], [8, 16], in_channels=1)
    student = reuse_teacher_classifier(backbone, teacher.fc).eval()
    set_data_config(student, DataConfig.of([0.5], [0.25]))
    images = torch.rand(40, 1, 8, 8)
    export_network(student, tmp_path / "student.onnx", images)
    initializers = onnx.load(tmp_path / "student.onnx").graph.initializer
    assert any(list(value.dims) in ([10, 16], [16, 10]) for value in initializers)
    with torch.no_grad():
        expected = Inference(student)(images).numpy()
    np.testing.assert_allclose(OnnxClassifier(tmp_path / "student.onnx")(images.numpy()), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "torch", "-o", "good.onnx"], "ends in .pt2"),
        (["--int8", "--format", "torch", "-o", "good.pt2"], "for the format onnx"),
        (
            ["--fp16", "--format", "safetensors", "-o", "good.safetensors"],
            "fp16 is only available for the formats onnx and torch",
        ),
        (["--int8", "--fp16", "-o", "good.onnx"], "cannot be combined"),
        (["--int8", "--calibration_images", "5", "-o", "good.onnx"], "calibration_images must be >= 32"),
    ],
)
def test_incompatible_options_are_refused(
    options: list[str], message: str, best: Path, kd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.onnx").write_bytes(b"good")
    with pytest.raises(SystemExit, match=message):
        kd("export", str(best), *options)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("good.onnx", b"good")]


def test_missing_files_are_refused(kd: Command, tmp_path: Path, best: Path) -> None:
    with pytest.raises(SystemExit, match="There is no checkpoint, run or trained recipe 'nowhere'"):
        kd("export", "nowhere")
    alone = tmp_path / "alone.ckpt"
    content = Checkpoint(best).content
    torch.save({key: value for key, value in content.items() if not key.startswith("datamodule")}, alone)
    with pytest.raises(SystemExit, match=r"calibrated on training images, and those of '.*' do not exist"):
        kd("export", str(alone), "--int8")
    with pytest.raises(SystemExit, match="cannot be read as an ONNX file"):
        kd("classify", str(alone), str(tmp_path))
    kd("export", str(best), "-o", str(tmp_path / "s.onnx"))
    with pytest.raises(SystemExit, match="There is no image"):
        kd("classify", str(tmp_path / "s.onnx"), str(tmp_path / "none"))


def test_data_that_cannot_be_imported_are_refused_by_name(run: Path, kd: Command, tmp_path: Path) -> None:
    config = shutil.copytree(run, tmp_path / "run") / "config.yaml"
    config.write_text(config.read_text().replace("kd_lightning.DigitsDataModule", "my_pkg.MyData"))
    with pytest.raises(SystemExit, match=r"config.yaml' names 'my_pkg.MyData', and there is no module 'my_pkg'"):
        kd("export", str(tmp_path / "run"))


def test_the_command_refuses_a_checkpoint_trained_from_python(
    make_trainer: Callable[..., object], tmp_path: Path, kd: Command
) -> None:
    from kd_lightning import TeacherModule

    trainer = make_trainer(max_epochs=1)
    trainer.fit(TeacherModule(ResNet([1], [4], in_channels=1)), DigitsDataModule())  # type: ignore[attr-defined]
    trainer.save_checkpoint(tmp_path / "python.ckpt")  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match=r"for example to kd_lightning\.export\.export_network"):
        kd("export", str(tmp_path / "python.ckpt"))


class DiffersDuringExport(nn.Module):
    """A network whose exported program gives other logits than the network."""

    data_config = DataConfig.of([0.5], [0.25])

    def __init__(self, operator: str = "none") -> None:
        super().__init__()
        self.operator = operator
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        if self.operator == "eig":
            images = torch.linalg.eig(images).eigenvalues.real.repeat(1, 1, 8)
        return self.fc(images.flatten(1)) * (2 if torch.compiler.is_exporting() else 1)


def test_a_file_that_differs_from_the_network_is_refused_and_overwrites_nothing(tmp_path: Path) -> None:
    good = tmp_path / "good.onnx"
    good.write_bytes(b"good")
    with pytest.raises(ValueError, match="The file disagrees with the checkpoint"):
        export_network(DiffersDuringExport(), good, torch.rand(40, 1, 8, 8))
    assert [file.name for file in tmp_path.iterdir()] == ["good.onnx"]
    assert good.read_bytes() == b"good"


def test_a_folder_is_refused_before_the_export(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.onnx' is a folder; name a file\.$"):
        export_network(DiffersDuringExport("eig"), tmp_path / "folder.onnx", torch.rand(40, 1, 8, 8))


def test_an_operator_that_cannot_be_exported_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DiffersDuringExport cannot be exported to ONNX: .*linalg_eig"):
        export_network(DiffersDuringExport("eig"), tmp_path / "a.onnx", torch.rand(40, 1, 8, 8))


def test_a_network_without_input_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="standard deviation of the network's input are not known"):
        export_network(ResNet([1], [4]), tmp_path / "a.onnx")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r'extra `export` is not installed; run `pip install "\.\[export\]"` in a'):
        OnnxClassifier(tmp_path / "a.onnx")


def test_a_network_in_channels_last_gives_the_same_file(tmp_path: Path) -> None:
    """Its pooled map would become a gather, of which no reader of the file knows the shape."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.pool(self.conv(images)).flatten(1))
            return logits

    network = Pooled().eval()
    set_data_config(network, DataConfig.of([0.5] * 3, [0.25] * 3))
    operations: list[list[str]] = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=memory_format)
        file = tmp_path / f"{len(operations)}.onnx"
        export_network(network, file)
        operations.append([node.op_type for node in onnx.load(file).graph.node])
    assert operations[0] == operations[1]
    assert network.conv.weight.is_contiguous(memory_format=torch.channels_last), "as it was"
