"""A model of a report: a run, a checkpoint or an exported file, as something that is run."""

from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.export import Inference, OnnxClassifier
from kd_lightning.export.extra import extra_module
from kd_lightning.export.rebuilt import data_of_run, trained_network
from kd_lightning.networks import TrainedOn, trained_on
from kd_lightning.runs import LOGS, newest_run, resolve_checkpoint, run_of

Floats = npt.NDArray[np.float32]


@dataclass
class Model:
    """What is reported.

    Attributes:
        name: Unlike every other's.
        file: The checkpoint or the ONNX file.
        run: The folder of the run that it comes from, if that is known.
        parameters: Weights that are multiplied or added.
        macs: Multiply-accumulates for one image.
        size: Bytes: of the file, or of the weights in a checkpoint, which holds more than them.
        classes: Names in the order of the logits.
        runtime: What runs it.
        classify: Images in [0, 1], float32 ``(B, channels, H, W)``, to logits, on one thread.
    """

    name: str
    file: Path
    run: Path | None
    parameters: int
    macs: int
    size: int
    classes: tuple[str, ...]
    runtime: str
    classify: Callable[[Floats], Floats]


def opened(where: str, shape: tuple[int, int, int] | None = None) -> Model:
    """The model of a run, a recipe (its newest run), a checkpoint or an ONNX file.

    Args:
        where: Its path or name.
        shape: Of an image, where the file does not tell.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be read.
    """
    path = Path(where)
    if path.suffix == ".onnx":
        return _of_onnx(path)
    if not path.is_file():
        runs = [folder for folder in (path, LOGS / where) if folder.is_dir()]
        if not runs:
            raise FileNotFoundError(f"{where!r} is neither a run, a trained recipe, a checkpoint nor an ONNX file.")
        path = resolve_checkpoint("best", runs[0] if (runs[0] / "checkpoints").is_dir() else newest_run(runs[0]))
    return _of_checkpoint(path, shape)


def _of_checkpoint(path: Path, shape: tuple[int, int, int] | None) -> Model:
    run = run_of(path)
    return _of_network(trained_network(path), _name(run or path), path, run, shape)


def _of_network(
    network: nn.Module, name: str, path: Path, run: Path | None, shape: tuple[int, int, int] | None
) -> Model:
    model = Inference(network).eval()

    def classify(images: Floats) -> Floats:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    macs = 0
    if shape is not None:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.zeros(1, *shape))
        macs = counter.get_total_flops() // 2
    parameters = sum(weight.numel() for weight in model.network.parameters())
    size = sum(value.numel() * value.element_size() for value in model.network.state_dict().values())
    classes = model.known.classes or ()
    return Model(name, path, run, parameters, macs, size, classes, f"torch {torch.__version__}", classify)


def _of_onnx(path: Path) -> Model:
    classifier = OnnxClassifier(path, threads=1)
    (parameters, macs), size = onnx_size(path), path.stat().st_size
    made_from = Path(classifier.metadata.get("checkpoint", ""))
    runtime = f"ONNX Runtime {extra_module('onnxruntime').__version__}"
    return Model(
        path.name, path, run_of(made_from), parameters, macs, size, tuple(classifier.classes), runtime, classifier
    )


def onnx_size(path: Path) -> tuple[int, int]:
    """Weights of an ONNX file's convolutions and linear layers with their biases, and multiply-accumulates an image.

    Batch norms are folded into them, and a weight in 8 bits counts once, without its scales.
    """
    onnx = extra_module("onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    stored = {value.name: list(value.dims) for value in model.graph.initializer}
    source = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    shapes = {v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    parameters, macs = 0, 0
    for node in model.graph.node:
        held = [stored[name] for name in (source.get(name, name) for name in node.input) if name in stored]
        if node.op_type not in ("Conv", "Gemm", "MatMul") or not held:
            continue
        weight = int(np.prod(held[0]))
        parameters += sum(int(np.prod(dims)) for dims in held)
        macs += weight * (int(np.prod(shapes[node.output[0]][2:])) if node.op_type == "Conv" else 1)
    return parameters, macs


def _name(path: Path) -> str:
    parts = path.parts
    inside = parts[parts.index(LOGS.name) + 1 :] if LOGS.name in parts else parts[-2:]
    return "/".join(part for part in inside if part != "version_0") or path.name


def teacher_of(run: Path | None, shape: tuple[int, int, int] | None) -> Model | None:
    """The teacher that a run's configuration names, if its files are there; of any network.

    Args:
        run: The folder of the run.
        shape: Of an image.
    """
    config = yaml.safe_load((run / "config.yaml").read_text()) if run is not None else {}
    named = config.get("model", {}).get("init_args", {}).get("teacher")
    if run is None or not isinstance(named, dict):
        return None
    path = Path((named.get("init_args") or {}).get("path") or run / "config.yaml")
    if run_of(path) is not None and path != run / "config.yaml":
        return _of_checkpoint(path, shape) if path.is_file() else None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=nn.Module)
    try:
        network = parser.instantiate_classes(parser.parse_object({"teacher": named})).teacher
    except (OSError, ValueError, ArgumentError):
        return None
    data = data_of_run(run / "checkpoints" / "best.ckpt")
    if trained_on(network).mean is None and data is not None:  # as DistillationModule takes it
        network.trained_on = TrainedOn.of(data.mean, data.std, data.classes)
    return _of_network(network, f"teacher of {_name(run)}", path, None, shape)
