"""A model of a report: a run, a checkpoint or an exported file, ready to classify images."""

from argparse import ArgumentError
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.checkpoints.checkpoint import Checkpoint
from kd_lightning.errors import UserError
from kd_lightning.export import Inference, OnnxClassifier
from kd_lightning.export.extra import require_extra
from kd_lightning.files.digest import sha256
from kd_lightning.networks import DataConfig, data_config
from kd_lightning.runs.run import LOGS, Run, find_checkpoint

Floats = npt.NDArray[np.float32]


@dataclass
class Model:
    """A model of a report.

    Attributes:
        name: Name, unique in a report.
        file: The checkpoint or the ONNX file.
        run: The run that it comes from, if that is known.
        parameters: Number of parameters.
        macs: Multiply-accumulates for one image, where they can be counted.
        size: Bytes of an exported file, or of the weights in a checkpoint, which contains more than them.
        classes: Class names in the order of the logits.
        shape: Shape of the images that an exported file takes; a network itself may take others too.
        runtime: Name and version of the runtime.
        classify: Function from images in [0, 1], float32 ``(B, channels, H, W)``, to logits, on one thread.
    """

    name: str
    file: Path
    run: Run | None
    parameters: int
    macs: int | None
    size: int
    classes: tuple[str, ...]
    shape: tuple[int, int, int] | None
    runtime: str
    classify: Callable[[Floats], Floats]


def load_model(where: str, shape: tuple[int, int, int] | None = None) -> Model:
    """Load the model of a run, a recipe (its newest run), a checkpoint or an ONNX file.

    Args:
        where: Path or name.
        shape: Shape of an image, to count multiply-accumulates where the file does not have it.

    Raises:
        MissingFileError: If there is none.
        UserError: If it cannot be read, or does not take images of that shape.
    """
    path = Path(where)
    if path.suffix == ".onnx":
        return _of_onnx(path)
    return _of_checkpoint(find_checkpoint(where), shape)


def _of_checkpoint(path: Path, shape: tuple[int, int, int] | None) -> Model:
    run = Run.of_checkpoint(path)
    return _of_network(Checkpoint(path).network(), _name(run.folder if run else path), path, run, shape)


def _of_network(
    network: nn.Module, name: str, path: Path, run: Run | None, shape: tuple[int, int, int] | None
) -> Model:
    model = Inference(network).eval()

    def classify(images: Floats) -> Floats:
        with torch.inference_mode():
            logits: Floats = model(torch.from_numpy(images)).numpy()
            return logits

    macs = None if shape is None else _macs(model, name, shape)
    parameters = sum(weight.numel() for weight in model.network.parameters())
    size = sum(value.numel() * value.element_size() for value in model.network.state_dict().values())
    classes = model.known.classes or ()
    return Model(name, path, run, parameters, macs, size, classes, None, f"PyTorch {torch.__version__}", classify)


def _macs(model: Inference, name: str, shape: tuple[int, int, int]) -> int:
    """Count multiply-accumulates, including those of attention, which the counter does not see in fused kernels."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(1, *shape))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"{name} does not take images of shape {shape} ({reason}); report models of the same data."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops()) // 2


def _of_onnx(path: Path) -> Model:
    classifier = OnnxClassifier(path, threads=1)
    (parameters, macs), size = onnx_size(path), path.stat().st_size
    run, classes = _exported_run(classifier.metadata), tuple(classifier.classes)
    runtime = f"ONNX Runtime {require_extra('onnxruntime').__version__}"
    return Model(path.name, path, run, parameters, macs, size, classes, classifier.shape, runtime, classifier)


def _exported_run(metadata: Mapping[str, str]) -> Run | None:
    """Return the run that a file was exported from, unless its checkpoint is gone or has changed."""
    checkpoint = Path(metadata.get("checkpoint", ""))
    if not checkpoint.is_file():
        return None
    same = sha256(checkpoint) == metadata.get("checkpoint_sha256")
    return Run.of_checkpoint(checkpoint) if same else None


def onnx_size(path: Path) -> tuple[int, int | None]:
    """Count the parameters of an ONNX file's convolutions and linear layers, and the multiply-accumulates of one image.

    Batch norms are folded into them, and a weight in 8 bits counts once, without its scales. Products of activations
    count too; the multiply-accumulates are ``None`` where shapes depend on values.
    """
    onnx = require_extra("onnx")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]  # of any batch size
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    stored = {value.name: list(value.dims) for value in graph.initializer}
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    known = [*graph.input, *graph.value_info, *graph.output]
    shapes = stored | {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in known}
    parameters, macs = 0, []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            inputs = (stored.get(source.get(name, name)) for name in node.input)
            parameters += sum(int(np.prod(dims)) for dims in inputs if dims)
            left, right, out = (shapes.get(name, [0]) for name in (*node.input[:2], node.output[0]))
            macs.append(int(np.prod(out)) * (int(np.prod(right[1:])) if node.op_type == "Conv" else left[-1]))
    return parameters, sum(macs) if all(macs) else None


def _name(path: Path) -> str:
    parts = path.parts
    inside = parts[parts.index(LOGS.name) + 1 :] if LOGS.name in parts else parts[-2:]
    return "/".join(part for part in inside if part != "version_0") or path.name


def teacher_of(run: Run | None, shape: tuple[int, int, int] | None) -> Model | None:
    """Load the teacher that a run's configuration names, if its files exist.

    Args:
        run: The run, if it is known.
        shape: Shape of an image.
    """
    if run is None:
        return None
    named = ((run.config.get("model") or {}).get("init_args") or {}).get("teacher")
    if not isinstance(named, dict):
        return None
    path = Path((named.get("init_args") or {}).get("path") or run.config_file)
    if Run.of_checkpoint(path) is not None:
        return _of_checkpoint(path, shape) if path.is_file() else None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=nn.Module)
    try:
        network = parser.instantiate_classes(parser.parse_object({"teacher": named})).teacher
    except (OSError, ValueError, ArgumentError):
        return None
    data = run.data()
    if data_config(network).mean is None and data is not None:  # as DistillationModule takes it
        network.data_config = DataConfig.of(data.mean, data.std, data.classes)
    return _of_network(network, f"teacher of {_name(run.folder)}", path, None, shape)
