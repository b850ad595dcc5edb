import pytest
import torch
from on_other_device import on_other_device

from kd_lightning.data.labels import check_labels
from kd_lightning.errors import UserError
from kd_lightning.losses._labels import class_indices


@pytest.mark.parametrize("labels", [[0, 2, -1], [-1, -1], []])
def test_classes_and_minus_one_are_accepted(labels: list[int]) -> None:
    check_labels(torch.tensor(labels, dtype=torch.int64), num_classes=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_accepted_in_any_precision(dtype: torch.dtype) -> None:
    check_labels(torch.randn(50, 100).softmax(1).to(dtype), num_classes=100)
    check_labels(torch.eye(3, dtype=dtype), num_classes=3)
    check_labels(torch.tensor([[0, 1, 0], [-1, -1, -1]], dtype=dtype), num_classes=3)  # the second is unlabelled


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], "one sums to 2; .*declare multi_label"),
        ([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], "one sums to 0; "),
        ([[0.0, 1.0, 0.0], [-1.0, -1.0, 0.0]], "one contains -1; "),
        ([[2.0, -1.0, 0.0], [1.0, 0.0, 0.0]], "one contains -1; "),
        ([[torch.nan, 0.0, 1.0], [1.0, 0.0, 0.0]], "one contains nan; "),
        ([[1.0, 0.0], [0.0, 1.0]], "probabilities of 2 classes, but there are 3; "),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_that_are_no_probabilities_are_refused(rows: list[list[float]], found: str, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=found):
        check_labels(torch.tensor(rows, dtype=dtype), num_classes=3)


@on_other_device
def test_probabilities_are_checked_on_their_device() -> None:
    rows = torch.eye(3, device="other")
    check_labels(rows, num_classes=3)
    assert class_indices(rows).device.type == "other"
    with pytest.raises(UserError, match="one sums to 2"):
        check_labels(2 * rows, num_classes=3)


@pytest.mark.parametrize(("labels", "wrong"), [([0, 3], 3), ([-2, 1], -2), ([-2, 3], -2)])
@pytest.mark.parametrize(("split", "images"), [("", ""), ("val", " of the 'val' images")])
def test_the_message_names_the_label_and_the_split(labels: list[int], wrong: int, split: str, images: str) -> None:
    with pytest.raises(ValueError, match=rf"^Label {wrong}{images} is outside \[0, 3\) \(-1 means unlabelled\); "):
        check_labels(torch.tensor(labels), num_classes=3, split=split)
