"""From a checkpoint to a file that serves."""

from kd_lightning.export.command import classify, export, export_network
from kd_lightning.export.inference import Inference
from kd_lightning.export.onnx_classifier import OnnxClassifier

__all__ = ["Inference", "OnnxClassifier", "classify", "export", "export_network"]
