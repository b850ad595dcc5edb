"""From a checkpoint to a file that serves.

The public names are imported when they are first used, so that what runs an exported file needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_lightning.export.classify_command import classify as classify
    from kd_lightning.export.command import export as export
    from kd_lightning.export.inference import Inference as Inference
    from kd_lightning.export.network import export_network as export_network
    from kd_lightning.export.onnx_classifier import OnnxClassifier as OnnxClassifier

_HOMES = {
    "Inference": "inference",
    "OnnxClassifier": "onnx_classifier",
    "classify": "classify_command",
    "export": "command",
    "export_network": "network",
}

__all__ = ["Inference", "OnnxClassifier", "classify", "export", "export_network"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
