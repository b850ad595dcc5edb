"""The teacher's logits on disk and in memory: kept in float16, found by ids, never half-read."""

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
MADE_OF = {"teacher": "a", "view_seed": "0", "views": "4"}


def opened(folder: Path | None, **options: Any) -> OutputCache:
    defaults: dict[str, Any] = {"samples": SAMPLES, "classes": CLASSES, "views": VIEWS, "fingerprint": MADE_OF}
    return OutputCache(**defaults | options, folder=folder)


def logits_of(view: int) -> Tensor:
    """Whole numbers, which float16 keeps."""
    return torch.arange(SAMPLES * CLASSES).view(SAMPLES, CLASSES).float() + 100 * view


def read(cache: OutputCache, view: int, samples: Tensor | None = None) -> Tensor:
    samples = torch.arange(cache.shape[0]) if samples is None else samples
    cache.load(view, CPU)
    return cache(samples * cache.views + view)


def refused(folder: Path, **options: Any) -> str:
    """The one sentence with which a folder is refused."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        opened(folder, **options)
    message = str(caught.value)
    assert repr(str(folder))[1:-1] in message
    assert "\n" not in message
    assert ". " not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "logits"


@pytest.fixture
def kept(folder: Path) -> Path:
    """A folder in which views 1 and 2 are whole."""
    for view in (1, 2):
        opened(folder).put(view, logits_of(view))
    return folder


def file_of(folder: Path, view: int) -> Path:
    (file,) = (path for path in folder.glob("view-*.float16") if int("".join(filter(str.isdigit, path.stem))) == view)
    return file


# --- put, show, look up


@pytest.mark.parametrize("on_disk", [False, True])
def test_logits_come_back_by_ids(folder: Path, on_disk: bool) -> None:
    cache = opened(folder if on_disk else None)
    for view in (3, 0):
        assert view not in cache
        cache.put(view, logits_of(view))
        assert view in cache
    assert 1 not in cache
    for view in (0, 3, 0):
        cache.load(view, CPU)
        assert cache.current_view == view
        samples = torch.tensor([5, 0, 0, 3])
        found = cache(samples * VIEWS + view)
        assert found.dtype == torch.float32
        assert torch.equal(found, logits_of(view)[samples])


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_view_that_is_not_whole_cannot_be_shown(folder: Path, on_disk: bool) -> None:
    cache = opened(folder if on_disk else None)
    cache.put(1, logits_of(1))
    cache.load(1, CPU)
    with pytest.raises(KeyError, match="2"):
        cache.load(2, CPU)
    assert cache.current_view == 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_view_can_be_put_again(folder: Path, on_disk: bool) -> None:
    cache = opened(folder if on_disk else None)
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
    given = torch.tensor([[0.1, 1 / 3, 1000.3], [65504.0, 65519.0, 65520.0], [1e6, -1e9, -70000.0]]).to(dtype)
    given = torch.cat([given, torch.tensor([[float("inf"), -float("inf"), -1e-9]]).to(dtype)])
    cache = opened(folder if on_disk else None, samples=4)
    cache.put(0, given)
    found = read(cache, 0)
    expected = torch.from_numpy(given.double().clamp(-65504, 65504).numpy().astype(np.float16).astype(np.float32))
    assert torch.equal(found, expected)
    assert torch.isfinite(found).all()
    assert found.abs().max() == 65504


def test_what_is_put_stays_as_it_was() -> None:
    cache = opened(None)
    given = logits_of(0).half()  # the type in which it is kept
    cache.put(0, given)
    given.zero_()
    assert torch.equal(read(cache, 0), logits_of(0))


# --- a folder outlives the run


def test_another_run_finds_what_is_whole(kept: Path) -> None:
    later = opened(kept)
    assert [view in later for view in range(VIEWS)] == [False, True, True, False]
    assert torch.equal(read(later, 2), logits_of(2))
    later.put(0, logits_of(0))
    last = opened(kept)
    for view in range(3):
        assert torch.equal(read(last, view), logits_of(view))


def test_two_that_are_open_see_what_each_other_puts(folder: Path) -> None:
    """As the ranks of a node: one puts, all read."""
    first, second = opened(folder), opened(folder)
    first.put(0, logits_of(0))
    assert torch.equal(read(second, 0), logits_of(0))
    second.put(1, logits_of(1))
    assert torch.equal(read(first, 1), logits_of(1))
    assert 0 in second


def test_a_view_is_mapped_and_what_is_shown_survives_a_replacement(kept: Path) -> None:
    cache = opened(kept)
    cache.load(1, CPU)
    if Path("/proc/self/maps").exists():
        assert str(file_of(kept, 1)) in Path("/proc/self/maps").read_text()
    opened(kept).put(1, logits_of(3))
    assert torch.equal(cache(torch.arange(SAMPLES) * VIEWS + 1), logits_of(1))


def test_nothing_is_written_before_a_view_is_put(folder: Path) -> None:
    cache = opened(folder)
    assert 0 not in cache
    assert not folder.exists()


def test_files_are_synced_before_they_are_moved_to_their_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        happened.append("sync")
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        assert target.parent == folder
        happened.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    opened(folder).put(1, logits_of(1))
    assert happened == ["sync", "created_from.json", "sync", "sync", "view-0001.float16", "sync"]  # file, move, folder
    assert sorted(path.name for path in folder.iterdir()) == ["created_from.json", "view-0001.float16"]


# --- what is whole


def assert_only_view_2_is_whole(folder: Path) -> None:
    """And view 1 can be put again."""
    cache = opened(folder)
    assert [view in cache for view in range(VIEWS)] == [False, False, True, False]
    with pytest.raises(KeyError):
        cache.load(1, CPU)
    cache.put(1, logits_of(1))
    for view in (1, 2):
        assert torch.equal(read(opened(folder), view), logits_of(view))


@pytest.mark.parametrize("size", [0, 1, 2, 30, -5, -2, -1])
def test_a_truncated_file_is_not_whole(kept: Path, size: int) -> None:
    content = file_of(kept, 1).read_bytes()
    assert len(content) == 2 * SAMPLES * CLASSES + 4
    file_of(kept, 1).write_bytes(content[:size])
    assert_only_view_2_is_whole(kept)


def test_no_flipped_bit_of_the_logits_goes_unnoticed(kept: Path) -> None:
    file, cache = file_of(kept, 1), opened(kept)
    content = file.read_bytes()
    for bit in range(len(content) * 8):
        file.write_bytes(flipped(content, bit))
        assert 1 not in cache, bit
    assert_only_view_2_is_whole(kept)


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_a_file_without_the_record_is_not_believed(kept: Path) -> None:
    (kept / "created_from.json").unlink()
    cache = opened(kept, fingerprint={"teacher": "b"})  # whoever made them
    assert not any(view in cache for view in range(VIEWS))
    cache.put(2, logits_of(3))
    assert torch.equal(read(opened(kept, fingerprint={"teacher": "b"}), 2), logits_of(3))
    assert 1 not in cache


def test_a_file_that_is_deleted_is_not_whole(kept: Path) -> None:
    file_of(kept, 1).unlink()
    assert_only_view_2_is_whole(kept)


def test_the_file_of_another_view_is_not_whole(kept: Path) -> None:
    file_of(kept, 1).write_bytes(file_of(kept, 2).read_bytes())
    assert_only_view_2_is_whole(kept)


@pytest.mark.parametrize(
    "shape", [{"classes": SAMPLES, "samples": CLASSES}, {"samples": SAMPLES * CLASSES, "classes": 1}]
)
def test_logits_of_another_shape_are_not_whole(kept: Path, shape: dict[str, int]) -> None:
    """Of as many numbers, so that the file is as long."""
    assert 1 in opened(kept)
    assert 1 not in opened(kept, **shape)


def test_left_over_temporary_files_do_not_count(folder: Path) -> None:
    """What a run that was cut in the very first view leaves: no index yet."""
    opened(folder).put(2, logits_of(2))
    file_of(folder, 2).rename(folder / "view-0002.float16.99.tmp")
    (folder / "created_from.json").rename(folder / "created_from.json.99.tmp")
    cache = opened(folder)
    assert not any(view in cache for view in range(VIEWS))
    cache.put(2, logits_of(2))
    (folder / "view-0001.float16.98.tmp").write_bytes(file_of(folder, 2).read_bytes())
    (folder / "view-0001.float16.97.tmp").write_bytes(b"half")
    assert_only_view_2_is_whole(folder)


@pytest.mark.parametrize("cut_at", [1])
@pytest.mark.parametrize("view", [1, 3])
def test_a_run_that_is_cut_while_it_moves_files_leaves_whole_views(
    kept: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int, view: int
) -> None:
    replace, count = Path.replace, itertools.count(1)

    def cut(self: Path, target: Path) -> Path:
        if next(count) == cut_at:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            opened(kept).put(view, logits_of(0))
    cache = opened(kept)
    assert torch.equal(read(cache, 2), logits_of(2))
    assert (view in cache) == (view == 1 and cut_at == 1)
    if view in cache:
        assert torch.equal(read(cache, view), logits_of(1))
    cache.put(view, logits_of(0))
    assert torch.equal(read(opened(kept), view), logits_of(0))


def _put_for_ever(folder: Path, start: int) -> None:
    cache = opened(folder, samples=2000)
    for number in itertools.count(start):
        cache.put(number % VIEWS, torch.full((2000, CLASSES), float(number % 2048)))


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded).*")
def test_a_killed_process_leaves_whole_views(folder: Path) -> None:
    """Each view that is put is filled with one number, which identifies the view too."""
    dice, found = random.Random(0), 0
    for turn in range(12):
        process = multiprocessing.get_context("fork").Process(target=_put_for_ever, args=(folder, turn * VIEWS))
        process.start()
        deadline = time.monotonic() + 20
        while not any(folder.glob("*.float16")) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(dice.uniform(0.001, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -9
        cache = opened(folder, samples=2000)
        for view in range(VIEWS):
            if view in cache:
                found += 1
                (number,) = read(cache, view).unique().tolist()
                assert number % VIEWS == view
    assert found >= 12
    for view in range(VIEWS):
        cache.put(view, torch.full((2000, CLASSES), float(view)))
    assert all(view in opened(folder, samples=2000) for view in range(VIEWS))


def _put_what_is_missing(folder: Path, views: Iterable[int]) -> None:
    cache = opened(folder, samples=1000, views=16)
    for view in views:
        if view not in cache:
            cache.put(view, torch.full((1000, CLASSES), float(view)))
        cache.load(view, CPU)


@pytest.mark.filterwarnings("ignore:.*(fork|multi-threaded).*")
def test_two_runs_share_a_folder(tmp_path: Path) -> None:
    """Two students at different epochs; what one records the other does not take away."""
    fork = multiprocessing.get_context("fork")
    for turn in range(8):
        orders = (range(16), range(15, -1, -1))
        runs = [fork.Process(target=_put_what_is_missing, args=(tmp_path / str(turn), order)) for order in orders]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        assert [run.exitcode for run in runs] == [0, 0]
        cache = opened(tmp_path / str(turn), samples=1000, views=16)
        assert all(view in cache for view in range(16))


# --- what is refused


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
def test_a_damaged_record_is_refused(kept: Path, content: bytes) -> None:
    (kept / "created_from.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged; delete the folder or name another one\.$") as e:
        opened(kept)
    assert repr(str(kept / "created_from.json")) in str(e.value)
    assert "\n" not in str(e.value)
    (kept / "created_from.json").unlink()
    opened(kept).put(1, logits_of(1))
    assert 1 in opened(kept)


def test_a_truncated_record_is_refused(kept: Path) -> None:
    content = (kept / "created_from.json").read_bytes()
    for size in range(len(content)):
        (kept / "created_from.json").write_bytes(content[:size])
        with pytest.raises(ValueError, match="is damaged; delete the folder or name another one"):
            opened(kept)


@pytest.mark.parametrize("name", ["holiday.jpg", "checkpoint.ckpt", "sub/file.txt"])
def test_a_folder_with_something_else_is_refused_and_left_alone(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    (folder / "view-0001.float16").write_text("with a name as ours")
    assert refused(folder).endswith("contains other files than cached logits; name an empty folder.")
    assert (folder / name).read_text() == "mine"


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.ckpt"
    path.write_text("mine")
    assert "contains other files than cached logits" in refused(path)
    assert path.read_text() == "mine"


def test_a_file_that_is_called_as_ours_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "view-logits"
    path.write_text("mine")
    refused(path)


def test_an_empty_folder_will_do(folder: Path) -> None:
    folder.mkdir(parents=True)
    opened(folder).put(1, logits_of(1))
    assert 1 in opened(folder)


@pytest.mark.parametrize(
    ("fingerprint", "named"),
    [
        (MADE_OF | {"teacher": "b"}, "teacher"),
        (MADE_OF | {"view_seed": "1"}, "view_seed"),
        (MADE_OF | {"views": "8", "teacher": ""}, "teacher, views"),
        (MADE_OF | {"augmentation": "new"}, "augmentation"),
    ],
)
def test_logits_that_were_made_otherwise_are_refused(kept: Path, fingerprint: dict[str, str], named: str) -> None:
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    assert f"were computed differently (different: {named}); name another folder" in refused(
        kept, fingerprint=fingerprint
    )
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert 1 in opened(kept)


# --- a file is data


class Bomb:
    """What runs if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.path),))


def _poisoned(bomb: Bomb) -> Iterator[tuple[str, bytes]]:
    for shape in ((), (SAMPLES, CLASSES)):
        array = np.empty(shape, dtype=object)
        array.fill(bomb)
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        yield f"array of {shape}", file.getvalue()
    yield "pickle", pickle.dumps(bomb)


def test_nothing_is_unpickled(kept: Path, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "ran")
    for name, content in _poisoned(bomb):
        file_of(kept, 1).write_bytes(content)
        assert 1 not in opened(kept), name
        assert_only_view_2_is_whole(kept)
        assert not bomb.path.exists(), name


@pytest.mark.parametrize(
    "content",
    [
        "archive",
        "structured",
        "other bytes",
    ],
)
def test_foreign_files_in_the_place_of_a_view_are_not_whole(kept: Path, content: str) -> None:
    with file_of(kept, 1).open("wb") as file:
        if content == "archive":
            np.savez(file, logits=logits_of(1).half().numpy())
        elif content == "structured":
            np.save(file, np.zeros((SAMPLES, CLASSES), dtype=[("a", "<f2")]))
        else:
            file.write(random.Random(0).randbytes(500))
    assert_only_view_2_is_whole(kept)


# --- memory


def test_32_views_of_cifar10_take_less_than_40_mb() -> None:
    cache = OutputCache(samples=50_000, classes=10, views=32, fingerprint={})
    logits = torch.randn(50_000, 10)
    for view in range(32):
        cache.put(view, logits + view)
        cache.load(view, CPU)
    assert all(view in cache for view in range(32))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(vars(cache))}
    assert 32_000_000 <= sum(storages.values()) <= 40_000_000


def test_32_views_of_cifar10_take_less_than_40_mb_of_a_disk(folder: Path) -> None:
    cache = OutputCache(samples=50_000, classes=10, views=32, fingerprint={}, folder=folder)
    cache.put(0, torch.randn(50_000, 10))
    assert 32 * sum(path.stat().st_size for path in folder.iterdir()) <= 40_000_000


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        yield from itertools.chain.from_iterable(map(_tensors, held.values()))
    elif isinstance(held, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, held))


def test_a_folder_that_another_run_has_made_meanwhile_is_refused(folder: Path) -> None:
    first, second = opened(folder), opened(folder, fingerprint={"teacher": "b"})
    first.put(1, logits_of(1))
    with pytest.raises(ValueError, match="were computed differently \\(different: teacher\\)"):
        second.put(1, logits_of(2))
    assert torch.equal(read(opened(folder), 1), logits_of(1))


def test_a_folder_of_another_format_is_refused(kept: Path) -> None:
    record = kept / "created_from.json"
    record.write_text(record.read_text().replace('"kd_lightning_format": 1,', ""))
    assert "were computed differently (different: kd_lightning_format); name another folder" in refused(kept)
