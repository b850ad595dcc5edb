"""Runs an exported ONNX file; needs ONNX Runtime and NumPy, but not torch."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kd_lightning.errors import MissingFileError, UserError
from kd_lightning.files.prepare import Preparation

Images = npt.NDArray[np.float32] | npt.NDArray[np.uint8]


class OnnxClassifier:
    """An ONNX file of ``kd-lightning export``.

    Args:
        path: Path of the file.
        threads: Number of threads of ONNX Runtime; 0 for all cores.

    Attributes:
        classes: Class names in the order of the logits.
        thresholds: Probability of each class above which an image is given it, where it may have several; ``None``
            where it has one.
        shape: Channels, height and width of the images.
        metadata: Metadata of the file.
        preparation: Resizing and crop of image files, as before the network's test; where the file does not contain
            it, the shorter side is resized to the network's and the centre cut out.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If it is not an ONNX file, or does not take images.

    Example:
        >>> import tempfile
        >>> from kd_lightning.export import export_network
        >>> from kd_lightning.networks import DataConfig, ResNet
        >>> network = ResNet([1], [4])
        >>> network.data_config = DataConfig.of(mean=[0.5] * 3, std=[0.25] * 3)  # as after a training
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = export_network(network, f"{folder}/student.onnx")
        ...     classifier = OnnxClassifier(result.path)
        >>> classifier(np.zeros((2, *classifier.shape), dtype=np.float32)).shape
        (2, 10)
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        from kd_lightning.export.extra import require_extra

        runtime = require_extra("onnxruntime")
        path = Path(path).expanduser()
        if not path.is_file():
            raise MissingFileError(f"There is no file {str(path)!r}; create one with `kd-lightning export`.")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UserError(f"{str(path)!r} cannot be read as an ONNX file; export it again.") from error
        (accepted, *more) = self.session.get_inputs()
        if more or len(accepted.shape) != 4 or not all(isinstance(side, int) for side in accepted.shape[1:]):
            raise UserError(f"{str(path)!r} must have one input, images (batch, channels, height, width).")
        self._input = accepted.name
        self._uint8 = accepted.type == "tensor(uint8)"
        self.shape: tuple[int, int, int] = tuple(accepted.shape[1:])
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        logits = self.session.get_outputs()[0].shape[-1]
        self.classes: list[str] = json.loads(self.metadata.get("classes", "null")) or [str(i) for i in range(logits)]
        self.thresholds: list[float] | None = json.loads(self.metadata.get("thresholds", "null"))
        plain = json.loads(self.metadata.get("data_config", "{}")).get("preparation")
        prepared = Preparation.of(self.shape[1:]) if plain is None else Preparation.of(**plain)
        self.preparation = prepared.at(self.shape[1:])

    def __call__(self, images: Images) -> npt.NDArray[np.float32]:
        """Return logits ``(B, C)`` of images ``(B, channels, H, W)``: bytes, or floats in [0, 1]."""
        if self._uint8 and images.dtype != np.uint8:
            images = np.rint(images * 255).astype(np.uint8)
        elif not self._uint8:
            images = images.astype(np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)
        logits: npt.NDArray[np.float32] = self.session.run(None, {self._input: np.ascontiguousarray(images)})[0]
        return logits

    def probabilities(self, images: Images) -> npt.NDArray[np.float64]:
        """Return probabilities ``(B, C)``: of rows that sum to 1 or, with ``thresholds``, of each class by itself.

        An image is given the most probable class, or those whose probability is above their threshold.
        """
        logits = self(images).astype(np.float64)
        if self.thresholds is not None:
            sigmoid: npt.NDArray[np.float64] = np.exp(-np.logaddexp(0, -logits))  # without overflow
            return sigmoid
        probabilities: npt.NDArray[np.float64] = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        return probabilities
