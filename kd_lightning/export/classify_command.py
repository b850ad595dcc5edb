"""`kd-lightning classify`."""

import csv
from pathlib import Path

import numpy as np

from kd_lightning.export.onnx_classifier import OnnxClassifier
from kd_lightning.image_files import SUFFIXES, decoded


def classify(model: str, images: list[str], output: str | None = None) -> None:
    """Classify image files with an exported ONNX file; a line for each, or a CSV file.

    Args:
        model: A file of `kd-lightning export`.
        images: Image files, and folders of them at any depth.
        output: A CSV file to write instead, with the columns image, label and probability.

    Raises:
        FileNotFoundError: If there is no such file or no image.
        ValueError: If a file cannot be read.
    """
    classifier = OnnxClassifier(model)
    files = [file for name in images for file in _images_in(Path(name))]
    rows = []
    for first in range(0, len(files), 64):
        part = files[first : first + 64]
        logits = classifier(np.stack([_pixels(file, classifier.shape) for file in part])).astype(np.float64)
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        labels = [classifier.classes[number] for number in shares.argmax(1)]
        rows += [
            (str(file), label, f"{share:.4f}") for file, label, share in zip(part, labels, shares.max(1), strict=True)
        ]
    if output is None:
        print("\n".join(f"{file}  {label}  {share}" for file, label, share in rows))
        return
    with Path(output).open("x", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([("image", "label", "probability"), *rows])
    print(f"{len(rows)} images; the table is in {output}.")


def _images_in(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"There is no image {str(path)!r}, nor a folder of that name with images in it.")
    return found


def _pixels(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
    channels, height, width = shape
    pixels = np.asarray(decoded(file, "L" if channels == 1 else "RGB", (height, width)))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
