"""Callbacks: which weights may move, or exist; what is drawn and written."""

from kd_lightning.callbacks.embedding_picture import EmbeddingPicture
from kd_lightning.callbacks.exact_resume import ExactResume
from kd_lightning.callbacks.feature_writer import FeatureWriter
from kd_lightning.callbacks.freezing import FreezeLayers
from kd_lightning.callbacks.masking import MaskWeights
from kd_lightning.callbacks.prediction_writer import PredictionWriter
from kd_lightning.callbacks.pruning import PruneNetwork
from kd_lightning.callbacks.quantization import QuantizationAware
from kd_lightning.callbacks.run_report import RunReport
from kd_lightning.callbacks.save_progress import SaveProgress
from kd_lightning.callbacks.tensorboard_images import TensorBoardImages

__all__ = [
    "EmbeddingPicture",
    "ExactResume",
    "FeatureWriter",
    "FreezeLayers",
    "MaskWeights",
    "PredictionWriter",
    "PruneNetwork",
    "QuantizationAware",
    "RunReport",
    "SaveProgress",
    "TensorBoardImages",
]
