"""`kd-lightning report`."""

import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from kd_lightning.cli.machine import processor_name
from kd_lightning.cli.sources import echo_imported
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.report.contents import contents
from kd_lightning.report.measuring import measure
from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Model, load_model, source_of, teacher_of
from kd_lightning.report.page import MARKS, write
from kd_lightning.runs.source import Source


def report(models: list[str], output: str = "report", teacher: str | None = None, trust: bool = False) -> None:
    """Measure trained runs and exported files on the test images, and write a page that compares them.

    Args:
        models: Runs and trained recipes, whose own classes are imported, and checkpoints and ONNX files, which may name
            classes of kd_lightning, torch and torchvision only; the data are those of the first that has them.
        output: Folder to write index.html, report.md and its pictures to.
        teacher: Model that the others are compared with; by default the teacher of a run, otherwise the largest.
        trust: Import whatever a checkpoint names, that of an ONNX file too.

    Raises:
        MissingFileError: If a model or the test images do not exist.
        UserError: If models take different images or have different classes, or the folder contains files that are
            not a report's.
    """
    folder = Path(output).expanduser()
    _check_folder(folder)
    found = _load(models, teacher, trust)
    for model in found:
        if model.source is not None:
            echo_imported(model.name, model.source.imported)
    images, labels, data_of = _test_images(found)
    print(f"Measuring {len(found)} models on {len(images)} test images.", file=sys.stderr, flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        metrics: list[Metrics] = []
        for model in found:
            prepared = _prepared_for(model, data_of, images)
            teacher_logits = metrics[0].logits if metrics else None
            metrics.append(measure(model, prepared, labels, teacher_logits, found[0].thresholds))
    finally:
        torch.set_num_threads(threads)
    write(folder, contents(found, metrics, images, labels, processor_name()))
    print(f"The report is {folder / 'index.html'}.")


def _load(names: list[str], teacher: str | None, trust: bool) -> list[Model]:
    """Load the models, the teacher first, and give them unique names."""
    wanted = list(dict.fromkeys([*([teacher] if teacher else []), *names]))
    sources = _shared([source_of(name, trust=trust) for name in wanted])
    shape = next(filter(None, map(_shape, sources)), None)
    found = [
        load_model(name, _shape(source) or shape, source=source) for name, source in zip(wanted, sources, strict=True)
    ]
    if teacher is None:
        configured = next(filter(None, (teacher_of(model, shape, found) for model in found)), None)
        first = configured or max(found, key=lambda model: model.parameters)
        found = [first, *(model for model in found if model is not first)]
    for i, model in enumerate(found):
        same = sum(other.name == model.name for other in found[:i])
        if same:
            model.name += f" ({same + 1})"
        if model.classes and found[0].classes and model.classes != found[0].classes:
            raise UserError(
                f"{model.name} and {found[0].name} do not have the same classes; report models of the same data."
            )
        if model.classes and found[0].classes and (model.thresholds is None) != (found[0].thresholds is None):
            raise UserError(
                f"Of {model.name} and {found[0].name} one was trained on one class an image and the other on several; "
                "report models of the same data."
            )
    return found


def _shared(sources: list[Source | None]) -> list[Source | None]:
    """Return the sources with one for each checkpoint, so that it is read once: that of a run, if one is named."""
    by_path: dict[Path, Source] = {}
    for source in sorted(filter(None, sources), key=lambda source: not source.is_run):
        by_path.setdefault(source.path.resolve(), source)
    return [None if source is None else by_path[source.path.resolve()] for source in sources]


def _shape(source: Source | None) -> tuple[int, int, int] | None:
    data = None if source is None else source.data
    with suppress(OSError):
        return None if data is None else data.image_shape
    return None


def _test_images(models: list[Model]) -> tuple[Tensor, Tensor, Source]:
    """Return the test images of the first model that has some, their labels, and where they come from."""
    for model in models:
        shown = None if model.source is None else model.source.images("test")
        if shown is not None:
            assert model.source is not None
            _check_shapes(models, model, tuple(shown[0].shape[1:]))
            return *shown, model.source
    raise MissingFileError("No model comes from a run whose test images exist; add such a run.")


def _prepared_for(model: Model, data_of: Source, images: Tensor) -> Tensor:
    """Return the test images as a model's own run prepares them, if these are the same images."""
    if model.source is None or _preparation(model.source) == _preparation(data_of):
        return images
    own = model.source.images("test")
    return own[0] if own is not None and _names(model.source) == _names(data_of) else images


def _preparation(source: Source) -> object:
    return getattr(source.data, "preparation", None), _shape(source)


def _names(source: Source) -> list[str]:
    """Return the names of the test images, which were read."""
    data = getattr(source.data, "target", source.data)  # of a domain pair
    return [data.image_name("test", sample) for sample in range(len(data.splits["test"].labels))]


def _check_shapes(models: list[Model], source: Model, shape: tuple[int, ...]) -> None:
    for model in models:
        if model.shape not in (None, shape, _shape(model.source)):
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
