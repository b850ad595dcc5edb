"""`kd-lightning classify` answers as `test` and `predict` do, whatever the files are."""

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from command_options import QUIET
from faults import run_command
from made_photographs import photograph
from PIL import Image

from kd_lightning import ImageFolderDataModule, TeacherModule
from kd_lightning.export import OnnxClassifier, export_network
from kd_lightning.export.onnx_classifier import Images
from kd_lightning.files.prepare import Preparation
from kd_lightning.networks import DataConfig, ResNet, from_checkpoint
from kd_lightning.networks.data_config import set_data_config


def write_photographs(folder: Path) -> None:
    """Write an image turned by its orientation, a transparent one, one in a sub-folder, and what is left out."""
    (folder / "deep").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (4, 9, 12, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(noise[0, :, :, :3]).save(folder / "a.jpg", exif=exif)
    Image.fromarray(noise[1]).save(folder / "b.png")
    Image.fromarray(noise[2, :, :, :3]).convert("CMYK").save(folder / "deep" / "c.JPEG")
    Image.fromarray(noise[3, :, :, :3]).save(folder / "d.gif")
    for name in ("._a.jpg", ".DS_Store", "e.heic"):
        (folder / name).write_bytes(b"no image")


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_read_as_by_the_data_module(channels: int, kd: Callable[..., str], tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos" / "predict")
    torch.manual_seed(0)
    network = ResNet([1], [16], num_classes=4, in_channels=channels).eval()
    statistics = [0.5] * channels, [0.25] * channels
    set_data_config(network, DataConfig.of(*statistics, ["ant", "bee", "cat", "dog"]))
    export_network(network, tmp_path / "a.onnx", torch.rand(4, channels, 8, 8))
    data = ImageFolderDataModule(str(tmp_path / "photos"), mean=statistics[0], std=statistics[1], image_size=8)
    with pytest.warns(UserWarning, match=r"left out, .*: 1 \.heic"):
        data.setup("predict")
    batch = data.augment(next(iter(data.predict_dataloader())))
    with torch.no_grad():
        probabilities = network(batch.images).softmax(1)
    kd("classify", "a.onnx", "photos", "-o", "labels.csv")
    rows = list(csv.DictReader(Path("labels.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == [
        f"photos/predict/{name}" for name in ("a.jpg", "b.png", "d.gif", "deep/c.JPEG")
    ]
    assert [row["label"] for row in rows] == [["ant", "bee", "cat", "dog"][i] for i in probabilities.argmax(1).tolist()]
    found = [float(row["probability"]) for row in rows]
    assert found == pytest.approx(probabilities.amax(1).tolist(), abs=1e-3)


def test_what_is_left_out_is_counted(kd: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photographs(tmp_path / "photos")
    network = ResNet([1], [4]).eval()
    set_data_config(network, DataConfig.of([0.5] * 3, [0.25] * 3))
    export_network(network, tmp_path / "a.onnx", torch.rand(4, 3, 8, 8))
    printed = io.StringIO()
    monkeypatch.setattr("sys.stderr", printed)
    kd("classify", "a.onnx", "photos")
    assert "1 file of 'photos' is left out, since Pillow does not read it as an image: 1 .heic;" in printed.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs, of which four of six to predict can be read, and a run on them."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("train/ant", "train/bee", "predict"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(6):
            photograph(48, 48, seed=number + 100 * (name == "train/bee")).save(
                folder / "photos" / name / f"{number}.jpg"
            )
    (folder / "photos" / "predict" / "1.jpg").write_bytes(b"no image")
    cut = folder / "photos" / "predict" / "4.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    options = ["--data.root=photos", "--data.image_size=8", "--data.batch_size=4", "--trainer.max_epochs=1"]
    small = ["=kd_lightning.networks.ResNet", ".num_classes=2", ".blocks=[1]", ".widths=[4]"]
    network = [f"--model.network{argument}" for argument in small]
    run_command(folder, "fit", "-c", "photos/teacher", *options, *network, *QUIET)
    return folder


@pytest.mark.filterwarnings("ignore:Left out")
def test_predict_and_classify_finish_the_others_and_name_what_is_broken(
    kd: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    broken = [f"{f'photos/predict/{i}.jpg'!r} cannot be read as an image; fix or remove it." for i in (1, 4)]
    sentence = "\n".join(["2 of 6 images are left out.", *broken])
    kd("export", "photos/teacher", "-o", "a.onnx")
    commands = [["classify", "a.onnx", "photos/predict", "-o", "labels.csv"]]
    in_file = ["--data.memory_limit=0", "--data.cache=decoded"]  # the second time its images are not decoded
    for options in ([], in_file, in_file, ["--data.memory_limit=0", "--data.cache=off", "--data.num_workers=1"]):
        commands.append(["predict", "-c", "photos/teacher", "--predictions.path=labels.csv", *options, *QUIET])
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            kd(*command)
        assert stopped.value.code == f"kd-lightning {command[0]}: {sentence}", command
        rows = list(csv.DictReader(Path("labels.csv").read_text().splitlines()))
        assert [row["image"] for row in rows] == [f"photos/predict/{i}.jpg" for i in (0, 2, 3, 5)]
        Path("labels.csv").unlink()


def test_a_number_of_channels_that_files_do_not_have_is_refused(kd: Callable[..., str], tmp_path: Path) -> None:
    network = ResNet([1], [4], in_channels=4).eval()
    set_data_config(network, DataConfig.of([0.5] * 4, [0.25] * 4))
    export_network(network, tmp_path / "a.onnx", torch.rand(4, 4, 8, 8))
    with pytest.raises(SystemExit, match=r"classify: 'a\.onnx' takes images of 4 channels, and files are read with 1"):
        kd("classify", "a.onnx", "photos")


# --- prepared as by test


def write_folder(root: Path) -> None:
    """Write photographs of several sizes and shapes, one on its side, in class folders."""
    sizes = [(40, 56), (61, 33), (30, 30), (90, 44), (12, 17), (50, 51)]
    turned = Image.Exif()
    turned[0x112] = 6
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i, (height, width) in enumerate(sizes):
                image = photograph(height, width, seed=10 * number + i)
                image.save(root / split / name / f"{i}.jpg", exif=turned if i == 3 else Image.Exif())


class Recorder(OnnxClassifier):
    """Keeps the images that it was given."""

    seen: ClassVar[list[Images]] = []

    def __call__(self, images: Images) -> npt.NDArray[np.float32]:
        Recorder.seen.append(images)
        return super().__call__(images)


def known_to_timm(mode: str) -> DataConfig:
    preparation = Preparation.of(24, 27, mode=mode, interpolation="bicubic", fill=(124, 116, 104))
    return DataConfig.of([0.5] * 3, [0.25] * 3, preparation=preparation)


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"image_size": 24, "eval_size": 30}, None),
        ({"image_size": 24, "eval_crop": 0.8, "interpolation": "bicubic"}, None),
        ({"image_size": 24, "eval_size": 31, "eval_crop": 0.9, "mean": [0.5], "std": [0.25]}, None),
        ({}, known_to_timm("squash")),
        ({}, known_to_timm("border")),
        ({"image_size": 20, "eval_size": 33}, known_to_timm("center")),
    ],
)
def test_classified_pixels_are_those_of_test(
    options: dict[str, Any],
    known: DataConfig | None,
    kd: Callable[..., str],
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_folder(tmp_path / "photos")
    data = ImageFolderDataModule(str(tmp_path / "photos"), batch_size=6, **options)
    network, saved = (ResNet([1], [8], num_classes=2, in_channels=len(data.mean)) for _ in range(2))
    if known is not None:
        set_data_config(network, known)
    trainer = make_trainer()
    trainer.fit(TeacherModule(network), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    (found,) = trainer.test(ckpt_path=tmp_path / "a.ckpt", datamodule=data, weights_only=True)
    pixels = {
        data.image_name("test", sample): image
        for batch in data.test_dataloader()
        for sample, image in zip(batch.ids.tolist(), data.pixels(batch).numpy(), strict=True)
    }
    export_network(from_checkpoint(saved, tmp_path / "a.ckpt").eval(), tmp_path / "a.onnx")
    monkeypatch.setattr("kd_lightning.cli.classify.OnnxClassifier", Recorder)
    Recorder.seen.clear()
    kd("classify", "a.onnx", "photos/test", "-o", "labels.csv")
    rows = list(csv.DictReader(Path("labels.csv").read_text().splitlines()))
    assert len(rows) == len(pixels) == 12
    for row, shown in zip(rows, np.concatenate(Recorder.seen), strict=True):
        assert (shown == pixels[str(tmp_path / row["image"])]).all(), row["image"]
    correct = [row["label"] == Path(row["image"]).parent.name for row in rows]
    assert np.mean(correct) == pytest.approx(found["test/accuracy"])
    expected = data.preparation
    assert OnnxClassifier("a.onnx").preparation == expected
    assert expected is not None
    if known is not None:
        assert known.preparation is not None
        assert expected == known.preparation.at(expected.size)


def test_a_file_without_a_preparation_keeps_the_aspect_ratio(tmp_path: Path) -> None:
    network = ResNet([1], [4]).eval()
    set_data_config(network, known_to_timm("squash"))
    export_network(network, tmp_path / "a.onnx")
    assert OnnxClassifier(tmp_path / "a.onnx").preparation == known_to_timm("squash").preparation
    older = onnx.load(tmp_path / "a.onnx")
    entries = [entry for entry in older.metadata_props if entry.key != "data_config"]
    del older.metadata_props[:]
    older.metadata_props.extend(entries)
    onnx.save(older, tmp_path / "older.onnx")
    assert OnnxClassifier(tmp_path / "older.onnx").preparation == Preparation.of(24)
