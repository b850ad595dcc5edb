"""Results of each class, from a confusion matrix."""

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from kd_lightning.callbacks.class_results import class_results, most_confused


@pytest.mark.filterwarnings("ignore:Precision is ill-defined")
def test_accuracy_and_precision_are_those_of_scikit_learn() -> None:
    labels, predicted = torch.randint(5, (80,)), torch.randint(4, (80,))
    counts = torch.tensor(confusion_matrix(labels, predicted, labels=range(5)))
    precision, recall, _, images = precision_recall_fscore_support(labels, predicted, labels=range(5))
    for result, expected in zip(
        class_results(counts, list("abcde")), zip(precision, recall, images, strict=True), strict=True
    ):
        assert result.images == expected[2]
        assert result.accuracy == pytest.approx(expected[1])
        assert result.precision == (None if result.name == "e" else pytest.approx(expected[0]))


def test_a_class_without_images_or_errors_has_none() -> None:
    never, perfect = class_results(torch.tensor([[0, 0], [0, 3]]), ["never", "always"])
    assert never == ("never", 0, None, None, "")
    assert perfect == ("always", 3, 1.0, 1.0, "")


def test_the_most_confused_pairs_come_first_and_pairs_without_errors_not_at_all() -> None:
    counts = torch.tensor([[5, 2, 0], [3, 7, 0], [0, 1, 3]])
    assert most_confused(counts, ["a", "b", "c"], 10) == [
        ("b", "a", 3, pytest.approx(0.3)),
        ("a", "b", 2, pytest.approx(2 / 7)),
        ("c", "b", 1, 0.25),
    ]
    assert len(most_confused(counts, ["a", "b", "c"], 2)) == 2
