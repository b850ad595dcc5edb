"""Random resized crops: torchvision's boxes in distribution and its pixels, within a grey level of Pillow's."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from kd_lightning.data.augmentation.resized_crop import ResizedCrop, cut, draw_boxes

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def boxes(samples: Tensor, size: tuple[int, int], *, seed: int = 0, view: int = 0, **options: object) -> Tensor:
    sizes = torch.tensor([size] * len(samples))
    given = {"scale": SCALE, "ratio": RATIO} | options
    return draw_boxes(samples, sizes, seed=seed, view=view, **given)  # type: ignore[arg-type]


def photograph(height: int, width: int, seed: int = 0) -> Tensor:
    """Return a smooth image with edges and noise, uint8 ``(3, H, W)`` in channels-last memory."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (50, 200), (16, 16)])
def test_boxes_have_the_moments_of_torchvisions(size: tuple[int, int]) -> None:
    ours = boxes(torch.arange(20_000), size).double()
    torch.manual_seed(0)
    transform, image = RandomResizedCrop(32, scale=SCALE, ratio=RATIO), torch.empty(3, *size)
    drawn = [transform.make_params([image]) for _ in range(3000)]
    theirs = torch.tensor([[box[name] for name in ("top", "left", "height", "width")] for box in drawn]).double()
    spread = theirs.std(0) + 0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 0.1 * spread).all()
    assert ((ours.std(0) - theirs.std(0)).abs() < 0.08 * spread).all()


def test_boxes_lie_inside_the_image_and_in_the_limits() -> None:
    top, left, height, width = boxes(torch.arange(5000), (70, 101)).unbind(1)
    assert (torch.stack([top, left]) >= 0).all()
    assert (top + height <= 70).all()
    assert (left + width <= 101).all()
    area = height * width / (70 * 101)
    assert ((area > 0.19) & (area <= 1)).all()
    shape = width / height
    assert ((shape > 0.7) & (shape < 1.4)).all()


def test_where_no_box_fits_it_is_the_largest_central_one() -> None:
    found = boxes(torch.arange(3), (10, 100), scale=(1.0, 1.0))
    assert found.tolist() == [[0, 43, 10, 13]] * 3
    found = boxes(torch.arange(3), (100, 10), scale=(1.0, 1.0))
    assert found.tolist() == [[43, 0, 13, 10]] * 3


def test_boxes_depend_on_sample_seed_and_view_alone() -> None:
    whole = boxes(torch.arange(64), (60, 90))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:9]
    assert torch.equal(boxes(order, (60, 90)), whole[order])
    mixed_sizes = torch.tensor([[60, 90], [30, 30]] * 32)
    together = draw_boxes(torch.arange(64), mixed_sizes, scale=SCALE, ratio=RATIO, seed=0, view=0)
    assert torch.equal(together[::2], whole[::2])
    for other in (boxes(torch.arange(64), (60, 90), seed=1), boxes(torch.arange(64), (60, 90), view=1)):
        assert (other != whole).any(1).float().mean() > 0.9


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(3, 5, 60, 71), (0, 0, 96, 120), (20, 30, 17, 12)])
def test_a_box_has_the_pixels_of_torchvision_and_within_a_level_of_pillow(
    interpolation: str, box: tuple[int, int, int, int]
) -> None:
    image = photograph(96, 120)
    found = cut(image, box, size=(32, 40), interpolation=interpolation)
    top, left, height, width = box
    mode = F.InterpolationMode(interpolation)
    assert torch.equal(found, F.resized_crop(image, top, left, height, width, [32, 40], mode, antialias=True))
    part = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).crop((left, top, left + width, top + height))
    pillow = np.array(part.resize((40, 32), Image.Resampling[interpolation.upper()]))
    assert (found.int() - torch.from_numpy(pillow).permute(2, 0, 1).int()).abs().max() <= 1


def test_memory_formats_give_the_same_pixels() -> None:
    image = photograph(50, 70)
    options = {"size": (24, 24), "interpolation": "bilinear"}
    assert torch.equal(cut(image, (2, 3, 40, 33), **options), cut(image.contiguous(), (2, 3, 40, 33), **options))  # type: ignore[arg-type]


def crop(**options: object) -> ResizedCrop:
    given = {
        "size": (24, 24),
        "scale": SCALE,
        "ratio": RATIO,
        "flip": True,
        "vertical_flip": False,
        "interpolation": "bilinear",
        "teacher_size": None,
        "teacher_interpolation": "bilinear",
        "seed": 0,
    }
    return ResizedCrop(**given | options)  # type: ignore[arg-type]


def test_a_view_does_not_depend_on_the_batch() -> None:
    images = [photograph(40 + 3 * i, 90 - 2 * i, seed=i) for i in range(12)]
    whole, _ = crop()(images, torch.arange(12), 5)
    for row in (0, 4, 11):
        alone, _ = crop()([images[row]], torch.tensor([row]), 5)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 300)])
def test_images_of_few_pixels_are_cut(size: tuple[int, int]) -> None:
    image = photograph(*size)
    views, teacher_views = crop(teacher_size=(30, 31))([image] * 20, torch.arange(20), 0)
    assert (views.shape, views.dtype) == ((20, 3, 24, 24), torch.uint8)
    assert teacher_views is not None
    assert teacher_views.shape == (20, 3, 30, 31)
    if size == (1, 1):
        assert (views == image).all()


def test_a_batch_of_which_no_image_is_readable_has_no_views() -> None:
    views, teacher_views = crop(teacher_size=(30, 30))([], torch.empty(0, dtype=torch.int64), 0)
    assert teacher_views is not None
    assert len(views) == len(teacher_views) == 0


def test_the_teacher_sees_the_same_box_at_its_size() -> None:
    images = [photograph(80, 100, seed=i) for i in range(6)]
    whole = crop(scale=(1.0, 1.0), ratio=(1.25, 1.25), teacher_size=(40, 40), vertical_flip=True)
    views, teacher_views = whole(images, torch.arange(6), 0)
    assert teacher_views is not None
    assert teacher_views.shape == (6, 3, 40, 40)
    smaller = F.resize(teacher_views, [24, 24], antialias=True)
    assert (views.int() - smaller.int()).abs().float().mean() < 3


@pytest.mark.parametrize(("flips", "kinds"), [((False, False), 1), ((True, False), 2), ((True, True), 4)])
def test_half_of_the_views_are_mirrored(flips: tuple[bool, bool], kinds: int) -> None:
    image, count = photograph(16, 16), 400
    whole = crop(size=(16, 16), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flips[0], vertical_flip=flips[1])
    views, _ = whole([image] * count, torch.arange(count), 0)
    mirrored = [image, image.flip(2), image.flip(1), image.flip(1, 2)]
    counts = [int((views == one).flatten(1).all(1).sum()) for one in mirrored]
    assert sum(counts) == count
    assert all(abs(found - count / kinds) < 60 for found in counts if found)
    assert sum(found > 0 for found in counts) == kinds
