import pytest
import torch
from reading import in_memory
from sklearn.datasets import load_digits

from kd_lightning.data import Augmentation, DigitsDataModule


def sample_ids(data: DigitsDataModule, split: str) -> list[int]:
    return [sample for batch in getattr(data, f"{split}_dataloader")() for sample in batch.ids.tolist()]


def test_sizes_and_classes() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    data.setup("test")
    assert {split: tuple(in_memory(images).pixels.shape) for split, images in data.splits.items()} == {
        "train": (1437, 1, 8, 8),
        "test": (360, 1, 8, 8),
    }
    assert data.image_shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    for images in data.splits.values():
        shares = images.labels.bincount(minlength=10) / len(images.labels)
        assert (shares - 0.1).abs().max() < 0.01


def test_train_and_test_split_contain_each_scikit_learn_image_once() -> None:
    data, digits = DigitsDataModule(), load_digits()
    train, test = (in_memory(data.load(split)) for split in ("train", "test"))
    pixels = torch.cat([train.pixels, test.pixels]).flatten(1).double()
    rows = torch.cat([pixels, torch.cat([train.labels, test.labels])[:, None]], dim=1)
    expected = torch.cat(
        [torch.from_numpy(digits.images).flatten(1) * 255 / 16, torch.from_numpy(digits.target)[:, None]], dim=1
    ).round()
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_test_images_do_not_depend_on_the_seed_and_are_predicted() -> None:
    first, other = (DigitsDataModule(seed=seed, view_seed=seed) for seed in (0, 5))
    for split in ("test", "predict"):
        images, others = in_memory(first.load(split)), in_memory(other.load(split))
        assert torch.equal(images.pixels, others.pixels)
        assert torch.equal(images.labels, others.labels)
        assert torch.equal(images.pixels, in_memory(first.load("test")).pixels)
    assert sample_ids(first, "predict") == sample_ids(first, "test") == list(range(360))


def test_validation_is_a_stratified_split_by_seed() -> None:
    first, other = DigitsDataModule(batch_size=1), DigitsDataModule(batch_size=1, seed=1)
    train, val = sample_ids(first, "train"), sample_ids(first, "val")
    assert sorted(train + val) == list(range(1437))
    labels = first.splits["train"].labels
    assert torch.equal(labels[val].bincount(), (labels.bincount() * 0.2).round().long())
    assert val != sample_ids(other, "val")


def test_mean_and_std_are_those_of_the_training_images() -> None:
    data = DigitsDataModule()
    pixels = in_memory(data.load("train")).pixels.double() / 255
    assert data.mean == pytest.approx([pixels.mean().item()], abs=1e-3)
    assert data.std == pytest.approx([pixels.std().item()], abs=1e-3)


def test_the_margin_is_black_and_surrounds_the_digits() -> None:
    plain, wide = DigitsDataModule(), DigitsDataModule(margin=2)
    for data in (plain, wide):
        data.setup("test")
    digits, pixels = (in_memory(data.splits["test"]).pixels for data in (plain, wide))
    assert wide.image_shape == (1, 12, 12)
    assert torch.equal(pixels[..., 2:10, 2:10], digits)
    assert pixels.sum() == digits.sum()
    with pytest.raises(ValueError, match="margin must be >= 0"):
        DigitsDataModule(margin=-1)


def test_digits_are_cropped_and_not_flipped() -> None:
    data = DigitsDataModule(augmentation=Augmentation(padding=1))
    loader = data.train_dataloader()
    batch = next(iter(loader))
    plain = in_memory(data.splits["train"]).pixels[batch.ids]
    padded = torch.nn.functional.pad(plain, (1, 1, 1, 1))
    shifts = torch.stack([padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    assert (shifts == data.pixels(batch)).flatten(2).all(2).any(0).all()
    assert not torch.equal(data.pixels(batch), plain)


def test_with_three_means_grey_is_repeated() -> None:
    data = DigitsDataModule(mean=[0.3, 0.4, 0.5], std=[1.0, 1.0, 1.0])
    data.setup("test")
    images = data.augment(next(iter(data.test_dataloader()))).images
    assert data.image_shape == (3, 8, 8)
    shifted = images + torch.tensor([0.3, 0.4, 0.5])[:, None, None]
    assert torch.allclose(shifted, shifted[:, :1].expand(-1, 3, -1, -1), atol=1e-6)
