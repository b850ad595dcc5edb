"""`kd-lightning report`."""

import platform
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from kd_lightning.export.rebuilt import data_of_run, labelled_images_of_run
from kd_lightning.report import drawing
from kd_lightning.report.measuring import Figures, measured
from kd_lightning.report.model import Model, opened, teacher_of
from kd_lightning.report.page import html, markdown
from kd_lightning.whole_files import whole_file

HEAD = [
    "model",
    "parameters",
    "MACs (M)",
    "size (MB)",
    "test accuracy (%)",
    "ECE",
    "agreement (%)",
    "latency (ms)",
    "images/s",
    "smaller",
    "faster",
]
_LOW_IS_BEST, _HIGH_IS_BEST = (1, 2, 3, 5, 7), (4, 6, 8)


def report(models: list[str], output: str = "report", teacher: str | None = None) -> None:
    """Measure trained runs and exported files on the test images, and write a page that compares them.

    Args:
        models: Runs, trained recipes, checkpoints and ONNX files; the data are those of the first that has a run.
        output: The folder to write index.html, report.md and its pictures to.
        teacher: The model that the others are compared with; by default the one that a run was taught by, else the
            largest.

    Raises:
        FileNotFoundError: If a model, or the test images, are not there.
        ValueError: If models tell other classes apart, or the folder holds files that are not a report's.
    """
    folder = Path(output)
    _refuse_foreign(folder)
    found = _opened(models, teacher)
    lead = found[0]
    images, labels = _test_images(found)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures = [measured(lead, images, labels, None)]
        figures += [measured(model, images, labels, figures[0].logits) for model in found[1:]]
    finally:
        torch.set_num_threads(threads)
    rows = [_row(model, f, lead, figures[0]) for model, f in zip(found, figures, strict=True)]
    preface = (
        f"{len(images):,} test images. Latency at batch 1, images a second at batch 64, on one thread of {_machine()} "
        f"({', '.join(_runtimes(found))}), medians and quartiles; accuracy with its 95% interval (Wilson). "
        "Smaller (size) and faster (latency) are factors "
        f"against {lead.name}, and agreement is with it. Each model was run itself."
    )
    pictures = _pictures(found, figures, images, labels)
    _write(folder, "What the students bought", preface, rows, found, figures, pictures)
    print(f"The report is {folder / 'index.html'}.")


def _opened(names: list[str], teacher: str | None) -> list[Model]:
    """The models, the teacher first, under names of their own."""
    wanted = list(dict.fromkeys([*([teacher] if teacher else []), *names]))
    first = [opened(name) for name in wanted]
    if teacher is None:
        taught_by = next((path for path in (teacher_of(model.run) for model in first) if path), None)
        known = {model.file.resolve() for model in first}
        if taught_by and Path(taught_by).resolve() not in known:
            wanted, first = [taught_by, *wanted], [opened(taught_by), *first]
        lead = next((m for m in first if taught_by and m.file.resolve() == Path(taught_by).resolve()), None)
        lead = lead or max(first, key=lambda model: model.parameters)
        order = sorted(range(len(first)), key=lambda i: first[i] is not lead)
        wanted = [wanted[i] for i in order]
    shape = next((s for s in (_shape(model) for model in first) if s), None)
    found = [opened(name, shape) for name in wanted]
    for i, model in enumerate(found):
        same = sum(other.name == model.name for other in found[:i])
        if same:
            model.name += f" ({same + 1})"
        if model.classes and found[0].classes and model.classes != found[0].classes:
            raise ValueError(
                f"{model.name} and {found[0].name} do not tell the same classes apart; report models of the same data."
            )
    return found


def _shape(model: Model) -> tuple[int, int, int] | None:
    data = None if model.run is None else data_of_run(model.run / "checkpoints" / "best.ckpt")
    with suppress(OSError):
        return None if data is None else data.image_shape
    return None


def _test_images(models: list[Model]) -> tuple[Tensor, Tensor]:
    for model in models:
        if model.run is not None:
            shown = labelled_images_of_run(model.run / "checkpoints" / "best.ckpt", "test")
            if shown is not None:
                return shown
    raise FileNotFoundError("None of the models comes from a run whose test images are there; add such a run.")


def _row(model: Model, f: Figures, lead: Model, base: Figures) -> list[str]:
    size, whole = model.size, lead.size
    low, middle, high = (1000 * seconds for seconds in f.latency)
    slow, usual, quick = f.throughput
    return [
        model.name,
        f"{model.parameters:,}",
        f"{model.macs / 1e6:.2f}",
        f"{size / 1e6:.3f}",
        f"{100 * f.accuracy:.2f}\n{100 * f.interval[0]:.1f} to {100 * f.interval[1]:.1f}",
        f"{f.ece:.3f}",
        f"{100 * f.agreement:.2f}",
        f"{middle:.3f}\n{low:.3f} to {high:.3f}",
        f"{usual:,.0f}\n{slow:,.0f} to {quick:,.0f}",
        f"{whole / size:.1f}x",
        f"{base.latency[1] / f.latency[1]:.1f}x",
    ]


def _pictures(models: list[Model], figures: list[Figures], images: Tensor, labels: Tensor) -> dict[str, dict[str, str]]:
    names = [model.name for model in models]
    sizes, times = [m.size / 1e6 for m in models], [1000 * f.latency[1] for f in figures]
    pictures = {
        "Accuracy against cost": {
            "accuracy and size": drawing.trade_off(names, sizes, figures, "size (MB)"),
            "accuracy and latency": drawing.trade_off(names, times, figures, "latency at batch 1 (ms)"),
        }
    }
    training = drawing.curves(models)
    if training is not None:
        pictures["Training"] = {"training loss and validation accuracy": training}
    classes = models[0].classes or tuple(map(str, range(figures[0].logits.shape[1])))
    pictures["Calibration"] = {"reliability": drawing.reliability(names, figures, labels)}
    pictures["Confusion, in per cent of a class"] = {
        f"confusion of {name}": drawing.confusion(f.confusion, classes) for name, f in zip(names, figures, strict=True)
    }
    if len(models) > 1:
        pictures["Where a student differs most from the teacher"] = {
            f"disagreements of {name}": drawing.disagreements(images, labels, figures[0].logits, f.logits, classes)
            for name, f in list(zip(names, figures, strict=True))[1:]
        }
    return pictures


def _write(
    folder: Path,
    title: str,
    preface: str,
    rows: list[list[str]],
    models: list[Model],
    figures: list[Figures],
    pictures: dict[str, dict[str, str]],
) -> None:
    columns: dict[int, list[float]] = {
        1: [m.parameters for m in models],
        2: [m.macs for m in models],
        3: [m.size for m in models],
        4: [f.accuracy for f in figures],
        5: [f.ece for f in figures],
        6: [0.0, *(f.agreement for f in figures[1:])],
        7: [f.latency[1] for f in figures],
        8: [f.throughput[1] for f in figures],
    }
    best = {c: min(range(len(rows)), key=columns[c].__getitem__) for c in _LOW_IS_BEST}
    best |= {c: max(range(len(rows)), key=columns[c].__getitem__) for c in _HIGH_IS_BEST}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [(text, svg) for section in pictures.values() for text, svg in section.items()]
    files = {text: f"picture-{number}.svg" for number, (text, _) in enumerate(drawn, 1)}
    contents = {files[text]: svg for text, svg in drawn}
    contents["report.md"] = markdown(title, preface, HEAD, rows, pictures, files)
    contents["index.html"] = html(title, preface, HEAD, rows, best, pictures)
    for old in folder.glob("picture-*.svg"):
        old.unlink()
    for name, content in contents.items():
        with whole_file(folder / name) as file:
            file.write(content.encode())


def _refuse_foreign(folder: Path) -> None:
    ours = {"index.html", "report.md"}
    if folder.is_file() or (
        folder.is_dir() and any(file.name not in ours and not file.match("picture-*.svg") for file in folder.iterdir())
    ):
        raise ValueError(f"{str(folder)!r} holds something that is not a report; name a new folder with -o.")


def _runtimes(models: list[Model]) -> list[str]:
    return list(dict.fromkeys(model.runtime for model in models))


def _machine() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
