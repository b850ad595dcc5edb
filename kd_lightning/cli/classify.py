"""`kd-lightning classify`."""

import csv
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kd_lightning.errors import MissingFileError, OutputExistsError, UserError
from kd_lightning.export.onnx_classifier import OnnxClassifier
from kd_lightning.files.atomic import atomic_write
from kd_lightning.files.find_images import FoundImages, describe_left_out, find_images
from kd_lightning.files.images import load_image
from kd_lightning.files.prepare import prepare
from kd_lightning.files.progress import progress
from kd_lightning.files.several_labels import join_labels

Row = tuple[str, str, str]


def classify(model: str, images: list[str], output: str | None = None) -> None:
    """Classify image files with an exported ONNX file; those that cannot be read are named at the end.

    Where an image may have several classes, all whose probability is above their threshold are printed, joined by ";",
    with their probabilities, and "-" for none.

    Args:
        model: A file of `kd-lightning export`.
        images: Image files, and folders of them at any depth.
        output: A new CSV file to write, with the columns image, label and probability; by default a line is printed
            for each image.

    Raises:
        FileExistsError: If the output exists.
        FileNotFoundError: If there is no such file or no image.
        ValueError: If the model cannot be read, or images could not; the others were classified.
    """
    if output is not None and Path(output).expanduser().exists():
        raise OutputExistsError(f"{output!r} exists; delete it, or name another file with -o.")
    classifier = OnnxClassifier(model)
    if classifier.shape[0] not in (1, 3):
        raise UserError(
            f"{model!r} takes images of {classifier.shape[0]} channels, and files are read with 1 (grey) or 3; call "
            "OnnxClassifier in Python."
        )
    files = [file for name in images for file in _images_in(Path(name).expanduser())]
    rows: list[Row] = []
    unreadable: list[str] = []
    with progress("Classifying", len(files)) as advance:
        for first in range(0, len(files), 64):
            readable, pixels = [], []
            for file in files[first : first + 64]:
                try:
                    pixels.append(_pixels(file, classifier))
                    readable.append(file)
                except ValueError as error:
                    unreadable.append(str(error))
            if pixels:
                rows += _predictions(classifier, readable, np.stack(pixels))
            advance(len(files[first : first + 64]))
    _write(rows, output)
    if unreadable:
        raise UserError("\n".join([f"{len(unreadable)} of {len(files)} images are left out.", *unreadable]))


def _predictions(classifier: OnnxClassifier, files: list[Path], pixels: npt.NDArray[np.uint8]) -> Iterator[Row]:
    for file, probability in zip(files, classifier.probabilities(pixels), strict=True):
        if classifier.thresholds is not None:
            given = (probability > classifier.thresholds).tolist()
            yield str(file), *join_labels(given, probability.tolist(), classifier.classes, digits=4)
        else:
            yield str(file), classifier.classes[probability.argmax()], f"{probability.max():.4f}"


def _write(rows: list[Row], output: str | None) -> None:
    if output is None:
        for row in rows:
            print("  ".join(filter(None, row)))
        return
    table = StringIO(newline="")
    csv.writer(table).writerows([("image", "label", "probability"), *rows])
    with atomic_write(Path(output)) as file:
        file.write(table.getvalue().encode())
    print(f"{len(rows)} images; the table is in {output}.")


def _images_in(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = find_images(path) if path.is_dir() else FoundImages()
    if found.left_out:
        print(describe_left_out(path, found.left_out), file=sys.stderr)
    if not found.files:
        raise MissingFileError(f"There is no image {str(path)!r}, nor a folder of that name with images in it.")
    return found.files


def _pixels(file: Path, classifier: OnnxClassifier) -> npt.NDArray[np.uint8]:
    channels = classifier.shape[0]
    pixels = np.asarray(prepare(load_image(file, "L" if channels == 1 else "RGB"), classifier.preparation))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
