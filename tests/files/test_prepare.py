"""Images are prepared to the bit as by torchvision's transforms; timm's are in ``tests/networks``."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from made_photographs import photograph
from PIL import Image

from kd_lightning.files.prepare import MODES, RESAMPLING, Preparation, prepare

SIDES = st.integers(1, 150)


@given(
    SIDES, SIDES, st.integers(1, 80), st.integers(1, 80), st.sampled_from(["RGB", "L"]), st.sampled_from([*RESAMPLING])
)
@settings(max_examples=150, deadline=None)
def test_shorter_side_and_centre_crop_are_torchvisions(
    height: int, width: int, resize: int, crop: int, mode: str, interpolation: str
) -> None:
    image = photograph(height, width, mode=mode)
    filter_ = F.InterpolationMode(interpolation)
    expected = F.center_crop(F.resize(image, [resize], filter_), [crop])
    shown = prepare(image, Preparation.of(crop, resize, interpolation=interpolation))
    assert shown.mode == mode
    assert torch.equal(F.pil_to_tensor(shown), F.pil_to_tensor(expected))


@given(SIDES, SIDES, st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES))
@settings(max_examples=50, deadline=None)
def test_squashed_images_are_torchvisions(
    height: int, width: int, resize: tuple[int, int], crop: tuple[int, int]
) -> None:
    image = photograph(height, width)
    expected = F.center_crop(F.resize(image, list(resize)), list(crop))
    assert torch.equal(
        F.pil_to_tensor(prepare(image, Preparation.of(crop, resize, mode="squash"))), F.pil_to_tensor(expected)
    )


@given(SIDES, SIDES, st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.sampled_from(MODES))
@settings(max_examples=100, deadline=None)
def test_every_image_gets_the_size_of_the_network(
    height: int, width: int, size: tuple[int, int], resize: tuple[int, int], mode: str
) -> None:
    shown = prepare(photograph(height, width), Preparation.of(size, resize, mode=mode))
    assert (shown.height, shown.width) == size


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(40, 80, (8, 24), (0, 32)), (80, 40, (0, 32), (8, 24)), (7, 7, (0, 32), (0, 32))],
)
@pytest.mark.parametrize(("mode", "fill", "colour"), [("RGB", (9, 8, 7), (9, 8, 7)), ("L", (9, 8, 7), (9,))])
def test_borders_are_beside_the_whole_image(
    height: int, width: int, rows: tuple[int, int], columns: tuple[int, int], mode: str, fill: Any, colour: Any
) -> None:
    image = photograph(height, width, mode=mode)
    pixels = np.array(prepare(image, Preparation.of(32, mode="border", fill=fill))).reshape(32, 32, -1)
    inner = pixels[slice(*rows), slice(*columns)]
    whole = np.asarray(image.resize((inner.shape[1], inner.shape[0]), Image.Resampling.BILINEAR))
    assert (inner == whole.reshape(inner.shape)).all()
    pixels[slice(*rows), slice(*columns)] = colour
    assert (pixels == colour).all()


def test_an_image_of_the_right_size_is_not_resized() -> None:
    image = photograph(24, 24)
    for mode in MODES:
        assert prepare(image, Preparation.of(24, mode=mode, interpolation="bicubic")) is image


def test_the_aspect_ratio_is_kept_where_nothing_is_said() -> None:
    image = photograph(60, 90)
    assert Preparation.of(30) == ((30, 30), (30, 30), "center", "bilinear", (0,))
    halved = np.asarray(image.resize((45, 30), Image.Resampling.BILINEAR))
    assert (np.asarray(prepare(image, Preparation.of(30))) == halved[:, 8:38]).all()  # 7.5, rounded to even


@pytest.mark.parametrize(
    ("preparation", "size", "resize"),
    [
        (Preparation.of(224, 256), 160, (183, 183)),
        (Preparation.of(224, 235, interpolation="bicubic"), 384, (403, 403)),
        (Preparation.of((80, 112), (84, 118), mode="squash"), 40, (42, 42)),
        (Preparation.of(224, 256), (112, 224), (128, 256)),
    ],
)
def test_another_size_shows_the_same_part(preparation: Preparation, size: Any, resize: tuple[int, int]) -> None:
    other = preparation.at(size)
    assert (other.size, other.resize) == ((size, size) if isinstance(size, int) else size, resize)
    assert other[2:] == preparation[2:]
    assert preparation.at(preparation.size) is preparation


def test_plain_data_makes_the_preparation_again() -> None:
    preparation = Preparation.of((80, 112), 120, mode="border", interpolation="bicubic", fill=(1, 2, 3))
    assert Preparation.of(**json.loads(json.dumps(preparation._asdict()))) == preparation


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0}, r"^Images cannot be resized to \(0, 0\) and cropped to \(0, 0\); give sizes of at least 1\.$"),
        ({"size": 8, "resize": (8, -1)}, r"^Images cannot be resized to \(8, -1\)"),
        ({"size": (8, 8, 8)}, r"^A size must be a number of pixels, or height and width, got \(8, 8, 8\)\.$"),
        ({"size": "large"}, r"^A size must be a number of pixels, or height and width, got 'large'\.$"),
        ({"size": 8, "mode": "centre"}, r"^The crop mode must be center, squash, border, got 'centre'\.$"),
        ({"size": 8, "interpolation": "cubic"}, r"^The interpolation must be nearest, bilinear, .* got 'cubic'\.$"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preparation.of(**given)
