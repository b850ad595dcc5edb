"""A file of decoded images is there completely or not at all, and belongs to its images and settings."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packing import source_of, write_photographs

from kd_lightning.data.image_set import ImageFiles
from kd_lightning.data.packed_file import bytes_on_disk, pack_to_file, packed_file
from kd_lightning.data.packed_images import PackedImages
from kd_lightning.errors import UserError, WriteError

HEAD = """
import os, signal, sys, time
from pathlib import Path
from packing import source_of
from kd_lightning.data.packed_file import pack_to_file
from kd_lightning.data.image_set import ImageFiles
cache = Path(sys.argv[2])
source = source_of(sorted(Path(sys.argv[1]).iterdir()))
"""


@pytest.fixture
def source(tmp_path: Path) -> ImageFiles:
    return source_of(write_photographs(tmp_path / "set"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "beside" / ".cache"


def pack(source: ImageFiles, cache: Path, name: str = "train") -> PackedImages:
    return pack_to_file(source, cache, name=name)


def visible_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def assert_holds(packed: PackedImages, source: ImageFiles) -> None:
    assert len(packed) == len(source)
    assert all(torch.equal(packed.read(sample), source.read(sample)) for sample in range(len(source)))


def start(code: str, source: ImageFiles, cache: Path, *, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    command = [*before, sys.executable, "-c", HEAD + code, str(source.files[0].parent), str(cache)]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --- one file for the same images and settings


def test_the_second_time_nothing_is_decoded(
    source: ImageFiles, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = packed_file(source, cache, name="train")
    assert not file.exists()
    pack(source, cache)
    size = file.stat().st_size
    assert size == bytes_on_disk(source)
    written = capsys.readouterr().err
    assert written == f"Writing {size / 1024:.1f} KiB of decoded images to {str(file)!r}.\n"
    expected = [source.read(sample) for sample in range(len(source))]
    monkeypatch.setattr(ImageFiles, "read", lambda *_: pytest.fail("an image was decoded"))
    packed = pack(source, cache)
    assert all(torch.equal(packed.read(sample), image) for sample, image in enumerate(expected))
    assert visible_files(cache) == [file.name]
    assert capsys.readouterr().err == ""


def test_changed_files_replace_the_file_and_other_settings_stand_beside_it(
    source: ImageFiles, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = packed_file(source, cache, name="train")
    pack(source, cache)
    os.utime(source.files[3], (1, 1))
    changed = pack(source, cache)
    assert_holds(changed, source)
    second = packed_file(source, cache, name="train")
    assert visible_files(cache) == [second.name] != [first.name]
    capsys.readouterr()
    larger = source_of(list(source.files), side=40)
    assert_holds(pack(larger, cache, "train-40"), larger)
    assert "; other sets of images there take 59.3 KiB." in capsys.readouterr().err
    assert len(visible_files(cache)) == 2
    grey = ImageFiles(source.labels, source.files, source.original_sizes, source.form, channels=1)
    assert packed_file(grey, cache, name="train") != second


def test_another_version_of_pillow_decodes_again(
    source: ImageFiles, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = packed_file(source, cache, name="train")
    monkeypatch.setattr("PIL.__version__", "99.0")
    assert packed_file(source, cache, name="train") != before


def test_labels_are_those_of_today(source: ImageFiles, cache: Path) -> None:
    pack(source, cache)
    other = ImageFiles(source.labels + 5, source.files, source.original_sizes, source.form)
    assert torch.equal(pack(other, cache).labels, other.labels)
    assert len(visible_files(cache)) == 1


# --- damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"something else" * 999, "is not a file of decoded images"),
        (lambda content: b"", "is not a file of decoded images"),
        (lambda content: content[:-1], "has been cut off"),
        (lambda content: content + b"x", "has been cut off"),
        (lambda content: content[:200], "is damaged"),
        *((lambda content, at=at: _flipped(content, at), "is damaged") for at in (20, 50, 57, 70, 90, 120, 130, 350)),
    ],
)
def test_a_damaged_file_is_named_and_written_again(
    source: ImageFiles, cache: Path, damage: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(source, cache)
    file = packed_file(source, cache, name="train")
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    capsys.readouterr()
    assert_holds(pack(source, cache), source)
    line, writing = capsys.readouterr().err.splitlines()
    assert line == f"{str(file)!r} {message}. It is written again."
    assert writing.startswith("Writing ")
    assert_holds(pack(source, cache), source)
    assert capsys.readouterr().err == ""


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_a_renamed_file_of_other_images_is_not_taken(
    source: ImageFiles, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = source_of(write_photographs(tmp_path / "other"))
    pack(other, cache, "other")
    shutil.copy(packed_file(other, cache, name="other"), packed_file(source, cache, name="train"))
    assert_holds(pack(source, cache), source)
    assert "holds images of other files or settings. It is written again." in capsys.readouterr().err


# --- interrupted and simultaneous writers

KILLED = """
class Killed(ImageFiles):
    def read(self, sample):
        if sample == 11:
            time.sleep(0.2)  # until some images are written
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(sample)

killed = Killed(source.labels, source.files, source.original_sizes, source.form)
pack_to_file(killed, cache, name="train", threads=1)
"""


def test_a_killed_writer_leaves_nothing_that_is_used_or_stays(source: ImageFiles, cache: Path) -> None:
    process = start(KILLED, source, cache)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (left,) = visible_files(cache)
    assert left.endswith(".tmp")
    (cache / "train-old.images").touch()  # of a user
    assert_holds(pack(source, cache), source)
    assert visible_files(cache) == sorted([packed_file(source, cache, name="train").name, "train-old.images"])


def test_an_interrupted_writer_leaves_nothing(source: ImageFiles, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ImageFiles.read

    def interrupt(self: ImageFiles, sample: int) -> torch.Tensor:
        if sample == 9:
            raise KeyboardInterrupt
        return read(self, sample)

    monkeypatch.setattr(ImageFiles, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(source, cache)
    assert visible_files(cache) == []


TOGETHER = """
class Slow(ImageFiles):
    def read(self, sample):
        print("read", flush=True)
        time.sleep(0.02)
        return super().read(sample)
slow = Slow(source.labels, source.files, source.original_sizes, source.form)
packed = pack_to_file(slow, cache, name="train")
print("sum", int(packed.buffer.long().sum()))
"""


def test_of_several_processes_one_writes_and_the_others_wait(source: ImageFiles, cache: Path) -> None:
    processes = [start(TOGETHER, source, cache) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum(out.count("read") for out, _ in outputs) == len(source)
    assert sum(err.count("Writing ") for _, err in outputs) == 1
    assert len({out.split("sum")[1] for out, _ in outputs}) == 1
    assert len(visible_files(cache)) == 1


@pytest.mark.slow
def test_a_process_that_waits_writes_if_the_first_is_killed(source: ImageFiles, cache: Path) -> None:
    first = start(TOGETHER.replace("0.02", "60"), source, cache)
    assert first.stdout is not None
    assert first.stdout.readline() == "read\n"
    second = start(TOGETHER, source, cache)
    assert second.stderr is not None
    assert second.stderr.readline().startswith("Waiting until another process has written ")
    first.kill()
    out, err = second.communicate(timeout=60)
    first.communicate()
    assert second.returncode == 0, err
    assert out.count("read") == len(source)
    assert len(visible_files(cache)) == 1


def test_without_locks_both_write_and_nothing_of_the_other_is_removed(
    source: ImageFiles, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_lightning.files.lock.fcntl", None)
    cache.mkdir(parents=True)
    other = cache / f"{packed_file(source, cache, name='train').name}.12345.tmp"
    other.write_bytes(b"half")
    assert_holds(pack(source, cache), source)
    assert other.read_bytes() == b"half"


# --- no room


def test_a_disk_without_room_is_refused_before_anything_is_decoded(
    source: ImageFiles, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2048))
    monkeypatch.setattr(ImageFiles, "read", lambda *_: pytest.fail("an image was decoded"))
    needed = f"{bytes_on_disk(source) / 1024:.1f} KiB"
    expected = (
        rf"^'.*\.cache' has no room for {needed} of decoded images \(2\.0 KiB are free\); "
        r"make room, set data\.cache to a folder on another disk, or lower data\.store_size\.$"
    )
    with pytest.raises(WriteError, match=expected):
        pack(source, cache)
    assert visible_files(cache) == []


FILLED = """
import shutil
from types import SimpleNamespace
shutil.disk_usage = lambda folder: SimpleNamespace(free=10**12)  # others fill it later
try:
    pack_to_file(source, cache, name="train")
except ValueError as error:
    print(error)
print(sorted(os.listdir(cache)))
"""


def _private_disk() -> tuple[str, ...]:
    """Return the beginning of a command that sees a small disk of its own, which goes away with it."""
    mount = 'mkdir -p "$0" && mount -t tmpfs -o size=32k none "$0" && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", mount)


def test_a_disk_that_fills_up_while_it_is_written(source: ImageFiles, cache: Path) -> None:
    before = (*_private_disk(), str(cache))
    if not shutil.which("unshare") or subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    process = start(FILLED, source, cache, before=before)
    out, err = process.communicate(timeout=60)
    message, left = out.splitlines()
    assert message.startswith(f"{str(cache)!r} has no room for "), err
    assert message.endswith(
        " KiB of decoded images (its disk, or your share of it, is full); make room, set data.cache to a folder on "
        "another disk, or lower data.store_size."
    )
    assert left == "['.train.lock']"


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))" + FILLED


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_file_that_may_not_become_so_long(source: ImageFiles, cache: Path) -> None:
    out, err = start(LIMITED, source, cache).communicate(timeout=60)
    message, left = out.splitlines()
    assert "(its disk, or your share of it, is full)" in message, err
    assert left == "['.train.lock']"


def test_a_folder_that_cannot_be_written_to(source: ImageFiles, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file' cannot be written to \(File exists\); set data\.cache to a folder"):
        pack(source, tmp_path / "file")


def test_a_file_in_a_folder_that_is_only_readable_is_used(
    source: ImageFiles, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(source, cache)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    assert_holds(pack(source, cache), source)
    os.utime(source.files[0], (1, 1))
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\); set data\.cache to a folder"):
        pack(source, cache)
