"""`kd-lightning export`."""

import hashlib
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.export.network import FEWEST_CALIBRATED, SUFFIXES, Format, export_network
from kd_lightning.runs.run import Run, find_checkpoint


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
        output: The file to write; by default beside the checkpoint, as best.onnx or best-int8.onnx.
        format: onnx (ONNX Runtime), torch (torch.export) or safetensors (weights alone).
        int8: Quantize to 8 bits, calibrated on training images of the run.
        half: Weights and arithmetic in float16 (onnx) or bfloat16 (torch).
        uint8: Images are bytes from 0 to 255, and not floats in [0, 1].
        calibration_images: How many, for int8.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or its training images are not there (int8).
        ValueError: If the options do not fit together, the network cannot be exported, or the file disagrees with it.
    """
    file = find_checkpoint(checkpoint)
    run = Run.of_checkpoint(file)
    if int8 and calibration_images < FEWEST_CALIBRATED:
        raise UserError(f"calibration_images must be >= {FEWEST_CALIBRATED}, got {calibration_images}.")
    marks = [name for name, given in {"int8": int8, "half": half, "uint8": uint8}.items() if given]
    path = Path(output) if output else file.with_name("-".join([file.stem, *marks]) + SUFFIXES[format])
    network = Checkpoint(file).network()
    calibration = _images(run, "train", calibration_images) if int8 else None
    if int8 and calibration is None:
        raise MissingFileError(
            f"int8 is calibrated on training images, and those of {str(file)!r} are not there; keep it in its run."
        )
    images = _images(run, "val", 256)
    difference = export_network(network, path, images, format, half, uint8, calibration, _identity(file))
    where = "validation images of the run" if images is not None else "random images"
    print(f"{path} ({path.stat().st_size / 1e6:.3f} MB) {difference} on {where}.")


def _images(run: Run | None, split: str, count: int) -> Tensor | None:
    found = None if run is None else run.images(split, count=count)
    return None if found is None else found[0]


def _identity(checkpoint: Path) -> dict[str, str]:
    run = Run.of_checkpoint(checkpoint)
    known = None
    with suppress(UserError, TypeError):  # a damaged test.json adds nothing
        figures = (run.test if run is not None else None) or {}
        tested = Path(figures.get("checkpoint") or "").parts[-2:]
        known = figures.get("accuracy") if tested == checkpoint.parts[-2:] else None  # the run may have been moved
    return {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        **({} if known is None else {"test_accuracy_of_the_checkpoint": str(known)}),
    }
