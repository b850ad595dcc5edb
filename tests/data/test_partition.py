"""One labelled set is divided into three parts, which are kept."""

import pytest
import torch

from kd_lightning.data.partition import draw_partition, restore_partition, save_partition

LABELS = torch.arange(100) % 2  # of 50 images each
NAMES = [f"{label}/{i:02}.jpg" for i, label in enumerate(LABELS.tolist())]


def drawn(seed: int = 0, labels: torch.Tensor = LABELS) -> dict[str, list[int]]:
    parts = draw_partition(labels, val_fraction=0.2, test_fraction=0.1, seed=seed).parts
    return {name: samples.tolist() for name, samples in parts.items()}


def test_each_class_is_divided_by_the_fractions() -> None:
    parts = drawn()
    assert sorted(sample for part in parts.values() for sample in part) == list(range(100))
    for name, count in (("train", 35), ("val", 10), ("test", 5)):
        assert LABELS[parts[name]].bincount().tolist() == [count, count]
        assert parts[name] == sorted(parts[name])


def test_the_seed_decides() -> None:
    assert drawn(1) == drawn(1)
    assert drawn(0)["test"] != drawn(1)["test"]


@pytest.mark.parametrize(("size", "expected"), [(1, [1, 0, 0]), (2, [2, 0, 0]), (3, [1, 1, 1]), (5, [3, 1, 1])])
def test_small_classes_have_an_image_in_each_part_if_there_are_three(size: int, expected: list[int]) -> None:
    assert [len(drawn(labels=torch.zeros(size).long())[name]) for name in ("train", "val", "test")] == expected


def test_a_saved_partition_is_restored() -> None:
    partition = draw_partition(LABELS, val_fraction=0.2, test_fraction=0.1, seed=3)
    restored = restore_partition(save_partition(partition, NAMES), NAMES)
    assert restored.changed == ""
    assert all(torch.equal(restored.parts[name], samples) for name, samples in partition.parts.items())


def test_in_a_changed_set_images_keep_their_part_and_new_ones_are_trained_on() -> None:
    partition = draw_partition(LABELS, val_fraction=0.2, test_fraction=0.1, seed=3)
    test = [NAMES[sample] for sample in partition.parts["test"].tolist()]
    names = sorted([*NAMES[:40], "0/new.jpg", *NAMES[40:]])
    names.remove(test[0])
    restored = restore_partition(save_partition(partition, NAMES), names)
    assert [names[sample] for sample in restored.parts["test"].tolist()] == sorted(test[1:])
    assert "0/new.jpg" in [names[sample] for sample in restored.parts["train"].tolist()]
    assert sum(map(len, restored.parts.values())) == 100
    assert restored.changed == (
        "it had 100 labelled images and has 100; 0 of the validation and 1 of the test images are gone, and new images "
        "are only trained on"
    )
