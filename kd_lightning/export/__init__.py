"""From a checkpoint to a file that serves."""

from kd_lightning.export.classify import classify
from kd_lightning.export.command import export
from kd_lightning.export.inference import Inference
from kd_lightning.export.network import export_network
from kd_lightning.export.onnx_classifier import OnnxClassifier

__all__ = ["Inference", "OnnxClassifier", "classify", "export", "export_network"]
