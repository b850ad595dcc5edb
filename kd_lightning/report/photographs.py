"""Images on which the teacher and its students differ, each shown once, in a size that can be judged."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

_SMALL = 64
"""Side below which an image is kept pixel by pixel, and drawn with sharp ones."""
_SIDE = 224


def choose_images(
    labels: Tensor, teacher: Tensor, students: Sequence[Tensor], count: int
) -> tuple[list[int], list[int]]:
    """Return images that a student gets wrong and the teacher right, and others on which they do not agree.

    The former are those whose wrong label has the highest probability, the latter those of the largest divergence.

    Args:
        labels: Class indices ``(N,)``, -1 where unlabelled.
        teacher: Logits ``(N, C)``.
        students: Logits ``(N, C)`` of each student.
        count: Maximum number of either.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
        >>> choose_images(torch.tensor([0, 0, 0]), teacher, [-teacher], count=5)
        ([0, 2], [1])
    """
    right = (teacher.argmax(1) == labels) & (labels >= 0)
    errors, divergences = [], []
    for student in students:
        highest, predicted = student.softmax(1).max(1)
        differs = predicted != teacher.argmax(1)
        divergence = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
        errors.append((highest * (right & differs)).tolist())
        divergences.append((divergence.clamp(min=1e-12) * (differs & ~right)).tolist())
    return largest(errors, count), largest(divergences, count)


def largest(values: list[list[float]], count: int) -> list[int]:
    """Return the places of the largest values above 0, over all lists."""
    most = [max(column) for column in zip(*values, strict=True)]
    return sorted((place for place, value in enumerate(most) if value > 0), key=lambda place: -most[place])[:count]


def describe_image(
    number: int, labels: Tensor, logits: Sequence[Tensor], names: Sequence[str], classes: Sequence[str]
) -> str:
    """Return the caption of an image, in lines: its label, and each answer with the models that give it.

    Args:
        number: Number of the image.
        labels: Class indices ``(N,)``, -1 where unlabelled.
        logits: Logits ``(N, C)`` of each model.
        names: Names of the models.
        classes: Class names.

    Example:
        >>> import torch
        >>> logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> print(describe_image(0, torch.tensor([0]), logits, ["teacher", "small.onnx"], ["cat", "dog"]))
        Test image 0, labelled cat
        cat: teacher (88%)
        dog: small.onnx (73%)
    """
    opinions: dict[str, list[tuple[str, float]]] = {}
    for name, output in zip(names, logits, strict=True):
        probability, predicted = output[number].softmax(0).max(0)
        opinions.setdefault(classes[int(predicted)], []).append((name, float(probability)))
    label = f"labelled {classes[int(labels[number])]}" if labels[number] >= 0 else "unlabelled"
    answers = [
        f"{answer}: {', '.join(f'{name} ({100 * value:.0f}%)' for name, value in who)}"
        for answer, who in opinions.items()
    ]
    return "\n".join([f"Test image {number}, {label}", *answers])


def photograph_svg(image: Tensor, description: str) -> str:
    """Return an image as an SVG that contains it.

    Args:
        image: Floats in [0, 1], ``(channels, H, W)``, of which one channel is grey and the first three are colours.
        description: Plain text for those who do not see it.
    """
    pixels = np.rint(255 * image[:3].permute(1, 2, 0).numpy()).astype(np.uint8)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] < 3 else pixels)
    is_small = max(picture.size) < _SMALL
    kind, options = ("png", {}) if is_small else ("jpeg", {"quality": 90})
    with io.BytesIO() as file:
        picture.save(file, kind, **options)
        data = base64.b64encode(file.getvalue()).decode()
    scale = _SIDE / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    style = ' style="image-rendering: pixelated"' if is_small else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" role="img"><title>{escape(description)}</title>'
        "<metadata><dc:title>kd-lightning report</dc:title></metadata>"
        f'<image width="{width}" height="{height}"{style} href="data:image/{kind};base64,{data}"/></svg>'
    )
