"""A report of real runs and of the files that were made of them."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from faults import run_command
from onnx import numpy_helper
from scipy.stats import binomtest
from torch import nn
from torchvision.models import VisionTransformer

from kd_lightning.export import export_network
from kd_lightning.networks import DataConfig, ResNet, read_checkpoint, set_data_config
from kd_lightning.report.contents import contents, table
from kd_lightning.report.drawing import pareto, trade_off
from kd_lightning.report.measuring import measure
from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Model, load_model, onnx_size, teacher_of
from kd_lightning.report.page import Page, Section, write

Command = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a student that it taught, and the student's two exported files."""
    folder = tmp_path_factory.mktemp("reported")
    quick = ["--trainer.max_epochs=5", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    for arguments in (
        ["fit", "-c", "digits/teacher", *quick, "--model.network.blocks=[1,1,1]"],
        ["fit", "-c", "digits/distill", *quick, "--model.teacher.network.blocks=[1,1,1]"],
        ["export", "digits/distill", "-o", "student.onnx"],
        ["export", "digits/distill", "--int8", "-o", "small.onnx"],
        ["test", "-c", "digits/distill"],
    ):
        run_command(folder, *arguments)
    weights = onnx.load(folder / "student.onnx")
    for value in weights.graph.initializer:
        if list(value.dims) == [10]:  # the last bias: everything is a seven
            value.CopyFrom(numpy_helper.from_array(np.eye(10, dtype=np.float32)[7] * 1e4, value.name))
    onnx.save(weights, folder / "sevens.onnx")
    return folder


@pytest.fixture(scope="module")
def report(place: Path) -> Path:
    """The report of all of them."""
    files = ["digits/distill", "student.onnx", "small.onnx", "sevens.onnx"]
    run_command(place, "report", *files, "-o", "out")
    return place / "out"


def rows(report: Path) -> dict[str, list[str]]:
    lines = (report / "report.md").read_text().partition("\n## All models")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {cell[0]: cell[1:] for cell in cells[2:]}


def test_every_model_is_there_with_the_teacher_first(report: Path) -> None:
    assert list(rows(report)) == ["digits/teacher", "digits/distill", "student.onnx", "small.onnx", "sevens.onnx"]
    page = (report / "index.html").read_text()
    for section in ("Accuracy against cost", "Training", "Calibration", "Confusion", "the teacher right", "Each class"):
        assert section in page
    assert page.count('<figure class="plot">') == 3 + 2 + 1
    assert page.count('<table class="heat">') == 4, "a matrix for models that have the same"
    assert 12 <= page.count('<figure class="photograph">') <= 24
    captions = re.findall(r"<figcaption>(Test image \d+)", page)
    assert len(captions) == len(set(captions)), "each image is shown once"
    for picture in re.findall(r"\((picture-\d+\.svg)\)", (report / "report.md").read_text()):
        assert (report / picture).read_text().startswith("<svg")


def test_ids_are_one_pictures_alone(report: Path) -> None:
    page = (report / "index.html").read_text()
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 200
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_the_page_needs_nothing_else(report: Path) -> None:
    fetched: list[str] = []

    class Look(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag != "script"
            for name, value in attributes:
                if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:")):
                    fetched.append(value)

    Look().feed((report / "index.html").read_text())
    assert fetched == []


def test_figures_are_the_tests_and_each_file_is_run_itself(report: Path, place: Path) -> None:
    import json

    said = {name: cells[1:] for name, cells in rows(report).items()}
    tested = json.loads((place / "lightning_logs/digits/distill/version_0/test.json").read_text())
    student = said["digits/distill"]
    assert student[0] == f"{tested['parameters']:,}"
    assert student[3].split()[0] == f"{100 * tested['accuracy']:.2f}"
    assert float(student[4]) == pytest.approx(tested["ece"], abs=1e-3)
    assert float(student[5]) == pytest.approx(100 * tested["agreement"], abs=0.01)
    assert said["student.onnx"][3] == student[3]
    assert float(said["sevens.onnx"][3].split()[0]) == pytest.approx(10, abs=1)
    right = round(tested["accuracy"] * 360)
    low, high = binomtest(right, 360).proportion_ci(method="wilson")
    assert student[3].endswith(f"({100 * low:.1f} to {100 * high:.1f})")
    size = (place / "small.onnx").stat().st_size
    assert said["small.onnx"][2] == f"{size / 1e6:.3f}"


class Plain(nn.Module):
    """Known work: 6x6 places of 5 channels from 3x3 of 2, then 180 to 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 5, 3), nn.Linear(180, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(images).relu().flatten(1))


@pytest.mark.parametrize("numbers", ["float32", "float16", "int8"])
def test_work_and_weights_of_a_file_are_counted(numbers: str, tmp_path: Path) -> None:
    network = Plain().eval()
    set_data_config(network, DataConfig.of([0.5, 0.5], [0.25, 0.25]))
    images = torch.rand(64, 2, 8, 8)
    options: dict[str, Any] = {"fp16": numbers == "float16", "calibration": images if numbers == "int8" else None}
    export_network(network, tmp_path / "a.onnx", images, **options)
    parameters, macs = onnx_size(tmp_path / "a.onnx")
    assert parameters == 5 * 2 * 9 + 5 + 180 * 4 + 4
    assert macs == 36 * 5 * 2 * 9 + 180 * 4


@pytest.mark.parametrize("int8", [False, True])
def test_work_of_attention_is_counted_alike(int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5).eval()
    set_data_config(vit, DataConfig.of([0.5] * 3, [0.25] * 3))
    images = torch.rand(64, 3, 16, 16)
    export_network(vit, tmp_path / "vit.onnx", images, calibration=images if int8 else None)
    (tmp_path / "vit.ckpt").touch()
    monkeypatch.setattr("kd_lightning.runs.source.Checkpoint", lambda path: SimpleNamespace(network=lambda: vit))
    tokens, width = 17, 16
    layer = tokens * width * (3 * width + width + 2 * 32) + 2 * tokens * tokens * width
    expected = 16 * width * 3 * 4 * 4 + 2 * layer + 5 * width
    assert load_model(str(tmp_path / "vit.ckpt"), (3, 16, 16)).macs == expected
    assert onnx_size(tmp_path / "vit.onnx")[1] == expected


def test_latency_is_compared_within_one_runtime(report: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = rows(report)
    assert [cells[0].split()[0] for cells in said.values()] == ["PyTorch"] * 2 + ["ONNX"] * 3
    assert [cells[-1].endswith("x") for cells in said.values()] == [True] * 2 + [False] * 3
    assert all(cells[-2].endswith("x") for cells in said.values())
    assert "batch norms are folded" in (report / "index.html").read_text()
    monkeypatch.chdir(place)
    file, figures = load_model("student.onnx"), figures_of(torch.randn(4, 10))
    assert table([file], [figures]).rows[0]["faster"] == "1.0x"


def test_a_file_outlives_its_run(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(place / "lightning_logs", tmp_path / "lightning_logs")
    monkeypatch.chdir(tmp_path)
    file = str(place / "student.onnx")
    run = load_model(file).run
    assert run is not None
    assert run.folder == Path("lightning_logs/digits/distill/version_0")
    shutil.copy("lightning_logs/digits/teacher/version_0/checkpoints/best.ckpt", run.best_file)
    assert load_model(file).run is None, "another network was trained in that folder"
    run.best_file.unlink()
    assert load_model(file).run is None


def test_work_of_a_run_is_counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    model, file = load_model("digits/distill", (1, 8, 8)), load_model("student.onnx")
    assert model.macs == file.macs
    assert model.macs is not None
    assert model.macs > 1000
    assert model.parameters == sum(w.numel() for w in ResNet([1, 1, 1], [2, 4, 8], in_channels=1).parameters())
    figures = measure(model, torch.rand(65, 1, 8, 8), torch.arange(65) % 10, None)
    assert figures.latency[0] <= figures.latency[1] <= figures.latency[2]
    assert figures.agreement == 1
    with pytest.raises(ValueError, match=r"digits/distill does not take images of shape \(3, 8, 8\)"):
        load_model("digits/distill", (3, 8, 8))


def test_a_teacher_of_plain_weights_leads(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(place)
    teacher = load_model("digits/teacher", (1, 8, 8))
    weights = read_checkpoint(teacher.file)["state_dict"]
    published = {name.removeprefix("network."): value for name, value in weights.items() if name.startswith("network.")}
    torch.save(published, tmp_path / "published.pt")
    run = tmp_path / "run"
    shutil.copytree("lightning_logs/digits/distill/version_0", run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(teacher.file), str(tmp_path / "published.pt")))
    distilled = load_model(str(run), (1, 8, 8))
    taught_by = teacher_of(distilled, (1, 8, 8))
    assert taught_by is not None
    assert (taught_by.parameters, taught_by.macs) == (teacher.parameters, teacher.macs)
    images = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    np.testing.assert_allclose(taught_by.classify(images), teacher.classify(images), atol=1e-5)
    (tmp_path / "published.pt").unlink()
    assert teacher_of(distilled, (1, 8, 8)) is None


@pytest.mark.parametrize("names", [["digits/distill", "student.onnx"], ["digits/distill", "digits/teacher"]])
def test_each_checkpoint_is_read_once(
    place: Path,
    kd: Command,
    loaded_files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    names: list[str],
) -> None:
    monkeypatch.chdir(place)
    kd("report", *names, "-o", str(tmp_path / "out"))
    runs = [Path("lightning_logs", recipe, "version_0") for recipe in ("digits/distill", "digits/teacher")]
    assert sorted(loaded_files) == [run / "checkpoints/best.ckpt" for run in runs]


def test_the_front_is_what_nothing_beats() -> None:
    generator = np.random.default_rng(0)
    costs, values = generator.random(50), generator.random(50)
    front = pareto(costs.tolist(), values.tolist())
    for i in range(50):
        beaten = any(costs[j] <= costs[i] and values[j] >= values[i] and j != i for j in range(50))
        assert (i in front) != beaten
    assert sorted(front, key=lambda i: costs[i]) == front


def test_what_cannot_be_reported_is_refused(
    place: Path, kd: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit, match="There is no checkpoint, run or trained recipe 'nowhere'"):
        kd("report", "nowhere", "-o", str(tmp_path / "a"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match="contains files that are not a report's"):
        kd("report", "digits/distill", "-o", str(mine))
    assert [file.name for file in mine.iterdir()] == ["thesis.tex"]
    network = ResNet([1], [4], num_classes=3, in_channels=1).eval()
    set_data_config(network, DataConfig.of([0.5], [0.5], ["a", "b", "c"]))
    export_network(network, tmp_path / "other.onnx", torch.rand(64, 1, 8, 8))
    with pytest.raises(SystemExit, match="do not have the same classes"):
        kd("report", "digits/distill", str(tmp_path / "other.onnx"), "-o", str(tmp_path / "b"))
    with pytest.raises(SystemExit, match="add such a run"):
        kd("report", str(tmp_path / "other.onnx"), "-o", str(tmp_path / "c"))


def test_only_a_report_is_written_over(report: Path, kd: Command, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="There is no checkpoint, run or trained recipe 'nowhere'"):
        kd("report", "nowhere", "-o", str(report))
    for name in ("index.html", "report.md", "picture-1.svg"):
        mine = tmp_path / name / name
        mine.parent.mkdir()
        mine.write_text("made with kd-lightning report, by hand")
        with pytest.raises(SystemExit, match="contains files that are not a report's"):
            kd("report", "nowhere", "-o", str(mine.parent))


def test_images_of_another_size_are_refused(
    place: Path, kd: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network = ResNet([1], [4], in_channels=1).eval()
    set_data_config(network, DataConfig.of([0.5], [0.5], list("0123456789")))
    export_network(network, tmp_path / "large.onnx", torch.rand(64, 1, 16, 16))
    monkeypatch.chdir(place)
    said = r"large.onnx takes images \(1, 16, 16\) and the test images of digits/teacher are \(1, 8, 8\)"
    with pytest.raises(SystemExit, match=said):
        kd("report", "digits/teacher", str(tmp_path / "large.onnx"), "-o", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "is damaged"),
        ("model: [", "is damaged"),
        ("[1]", "is damaged"),
        ("data: 3", "is damaged"),
        ("data: {class_path: nowhere.Data}", "cannot be built .*nowhere.*; correct that, or make it importable"),
    ],
)
def test_a_broken_configuration_is_one_sentence(
    config: str, message: str, place: Path, kd: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "lightning_logs/digits/teacher/version_0", run)
    (run / "config.yaml").write_text(config)
    with pytest.raises(SystemExit, match=message) as caught:
        kd("report", str(run), "-o", str(tmp_path / "out"))
    assert str(run / "config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("times", [(4, 2, 3, 1), (1, 2, 3, 4)])
def test_each_runtime_has_its_own_picture_and_front(times: tuple[int, ...], tmp_path: Path) -> None:
    places = {
        "big": ("PyTorch", 0.9),
        "big.onnx": ("ONNX", 0.9),
        "small": ("PyTorch", 0.8),
        "small.onnx": ("ONNX", 0.8),
    }
    models = [Model(name, Path(name), None, 1, None, 1, (), None, at, np.asarray) for name, (at, _) in places.items()]
    metrics = [
        replace(
            figures_of(torch.randn(4, 2)),
            accuracy=value,
            interval=(0.7, 0.95),
            latency=(t, t, t),
            throughput=(1 / t, 1 / t, 1 / t),
        )
        for (_, value), t in zip(places.values(), times, strict=True)
    ]
    page = contents(models, metrics, torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]), "a processor")
    drawn = by_title(page)["Accuracy against cost"].pictures
    assert list(drawn) == ["accuracy and size", "accuracy and latency in PyTorch", "accuracy and latency in ONNX"]
    for runtime, (big, small) in {"PyTorch": (0, 2), "ONNX": (1, 3)}.items():
        picture = drawn[f"accuracy and latency in {runtime}"]
        assert legend_of(picture) == [name for name, (at, _) in places.items() if at == runtime]
        assert f"time for one image (ms), {runtime}<" in picture
        front = re.findall(r'<path d="(M [^"]*)"[^>]*stroke: #bbbbbb', picture)[0]
        assert len(re.findall(r"[ML] ", front)) == (2 if times[small] < times[big] else 1)
    assert legend_of(drawn["accuracy and size"]) == list(places)
    fastest = table(models, metrics).best
    assert sorted(fastest["latency (ms)"]) == sorted(fastest["images/s"])
    assert sorted(fastest["latency (ms)"]) == ([2, 3] if times[2] < times[0] else [0, 1])
    write(tmp_path, page)
    shown = re.findall(r"<td([^>]*)>\s*(\d+)000\.000\b", (tmp_path / "index.html").read_text())
    bold = sorted(int(number) for attributes, number in shown if "best" in attributes)
    assert bold == sorted(times[i] for i in fastest["latency (ms)"])


def by_title(page: Page) -> dict[str, Section]:
    return {section.title: section for section in page.sections}


def legend_of(picture: str) -> list[str]:
    """Return the models that a picture's legend names, in their order."""
    return re.findall(r">((?:big|small)[.\w]*)</text>", picture)


def figures_of(logits: torch.Tensor) -> Metrics:
    return Metrics(logits, 0.5, (0.4, 0.6), 0.1, 1.0, (1e-3, 1e-3, 1e-3), (64, 64, 64), torch.eye(logits.shape[1]))


def test_any_name_is_shown_as_it_is(tmp_path: Path) -> None:
    names = ["$x_{$", "_hidden", "<img src=x onerror=alert(1)>", "a|b*c*[d](e)"]
    models = [Model(n, Path(n), None, 1, None, 1, ("$_{$", "_b"), None, "PyTorch 2", np.asarray) for n in names]
    figures = [figures_of(torch.randn(4, 2)) for _ in names]
    page = contents(models, figures, torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]), names[2])
    sections = by_title(page)
    for legend in (*sections["Accuracy against cost"].pictures.values(), *sections["Calibration"].pictures.values()):
        assert ">$x_{$</text>" in legend
        assert "> _hidden</text>" in legend
    write(tmp_path, replace(page, title=names[2]))
    assert "<img" not in (tmp_path / "index.html").read_text()
    text = (tmp_path / "report.md").read_text()
    assert "<img" not in text
    assert r"| a\|b\*c\*\[d\](e) |" in text
    assert r"| class | \$\_{\$ | \_b |" in text


@pytest.mark.parametrize("costs", [(0.002, 0.9), (0.3, 0.45), (2.0, 2.1), (1e-3, 1e3), (2.0, 2.0)])
def test_labels_of_costs_have_room(costs: tuple[float, float]) -> None:
    drawn = trade_off(["a", "b"], dict(enumerate(costs)), [figures_of(torch.randn(4, 2))] * 2, "size (MB)")
    places = sorted(float(x) for x in re.findall(r"translate\(([\d.]+) [\d.]+\) rotate\(-45\)", drawn))
    assert len(places) >= 2
    assert np.diff(places).min() > 8  # points, at a font size of 7


# --- many classes


def counted(logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
    classes = logits.shape[1]
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((labels, logits.argmax(1)), torch.tensor(1), accumulate=True)
    return replace(figures_of(logits), confusion=confusion)


def test_of_many_classes_the_most_confused_are_listed_in_place_of_a_matrix(tmp_path: Path) -> None:
    classes = tuple(f"class {number}" for number in range(30))
    labels = torch.arange(300) % 30
    right = torch.nn.functional.one_hot(labels, 30).float()
    wrong = right.clone()
    wrong[labels == 7] = torch.nn.functional.one_hot(torch.tensor(9), 30).float()
    wrong[3::90] = torch.nn.functional.one_hot(torch.tensor(4), 30).float()
    models = [Model(n, Path(n), None, 1, None, 1, classes, None, "PyTorch 2", np.asarray) for n in ("a", "b")]
    metrics = [counted(right, labels), counted(wrong, labels)]
    shown = contents(models, metrics, torch.rand(300, 3, 70, 80), labels, "a processor")
    sections = by_title(shown)
    assert not any("Confusion" in title for title in sections)
    assert len(sections["What a student gets wrong and the teacher right"].pictures) == 12
    (lowest,) = sections["The 10 of 30 classes with the lowest accuracy, in per cent"].tables.values()
    (confused,) = sections["Classes that are confused most, in images"].tables.values()
    assert lowest.rows[0] == {"class": "class 7", "images": "10", "a": "100.0", "b": "0.0"}
    assert [dict(row) for row in confused.rows] == [
        {"class": "class 7", "taken for": "class 9", "a": "0", "b": "10"},
        {"class": "class 3", "taken for": "class 4", "a": "0", "b": "4"},
    ]
    write(tmp_path, shown)
    page, text = (tmp_path / "index.html").read_text(), (tmp_path / "report.md").read_text()
    after = text.partition("## Classes that are confused most, in images\n\n")[2].splitlines()
    assert after[2:4] == ["| class | taken for | a | b |", "| --- | --- | ---: | ---: |"]
    assert page.count('<figure class="photograph">') == 12
    assert page.count("data:image/jpeg;base64,") == 12
    assert len(list(tmp_path.glob("picture-*.svg"))) == page.count("<figure")
    write(tmp_path, shown)  # its own files may be overwritten
