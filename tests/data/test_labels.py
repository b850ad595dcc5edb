import pytest
import torch

from kd_lightning.data.labels import check_labels


@pytest.mark.parametrize("labels", [[0, 2, -1], [-1, -1], []])
def test_classes_and_minus_one_are_accepted(labels: list[int]) -> None:
    check_labels(torch.tensor(labels, dtype=torch.int64), num_classes=3)


def test_class_probabilities_are_not_checked() -> None:
    check_labels(torch.tensor([[0.5, 0.5], [7.0, -7.0]]), num_classes=2)


@pytest.mark.parametrize(("labels", "wrong"), [([0, 3], 3), ([-2, 1], -2), ([-2, 3], -2)])
@pytest.mark.parametrize(("split", "images"), [("", ""), ("val", " of the 'val' images")])
def test_the_message_names_the_label_and_the_split(labels: list[int], wrong: int, split: str, images: str) -> None:
    with pytest.raises(ValueError, match=rf"^Label {wrong}{images} is outside \[0, 3\) \(-1 means unlabelled\); "):
        check_labels(torch.tensor(labels), num_classes=3, split=split)
