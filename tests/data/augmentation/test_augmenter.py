"""Augmentation of a batch on its device."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from reading import in_memory
from torch.utils._python_dispatch import TorchDispatchMode

from kd_lightning import Augmentation, DigitsDataModule, DomainPairDataModule
from kd_lightning.data.image_set import StreamedImages


class HostConstants(TorchDispatchMode):
    """Counts tensors that are created from Python numbers, each of which is a copy from the host on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "lift_fresh" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pair", [False, True])
def test_no_batch_after_the_first_copies_constants_to_the_device(pair: bool) -> None:
    source = DigitsDataModule(augmentation=Augmentation(mixup=0.2, cutmix=1.0))
    data: Any = source
    if pair:
        affine = Augmentation(rotation=10.0, scaling=0.1)
        data = DomainPairDataModule(source, DigitsDataModule(mean=(0.4,)), augmentation=affine)
    first, second, *_ = data.train_dataloader()
    batches = [list(batch[0].values()) if pair else [batch] for batch in (first, second)]
    for batch in batches[0]:
        data.augment(batch)
    with HostConstants() as control:
        torch.tensor([1.0])
    assert control.count == 1
    with HostConstants() as constants:
        for batch in batches[1]:
            data.augment(batch)
    assert constants.count == 0


def test_images_are_packed_once_and_crops_are_drawn_once_per_view() -> None:
    data = DigitsDataModule(views=2)
    batches = list(data.train_dataloader())[:3]
    kept = []
    for batch in batches:
        data.augment(batch)
        kept.append((*data.augmenter.device_images.values(), data.augmenter.crop_cache["train"][1]))
    assert all(images is kept[0][0] and crops is kept[0][1] for images, crops in kept)
    data.augment(batches[0]._replace(epoch=2))  # the same view
    assert data.augmenter.crop_cache["train"][1] is kept[0][1]
    data.augment(batches[0]._replace(epoch=1))
    assert data.augmenter.crop_cache["train"][1] is not kept[0][1]


def test_a_batch_without_pixels_of_a_streamed_split_is_an_error() -> None:
    data = DigitsDataModule()
    batch = next(iter(data.train_dataloader()))._replace(places=None)
    data.augmenter.clear()
    data.augmenter.splits = {"train": StreamedImages(in_memory(data.splits.read("train")), (8, 8))}
    with pytest.raises(RuntimeError, match="not in memory"):
        data.augment(batch)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("preset", ["light", "standard", "strong"])
def test_no_batch_after_the_first_waits_for_the_gpu(preset: str) -> None:
    data = DigitsDataModule(augmentation=Augmentation(preset=preset, blur=0.2), views=2)
    batches = [move_data_to_device(batch, torch.device("cuda")) for batch in list(data.train_dataloader())[:4]]
    data.augment(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        shown = [data.augment(batch) for batch in batches[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(batch.images.isfinite().all()) for batch in shown)


@pytest.mark.gpu
@pytest.mark.parametrize("crops", [{"padding": 2}, {"resized_crop": True}])
def test_crops_flips_erasing_and_pasting_are_equal_on_a_gpu_to_the_bit(crops: dict[str, Any]) -> None:
    data = DigitsDataModule(augmentation=Augmentation(**crops, flip=True, vertical_flip=True, erasing=0.5, cutmix=1.0))
    for batch in data.train_dataloader():
        here, there = data.augment(batch), data.augment(move_data_to_device(batch, torch.device("cuda")))
        assert there.images.is_cuda
        assert torch.equal(there.images.cpu(), here.images)
        torch.testing.assert_close(there.labels.cpu(), here.labels)
