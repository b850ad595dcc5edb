"""Fixed views of each image, which repeat every V epochs, of digits and of image files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grouped_options import grouped
from PIL import Image
from reading import in_epoch, in_memory, on_rank
from torch import Tensor

from kd_lightning.data import Batch, DigitsDataModule, ImageDataModule, ImageFolderDataModule
from kd_lightning.data.augmentation.crops import normalize
from kd_lightning.data.image_set import ImageSet, StreamedImages

Views = dict[int, Tensor]
"""The images of an epoch by their ids."""


def digits(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(**grouped(**{"batch_size": 115} | options))


def batches(data: ImageDataModule, epoch: int) -> list[Batch]:
    return [data.augment(batch) for batch in in_epoch(data.train_dataloader(), epoch)]


def images_of_epoch(data: ImageDataModule, epoch: int) -> Views:
    """Return the training images of an epoch, without those that fill no batch."""
    return by_ids(batches(data, epoch))


def images_of_view(data: ImageDataModule, view: int) -> Views:
    """Return the training images in a view, as the loader of that view shows them."""
    return by_ids([data.augment(batch) for batch in data.view_dataloader(view)])


def by_ids(seen: list[Batch]) -> Views:
    found = {}
    for batch in seen:
        assert batch.ids.dtype == torch.int64
        for name, image in zip(batch.ids.tolist(), batch.images, strict=True):
            assert name not in found
            found[name] = image
    return found


def by_sample(views: Views, count: int) -> Views:
    return {name // count: image for name, image in views.items()}


def equal_fraction(first: Views, second: Views) -> float:
    """Return the fraction of exactly equal images among those that are in both."""
    both = first.keys() & second.keys()
    assert both
    return sum(torch.equal(first[name], second[name]) for name in both) / len(both)


# --- pixels


@pytest.mark.parametrize("views", [2, 3])
def test_views_repeat_after_v_epochs(views: int) -> None:
    data = digits(views=views)
    epochs = [images_of_epoch(data, epoch) for epoch in range(2 * views)]
    for epoch in range(views):
        assert equal_fraction(epochs[epoch], epochs[epoch + views]) == 1
        assert len(epochs[epoch].keys() & epochs[epoch + views].keys()) > 1000
        following = equal_fraction(*(by_sample(epochs[e], views) for e in (epoch, epoch + 1)))
        assert following < 0.3  # one of nine crops repeats by chance
    later = images_of_epoch(digits(views=views), 7 * views + 1)
    assert equal_fraction(later, epochs[1]) == 1


def test_the_order_differs_between_epochs() -> None:
    orders = [torch.cat([batch.ids for batch in batches(digits(views=1), epoch)]).tolist() for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_the_first_v_epochs_equal_those_without_views() -> None:
    plain, fixed = digits(), digits(views=3)
    for epoch in range(3):
        assert equal_fraction(images_of_epoch(plain, epoch), by_sample(images_of_epoch(fixed, epoch), 3)) == 1
    assert equal_fraction(images_of_epoch(plain, 3), by_sample(images_of_epoch(fixed, 3), 3)) < 0.3


def test_a_single_view_is_shown_in_every_epoch() -> None:
    data = digits(views=1)
    first = images_of_epoch(data, 0)
    assert first.keys() <= set(range(1437))
    assert all(equal_fraction(first, images_of_epoch(data, epoch)) == 1 for epoch in (1, 2, 9))


def test_views_without_augmentation_are_the_images() -> None:
    data = digits(views=2, padding=0)
    pixels = normalize(in_memory(data.load("train")).pixels, mean=data.mean, std=data.std)
    for epoch in (0, 1):
        for name, image in images_of_epoch(data, epoch).items():
            assert torch.equal(image, pixels[name // 2])


def test_views_depend_on_view_seed_and_not_on_seed_batch_size_or_rank() -> None:
    options = {"views": 2, "flip": True}
    base = images_of_epoch(digits(**options), 1)
    assert equal_fraction(base, images_of_epoch(digits(batch_size=32, **options), 3)) == 1
    assert equal_fraction(base, images_of_epoch(digits(seed=5, **options), 1)) == 1
    assert equal_fraction(base, images_of_epoch(on_rank(digits(batch_size=50, **options), 3, 2), 1)) == 1
    assert equal_fraction(base, images_of_epoch(digits(view_seed=1, **options), 1)) < 0.3


# --- ids


@pytest.mark.parametrize("views", [1, 2, 5])
def test_ids_encode_sample_and_view(views: int) -> None:
    data = digits(views=views)
    labels = in_memory(data.load("train")).labels
    for epoch in (0, 1, views, 3 * views + 1):
        for batch in batches(data, epoch):
            assert (batch.ids % views == epoch % views).all()
            assert torch.equal(labels[batch.ids // views], batch.labels)


def test_without_views_ids_are_samples_and_epochs_differ() -> None:
    data = digits()
    labels = in_memory(data.load("train")).labels
    for epoch in (0, 1, 4):
        for batch in batches(data, epoch):
            assert torch.equal(labels[batch.ids], batch.labels)
    assert equal_fraction(images_of_epoch(data, 0), images_of_epoch(data, 1)) < 0.3


@pytest.mark.parametrize("views", [None, 3])
def test_ids_in_evaluation_are_samples(views: int | None) -> None:
    data, plain = digits(views=views), digits()
    for split in ("val", "test", "predict"):
        ours, theirs = (
            [module.augment(batch) for batch in getattr(module, f"{split}_dataloader")()] for module in (data, plain)
        )
        for batch, expected in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch[:3], expected[:3], strict=True))
    ids = torch.cat([data.augment(batch).ids for batch in data.test_dataloader()])
    assert ids.tolist() == list(range(360))


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_ids_of_mixed_images_encode_the_view(alphas: dict[str, float]) -> None:
    for batch in batches(digits(views=2, **alphas), 3)[:2]:
        assert batch.labels.dtype == torch.float32
        assert (batch.ids % 2 == 1).all()


@pytest.mark.parametrize("views", [0, -1])
def test_views_below_one_are_refused(views: int) -> None:
    with pytest.raises(ValueError, match=rf"^views must be >= 1, or null for a new view in each epoch, got {views}\.$"):
        DigitsDataModule(views=views)


# --- the loader of one view


@pytest.mark.parametrize("batch_size", [7, 400])
def test_a_view_shows_each_training_image_once(batch_size: int) -> None:
    data = digits(views=3, batch_size=batch_size)
    for view in range(3):
        images = images_of_view(data, view)
        assert sorted(images) == [sample * 3 + view for sample in data.train_samples.tolist()]
        assert equal_fraction(images, images_of_epoch(data, view + 3)) == 1


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_split_a_view_without_overlap(world: int) -> None:
    whole = images_of_view(digits(views=2), 1)
    shares = [images_of_view(on_rank(digits(views=2), world, rank), 1) for rank in range(world)]
    assert sum(map(len, shares)) == len(whole) == 1150
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    together = {name: image for share in shares for name, image in share.items()}
    assert together.keys() == whole.keys()
    assert equal_fraction(together, whole) == 1


def test_ranks_beyond_the_number_of_images_get_no_images(root: Path) -> None:
    counts = [len(images_of_view(on_rank(folder(root, views=2), 20, rank), 0)) for rank in range(20)]
    assert counts == [1] * 14 + [0] * 6


# --- fingerprints


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"val_fraction": 0.21}, ["images"]),
        ({"seed": 1}, ["images"]),
        ({"padding": 2}, ["augmentation"]),
        ({"flip": True}, ["augmentation"]),
        ({"mean": (0.306,)}, ["statistics"]),
        ({"std": (0.375,)}, ["statistics"]),
        ({"view_seed": 1}, ["view_seed"]),
        ({"views": 3}, ["views"]),
        ({"views": None}, ["views"]),
        ({"batch_size": 7}, []),
        ({"num_workers": 2}, []),
    ],
)
def test_the_fingerprint_changes_in_the_field_that_describes_the_change(
    change: dict[str, Any], named: list[str]
) -> None:
    base, found = digits(views=2).fingerprint(), digits(**{"views": 2} | change).fingerprint()
    assert found.keys() == base.keys()
    assert [name for name in base if base[name] != found[name]] == named
    assert all(isinstance(value, str) for value in found.values())


def test_one_pixel_changes_the_fingerprint() -> None:
    data = digits(views=2)
    before = data.fingerprint()
    in_memory(data.splits["train"]).pixels[700, 0, 3, 3] ^= 1
    assert data.fingerprint() == before | {"images": data.fingerprint()["images"]} != before


def test_the_fingerprint_does_not_change_while_the_data_are_used() -> None:
    data = digits(views=2)
    before = data.fingerprint()
    images_of_epoch(data, 0)
    images_of_view(data, 1)
    data.setup("test")
    assert data.fingerprint() == before
    assert on_rank(digits(views=2), 2, 1).fingerprint() == before


# --- sets that are streamed


def write_image(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label, name in enumerate(("ant", "bee")):
        for i in range(10):
            write_image(tmp_path / "train" / name / f"{i}.png", 10 * label + i)
    return tmp_path


def folder(root: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **grouped(**{"batch_size": 7, "val_fraction": 0.3, "padding": 2} | options))


def test_streamed_views_equal_those_in_memory(root: Path) -> None:
    memory, stream = folder(root, views=2), folder(root, views=2, memory_limit=0.0, cache="off")
    for epoch in range(4):
        first, second = images_of_epoch(memory, epoch), images_of_epoch(stream, epoch)
        assert first.keys() == second.keys()
        assert equal_fraction(first, second) == 1
    assert isinstance(stream.splits["train"], StreamedImages)
    assert isinstance(memory.splits["train"], ImageSet)
    for view in range(2):
        images = images_of_view(stream, view)
        assert len(images) == 14
        assert images.keys() == images_of_view(memory, view).keys()
        assert equal_fraction(images, images_of_view(memory, view)) == 1
        assert equal_fraction(images, images_of_epoch(stream, view + 2)) == 1


def test_the_fingerprint_of_a_streamed_set_depends_on_its_files(root: Path) -> None:
    base = folder(root, views=2, memory_limit=0.0, cache="off").fingerprint()
    assert folder(root, views=2, memory_limit=0.0, cache="off", batch_size=3).fingerprint() == base
    for change in ({"image_size": 5}, {"view_seed": 1}, {"val_fraction": 0.5}):
        assert folder(root, views=2, memory_limit=0.0, cache="off", **change).fingerprint() != base
    write_image(root / "train" / "bee" / "3.png", 99)
    assert folder(root, views=2, memory_limit=0.0, cache="off").fingerprint()["images"] != base["images"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded).*")
def test_workers_give_the_same_views(root: Path) -> None:
    alone, two = (
        folder(root, views=2, memory_limit=0.0, cache="off"),
        folder(root, views=2, memory_limit=0.0, cache="off", num_workers=2),
    )
    for view in range(2):
        assert equal_fraction(images_of_view(alone, view), images_of_view(two, view)) == 1
        assert equal_fraction(images_of_epoch(alone, view + 2), images_of_epoch(two, view + 2)) == 1
