"""A sentence about each tag in TensorBoard, shown behind the (i) of its picture."""

import re
from typing import Any

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, DATA_CLASS_SCALAR
from torch.utils.tensorboard import SummaryWriter

_SPLITS = {
    "train": "the augmented training images of the epoch, while the weights change",
    "val": "the validation images, on which the best epoch is chosen",
    "test": "the test images, which are seen once, by `test`",
    "oracle": "the validation images of the target, whose labels nothing else reads",
}
_METRICS = {
    "accuracy": "Fraction of images whose most probable class is the label",
    "top5": "Fraction of images whose label is among the five most probable classes",
    "map": "Mean average precision: how well the probability of a class orders the images, averaged over the classes",
    "f1_micro": "F1 of all decisions on (image, class) at the thresholds of the classes, which `fit` chooses on the validation images: there it is a little too high",  # noqa: E501
    "f1_macro": "Mean F1 of the classes at their thresholds, which `fit` chooses on the validation images: there it is a little too high",  # noqa: E501
    "loss": "Mean loss, in `train` the weighted sum of all terms, elsewhere the cross-entropy with the labels",
    "ece": "Expected calibration error: mean distance between confidence and accuracy in 15 bins; 0 is best",
    "agreement": "Fraction of images that get the class that the teacher gives them, right or wrong; where an image may have several classes, fraction of equal decisions on (image, class), each at its own thresholds",  # noqa: E501
    "kl": "Mean Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats; 0 is best",
    "gap_closed": (
        "Part of the gap in accuracy between the student alone and its teacher that distillation closes: 0 is the "
        "student alone, 1 the teacher"
    ),
    "confusion": "Per cent of each true class (row) that is given each class (column), summed over the images",
    "per_label": "Average precision and F1 of each class, the lowest first, with the number of its images; of more than 20 classes the 20 lowest",  # noqa: E501
    "per_class": "Accuracy of each class, the lowest first, with the number of its images and the class that it is most often taken for; of more than 20 classes the 20 lowest",  # noqa: E501
}
_OTHERS = {
    "train/loss_step": "Loss of single steps, the weighted sum of all terms.",
    "train/images_per_second": "Training images per second of all processes, without validation.",
    "train/waiting_for_data": (
        "Share of the epoch in which the device had nothing to do because the next batch was not there; near 0 is best."
    ),
    "train/skipped_steps": "Steps of the epoch that were skipped because the loss or a gradient was not finite.",
    "train/images": "Training images of the first batch as the network sees them, with the classes of their labels.",
    "train/views": "Some training images (rows) as the augmentation shows them in the first epochs (columns).",
    "learning_rate": "Learning rate of the first group of weights.",
    "teacher/accuracy": "Accuracy of the teacher on the validation images, before the first step.",
    "teacher/map": "Mean average precision of the teacher on the validation images, before the first step.",
    "teacher/softened": (
        "The teacher's probabilities of some training images at the temperature of the loss: what the student sees "
        "beyond the label."
    ),
    "hp/test_map": "Mean average precision on the test images, the metric of the table of hyper-parameters; -1 before the test.",  # noqa: E501
    "hp/test_accuracy": "Accuracy on the test images, the metric of the table of hyper-parameters; -1 before the test.",
    "prune/sparsity": "Fraction of the masked layers' weights that are 0.",
    "prune/macs": "Multiply-accumulates of one image after each pruning step.",
    "prune/parameters": "Parameters of the network after each pruning step.",
    "embedding": "Validation images of source and target in two dimensions (t-SNE), before and after training.",
    "epoch": "Number of the epoch at each step.",
}


def describe_tag(tag: str) -> str:
    """Return a sentence, in Markdown, on the meaning of a tag; an empty string for tags of others.

    Example:
        >>> describe_tag("val/agreement").partition(",")[0]
        'Fraction of images that get the class that the teacher gives them'
        >>> describe_tag("train/soft")
        'The term `soft` of the loss, before it is weighted: its mean over the epoch.'
    """
    tag = re.sub(r"/dataloader_idx_\d+$|_(source|target)$", "", tag)
    if tag in _OTHERS:
        return _OTHERS[tag]
    split, _, name = tag.partition("/")
    if split in _SPLITS and name in _METRICS:
        return f"{_METRICS[name]}. Measured on {_SPLITS[split]}."
    if split == "train" and name and "/" not in name:
        return f"The term `{name}` of the loss, before it is weighted: its mean over the epoch."
    return ""


def describe_tags(writer: SummaryWriter) -> None:
    """Let a writer add the description to the first event of each tag, where TensorBoard reads it."""
    file_writer = writer._get_file_writer()
    if not isinstance(file_writer.event_writer, _DescribingWriter):
        file_writer.event_writer = _DescribingWriter(file_writer.event_writer)


_KINDS = {"simple_value": ("scalars", DATA_CLASS_SCALAR), "image": ("images", DATA_CLASS_BLOB_SEQUENCE)}
"""Plugin and class of data of a value."""


def _describe(value: Any) -> None:
    text, kind = describe_tag(value.tag), _KINDS.get(value.WhichOneof("value"))
    if text and kind and not value.HasField("metadata"):
        value.metadata.summary_description = text
        # without these, TensorBoard's data server puts metadata of its own in the place of these
        value.metadata.plugin_data.plugin_name, value.metadata.data_class = kind


class _DescribingWriter:
    """An ``EventFileWriter`` that adds descriptions: torch's ``add_scalar`` and ``add_image`` take none."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._described: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def add_event(self, event: Any) -> None:
        """Write an event."""
        for value in event.summary.value:
            if value.tag not in self._described:
                self._described.add(value.tag)
                _describe(value)
        self._writer.add_event(event)
