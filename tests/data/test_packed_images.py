"""Images that are decoded once: in memory they are those that are read from files, to the bit."""

import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packing import source_of, write_photographs
from torch import Tensor

from kd_lightning.data.image_form import OriginalForm
from kd_lightning.data.image_set import ImageFiles, ImageSource, Selection
from kd_lightning.data.packed_file import pack_to_file
from kd_lightning.data.packed_images import KeptImages, PackedImages, pack_in_memory
from kd_lightning.errors import UserError

Pack = Callable[[ImageSource, Path], PackedImages]
PACKS: dict[str, Pack] = {
    "memory": lambda source, folder: pack_in_memory(source),
    "one thread": lambda source, folder: pack_in_memory(source, threads=1),
    "many threads": lambda source, folder: pack_in_memory(source, threads=7),
    "file": lambda source, folder: pack_to_file(source, folder, name="train"),
}
every_pack = pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)


@every_pack
@pytest.mark.parametrize("count", [1, 8, 43])
def test_packed_images_are_those_that_are_read(pack: Pack, count: int, tmp_path: Path) -> None:
    source = source_of(write_photographs(tmp_path / "set", count))
    packed = pack(source, tmp_path / "cache")
    assert len(packed) == len(source)
    assert torch.equal(packed.labels, source.labels)
    assert packed.content() == source.content()
    assert packed.channels == 3
    for sample in range(count):
        image = packed.read(sample)
        assert torch.equal(image, source.read(sample))
        assert tuple(packed.sizes[sample].tolist()) == image.shape[1:]
        assert image.permute(1, 2, 0).is_contiguous()
        assert packed.name(sample) == source.name(sample)


@every_pack
def test_grey_images_and_chosen_ones(pack: Pack, tmp_path: Path) -> None:
    source = source_of(write_photographs(tmp_path / "set"))
    grey = ImageFiles(source.labels, source.files, source.original_sizes, source.form, channels=1)
    chosen = Selection(grey, torch.tensor([11, 3, 4]))
    packed = pack(chosen, tmp_path / "cache")
    assert packed.labels.tolist() == [11, 3, 4]
    assert all(torch.equal(packed.read(place), grey.read(sample)) for place, sample in enumerate([11, 3, 4]))
    assert packed.read(0).shape[0] == 1
    both = KeptImages(grey, packed, chosen.samples)
    assert all(torch.equal(both.read(sample), grey.read(sample)) for sample in range(16))


@every_pack
def test_images_larger_than_announced_are_kept_whole(pack: Pack, tmp_path: Path) -> None:
    source = source_of(write_photographs(tmp_path / "set"))
    wrong = ImageFiles(source.labels, source.files, torch.full((16, 2), 3), source.form)
    packed = pack(wrong, tmp_path / "cache")
    assert all(torch.equal(packed.read(sample), source.read(sample)) for sample in range(16))


@every_pack
def test_all_unreadable_images_are_named_at_once(pack: Pack, tmp_path: Path) -> None:
    files = write_photographs(tmp_path / "set")
    for number in (2, 9):
        files[number].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^2 of 16 images cannot be read\. .*002\.jpg.*009\.jpg"):
        pack(source_of(files), tmp_path / "cache")
    assert not list((tmp_path).rglob("*.images*"))


@every_pack
def test_unreadable_images_are_left_out_where_that_is_asked_for(pack: Pack, tmp_path: Path) -> None:
    files = write_photographs(tmp_path / "set")
    for number in (0, 9, 15):
        files[number].write_bytes(b"no image")
    source = source_of(files, skip_unreadable=True)
    left = [number for number in range(16) if number not in (0, 9, 15)]
    for _ in range(2):  # a file is only mapped the second time
        with pytest.warns(UserWarning, match=r"^Left out: 3 of 16 images cannot be read"):
            packed = pack(source, tmp_path / "cache")
    assert packed.labels.tolist() == left
    assert [Path(packed.name(place)) for place in range(len(packed))] == [files[number] for number in left]
    assert all(torch.equal(packed.read(place), source.read(number)) for place, number in enumerate(left))
    for file in files:
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^16 of 16 images cannot be read"):
        pack(source_of(files, skip_unreadable=True), tmp_path / "cache")


@every_pack
def test_an_image_with_other_channels_is_named(pack: Pack, tmp_path: Path) -> None:
    class Mixed(ImageFiles):
        def read(self, sample: int) -> Tensor:
            return super().read(sample)[: 1 if sample == 12 else 3]

    source = source_of(write_photographs(tmp_path / "set"))
    mixed = Mixed(source.labels, source.files, source.original_sizes, source.form)
    with pytest.raises(UserError, match=r"012\.jpg' has 1 channels and the others 3; convert all to the same\.$"):
        pack(mixed, tmp_path / "cache")


@every_pack
@pytest.mark.parametrize("error", [FileNotFoundError("mine"), RuntimeError("mine"), KeyError("mine")])
def test_an_error_of_a_source_is_passed_on(pack: Pack, error: Exception, tmp_path: Path) -> None:
    class Broken(ImageFiles):
        def read(self, sample: int) -> Tensor:
            if sample == 10:
                raise error
            return super().read(sample)

    source = source_of(write_photographs(tmp_path / "set"))
    broken = Broken(source.labels, source.files, source.original_sizes, source.form)
    with pytest.raises(type(error)) as raised:
        pack(broken, tmp_path / "cache")
    assert raised.value is error
    assert not list((tmp_path).rglob("*.images*"))


def test_one_thread_reads_one_image_at_a_time(tmp_path: Path) -> None:
    class Counting(ImageFiles):
        def read(self, sample: int) -> Tensor:
            with lock:
                running.append(sample)
                most.append(len(running))
            time.sleep(0.001)
            with lock:
                running.remove(sample)
            return super().read(sample)

    lock, running, most = threading.Lock(), [], [0]  # type: ignore[var-annotated]
    source = source_of(write_photographs(tmp_path / "set", 40))
    counting = Counting(source.labels, source.files, source.original_sizes, source.form)
    pack_in_memory(counting, threads=1)
    assert max(most) == 1
    pack_in_memory(counting, threads=4)
    assert max(most) > 1


def _checksum(packed: PackedImages) -> int:
    return sum(int(packed.read(sample).long().sum()) for sample in range(len(packed)))


@pytest.mark.parametrize("pack", [PACKS["memory"], PACKS["file"]], ids=["memory", "file"])
def test_spawned_processes_read_the_same_images(pack: Pack, tmp_path: Path) -> None:
    packed = pack(source_of(write_photographs(tmp_path / "set")), tmp_path / "cache")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_checksum, (packed,)) == _checksum(packed)


def test_a_mapped_file_travels_to_other_processes_by_its_path(tmp_path: Path) -> None:
    packed = pack_to_file(source_of(write_photographs(tmp_path / "set"), side=90), tmp_path / "cache", name="train")
    sent = pickle.dumps(packed)
    assert len(sent) < len(packed.buffer) / 10
    again: PackedImages = pickle.loads(sent)
    assert torch.equal(again.buffer, packed.buffer)
    (file,) = (tmp_path / "cache").glob("*.images")
    file.unlink()
    assert _checksum(packed) == _checksum(again)  # both have it open
    with pytest.raises(UserError, match=r"\.images' has been removed while its images are read; start again"):
        pickle.loads(sent)


class _Made(ImageFiles):
    """Images that are not in files."""

    def read(self, sample: int) -> Tensor:
        return torch.full((500, 600, 3), sample % 256, dtype=torch.uint8).permute(2, 0, 1)

    def content(self) -> bytes:
        return b""


def _peak_of_packing() -> tuple[int, int]:
    count = 400
    names = [Path(str(number)) for number in range(count)]
    sizes = torch.tensor([[500, 600]]).expand(count, 2)
    source = _Made(torch.zeros(count, dtype=torch.int64), names, sizes, OriginalForm(500, 600))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, as of the imports, is forgotten
    before = _peak_memory()
    packed = pack_in_memory(source)
    return _peak_memory() - before, len(packed.buffer)


def _peak_memory() -> int:
    """Return the bytes of memory that this process had at most; ``getrusage`` counts those of its parent as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_packing_into_memory_takes_the_memory_of_the_images_once() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak, size = pool.apply(_peak_of_packing)
    assert size == 400 * 500 * 600 * 3
    assert 0.9 * size < peak < 1.3 * size
