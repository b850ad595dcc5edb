"""A network as a file, which takes its place only after it was compared with the network."""

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kd_lightning.errors import UserError
from kd_lightning.export.formats import write_onnx, write_program, write_weights
from kd_lightning.export.inference import Inference
from kd_lightning.export.onnx_classifier import OnnxClassifier
from kd_lightning.export.onnx_precision import halve, quantize
from kd_lightning.files.atomic import atomic_write
from kd_lightning.networks.placement import weight_device

Format = Literal["onnx", "torch", "safetensors"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
FEWEST_CALIBRATED = 32


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
        network: A classifier with ``data_config`` (of :func:`from_checkpoint` or a training).
        path: Of the file, with the suffix of its format.
        images: In [0, 1], ``(N, channels, H, W)``, to compare on; random ones of 3x32x32 if ``None``.
        format: ``"onnx"``, ``"torch"`` (``.pt2``) or ``"safetensors"``.
        half: Weights and arithmetic in float16 (``"onnx"``) or bfloat16 (``"torch"``).
        uint8: Whether the file takes bytes from 0 to 255.
        calibration: Images in [0, 1] by which an ONNX file is quantized to 8 bits.
        identity: More to keep in the file's metadata.

    Returns:
        How far the file's logits are from the network's, and whether fewer bits made it larger.

    Raises:
        IsADirectoryError: If the path is that of a folder.
        ValueError: If the options do not fit together, the network cannot be exported, or the file disagrees with it.
    """
    path = Path(path)
    _refuse_unfit(path, format, half, calibration)
    if weight_device(network).type != "cpu":  # where files are written and compared
        network = copy.deepcopy(network).cpu()
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
            Inference(network, uint8, torch.bfloat16).eval() if half and format == "torch" else model,
            images[:2],
            written,
            metadata,
        )
        larger = ""
        if format == "onnx" and (half or calibration is not None):
            whole = written.rename(Path(folder, "float32.onnx"))
            if calibration is None:
                halve(whole, written)
            else:
                quantize(whole, written, model.taken(calibration).numpy())
            larger = _if_larger(written, whole)
        exact = not half and calibration is None
        said = _compare(model, images, _runner(written, format, network), exact)
        with atomic_write(path) as file:
            file.write(written.read_bytes())
    return larger + said


def _if_larger(written: Path, whole: Path) -> str:
    """Of a tiny network, what fewer bits take away is less than the operators that they add."""
    if written.stat().st_size <= whole.stat().st_size:
        return ""
    return f"is larger than it would be in float32 ({whole.stat().st_size / 1e6:.3f} MB); it "


def _refuse_unfit(path: Path, format: Format, half: bool, calibration: Tensor | None) -> None:
    if path.suffix != SUFFIXES[format]:
        raise UserError(f"A file of the format {format} ends in {SUFFIXES[format]}, got {str(path)!r}.")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; name a file.")
    if calibration is not None and format != "onnx":
        raise UserError("int8 is for the format onnx; leave it out, or choose onnx.")
    if half and format == "safetensors":
        raise UserError("half is for the formats onnx and torch; weights alone are kept as they are.")
    if half and calibration is not None:
        raise UserError("Choose int8 or half, not both.")
    if calibration is not None and len(calibration) < FEWEST_CALIBRATED:
        raise UserError(
            f"There are {len(calibration)} training images to calibrate on; int8 needs {FEWEST_CALIBRATED} or more."
        )


def _compare(model: Inference, images: Tensor, run: Callable[[Tensor], Tensor], exact: bool) -> str:
    with torch.no_grad():
        expected = model(images)
    got = run(images)
    difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("nan")
    agreement = float((got.argmax(1) == expected.argmax(1)).float().mean()) if got.shape == expected.shape else 0.0
    close = difference <= 1e-4 * max(1.0, float(expected.abs().max()))
    if not (close if exact else agreement >= 0.9 and difference == difference):
        raise UserError(
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
