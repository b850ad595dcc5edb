"""`kd-lightning export` and `kd-lightning classify`."""

import copy
import csv
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from kd_lightning.data.image_set import opened
from kd_lightning.export.formats import write_onnx, write_program, write_weights
from kd_lightning.export.inference import Inference
from kd_lightning.export.onnx_classifier import OnnxClassifier
from kd_lightning.export.rebuilt import images_of_run, trained_network
from kd_lightning.export.shrinking import halve, quantize
from kd_lightning.runs import LOGS, newest_run, resolve_checkpoint, run_of

Format = Literal["onnx", "torch", "safetensors"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
FEWEST_CALIBRATED = 32
_PICTURES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def export(
    checkpoint: str,
    output: str | None = None,
    format: Format = "onnx",
    int8: bool = False,
    half: bool = False,
    uint8: bool = False,
    calibration_images: int = 512,
) -> None:
    """Write the trained network of a checkpoint to a file that serves, and check the file against it.

    Args:
        checkpoint: A checkpoint file, or a run or recipe (the best of its newest run).
        output: The file to write; by default it lies beside the checkpoint.
        format: onnx (ONNX Runtime), torch (torch.export) or safetensors (weights alone).
        int8: Quantize to 8 bits, calibrated on training images of the run.
        half: Weights and arithmetic in float16.
        uint8: Images are bytes from 0 to 255, and not floats in [0, 1].
        calibration_images: How many, for int8.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or its training images are not there (int8).
        ValueError: If the options do not fit together, the network cannot be exported, or the file disagrees with it.
    """
    file = _checkpoint(checkpoint)
    if int8 and calibration_images < FEWEST_CALIBRATED:
        raise ValueError(f"calibration_images must be >= {FEWEST_CALIBRATED}, got {calibration_images}.")
    path = Path(output) if output else file.with_suffix(SUFFIXES[format])
    network = trained_network(file)
    calibration = images_of_run(file, "train", calibration_images) if int8 else None
    if int8 and calibration is None:
        raise FileNotFoundError(
            f"int8 is calibrated on training images, and those of {str(file)!r} are not there; keep it in its run."
        )
    images = images_of_run(file, "val", 256)
    difference = export_network(network, path, images, format, half, uint8, calibration, _identity(file))
    where = "validation images of the run" if images is not None else "random images"
    print(f"{path} ({path.stat().st_size / 1e6:.3f} MB) {difference} on {where}.")


def export_network(
    network: nn.Module,
    path: str | Path,
    images: Tensor | None = None,
    format: Format = "onnx",
    half: bool = False,
    uint8: bool = False,
    calibration: Tensor | None = None,
    identity: Mapping[str, str] | None = None,
) -> str:
    """Write a network to a file; the file takes its place only after it was compared with the network.

    Args:
        network: A classifier with ``trained_on`` (of :func:`from_checkpoint` or a training).
        path: Of the file, with the suffix of its format.
        images: In [0, 1], ``(N, channels, H, W)``, to compare on; random ones of 3x32x32 if ``None``.
        format: ``"onnx"``, ``"torch"`` (``.pt2``) or ``"safetensors"``.
        half: Weights and arithmetic in float16.
        uint8: Whether the file takes bytes from 0 to 255.
        calibration: Images in [0, 1] by which an ONNX file is quantized to 8 bits.
        identity: More to keep in the file's metadata.

    Returns:
        How far the file's logits are from the network's.

    Raises:
        ValueError: If the options do not fit together, the network cannot be exported, or the file disagrees with it.
    """
    path = Path(path)
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"A file of the format {format} ends in {SUFFIXES[format]}, got {str(path)!r}.")
    if (half or calibration is not None) and format != "onnx":
        raise ValueError("int8 and half are for the format onnx; leave them out, or choose onnx.")
    if half and calibration is not None:
        raise ValueError("Choose int8 or half, not both.")
    if calibration is not None and len(calibration) < FEWEST_CALIBRATED:
        raise ValueError(
            f"There are {len(calibration)} training images to calibrate on; int8 needs {FEWEST_CALIBRATED} or more."
        )
    model = Inference(network, uint8).eval()
    channels = len(model.mean)
    seeded = torch.Generator().manual_seed(0)
    images = model.taken(torch.rand(64, channels, 32, 32, generator=seeded) if images is None else images)
    metadata = {
        "classes": json.dumps(model.known.classes),
        "input": f"{'uint8' if uint8 else '[0, 1]'} {list(images.shape[1:])}",
        "kd_lightning": version("kd-lightning"),
        **(identity or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        written = Path(folder, path.name)
        {"onnx": write_onnx, "torch": write_program, "safetensors": write_weights}[format](
            model, images[:2], written, metadata
        )
        if half or calibration is not None:
            whole = written.rename(Path(folder, "float32.onnx"))
            if calibration is None:
                halve(whole, written)
            else:
                quantize(whole, written, model.taken(calibration).numpy())
        exact = not half and calibration is None
        said = _compare(model, images, _runner(written, format, network), exact)
        os.replace(written, path)
    return said


def _compare(model: Inference, images: Tensor, run: Callable[[Tensor], Tensor], exact: bool) -> str:
    with torch.no_grad():
        expected = model(images)
    got = run(images)
    difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("nan")
    agreement = float((got.argmax(1) == expected.argmax(1)).float().mean()) if got.shape == expected.shape else 0.0
    close = difference <= 1e-4 * max(1.0, float(expected.abs().max()))
    if not (close if exact else agreement >= 0.9 and difference == difference):
        raise ValueError(
            f"The file disagrees with the checkpoint (logits differ by up to {difference:.3g}, {agreement:.1%} of the "
            "answers are the same); nothing was written."
        )
    return f"differs from the checkpoint by {difference:.2g} in the logits and agrees in {agreement:.2%} of the answers"


def _runner(written: Path, format: Format, network: nn.Module) -> Callable[[Tensor], Tensor]:
    """What runs the file itself."""
    if format == "onnx":
        classifier = OnnxClassifier(written)
        return lambda images: torch.from_numpy(classifier(images.numpy()))
    if format == "torch":
        program = torch.export.load(written).module()
        return lambda images: program(images).detach()
    return lambda images: _filled(written, network, images)


def _filled(written: Path, network: nn.Module, images: Tensor) -> Tensor:
    from safetensors.torch import load_file

    again = copy.deepcopy(network)
    for weight in again.parameters():
        torch.nn.init.zeros_(weight.detach())
    again.load_state_dict(load_file(written))
    with torch.no_grad():
        return Inference(again, images.dtype == torch.uint8).eval()(images)


def _checkpoint(where: str) -> Path:
    path = Path(where)
    if path.is_file():
        return path
    runs = [folder for folder in (path, LOGS / where) if folder.is_dir()]
    if not runs:
        raise FileNotFoundError(f"There is no checkpoint, run or trained recipe {where!r}; train it first.")
    run = runs[0] if (runs[0] / "checkpoints").is_dir() else newest_run(runs[0])
    return resolve_checkpoint("best", run)


def _identity(checkpoint: Path) -> dict[str, str]:
    run = run_of(checkpoint)
    test = run / "test.json" if run is not None else None
    known = json.loads(test.read_text()).get("accuracy") if test is not None and test.is_file() else None
    return {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        **({} if known is None else {"test_accuracy_of_the_checkpoint": str(known)}),
    }


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
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _PICTURES)
    if not found:
        raise FileNotFoundError(f"There is no image {str(path)!r}, nor a folder of that name with images in it.")
    return found


def _pixels(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
    channels, height, width = shape
    with opened(file) as image:
        seen = image.convert("L" if channels == 1 else "RGB")
        if seen.size != (width, height):
            seen = seen.resize((width, height), 2)  # bilinear, over all pixels where it shrinks
        pixels = np.asarray(seen)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
