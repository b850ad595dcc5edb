"""The commands with photographs of several classes: fit, test, predict, export, classify, report and the tables."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from faults import run_command
from made_photographs import write_several_classes
from PIL import Image

from kd_lightning import Checkpoint, Run
from kd_lightning.export import OnnxClassifier

DATA = ["--data.root=photos", "--data.labels=labels.csv", "--data.image_size=32", "--data.augmentation.preset=light"]
QUICK = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]
NETWORK = '{"class_path": "kd_lightning.networks.ResNet", "init_args": {"blocks": [1, 1], "widths": [8, 16]}}'


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, its student and the student's exported file."""
    folder = tmp_path_factory.mktemp("several")
    write_several_classes(folder / "photos", 150, unlabelled=10)
    rate = "--model.learning_rate=0.1"
    options = [*DATA, *QUICK, rate]
    teacher = [f"--model.network={NETWORK}", "--trainer.max_epochs=12"]
    run_command(folder, "fit", "-c", "photos/teacher", *options, *teacher)
    student = ["--teacher=photos/teacher", f"--model.student={NETWORK}", "--trainer.max_epochs=2"]
    run_command(folder, "fit", "-c", "photos/distill", *options, *student, "--model.teacher_check=warn")
    run_command(folder, "test", "-c", "photos/distill")
    run_command(folder, "export", "photos/distill", "-o", "student.onnx")
    return folder


@pytest.fixture
def place(trained: Path, here: Path) -> Path:
    """The working folder, with a copy of all of it."""
    shutil.copytree(trained / "photos", here / "photos")
    shutil.copy(trained / "student.onnx", here)
    return here


def test_the_run_keeps_its_classes_thresholds_and_what_it_followed(place: Path) -> None:
    teacher, student = Run.find("photos/teacher"), Run.find("photos/distill")
    for run in (teacher, student):
        known = Checkpoint(run.best_file).data_config
        assert known.classes == ("blue", "green", "red")
        assert known.thresholds is not None
        fit = json.loads((run.folder / "fit.json").read_text())
        assert fit["monitor"] == "val/map"
        assert fit["score"] == pytest.approx(fit["val"]["map"], abs=1e-5)
    assert teacher.fit is not None
    assert teacher.fit["val"]["map"] > 0.9
    assert student.test is not None
    assert {"map", "f1_micro", "f1_macro", "agreement", "kl"} <= set(student.test)
    assert "num_classes: 3" in (student.folder / "config.yaml").read_text()


def test_predict_and_classify_give_the_same_labels(place: Path, kd: Callable[..., str]) -> None:
    printed = kd("predict", "-c", "photos/teacher", *QUICK)
    written = re.search(r"The predictions are in (\S+)\.\n", printed)
    assert written is not None
    predicted = list(csv.DictReader(Path(written[1]).read_text().splitlines()))
    kd("export", "photos/teacher", "-o", "teacher.onnx")
    kd("classify", "teacher.onnx", *(row["image"] for row in predicted), "-o", "labels.csv")
    classified = list(csv.DictReader(Path("labels.csv").read_text().splitlines()))
    assert [row["label"] for row in classified] == [row["label"] for row in predicted]
    assert len({row["label"] for row in classified}) > 2
    true = {
        Path(row["file"]).name: row["label"]
        for row in csv.DictReader((place / "photos/labels.csv").read_text().splitlines())
    }
    right = [set(row["label"].split(";")) == set(true[Path(row["image"]).name].split(";")) for row in classified]
    assert np.mean(right) > 0.6
    for one, other in zip(predicted, classified, strict=True):
        if one["label"] != "-":
            pairs = zip(one["probability"].split(";"), other["probability"].split(";"), strict=True)
            assert all(float(a) == pytest.approx(float(b), abs=2e-3) for a, b in pairs)
    shown = kd("classify", "teacher.onnx", predicted[0]["image"])
    assert shown.split() == [*filter(None, classified[0].values())]


def test_an_image_without_a_class_is_printed_as_such(place: Path, kd: Callable[..., str]) -> None:
    model = OnnxClassifier("student.onnx")
    assert model.thresholds is not None
    assert model.classes == ["blue", "green", "red"]
    assert json.loads(model.metadata["thresholds"]) == model.thresholds
    assert float(model.metadata["test_map_of_the_checkpoint"]) > 0
    # as without this package
    pixels: Any = np.asarray(Image.new("RGB", (32, 32), "gray"), dtype=np.float32).transpose(2, 0, 1)[None] / 255
    (logits,) = onnxruntime.InferenceSession("student.onnx").run(None, {"images": pixels})
    np.testing.assert_allclose(model.probabilities(pixels), 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=1e-6)
    Image.new("RGB", (32, 32), "gray").save("gray.png")
    given = [
        c for c, p, t in zip(model.classes, model.probabilities(pixels)[0], model.thresholds, strict=True) if p > t
    ]
    shown = kd("classify", "student.onnx", "gray.png").split()
    assert shown[0] == "gray.png"
    assert set(shown[1].split(";")) == set(given or ["-"])


def test_validate_and_the_tables_show_map_and_f1(place: Path, kd: Callable[..., str]) -> None:
    printed = kd("validate", "-c", "photos/teacher", *QUICK)
    assert re.search(r"class +┃ images ┃ average precision ┃ +F1 ┃ precision ┃ recall ┃ threshold", printed)
    assert re.search(r"│ blue +│ +\d+ │ +[\d.]+% │", printed)
    assert re.search(r"photos/distill .*[\d.]+% mAP", kd("compare", "photos/distill"))
    assert re.search(r"photos/teacher/version_0 .*[\d.]+% mAP", kd("runs"))


def test_the_report_shows_the_classes_and_the_photographs_in_which_models_differ(
    place: Path, kd: Callable[..., str]
) -> None:
    kd("report", "photos/distill", "student.onnx")
    text = Path("report/report.md").read_text()
    assert "test mAP (%)" in text
    assert "F1 micro (%)" in text
    assert "calibration error" not in text
    assert "test accuracy" not in text
    assert "## Each class, average precision and F1 in per cent" in text
    assert re.search(r"\| blue \| \d+ \| [\d.]+ \(F1 [\d.]+ above 0\.\d+\)", text)
    assert "onfusion" not in text
    for section in ("Mean average precision against cost", "Training", "Calibration"):
        assert f"## {section}" in text
    page = Path("report/index.html").read_text()
    assert re.search(r"Test image \d+, labelled (-|[a-z;]+)", page)
    captions = re.findall(r"<figcaption>(Test image \d+)", page)
    assert len(captions) == len(set(captions))


def test_a_softmax_loss_is_refused_before_the_first_step(place: Path, kd: Callable[..., str]) -> None:
    binary = ["--model.losses.hard=BinaryTargetLoss", "--model.losses.decoupled=BinarySoftTargetLoss"]
    for options, loss, flags in (
        ([], r"HardTargetLoss\) and 'decoupled' \(DecoupledLoss", " ".join(binary)),
        (binary[:1], "DecoupledLoss", binary[1]),
    ):
        networks = ["--teacher=photos/teacher", f"--model.student={NETWORK}"]
        message = rf"The loss.* '\w+' \({loss}\) (is|are) for images of one class, but .* place \({flags}\)\.$"
        with pytest.raises(SystemExit, match=message):
            kd("fit", "-c", "photos/dkd", *DATA, *QUICK, *networks, *options)
    kd("fit", "-c", "photos/dkd", *DATA, *QUICK, *networks, *binary, "--trainer.max_epochs=1")


def test_a_loss_on_features_teaches_beside_a_binary_one(place: Path, kd: Callable[..., str]) -> None:
    losses = ["--model.losses.hard=BinaryTargetLoss", "--teacher=photos/teacher", f"--model.student={NETWORK}"]
    kd("fit", "-c", "photos/rkd", *DATA, *QUICK, *losses, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    assert (Run.find("photos/rkd").fit or {})["val"]["map"] > 0


def test_int8_is_calibrated_on_the_training_photographs(place: Path, kd: Callable[..., str]) -> None:
    printed = kd("export", "photos/teacher", "--int8", "-o", "small.onnx")
    assert "agrees in" in printed
    assert OnnxClassifier("small.onnx").thresholds == list(
        Checkpoint(Run.find("photos/teacher").best_file).data_config.thresholds or ()
    )
