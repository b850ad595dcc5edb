"""Exports networks to files for inference.

Public names are imported when they are first used, so that running an exported file does not need torch.
"""

from typing import TYPE_CHECKING

from kd_lightning.lazy_names import lazy_names

if TYPE_CHECKING:
    from kd_lightning.export.inference import Inference as Inference
    from kd_lightning.export.network import ExportResult as ExportResult
    from kd_lightning.export.network import export_network as export_network
    from kd_lightning.export.onnx_classifier import OnnxClassifier as OnnxClassifier

_LAZY = {
    "ExportResult": "network",
    "Inference": "inference",
    "OnnxClassifier": "onnx_classifier",
    "export_network": "network",
}

__all__ = ["ExportResult", "Inference", "OnnxClassifier", "export_network"]


__getattr__ = lazy_names(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
