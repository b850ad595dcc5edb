"""Converts ONNX files to fewer bits: int8 and float16."""

import subprocess
import sys
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import cast

import numpy as np

from kd_lightning.errors import UserError, first_line
from kd_lightning.export.extra import require_extra
from kd_lightning.export.onnx_classifier import Images
from kd_lightning.export.silence import silenced

_BEFORE = {"Cast", "Sub", "Mul", "Div"}
"""Operators of the input normalization, which would otherwise be computed on rounded images."""
_NORMS = {"GroupNormalization", "InstanceNormalization", "LayerNormalization"}
"""Operators that ONNX Runtime cannot quantize for all shapes of their weights, and that are fast in float32."""
_PIXELS = 64 * 64 * 64
"""Pixels in a batch for calibration, for which ONNX Runtime keeps all activations."""


def quantize(source: Path, target: Path, images: Images) -> None:
    """Quantize statically to 8 bits after training: weights per channel, activations by their range on images.

    Pairs of QuantizeLinear and DequantizeLinear (QDQ) surround every operator, and are fused by ONNX Runtime.

    B. Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    CVPR 2018, https://arxiv.org/abs/1712.05877

    Args:
        source: An ONNX file in float32.
        target: The file to write.
        images: Images to calibrate on, ``(N, channels, H, W)``, in the form that the file takes.

    Raises:
        UserError: If ONNX Runtime cannot quantize an operator.
    """
    onnx = require_extra("onnx")
    require_extra("onnxruntime")
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no annotations
        def __init__(self) -> None:
            self.batches = iter(cast("list[Images]", np.array_split(images, max(1, len(images) // 64))))

        def get_next(self) -> dict[str, Images] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    try:
        with silenced(), tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder, "prepared.onnx")
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            nodes = onnx.load(prepared).graph.node
            exact = [
                *takewhile(lambda node: node.op_type in _BEFORE, nodes),
                *(n for n in nodes if n.op_type in _NORMS),
            ]
            quantize_static(
                prepared,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_exclude=[node.name for node in exact],
            )
    except Exception as error:
        raise UserError(
            f"ONNX Runtime cannot quantize this network ({first_line(error)[:300]}); export it without int8, or in "
            "float16."
        ) from error


def to_float16(source: Path, target: Path) -> None:
    """Convert weights and arithmetic to float16; inputs and outputs keep their types.

    Args:
        source: An ONNX file in float32.
        target: The file to write.

    Raises:
        UserError: If ONNX Runtime crashes on the network in float16, as on torchvision's vision transformers.
    """
    onnx = require_extra("onnx")
    float16 = require_extra("onnxruntime.transformers.float16")
    onnx_model = require_extra("onnxruntime.transformers.onnx_model")
    model = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True)
    onnx_model.OnnxModel.graph_topological_sort(model.graph)  # the first cast is near the end
    onnx.save(model, target)
    if not _is_survived(target):
        raise UserError(
            f"ONNX Runtime {require_extra('onnxruntime').__version__} crashes on this network in float16; export it "
            "without fp16, or with --format torch."
        )


_LOAD = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"


def _is_survived(file: Path) -> bool:
    """Return whether a process that loads a file, where ONNX Runtime optimizes it for the machine, does not die."""
    loading = subprocess.run([sys.executable, "-P", "-c", _LOAD, str(file)], capture_output=True, check=False)
    return loading.returncode in (0, 1)  # 1: an exception, which is raised again where the file is compared
