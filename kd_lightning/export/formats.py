"""Writes a network in each of the formats."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kd_lightning.errors import UserError
from kd_lightning.export.extra import require_extra
from kd_lightning.export.inference import Inference
from kd_lightning.export.silence import silenced
from kd_lightning.networks.memory_format import use_contiguous


def write_onnx(model: Inference, images: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write an ONNX file with one input ``images`` of any batch size and one output ``logits``.

    Args:
        model: Network to export.
        images: Two or more images, in the form that the model takes.
        path: Path of the file.
        metadata: Plain text for the file's metadata.

    Raises:
        UserError: If an operator cannot be exported; the message names it.
    """
    require_extra("onnx")
    require_extra("onnxscript")
    batch = torch.export.Dim("batch", min=1, max=4096)
    model = copy.deepcopy(model)
    use_contiguous(model)  # in channels-last, a pooling becomes a gather whose shape depends on the batch
    try:
        with silenced():
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                dynamic_shapes={"images": {0: batch}},
                input_names=["images"],
                output_names=["logits"],
                opset_version=18,
                verbose=False,
            )
    except Exception as error:
        raise UserError(
            f"{type(model.network).__name__} cannot be exported to ONNX: {_reason(error)}; replace that operator in "
            "the network, or use --format torch."
        ) from error
    assert program is not None
    for node in program.model.graph:  # source locations, which are larger than a small network
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def write_program(model: Inference, images: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a ``torch.export`` program, for ``torch.export.load``; see :func:`write_onnx`."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    try:
        with silenced():
            program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}})
    except Exception as error:
        raise UserError(
            f"{type(model.network).__name__} cannot be exported by torch.export: {_reason(error)}; make its forward "
            "independent of the values of tensors, or use --format safetensors."
        ) from error
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(dict(metadata))})


def write_weights(model: Inference, images: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the weights under their names, ``.safetensors``, for ``from_checkpoint``; see :func:`write_onnx`."""
    from safetensors.torch import save_file

    weights = {name: value.detach().clone().contiguous() for name, value in model.network.state_dict().items()}
    save_file(weights, path, metadata=dict(metadata))


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
