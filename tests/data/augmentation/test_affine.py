"""Random affine transforms: the identity, known rotations, and what the draws depend on."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from kd_lightning.data.augmentation.affine import draw_affine, transform

SAMPLES = torch.arange(4000)


def rotation_matrix(degrees: float) -> Tensor:
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]])


def test_zero_ranges_give_the_identity() -> None:
    images = torch.rand(3, 2, 9, 9)
    identity = draw_affine(torch.arange(3), seed=0, epoch=1, rotation=0.0, scaling=0.0)
    torch.testing.assert_close(transform(images, identity, background=[0.5, -1.0]), images)


@pytest.mark.parametrize("degrees", [90, 30, -45])
def test_rotation_matches_torchvision(degrees: float) -> None:
    images = torch.rand(2, 1, 11, 11)
    rotated = transform(images, rotation_matrix(degrees).expand(2, -1, -1), background=[0.0])
    expected = reference.rotate(images, degrees, interpolation=reference.InterpolationMode.BILINEAR)
    inside = slice(3, 8)  # at the border torchvision interpolates differently
    torch.testing.assert_close(rotated[..., inside, inside], expected[..., inside, inside], atol=1e-5, rtol=0)


def test_pixels_from_outside_the_image_are_background() -> None:
    rotated = transform(torch.full((1, 2, 8, 8), 3.0), rotation_matrix(45), background=[-1.0, 2.0])
    torch.testing.assert_close(rotated[0, :, 0, 0], torch.tensor([-1.0, 2.0]))


def test_draws_fill_and_respect_the_ranges() -> None:
    rotated = draw_affine(SAMPLES, seed=0, epoch=0, rotation=15.0, scaling=0.0)
    angles = torch.rad2deg(torch.atan2(rotated[:, 1, 0], rotated[:, 0, 0]))
    assert 14 < angles.max() <= 15
    assert -15 <= angles.min() < -14
    assert abs(angles.mean()) < 1
    scaled = draw_affine(SAMPLES, seed=0, epoch=0, rotation=0.0, scaling=0.2)
    for axis in range(2):
        logarithms = scaled[:, axis, axis].log()
        assert 0.19 < logarithms.max() < 0.2001
        assert -0.2001 < logarithms.min() < -0.19
    assert 0.19 < scaled[:, 0, 1].max() <= 0.2
    assert not scaled[:, :, 2].any()


def test_draws_depend_only_on_seed_sample_and_epoch() -> None:
    def draw(seed: int, samples: Tensor, epoch: int) -> Tensor:
        return draw_affine(samples, seed=seed, epoch=epoch, rotation=10.0, scaling=0.1)

    some = torch.tensor([7, 3, 99])
    assert torch.equal(draw(1, some, 2), draw(1, SAMPLES, 2)[some])
    for other in (draw(2, some, 2), draw(1, some, 3), draw(1, some + 1, 2)):
        assert not torch.isclose(other, draw(1, some, 2))[:, :, :2].all()
    columns = draw(1, SAMPLES, 2).flatten(1)[:, [0, 1, 3]].T
    assert torch.corrcoef(columns).fill_diagonal_(0).abs()[0, 2] < 0.05


@pytest.mark.gpu
def test_a_gpu_moves_pixels_as_a_cpu_does_whatever_the_precision_of_products() -> None:
    images = torch.rand(20, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
    matrices = draw_affine(torch.arange(20), seed=0, epoch=0, rotation=30.0, scaling=0.2)
    expected = transform(images, matrices, background=[0.0] * 3)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = transform(images.cuda(), matrices.cuda(), background=[0.0] * 3)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (found.cpu() - expected).abs().max() < 1e-3
