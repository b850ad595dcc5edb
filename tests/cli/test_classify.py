"""`kd-lightning classify` answers as `test` and `predict` do, whatever the files are."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_lightning import ImageFolderDataModule
from kd_lightning.export import export_network
from kd_lightning.networks import DataConfig, ResNet
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


def test_a_number_of_channels_that_files_do_not_have_is_refused(kd: Callable[..., str], tmp_path: Path) -> None:
    network = ResNet([1], [4], in_channels=4).eval()
    set_data_config(network, DataConfig.of([0.5] * 4, [0.25] * 4))
    export_network(network, tmp_path / "a.onnx", torch.rand(4, 4, 8, 8))
    with pytest.raises(SystemExit, match=r"classify: 'a\.onnx' takes images of 4 channels, and files are read with 1"):
        kd("classify", "a.onnx", "photos")
