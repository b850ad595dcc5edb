"""Decoded images are kept where there is room, and one sentence says where and why."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_lightning.data.storage_place import Resources, choose_place, fits_on_device, free_disk
from kd_lightning.errors import UserError

GIB = 2**30
ALONE = Resources(processes=1, memory=16 * GIB, disk=100 * GIB)
FOUR = ALONE._replace(processes=4)
NO_DISK = ALONE._replace(disk=None)


@pytest.mark.parametrize(
    ("needed", "resources", "options", "place", "reason"),
    [
        (
            8,
            ALONE,
            {},
            "memory",
            "8.0 GiB of decoded images are kept in memory (at most 8.0 GiB, see data.memory_limit).",
        ),
        (
            9,
            ALONE,
            {},
            "mapped",
            "9.0 GiB of decoded images are kept in a file, because memory has no room (at most 8.0 GiB, see "
            "data.memory_limit; data.cache sets its folder, or off).",
        ),
        (9, ALONE, {"memory_limit": 9.0}, "memory", None),
        (17, ALONE, {"memory_limit": 99.0}, "mapped", None),  # more than there is
        (2, ALONE, {"memory_limit": 4.0, "kept": 2 * GIB}, "memory", None),
        (3, ALONE, {"memory_limit": 4.0, "kept": 2 * GIB}, "mapped", None),
        (1, ALONE, {"memory_limit": 0.0}, "mapped", None),
        (
            1,
            ALONE,
            {"cache": "/disk/cache"},
            "mapped",
            "1.0 GiB of decoded images are kept in a file (data.cache /disk/cache).",
        ),
        (
            1,
            ALONE,
            {"written": True},
            "mapped",
            "1.0 GiB of decoded images are read from a file of an earlier run (data.cache sets its folder, or off).",
        ),
        (200, NO_DISK, {"written": True}, "mapped", None),  # a folder that is only readable
        (1, ALONE, {"written": True, "cache": "off"}, "memory", None),
        (
            1,
            FOUR,
            {},
            "mapped",
            "1.0 GiB of decoded images are kept in a file that 4 processes share (data.cache sets its folder, or off).",
        ),
        (
            2,
            FOUR,
            {"cache": "off"},
            "memory",
            "2.0 GiB of decoded images are kept in memory (at most 2.0 GiB for each of 4 processes, see "
            "data.memory_limit).",
        ),
        (2, FOUR._replace(disk=None), {}, "memory", None),
        (1.5, FOUR, {"cache": "off", "memory_limit": 4.0}, "workers", None),
        (1, FOUR, {"cache": "off", "memory_limit": 8.0, "kept": GIB}, "memory", None),
        (1.1, FOUR, {"cache": "off", "memory_limit": 8.0, "kept": GIB}, "workers", None),
        (
            9,
            ALONE,
            {"cache": "off"},
            "workers",
            "Images are decoded again for each batch by data.num_workers, because there is no room for 9.0 GiB of "
            "decoded images in memory (at most 8.0 GiB, see data.memory_limit) or in a file (data.cache is off); set "
            "data.cache to a folder on another disk, or lower data.store_size.",
        ),
        (
            95,
            ALONE,
            {},
            "workers",
            "Images are decoded again for each batch by data.num_workers, because there is no room for 95.0 GiB of "
            "decoded images in memory (at most 8.0 GiB, see data.memory_limit) or in a file (100.0 GiB are free); set "
            "data.cache to a folder on another disk, or lower data.store_size.",
        ),
        (
            9,
            NO_DISK,
            {},
            "workers",
            "Images are decoded again for each batch by data.num_workers, because there is no room for 9.0 GiB of "
            "decoded images in memory (at most 8.0 GiB, see data.memory_limit) or in a file (its folder cannot be "
            "written to); set data.cache to a folder on another disk, or lower data.store_size.",
        ),
    ],
)
def test_place_and_reason(
    needed: float, resources: Resources, options: dict[str, object], place: str, reason: str | None
) -> None:
    choice = choose_place(int(needed * GIB), resources, **options)  # type: ignore[arg-type]
    assert choice.place == place, choice.reason
    assert reason is None or choice.reason == reason
    assert choice.reason.count(". ") == 0


@pytest.mark.parametrize(("disk", "why"), [(1 * GIB, r"1\.0 GiB are free"), (None, "its folder cannot be written to")])
def test_a_folder_of_the_user_without_room_is_refused(disk: int | None, why: str) -> None:
    resources = Resources(processes=1, memory=16 * GIB, disk=disk)
    message = rf"^data\.cache '/disk' has no room for 1\.0 GiB of decoded images \({why}\); name another folder, or off"
    with pytest.raises(UserError, match=message):
        choose_place(GIB, resources, cache="/disk")


@given(
    needed=st.integers(0, 2**40),
    processes=st.integers(1, 8),
    memory=st.integers(0, 2**38),
    disk=st.none() | st.integers(0, 2**42),
    memory_limit=st.none() | st.floats(0, 300),
    off=st.booleans(),
    kept=st.integers(0, 2**36),
)
def test_what_is_chosen_fits(
    needed: int, processes: int, memory: int, disk: int | None, memory_limit: float | None, off: bool, kept: int
) -> None:
    resources = Resources(processes, memory, disk)
    cache = "off" if off else None
    choice = choose_place(needed, resources, memory_limit=memory_limit, cache=cache, kept=kept)
    if choice.place == "memory":
        assert needed * processes <= memory
        assert (
            memory_limit is None or (needed + (kept if needed else 0)) * processes <= memory_limit * GIB or not needed
        )
    if choice.place == "mapped":
        assert not off
        assert disk is not None
        assert needed < disk or not needed
    if choice.place == "workers":
        assert needed > 0


def test_a_set_lies_on_a_device_up_to_a_quarter_of_its_free_memory() -> None:
    assert fits_on_device(10, 40)
    assert not fits_on_device(11, 40)


def test_free_disk_is_that_of_the_folder_above_one_that_does_not_exist(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b") is not None
    (tmp_path / "file").touch()
    assert free_disk(tmp_path / "file") is None
    assert free_disk(tmp_path / "file" / "below") is None


def test_nothing_is_free_in_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    assert free_disk(tmp_path) is None
    assert free_disk(tmp_path / "below") is None
