"""The images of a report."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from made_photographs import photograph
from PIL import Image

from kd_lightning.report.photographs import choose_images, describe_image, photograph_svg


def logits(*labels: int, certainty: float = 4.0) -> torch.Tensor:
    return certainty * torch.nn.functional.one_hot(torch.tensor(labels), 3).float()


def test_images_are_chosen_once_and_by_what_the_teacher_knows() -> None:
    labels = torch.tensor([0, 1, 2, 0, -1, 1])
    teacher = logits(0, 1, 2, 1, 0, 1)
    students = [logits(0, 2, 1, 0, 1, 1), logits(0, 2, 2, 2, 0, 1, certainty=9.0)]
    wrong, others = choose_images(labels, teacher, students, 10)
    assert wrong == [1, 2], "that of the surest student first"
    assert sorted(others) == [3, 4]
    assert [len(found) for found in choose_images(labels, teacher, students, 1)] == [1, 1]
    assert choose_images(labels, teacher, [teacher], 10) == ([], [])


def test_models_of_one_opinion_are_named_together() -> None:
    outputs = [logits(0), logits(2), logits(2, certainty=1.0)]
    text = describe_image(0, torch.tensor([1]), outputs, ["teacher", "a.onnx", "b.onnx"], ["cat", "dog", "elk"])
    assert text == "Test image 0, labelled dog\ncat: teacher (96%)\nelk: a.onnx (96%), b.onnx (58%)"
    assert (
        describe_image(0, torch.tensor([-1]), outputs[:1], ["t"], list("abc")) == "Test image 0, unlabelled\na: t (96%)"
    )


@pytest.mark.parametrize(("height", "width", "kind"), [(224, 224, "jpeg"), (300, 150, "jpeg"), (8, 8, "png")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_photograph_is_in_the_picture_as_it_is(height: int, width: int, kind: str, mode: str) -> None:
    pixels = np.asarray(photograph(height, width, mode=mode), dtype=np.float32) / 255
    image = torch.from_numpy(pixels if mode == "RGB" else pixels[..., None]).permute(2, 0, 1)
    svg = photograph_svg(image, 'a <b> & "c"')
    assert svg.startswith("<svg")
    assert "<dc:title>kd-lightning report</dc:title>" in svg, "a report may overwrite its own pictures"
    assert "a &lt;b&gt; &amp;" in svg
    found = re.search(rf'href="data:image/{kind};base64,([^"]*)"', svg)
    assert found is not None
    shown = Image.open(io.BytesIO(base64.b64decode(found[1])))
    assert (shown.size, shown.mode) == ((width, height), mode)
    difference = np.abs(np.asarray(shown, dtype=np.float32) / 255 - pixels)
    assert difference.mean() < (1e-6 if kind == "png" else 0.05)
    assert ("pixelated" in svg) == (kind == "png")
    size = re.search(r'width="(\d+)" height="(\d+)"', svg)
    assert size is not None
    assert max(int(size[1]), int(size[2])) == 224
