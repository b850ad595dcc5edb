"""A model of a report: a run, a checkpoint or an exported file, ready to classify images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.errors import UserError
from kd_lightning.export import Inference, OnnxClassifier
from kd_lightning.export.extra import require_extra
from kd_lightning.files.digest import sha256
from kd_lightning.networks import DataConfig, data_config, set_data_config
from kd_lightning.networks.data_config import DEFAULT_THRESHOLD
from kd_lightning.runs.run import LOGS, Run
from kd_lightning.runs.source import Source

Floats = npt.NDArray[np.float32]


@dataclass
class Model:
    """A model of a report.

    Attributes:
        name: Name, unique in a report.
        file: The checkpoint or the ONNX file.
        run: The run that it comes from, if that is known, for its training curves.
        parameters: Number of parameters.
        macs: Multiply-accumulates for one image, where they can be counted.
        size: Bytes of an exported file, or of the weights in a checkpoint, which contains more than them.
        classes: Class names in the order of the logits.
        shape: Shape of the images that an exported file takes; a network itself may take others too.
        runtime: Name and version of the runtime.
        classify: Function from images in [0, 1], float32 ``(B, channels, H, W)``, to logits, on one thread.
        source: The checkpoint with its data and teacher, if that is known.
        thresholds: Probability of each class above which an image is given it, where it may have several.
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
    source: Source | None = None
    thresholds: Sequence[float] | None = None


def by_runtime(models: Sequence[Model]) -> dict[str, list[int]]:
    """Return the numbers of the models of each runtime, as times of two runtimes are not compared."""
    groups: dict[str, list[int]] = {}
    for number, model in enumerate(models):
        groups.setdefault(model.runtime, []).append(number)
    return groups


def source_of(where: str, *, trust: bool = False) -> Source | None:
    """Return the checkpoint that a model of :func:`load_model` comes from, if that is known, without loading the model.

    Args:
        where: Path or name.
        trust: Import whatever the checkpoint names, that of an ONNX file too.
    """
    if Path(where).suffix == ".onnx":
        return _exported_from(OnnxClassifier(where, threads=1).metadata, trust)
    return Source(where, trust=trust)


def load_model(where: str, shape: tuple[int, int, int] | None = None, *, source: Source | None = None) -> Model:
    """Load the model of a run, a recipe (its newest run), a checkpoint or an ONNX file.

    Args:
        where: Path or name.
        shape: Shape of an image, to count multiply-accumulates where the file does not have it.
        source: Its :func:`source_of`, if that was found before.

    Raises:
        MissingFileError: If there is none.
        UserError: If it cannot be read, or does not take images of that shape.
    """
    source = source or source_of(where)
    if source is None or Path(where).suffix == ".onnx":
        return _of_onnx(Path(where).expanduser(), source)
    name = _name(source.run.folder if source.run else source.path)
    return _of_network(source.network(), name, source.path, source.run, source, shape)


def _of_network(
    network: nn.Module,
    name: str,
    path: Path,
    run: Run | None,
    source: Source | None,
    shape: tuple[int, int, int] | None,
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
    runtime, cuts = f"PyTorch {torch.__version__}", model.known.thresholds
    return Model(name, path, run, parameters, macs, size, classes, None, runtime, classify, source, cuts)


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


def _of_onnx(path: Path, source: Source | None) -> Model:
    classifier = OnnxClassifier(path, threads=1)
    (parameters, macs), size = onnx_size(path), path.stat().st_size
    run, classes = None if source is None else source.run, tuple(classifier.classes)
    runtime = f"ONNX Runtime {require_extra('onnxruntime').__version__}"
    shape, cuts = classifier.shape, classifier.thresholds
    return Model(path.name, path, run, parameters, macs, size, classes, shape, runtime, classifier, source, cuts)


def _exported_from(metadata: Mapping[str, str], trust: bool) -> Source | None:
    """Return the checkpoint that a file was exported from, unless it is gone or has changed."""
    checkpoint = Path(metadata.get("checkpoint", ""))
    same = checkpoint.is_file() and sha256(checkpoint) == metadata.get("checkpoint_sha256")
    return Source(checkpoint, trust=trust) if same else None


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


def teacher_of(model: Model, shape: tuple[int, int, int] | None, known: Sequence[Model] = ()) -> Model | None:
    """Load the teacher that a distilled model had, if its files exist.

    Args:
        model: The model.
        shape: Shape of an image.
        known: Models that were loaded before; one of them may be the teacher.

    Raises:
        UserError: If the teacher's file is damaged, or a checkpoint names classes for it that are not trusted.
    """
    source = model.source
    path = None if source is None else source.teacher_path
    if source is None or path is None:
        return None
    run = None if path == source.path else Run.of_checkpoint(path)
    if run is not None and (same := next((m for m in known if m.file.resolve() == path.resolve()), None)):
        return same
    network = source.teacher()
    if network is None:
        return None
    if data_config(network).mean is None and source.data is not None:  # as DistillationModule takes it
        data = source.data
        thresholds = (DEFAULT_THRESHOLD,) * len(data.classes) if data.multi_label else None
        set_data_config(network, DataConfig.of(data.mean, data.std, data.classes, thresholds=thresholds))
    name = f"teacher of {model.name}" if run is None else _name(run.folder)
    return _of_network(network, name, path, run, None, shape)
