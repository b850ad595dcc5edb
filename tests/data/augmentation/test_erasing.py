"""Random erasing: torchvision's boxes in distribution, the same in every batch."""

import pytest
import torch
from on_other_device import on_other_device
from torchvision.transforms.v2 import RandomErasing

from kd_lightning.data.augmentation.erasing import Erasing, draw_erasing, erase_


def boxes(count: int, *, probability: float = 1.0, seed: int = 0, view: int = 0) -> torch.Tensor:
    """Return the box of each sample, zeros where nothing is erased."""
    drawn = draw_erasing(torch.arange(count), probability=probability, size=(40, 60), seed=seed, view=view)
    return torch.zeros(count, 4, dtype=torch.int64).index_copy(0, *drawn)


def test_boxes_have_the_moments_of_torchvisions() -> None:
    top, left, bottom, right = boxes(20_000).double().unbind(1)
    transform, image = RandomErasing(p=1.0), torch.rand(3, 40, 60)
    torch.manual_seed(0)
    drawn = [transform.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[box[name] for name in "ijhw"] for box in drawn]).double()
    ours = torch.stack([top, left, bottom - top, right - left], 1)
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 0.08 * spread).all()
    assert ((ours.std(0) - spread).abs() < 0.06 * spread).all()
    assert (bottom <= 40).all()
    assert (right <= 60).all()
    assert (bottom - top < 40).all()


@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_a_fraction_of_the_images_is_erased(probability: float) -> None:
    erased = boxes(20_000, probability=probability).any(1).float().mean()
    assert abs(erased - probability) < 0.015


def test_boxes_depend_on_sample_seed_and_view_alone() -> None:
    whole = boxes(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20]
    part = draw_erasing(order, probability=1.0, size=(40, 60), seed=0, view=0)
    assert torch.equal(part.boxes, whole[order][part.rows])
    assert len(part.rows) > 15
    for other in (boxes(50, seed=1), boxes(50, view=1)):
        assert (other != whole).any(1).float().mean() > 0.9


def test_the_box_is_set_to_the_mean_and_the_rest_stays() -> None:
    images = torch.rand(3, 2, 8, 10) + 1
    erased = erase_(images.clone(), Erasing(torch.tensor([0, 2]), torch.tensor([[1, 2, 4, 6], [0, 0, 8, 9]])))
    assert (erased[0, :, 1:4, 2:6] == 0).all()
    assert int((erased[0] == 0).sum()) == 2 * 3 * 4
    assert torch.equal(erased[1], images[1])
    assert int((erased[2] == 0).sum()) == 2 * 8 * 9


def test_boxes_are_scaled_for_the_same_views_at_another_size() -> None:
    box = Erasing(torch.tensor([0]), torch.tensor([[1, 2, 4, 6]]))
    small, large = erase_(torch.ones(1, 1, 8, 10), box), erase_(torch.ones(1, 1, 16, 20), box, scale=2.0)
    assert torch.equal(large, small.repeat_interleave(2, 2).repeat_interleave(2, 3))


@on_other_device
def test_boxes_are_erased_on_their_device() -> None:
    images = torch.rand(4, 3, 40, 60)
    drawn = draw_erasing(torch.arange(4), probability=1.0, size=(40, 60), seed=0, view=0)
    found = erase_(images.to("other"), Erasing(*(values.to("other") for values in drawn)))
    assert found.device.type == "other"
    assert torch.equal(found.cpu(), erase_(images.clone(), drawn))
