"""Exports a network to a file, which is put in place only after it was compared with the network."""

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kd_lightning.callbacks.label_scores import decide
from kd_lightning.errors import UserError
from kd_lightning.export.formats import write_onnx, write_program, write_weights
from kd_lightning.export.inference import Inference
from kd_lightning.export.onnx_classifier import OnnxClassifier
from kd_lightning.export.onnx_precision import quantize, to_float16
from kd_lightning.files.atomic import atomic_write
from kd_lightning.networks.placement import weight_device

Format = Literal["onnx", "torch", "safetensors"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
MIN_CALIBRATION_IMAGES = 32


@dataclass(frozen=True)
class ExportResult:
    """A written file, compared with the network.

    Attributes:
        path: The file.
        size: Its bytes.
        float32_size: Bytes of the same file in float32, where it was written in fewer bits; otherwise ``None``.
        difference: Largest absolute difference of the logits.
        agreement: Fraction of the images that get the same label; where an image may have several classes, the F1 of
            the file's decisions as measured by the network's, 1 where neither gives a class.

    Example:
        >>> result = ExportResult(Path("student.onnx"), 40_000, None, difference=1e-6, agreement=1.0)
        >>> f"{result.size / 1e6:.2f} MB"
        '0.04 MB'
    """

    path: Path
    size: int
    float32_size: int | None
    difference: float
    agreement: float


def export_network(
    network: nn.Module,
    path: str | Path,
    images: Tensor | None = None,
    *,
    format: Format = "onnx",
    fp16: bool = False,
    uint8: bool = False,
    calibration: Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write a network to a file, which is put in place only after it was compared with the network.

    Args:
        network: A classifier with a ``data_config`` (from :func:`from_checkpoint` or a training).
        path: Path of the file, with the suffix of its format.
        images: Images in [0, 1], ``(N, channels, H, W)``, to compare on; if ``None``, random ones of the size
            that the network's ``data_config`` names, or of 32x32 pixels.
        format: ``"onnx"``, ``"torch"`` (``.pt2``) or ``"safetensors"``.
        fp16: Store weights and compute in float16 (``"onnx"``) or bfloat16 (``"torch"``).
        uint8: Take bytes from 0 to 255 in place of floats in [0, 1].
        calibration: Images in [0, 1] with which an ONNX file is quantized to 8 bits.
        metadata: Further entries of the file's metadata.

    Raises:
        IsADirectoryError: If the path is that of a folder.
        UserError: If the options cannot be combined, the network cannot be exported, or the file disagrees with it.

    Example:
        >>> from kd_lightning.networks import DataConfig, resnet8x4
        >>> network = resnet8x4()
        >>> network.data_config = DataConfig.of(mean=[0.5] * 3, std=[0.25] * 3)  # as after a training
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = export_network(network, f"{folder}/student.safetensors", format="safetensors")
        >>> result.path.name, result.agreement
        ('student.safetensors', 1.0)
    """
    path = Path(path).expanduser()
    _check_options(path, format, fp16, calibration)
    if weight_device(network).type != "cpu":  # where files are written and compared
        network = copy.deepcopy(network).cpu()
    model = Inference(network, uint8).eval()
    if images is None:
        height, width = (32, 32) if model.known.preparation is None else model.known.preparation.size
        count = 64 if height * width <= 64 * 64 else 16
        images = torch.rand(count, len(model.mean), height, width, generator=torch.Generator().manual_seed(0))
    images = model.to_input(images)
    thresholds = model.known.thresholds
    entries = {
        "classes": json.dumps(model.known.classes),
        **({} if thresholds is None else {"thresholds": json.dumps(thresholds)}),
        "data_config": json.dumps(model.known.as_plain()),
        "input": f"{'uint8' if uint8 else '[0, 1]'} {list(images.shape[1:])}",
        "kd_lightning": version("kd-lightning"),
        **(metadata or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        written = Path(folder, path.name)
        {"onnx": write_onnx, "torch": write_program, "safetensors": write_weights}[format](
            Inference(network, uint8, torch.bfloat16).eval() if fp16 and format == "torch" else model,
            images[:2],
            written,
            entries,
        )
        float32_size = None
        if format == "onnx" and (fp16 or calibration is not None):
            float32_size = _reduce_precision(written, None if calibration is None else model.to_input(calibration))
        exact = not fp16 and calibration is None
        difference, agreement = _compare(model, images, _runner(written, format, network), exact)
        with atomic_write(path) as file:
            file.write(written.read_bytes())
    return ExportResult(path, path.stat().st_size, float32_size, difference, agreement)


def _reduce_precision(file: Path, calibration: Tensor | None) -> int:
    """Quantize an ONNX file to 8 bits, or convert it to float16; return the size that it had."""
    original = file.rename(file.with_name("float32.onnx"))
    if calibration is None:
        to_float16(original, file)
    else:
        quantize(original, file, calibration.numpy())
    return original.stat().st_size


def _check_options(path: Path, format: Format, fp16: bool, calibration: Tensor | None) -> None:
    if path.suffix != SUFFIXES[format]:
        raise UserError(f"A file of the format {format} ends in {SUFFIXES[format]}, got {str(path)!r}.")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; name a file.")
    if calibration is not None and format != "onnx":
        raise UserError("int8 is only available for the format onnx; remove it, or choose onnx.")
    if fp16 and format == "safetensors":
        raise UserError("fp16 is only available for the formats onnx and torch; safetensors stores weights unchanged.")
    if fp16 and calibration is not None:
        raise UserError("int8 and fp16 cannot be combined; choose one.")
    if calibration is not None and len(calibration) < MIN_CALIBRATION_IMAGES:
        raise UserError(
            f"There are {len(calibration)} training images to calibrate on; int8 needs at least "
            f"{MIN_CALIBRATION_IMAGES}."
        )


def _compare(model: Inference, images: Tensor, run: Callable[[Tensor], Tensor], exact: bool) -> tuple[float, float]:
    """Return the largest difference of the logits, and the fraction of equal labels."""
    batches = images.split(32)  # all activations at once take gigabytes at the sizes of photographs
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in batches])
    logits = torch.cat([run(batch) for batch in batches])
    same_shape = logits.shape == expected.shape
    difference = float((logits - expected).abs().max()) if same_shape else float("nan")
    agreement = _agreement(logits, expected, model.known.thresholds) if same_shape else 0.0
    close = difference <= 1e-4 * max(1.0, float(expected.abs().max()))
    if not (close if exact else agreement >= 0.9 and difference == difference):
        raise UserError(
            f"The file disagrees with the checkpoint (logits differ by up to {difference:.3g}, {agreement:.1%} of the "
            "labels are equal); nothing was written."
        )
    return difference, agreement


def _agreement(logits: Tensor, expected: Tensor, thresholds: tuple[float, ...] | None) -> float:
    """Return the fraction of equal labels, or the F1 of decisions on several classes."""
    if thresholds is None:
        return float((logits.argmax(1) == expected.argmax(1)).float().mean())
    one, other = (decide(values, thresholds) for values in (logits, expected))
    given = int(one.sum() + other.sum())
    return 2 * int((one & other).sum()) / given if given else 1.0


def _runner(written: Path, format: Format, network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that runs the file."""
    if format == "onnx":
        classifier = OnnxClassifier(written)
        return lambda images: torch.from_numpy(classifier(images.numpy()))
    if format == "torch":
        program = torch.export.load(written).module()
        return lambda images: program(images).detach()
    return lambda images: _reload(written, network, images)


def _reload(written: Path, network: nn.Module, images: Tensor) -> Tensor:
    from safetensors.torch import load_file

    reloaded = copy.deepcopy(network)
    for weight in reloaded.parameters():
        torch.nn.init.zeros_(weight.detach())
    reloaded.load_state_dict(load_file(written))
    with torch.no_grad():
        logits: Tensor = Inference(reloaded, images.dtype == torch.uint8).eval()(images)
        return logits
