"""Converts ONNX files to fewer bits: int8 and float16."""

import tempfile
from itertools import takewhile
from pathlib import Path
from typing import cast

import numpy as np

from kd_lightning.export.extra import require_extra
from kd_lightning.export.onnx_classifier import Images
from kd_lightning.export.silence import silenced

_BEFORE = {"Cast", "Sub", "Mul", "Div"}
"""Operators of the input normalization, which would otherwise be computed on rounded images."""


def quantize(source: Path, target: Path, images: Images) -> None:
    """Quantize statically to 8 bits after training: weights per channel, activations by their range on images.

    Pairs of QuantizeLinear and DequantizeLinear (QDQ) surround every operator, and are fused by ONNX Runtime.

    B. Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    CVPR 2018, https://arxiv.org/abs/1712.05877

    Args:
        source: An ONNX file in float32.
        target: The file to write.
        images: Images to calibrate on, ``(N, channels, H, W)``, in the form that the file takes.
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

    with silenced(), tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        normalisation = takewhile(lambda node: node.op_type in _BEFORE, onnx.load(prepared).graph.node)
        quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=[node.name for node in normalisation],
        )


def to_float16(source: Path, target: Path) -> None:
    """Convert weights and arithmetic to float16; inputs and outputs keep their types.

    Args:
        source: An ONNX file in float32.
        target: The file to write.
    """
    onnx = require_extra("onnx")
    float16 = require_extra("onnxruntime.transformers.float16")
    onnx_model = require_extra("onnxruntime.transformers.onnx_model")
    model = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True)
    onnx_model.OnnxModel.graph_topological_sort(model.graph)  # the first cast is near the end
    onnx.save(model, target)
