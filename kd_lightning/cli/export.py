"""`kd-lightning export`."""

import sys
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from kd_lightning.cli.sources import open_source
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.export.network import MIN_CALIBRATION_IMAGES, SUFFIXES, ExportResult, Format, export_network
from kd_lightning.runs.source import Source


def export(
    checkpoint: str,
    output: str | None = None,
    format: Format = "onnx",
    int8: bool = False,
    fp16: bool = False,
    uint8: bool = False,
    trust: bool = False,
    calibration_images: int = 512,
) -> None:
    """Export the trained network of a checkpoint to a file for inference, and compare the file with it.

    Args:
        checkpoint: A run or recipe (the best of its newest run), whose own classes are imported, or a checkpoint file,
            which may name classes of kd_lightning, torch and torchvision only.
        output: File to write; by default beside the checkpoint, as best.onnx or best-int8.onnx.
        format: onnx (ONNX Runtime), torch (torch.export) or safetensors (only weights).
        int8: Quantize to 8 bits, calibrated on training images of the run.
        fp16: Store weights and compute in float16 (onnx) or bfloat16 (torch).
        uint8: Take images as bytes from 0 to 255 in place of floats in [0, 1].
        trust: Import whatever a checkpoint file names.
        calibration_images: Number of images to calibrate int8 on.

    Raises:
        MissingFileError: If there is no such checkpoint, or its training images do not exist (int8).
        UserError: If the options cannot be combined, the network cannot be exported, or the file disagrees with it.
    """
    if int8 and calibration_images < MIN_CALIBRATION_IMAGES:
        raise UserError(f"calibration_images must be >= {MIN_CALIBRATION_IMAGES}, got {calibration_images}.")
    source = open_source(checkpoint, trust=trust)
    file = source.path
    marks = [name for name, given in {"int8": int8, "fp16": fp16, "uint8": uint8}.items() if given]
    path = Path(output).expanduser() if output else file.with_name("-".join([file.stem, *marks]) + SUFFIXES[format])
    network = source.network()
    calibration = _images(source, "train", calibration_images) if int8 else None
    if int8 and calibration is None:
        raise MissingFileError(
            f"int8 is calibrated on training images, and those of {str(file)!r} do not exist; restore them, or export "
            "without int8."
        )
    images = _images(source, "val", 256)
    print(f"Exporting to {path}, and comparing it with the checkpoint.", file=sys.stderr, flush=True)
    result = export_network(
        network,
        path,
        images,
        format=format,
        fp16=fp16,
        uint8=uint8,
        calibration=calibration,
        metadata=_provenance(source),
    )
    print(_describe(result, "validation images of the run" if images is not None else "random images"))


def _describe(result: ExportResult, images: str) -> str:
    larger = ""
    if result.float32_size is not None and result.size > result.float32_size:
        # fewer bits save less in a tiny network than their operators take
        larger = f"is larger than it would be in float32 ({result.float32_size / 1e6:.3f} MB); it "
    return (
        f"{result.path} ({result.size / 1e6:.3f} MB) {larger}differs from the checkpoint by {result.difference:.2g} in "
        f"the logits and agrees in {result.agreement:.2%} of the labels on {images}."
    )


def _images(source: Source, split: str, count: int) -> Tensor | None:
    found = source.images(split, count=count)
    return None if found is None else found[0]


def _provenance(source: Source) -> dict[str, str]:
    tested_values, checkpoint = {}, source.checkpoint
    with suppress(UserError, TypeError):  # a damaged test.json adds nothing
        metrics = (source.run.test if source.run is not None else None) or {}
        tested = Path(metrics.get("checkpoint") or "").parts[-2:]
        if tested == checkpoint.path.parts[-2:]:  # the run may have moved
            tested_values = {name: metrics[name] for name in ("accuracy", "map") if name in metrics}
    return {
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": checkpoint.sha256,
        **{f"test_{name}_of_the_checkpoint": str(value) for name, value in tested_values.items()},
    }
