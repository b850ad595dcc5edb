"""Cached logits in memory and on disk: stored in float16, returned by ids, and never incomplete."""

import io
import itertools
import multiprocessing
import os
import pickle
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.teacher.output_cache import OutputCache

CPU = torch.device("cpu")
SAMPLES, CLASSES, VIEWS = 6, 3, 4
FINGERPRINT = {"teacher": "a", "view_seed": "0", "views": "4"}


def open_cache(folder: Path | None, **options: Any) -> OutputCache:
    defaults: dict[str, Any] = {"samples": SAMPLES, "classes": CLASSES, "views": VIEWS, "fingerprint": FINGERPRINT}
    return OutputCache(**defaults | options, folder=folder)


def logits_of(view: int) -> Tensor:
    """Return integers, which float16 represents exactly."""
    return torch.arange(SAMPLES * CLASSES).view(SAMPLES, CLASSES).float() + 100 * view


def read(cache: OutputCache, view: int, samples: Tensor | None = None) -> Tensor:
    samples = torch.arange(cache.shape[0]) if samples is None else samples
    cache.load(view, CPU)
    return cache(samples * cache.views + view)


def refusal(folder: Path, **options: Any) -> str:
    """Return the one-sentence error with which a folder is refused."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        open_cache(folder, **options)
    message = str(caught.value)
    assert repr(str(folder))[1:-1] in message
    assert "\n" not in message
    assert ". " not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "logits"


@pytest.fixture
def complete(folder: Path) -> Path:
    """A folder in which views 1 and 2 are complete."""
    for view in (1, 2):
        open_cache(folder).put(view, logits_of(view))
    return folder


def file_of(folder: Path, view: int) -> Path:
    (file,) = (path for path in folder.glob("view-*.float16") if int("".join(filter(str.isdigit, path.stem))) == view)
    return file


# --- put, load, call


@pytest.mark.parametrize("on_disk", [False, True])
def test_logits_are_returned_by_ids(folder: Path, on_disk: bool) -> None:
    cache = open_cache(folder if on_disk else None)
    for view in (3, 0):
        assert view not in cache
        cache.put(view, logits_of(view))
        assert view in cache
    assert 1 not in cache
    for view in (0, 3, 0):
        cache.load(view, CPU)
        assert cache.current_view == view
        samples = torch.tensor([5, 0, 0, 3])
        read_back = cache(samples * VIEWS + view)
        assert read_back.dtype == torch.float32
        assert torch.equal(read_back, logits_of(view)[samples])


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_incomplete_view_cannot_be_loaded(folder: Path, on_disk: bool) -> None:
    cache = open_cache(folder if on_disk else None)
    cache.put(1, logits_of(1))
    cache.load(1, CPU)
    with pytest.raises(KeyError, match="2"):
        cache.load(2, CPU)
    assert cache.current_view == 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_view_can_be_replaced(folder: Path, on_disk: bool) -> None:
    cache = open_cache(folder if on_disk else None)
    cache.put(1, logits_of(1))
    cache.put(1, logits_of(3))
    assert torch.equal(read(cache, 1), logits_of(3))


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.bfloat16,
    ],
)
def test_logits_are_rounded_to_float16_and_clamped_to_its_range(
    folder: Path, on_disk: bool, dtype: torch.dtype
) -> None:
    logits = torch.tensor([[0.1, 1 / 3, 1000.3], [65504.0, 65519.0, 65520.0], [1e6, -1e9, -70000.0]]).to(dtype)
    logits = torch.cat([logits, torch.tensor([[float("inf"), -float("inf"), -1e-9]]).to(dtype)])
    cache = open_cache(folder if on_disk else None, samples=4)
    cache.put(0, logits)
    read_back = read(cache, 0)
    expected = torch.from_numpy(logits.double().clamp(-65504, 65504).numpy().astype(np.float16).astype(np.float32))
    assert torch.equal(read_back, expected)
    assert torch.isfinite(read_back).all()
    assert read_back.abs().max() == 65504


def test_the_cache_copies_the_logits() -> None:
    cache = open_cache(None)
    logits = logits_of(0).half()  # already in the stored type
    cache.put(0, logits)
    logits.zero_()
    assert torch.equal(read(cache, 0), logits_of(0))


# --- a folder is used by several runs


def test_another_run_finds_the_complete_views(complete: Path) -> None:
    later = open_cache(complete)
    assert [view in later for view in range(VIEWS)] == [False, True, True, False]
    assert torch.equal(read(later, 2), logits_of(2))
    later.put(0, logits_of(0))
    last = open_cache(complete)
    for view in range(3):
        assert torch.equal(read(last, view), logits_of(view))


def test_two_open_caches_see_each_others_views(folder: Path) -> None:
    """As the ranks of a run do: one writes, all read."""
    first, second = open_cache(folder), open_cache(folder)
    first.put(0, logits_of(0))
    assert torch.equal(read(second, 0), logits_of(0))
    second.put(1, logits_of(1))
    assert torch.equal(read(first, 1), logits_of(1))
    assert 0 in second


def test_a_loaded_view_is_memory_mapped_and_not_changed_by_a_replacement(complete: Path) -> None:
    cache = open_cache(complete)
    cache.load(1, CPU)
    if Path("/proc/self/maps").exists():
        assert str(file_of(complete, 1)) in Path("/proc/self/maps").read_text()
    open_cache(complete).put(1, logits_of(3))
    assert torch.equal(cache(torch.arange(SAMPLES) * VIEWS + 1), logits_of(1))


def test_nothing_is_written_before_the_first_put(folder: Path) -> None:
    cache = open_cache(folder)
    assert 0 not in cache
    assert not folder.exists()


def test_files_are_synced_before_they_are_moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        events.append("sync")
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        assert target.parent == folder
        events.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    open_cache(folder).put(1, logits_of(1))
    assert events == ["sync", "created_from.json", "sync", "sync", "view-0001.float16", "sync"]  # file, move, folder
    assert sorted(path.name for path in folder.iterdir()) == ["created_from.json", "view-0001.float16"]


# --- complete and incomplete views


def assert_only_view_2_is_complete(folder: Path) -> None:
    """Check too that view 1 can be replaced."""
    cache = open_cache(folder)
    assert [view in cache for view in range(VIEWS)] == [False, False, True, False]
    with pytest.raises(KeyError):
        cache.load(1, CPU)
    cache.put(1, logits_of(1))
    for view in (1, 2):
        assert torch.equal(read(open_cache(folder), view), logits_of(view))


@pytest.mark.parametrize("size", [0, 1, 2, 30, -5, -2, -1])
def test_a_truncated_file_is_incomplete(complete: Path, size: int) -> None:
    content = file_of(complete, 1).read_bytes()
    assert len(content) == 2 * SAMPLES * CLASSES + 4
    file_of(complete, 1).write_bytes(content[:size])
    assert_only_view_2_is_complete(complete)


def test_a_file_with_a_flipped_bit_is_incomplete(complete: Path) -> None:
    file, cache = file_of(complete, 1), open_cache(complete)
    content = file.read_bytes()
    for bit in range(len(content) * 8):
        file.write_bytes(flipped(content, bit))
        assert 1 not in cache, bit
    assert_only_view_2_is_complete(complete)


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_files_without_the_record_are_ignored(complete: Path) -> None:
    (complete / "created_from.json").unlink()
    cache = open_cache(complete, fingerprint={"teacher": "b"})  # of any fingerprint
    assert not any(view in cache for view in range(VIEWS))
    cache.put(2, logits_of(3))
    assert torch.equal(read(open_cache(complete, fingerprint={"teacher": "b"}), 2), logits_of(3))
    assert 1 not in cache


def test_a_deleted_file_is_incomplete(complete: Path) -> None:
    file_of(complete, 1).unlink()
    assert_only_view_2_is_complete(complete)


def test_the_file_of_another_view_is_incomplete(complete: Path) -> None:
    file_of(complete, 1).write_bytes(file_of(complete, 2).read_bytes())
    assert_only_view_2_is_complete(complete)


@pytest.mark.parametrize(
    "shape", [{"classes": SAMPLES, "samples": CLASSES}, {"samples": SAMPLES * CLASSES, "classes": 1}]
)
def test_logits_of_another_shape_are_incomplete(complete: Path, shape: dict[str, int]) -> None:
    """Even if the files have the same size."""
    assert 1 in open_cache(complete)
    assert 1 not in open_cache(complete, **shape)


def test_temporary_files_of_killed_runs_are_ignored(folder: Path) -> None:
    """Also where the first view was interrupted, so that there is no record."""
    open_cache(folder).put(2, logits_of(2))
    file_of(folder, 2).rename(folder / "view-0002.float16.99.tmp")
    (folder / "created_from.json").rename(folder / "created_from.json.99.tmp")
    cache = open_cache(folder)
    assert not any(view in cache for view in range(VIEWS))
    cache.put(2, logits_of(2))
    (folder / "view-0001.float16.98.tmp").write_bytes(file_of(folder, 2).read_bytes())
    (folder / "view-0001.float16.97.tmp").write_bytes(b"half")
    assert_only_view_2_is_complete(folder)


@pytest.mark.parametrize("view", [1, 3])
def test_an_interruption_before_a_move_keeps_the_old_views(
    complete: Path, monkeypatch: pytest.MonkeyPatch, view: int
) -> None:
    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_cache(complete).put(view, logits_of(0))
    cache = open_cache(complete)
    assert torch.equal(read(cache, 2), logits_of(2))
    assert (view in cache) == (view == 1)
    if view in cache:
        assert torch.equal(read(cache, view), logits_of(1))
    cache.put(view, logits_of(0))
    assert torch.equal(read(open_cache(complete), view), logits_of(0))


def _put_forever(folder: Path, start: int) -> None:
    cache = open_cache(folder, samples=2000)
    for number in itertools.count(start):
        cache.put(number % VIEWS, torch.full((2000, CLASSES), float(number % 2048)))


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded).*")
def test_a_killed_process_leaves_no_damaged_view(folder: Path) -> None:
    """All logits of a view are one number, from which the view can be computed."""
    generator, complete_views = random.Random(0), 0
    for turn in range(12):
        process = multiprocessing.get_context("fork").Process(target=_put_forever, args=(folder, turn * VIEWS))
        process.start()
        deadline = time.monotonic() + 20
        while not any(folder.glob("*.float16")) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.001, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -9
        cache = open_cache(folder, samples=2000)
        for view in range(VIEWS):
            if view in cache:
                complete_views += 1
                (number,) = read(cache, view).unique().tolist()
                assert number % VIEWS == view
    assert complete_views >= 12
    for view in range(VIEWS):
        cache.put(view, torch.full((2000, CLASSES), float(view)))
    assert all(view in open_cache(folder, samples=2000) for view in range(VIEWS))


def _put_missing_views(folder: Path, views: Iterable[int]) -> None:
    cache = open_cache(folder, samples=1000, views=16)
    for view in views:
        if view not in cache:
            cache.put(view, torch.full((1000, CLASSES), float(view)))
        cache.load(view, CPU)


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded).*")
def test_two_runs_can_fill_one_folder(tmp_path: Path) -> None:
    """Neither removes the views of the other."""
    fork = multiprocessing.get_context("fork")
    for turn in range(8):
        orders = (range(16), range(15, -1, -1))
        runs = [fork.Process(target=_put_missing_views, args=(tmp_path / str(turn), order)) for order in orders]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        assert [run.exitcode for run in runs] == [0, 0]
        cache = open_cache(tmp_path / str(turn), samples=1000, views=16)
        assert all(view in cache for view in range(16))


# --- errors


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"index"',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_record_is_refused(complete: Path, content: bytes) -> None:
    (complete / "created_from.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged; delete the folder or name another one\.$") as e:
        open_cache(complete)
    assert repr(str(complete / "created_from.json")) in str(e.value)
    assert "\n" not in str(e.value)
    (complete / "created_from.json").unlink()
    open_cache(complete).put(1, logits_of(1))
    assert 1 in open_cache(complete)


def test_a_truncated_record_is_refused(complete: Path) -> None:
    content = (complete / "created_from.json").read_bytes()
    for size in range(len(content)):
        (complete / "created_from.json").write_bytes(content[:size])
        with pytest.raises(ValueError, match="is damaged; delete the folder or name another one"):
            open_cache(complete)


@pytest.mark.parametrize("name", ["holiday.jpg", "checkpoint.ckpt", "sub/file.txt"])
def test_a_folder_with_other_files_is_refused_and_not_changed(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    (folder / "view-0001.float16").write_text("named like a view")
    assert refusal(folder).endswith("contains other files than cached logits; name an empty folder.")
    assert (folder / name).read_text() == "mine"


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.ckpt"
    path.write_text("mine")
    assert "contains other files than cached logits" in refusal(path)
    assert path.read_text() == "mine"


def test_a_file_named_like_a_view_is_refused_as_folder(tmp_path: Path) -> None:
    path = tmp_path / "view-logits"
    path.write_text("mine")
    refusal(path)


def test_an_empty_folder_is_accepted(folder: Path) -> None:
    folder.mkdir(parents=True)
    open_cache(folder).put(1, logits_of(1))
    assert 1 in open_cache(folder)


@pytest.mark.parametrize(
    ("fingerprint", "different"),
    [
        (FINGERPRINT | {"teacher": "b"}, "teacher"),
        (FINGERPRINT | {"view_seed": "1"}, "view_seed"),
        (FINGERPRINT | {"views": "8", "teacher": ""}, "teacher, views"),
        (FINGERPRINT | {"augmentation": "new"}, "augmentation"),
    ],
)
def test_logits_with_another_fingerprint_are_refused(
    complete: Path, fingerprint: dict[str, str], different: str
) -> None:
    before = {path.name: path.read_bytes() for path in complete.iterdir()}
    assert f"were computed differently (different: {different}); name another folder" in refusal(
        complete, fingerprint=fingerprint
    )
    assert {path.name: path.read_bytes() for path in complete.iterdir()} == before
    assert 1 in open_cache(complete)


# --- files are read as data


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.path),))


def _pickled(bomb: Bomb) -> Iterator[tuple[str, bytes]]:
    for shape in ((), (SAMPLES, CLASSES)):
        array = np.empty(shape, dtype=object)
        array.fill(bomb)
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        yield f"array of {shape}", file.getvalue()
    yield "pickle", pickle.dumps(bomb)


def test_nothing_is_unpickled(complete: Path, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "ran")
    for name, content in _pickled(bomb):
        file_of(complete, 1).write_bytes(content)
        assert 1 not in open_cache(complete), name
        assert_only_view_2_is_complete(complete)
        assert not bomb.path.exists(), name


@pytest.mark.parametrize(
    "content",
    [
        "archive",
        "structured",
        "other bytes",
    ],
)
def test_other_files_in_place_of_a_view_are_incomplete(complete: Path, content: str) -> None:
    with file_of(complete, 1).open("wb") as file:
        if content == "archive":
            np.savez(file, logits=logits_of(1).half().numpy())
        elif content == "structured":
            np.save(file, np.zeros((SAMPLES, CLASSES), dtype=[("a", "<f2")]))
        else:
            file.write(random.Random(0).randbytes(500))
    assert_only_view_2_is_complete(complete)


# --- memory


def test_32_views_of_cifar10_take_less_than_40_mb_of_memory() -> None:
    cache = OutputCache(samples=50_000, classes=10, views=32, fingerprint={})
    logits = torch.randn(50_000, 10)
    for view in range(32):
        cache.put(view, logits + view)
        cache.load(view, CPU)
    assert all(view in cache for view in range(32))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(vars(cache))}
    assert 32_000_000 <= sum(storages.values()) <= 40_000_000


def test_32_views_of_cifar10_take_less_than_40_mb_on_disk(folder: Path) -> None:
    cache = OutputCache(samples=50_000, classes=10, views=32, fingerprint={}, folder=folder)
    cache.put(0, torch.randn(50_000, 10))
    assert 32 * sum(path.stat().st_size for path in folder.iterdir()) <= 40_000_000


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, value))


def test_a_folder_that_another_run_has_created_meanwhile_is_refused(folder: Path) -> None:
    first, second = open_cache(folder), open_cache(folder, fingerprint={"teacher": "b"})
    first.put(1, logits_of(1))
    with pytest.raises(ValueError, match="were computed differently \\(different: teacher\\)"):
        second.put(1, logits_of(2))
    assert torch.equal(read(open_cache(folder), 1), logits_of(1))


def test_a_folder_of_another_format_is_refused(complete: Path) -> None:
    record = complete / "created_from.json"
    record.write_text(record.read_text().replace('"kd_lightning_format": 1,', ""))
    assert "were computed differently (different: kd_lightning_format); name another folder" in refusal(complete)
