from typing import Any

import numpy as np
import pytest
import torch
from on_other_device import on_other_device
from torch import Tensor

from kd_lightning.data.batch import Batch
from kd_lightning.data.read_batch import read_batch, read_images, read_to_predict, read_training_batch
from kd_lightning.errors import UserError

X = torch.rand(4, 3, 8, 8)
Y = torch.tensor([2, 0, 1, -1])
PATHS = ("a.png", "b.png", "c.png", "d.png")


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_class_indices_of_any_integer_type_and_as_a_column(kind: type, dtype: torch.dtype) -> None:
    for labels in (Y.to(dtype), Y.to(dtype)[:, None]):
        images, read, ids, _ = read_batch(kind([X, labels]))
        assert images is X
        assert ids is None
        assert read.dtype == torch.int64
        assert torch.equal(read, Y)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_class_indices_without_a_sign(dtype: torch.dtype) -> None:
    labels = torch.tensor([1, 0, 0, 1], dtype=dtype)
    assert read_batch((X, labels)).labels.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_floats_are_class_probabilities(dtype: torch.dtype) -> None:
    rows = torch.eye(4, 10, dtype=dtype)
    assert read_batch((X, rows)).labels is rows


def test_a_batch_of_a_data_module_is_returned_as_it_is() -> None:
    batch = Batch(X, Y, torch.arange(4))
    assert read_batch(batch) == tuple(batch)  # the same tensors
    assert read_to_predict(batch) == tuple(batch)


@pytest.mark.parametrize(
    ("rest", "ids"),
    [
        ((torch.arange(4), PATHS), [0, 1, 2, 3]),
        ((torch.arange(4, dtype=torch.int32),), [0, 1, 2, 3]),
        ((PATHS,), None),
        ((PATHS, torch.arange(4)), None),
        ((torch.rand(4),), None),
        ((torch.ones(4, dtype=torch.bool),), None),
        ((torch.zeros(4, 2, dtype=torch.int64),), None),
        (({"a": torch.ones(4)}, None), None),
    ],
)
def test_ids_are_integers_and_what_follows_is_ignored(rest: tuple[Any, ...], ids: list[int] | None) -> None:
    for read in (read_batch, read_to_predict):
        found = read([X, Y, *rest]).ids
        assert (None if found is None else found.tolist()) == ids


@pytest.mark.parametrize("batch", [X, (X,), [X], (X, PATHS), (X, None)])
def test_labels_are_not_needed_to_predict(batch: Any) -> None:
    assert read_to_predict(batch).labels.tolist() == [-1] * 4


def test_labels_of_any_kind_are_kept_where_they_are_not_used() -> None:
    rows = torch.ones(4, 7, dtype=torch.int64)
    assert read_to_predict((X, rows)).labels is rows


def test_missing_labels_may_be_allowed() -> None:
    assert read_batch([X], labelled=False).labels.tolist() == [-1] * 4
    with pytest.raises(UserError, match="labels of a batch are float32"):
        read_batch([X, torch.rand(4)], labelled=False)


WANTED = r"^A batch must be \(images, labels\) with images \(B, channels, H, W\), got "


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": X, "label": Y}, rf"{WANTED}a dict of 'image', 'label'; change what the data set returns"),
        ({"a": (X, Y), "b": (X, Y)}, rf"{WANTED}a dict of 'a', 'b'; give one loader, not several"),
        ([(X, Y), (X, Y)], rf"{WANTED}\[\[float32 \(4, 3, 8, 8\), int64 \(4,\)\], .*; give one loader, not several"),
        (((X, Y), 3), rf"{WANTED}\[\[float32 .*\], int\]; change"),
        (None, f"{WANTED}None; "),
        ((), f"{WANTED}an empty list; "),
        ("abc", f"{WANTED}str; "),
        ((X[0], Y), rf"{WANTED}\[float32 \(3, 8, 8\)"),
        ((X.numpy(), Y), rf"{WANTED}\[ndarray, int64 \(4,\)\]"),
        (X[0], rf"{WANTED}float32 \(3, 8, 8\); "),
        ((Y, X), rf"{WANTED}\[int64 \(4,\), float32"),
        (((255 * X).byte(), Y), r"images of a batch are uint8, .*ToDtype\(torch.float32, scale=True\)"),
        ((X > 0.5, Y), "images of a batch are bool"),
        ((X.long(), Y), "images of a batch are int64"),
    ],
)
def test_other_images_are_refused(batch: Any, message: str) -> None:
    for read in (read_images, read_batch, read_to_predict):
        with pytest.raises(UserError, match=message):
            read(batch)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.eye(4, dtype=torch.int64), r"int64 \(4, 4\), one column for each class; give labels.argmax\(1\)"),
        (torch.ones(4, 5, dtype=torch.bool), r"bool \(4, 5\).*declare multi_label = True in the data module"),
        (Y.float(), r"float32, but class indices are integers; give labels.long\(\)"),
        (Y.double()[:, None], r"float64, but class indices are integers"),
        (Y[:3], r"of 4 images are int64 \(3,\); give integers \(4,\)"),
        (Y[0], r"of 4 images are int64 \(\); "),
        (torch.zeros(4, 2, 2), r"of 4 images are float32 \(4, 2, 2\); "),
        (PATHS, r"are \[str, str, str, str\]; give an integer tensor \(4,\)"),
        ([0, 1, 2, 0], r"are \[int, int, int, int\]; "),
        (np.arange(4), "are ndarray; "),
        (None, rf"{WANTED}\[float32 \(4, 3, 8, 8\), None\] without labels"),
    ],
)
def test_other_labels_are_refused(labels: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_batch([X, labels])


@pytest.mark.parametrize("batch", [X, [X]])
def test_images_alone_are_refused_where_labels_are_needed(batch: Any) -> None:
    with pytest.raises(UserError, match="without labels; change what the data set returns"):
        read_batch(batch)


@pytest.mark.parametrize("target", [X, (X,), [X, Y], (X, PATHS)])
def test_pairs_have_a_source_with_labels_and_a_target_without(target: Any) -> None:
    source, images = read_training_batch({"source": [X, Y], "target": target}, pairs=True)
    assert torch.equal(source.labels, Y)
    assert images is X


@pytest.mark.parametrize("batch", [(X, Y), {"src": (X, Y), "tgt": X}, [(X, Y), (X, Y)], None])
def test_other_pairs_are_refused(batch: Any) -> None:
    with pytest.raises(UserError, match=r'{"source": .*; give the Trainer a dict of two loaders with these keys'):
        read_training_batch(batch, pairs=True)


@pytest.mark.parametrize("target", [torch.rand(4, 1, 8, 8), torch.rand(4, 3, 9, 8)])
def test_a_target_of_another_shape_is_refused(target: Tensor) -> None:
    with pytest.raises(UserError, match=r"source's images are float32 \(4, 3, 8, 8\) and the target's"):
        read_training_batch({"source": [X, Y], "target": target}, pairs=True)


@on_other_device
def test_what_is_added_is_on_the_device_of_the_images() -> None:
    images = X.to("other")
    assert {tensor.device.type for tensor in read_to_predict(images)[:2]} == {"other"}
    assert read_batch([images], labelled=False).labels.device.type == "other"
    assert read_batch([images, Y.to("other", torch.uint8)]).labels.device.type == "other"
