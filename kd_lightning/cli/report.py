"""`kd-lightning report`."""

import platform
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.report.contents import all_pictures, table, write
from kd_lightning.report.measuring import measure
from kd_lightning.report.model import Model, load_model, teacher_of
from kd_lightning.report.page import MARKS


def report(models: list[str], output: str = "report", teacher: str | None = None) -> None:
    """Measure trained runs and exported files on the test images, and write a page that compares them.

    Args:
        models: Runs, trained recipes, checkpoints and ONNX files; the data are those of the first that has a run.
        output: Folder to write index.html, report.md and its pictures to.
        teacher: Model that the others are compared with; by default the teacher of a run, otherwise the largest.

    Raises:
        MissingFileError: If a model or the test images do not exist.
        UserError: If models take different images or have different classes, or the folder contains files that are
            not a report's.
    """
    folder = Path(output)
    _check_folder(folder)
    found = _load(models, teacher)
    images, labels = _test_images(found)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        metrics = [measure(found[0], images, labels, None)]
        metrics += [measure(model, images, labels, metrics[0].logits) for model in found[1:]]
    finally:
        torch.set_num_threads(threads)
    preface = (
        f"{len(images):,} test images. Latency at batch size 1 and images per second at batch size 64, on one thread "
        f"of {_machine()}: medians and quartiles. Accuracy with its 95% interval (Wilson). Size is that of the "
        "exported file, or of a run's weights. Smaller (size) and faster (latency, in the same runtime) are factors "
        f"relative to {found[0].name}; agreement is the fraction of images that get its label. Every model was run to "
        "measure it."
    )
    if any(model.file.suffix == ".onnx" for model in found):
        preface += (
            " The parameters of a .onnx file are those of its convolutions and linear layers, into which batch norms "
            "are folded: slightly fewer than those of its run."
        )
    pictures = all_pictures(found, metrics, images, labels)
    write(folder, "Teacher and students compared", preface, table(found, metrics), pictures)
    print(f"The report is {folder / 'index.html'}.")


def _load(names: list[str], teacher: str | None) -> list[Model]:
    """Load the models, the teacher first, and give them unique names."""
    wanted = list(dict.fromkeys([*([teacher] if teacher else []), *names]))
    shape = next((s for s in (_shape(load_model(name)) for name in wanted) if s), None)
    found = [load_model(name, shape) for name in wanted]
    if teacher is None:
        configured = next((t for t in (teacher_of(model.run, shape) for model in found) if t), None)
        largest = max(found, key=lambda model: model.parameters)
        first = largest
        if configured is not None:
            first = next((m for m in found if m.file.resolve() == configured.file.resolve()), configured)
        found = [first, *(model for model in found if model is not first)]
    for i, model in enumerate(found):
        same = sum(other.name == model.name for other in found[:i])
        if same:
            model.name += f" ({same + 1})"
        if model.classes and found[0].classes and model.classes != found[0].classes:
            raise UserError(
                f"{model.name} and {found[0].name} do not have the same classes; report models of the same data."
            )
    return found


def _shape(model: Model) -> tuple[int, int, int] | None:
    data = None if model.run is None else model.run.data()
    with suppress(OSError):
        return None if data is None else data.image_shape
    return None


def _test_images(models: list[Model]) -> tuple[Tensor, Tensor]:
    for source in models:
        if source.run is not None:
            shown = source.run.images("test")
            if shown is not None:
                _check_shapes(models, source, tuple(shown[0].shape[1:]))
                return shown
    raise MissingFileError("No model comes from a run whose test images exist; add such a run.")


def _check_shapes(models: list[Model], source: Model, shape: tuple[int, ...]) -> None:
    for model in models:
        if model.shape not in (None, shape):
            raise UserError(
                f"{model.name} takes images {model.shape} and the test images of {source.name} are {shape}; "
                "report models of the same data."
            )


def _check_folder(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and not all(map(_is_ours, folder.iterdir()))):
        raise UserError(f"{str(folder)!r} contains files that are not a report's; name a new folder with -o.")


def _is_ours(file: Path) -> bool:
    named = file.name in ("index.html", "report.md") or file.match("picture-*.svg")
    return named and file.is_file() and MARKS[file.suffix] in file.read_text(encoding="utf-8", errors="replace")


def _machine() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
