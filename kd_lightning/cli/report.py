"""`kd-lightning report`."""

import platform
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.report.contents import all_pictures, row, write
from kd_lightning.report.measuring import measured
from kd_lightning.report.model import Model, opened, teacher_of
from kd_lightning.report.page import MARKS


def report(models: list[str], output: str = "report", teacher: str | None = None) -> None:
    """Measure trained runs and exported files on the test images, and write a page that compares them.

    Args:
        models: Runs, trained recipes, checkpoints and ONNX files; the data are those of the first that has a run.
        output: The folder to write index.html, report.md and its pictures to.
        teacher: The model that the others are compared with; by default the one that a run was taught by, else the
            largest.

    Raises:
        FileNotFoundError: If a model, or the test images, are not there.
        ValueError: If models take other images or tell other classes apart, or the folder holds files that are not a
            report's.
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
    rows = [row(model, f, lead, figures[0]) for model, f in zip(found, figures, strict=True)]
    preface = (
        f"{len(images):,} test images. Latency at batch 1, images a second at batch 64, on one thread of {_machine()}, "
        "medians and quartiles; accuracy with its 95% interval (Wilson). Size is a file's, or that of a run's weights. "
        f"Smaller (size) and faster (latency, in the same runtime) are factors against {lead.name}, and agreement is "
        "with it. Each model was run itself."
    )
    if any(model.file.suffix == ".onnx" for model in found):
        preface += (
            " The parameters of a .onnx file are those of its convolutions and linear layers, into which batch norms "
            "are folded: a few less than its run's."
        )
    pictures = all_pictures(found, figures, images, labels)
    write(folder, "What the students bought", preface, rows, found, figures, pictures)
    print(f"The report is {folder / 'index.html'}.")


def _opened(names: list[str], teacher: str | None) -> list[Model]:
    """The models, the teacher first, under names of their own."""
    wanted = list(dict.fromkeys([*([teacher] if teacher else []), *names]))
    shape = next((s for s in (_shape(opened(name)) for name in wanted) if s), None)
    found = [opened(name, shape) for name in wanted]
    if teacher is None:
        taught_by = next((t for t in (teacher_of(model.run, shape) for model in found) if t), None)
        lead = max(found, key=lambda model: model.parameters)
        if taught_by is not None:
            lead = next((m for m in found if m.file.resolve() == taught_by.file.resolve()), taught_by)
        found = [lead, *(model for model in found if model is not lead)]
    for i, model in enumerate(found):
        same = sum(other.name == model.name for other in found[:i])
        if same:
            model.name += f" ({same + 1})"
        if model.classes and found[0].classes and model.classes != found[0].classes:
            raise UserError(
                f"{model.name} and {found[0].name} do not tell the same classes apart; report models of the same data."
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
                _refuse_other_images(models, source, tuple(shown[0].shape[1:]))
                return shown
    raise MissingFileError("None of the models comes from a run whose test images are there; add such a run.")


def _refuse_other_images(models: list[Model], source: Model, shape: tuple[int, ...]) -> None:
    for model in models:
        if model.shape not in (None, shape):
            raise UserError(
                f"{model.name} takes images {model.shape} and the test images of {source.name} are {shape}; "
                "report models of the same data."
            )


def _refuse_foreign(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and not all(map(_is_ours, folder.iterdir()))):
        raise UserError(f"{str(folder)!r} holds something that is not a report; name a new folder with -o.")


def _is_ours(file: Path) -> bool:
    named = file.name in ("index.html", "report.md") or file.match("picture-*.svg")
    return named and file.is_file() and MARKS[file.suffix] in file.read_text(encoding="utf-8", errors="replace")


def _machine() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
