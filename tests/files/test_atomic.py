"""A file is written completely or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.files.atomic import atomic_write


def is_only_file(place: Path) -> bool:
    return [path.name for path in place.parent.iterdir()] == [place.name]


def run_in_subprocess(code: str, place: Path) -> subprocess.CompletedProcess[bytes]:
    head = "import os, signal, sys\nfrom pathlib import Path\nfrom kd_lightning.files.atomic import atomic_write\n"
    return subprocess.run(
        [sys.executable, "-c", f"{head}place = Path(sys.argv[1])\n{code}", place], capture_output=True
    )


@pytest.mark.parametrize("before", [None, b"old"])
def test_content_appears_when_the_block_ends(before: bytes | None, tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "file"  # folders that do not exist
    if before is not None:
        place.parent.mkdir(parents=True)
        place.write_bytes(before)
    with atomic_write(place) as file:
        file.write(b"new")
        file.flush()
        assert (place.read_bytes() if place.exists() else None) == before
    assert place.read_bytes() == b"new"
    assert is_only_file(place)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), RuntimeError("torch")])
def test_an_exception_keeps_the_old_file(error: BaseException, tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(place) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    assert place.read_bytes() == b"old"
    assert is_only_file(place)


def test_a_killed_process_keeps_the_old_file(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"old")
    code = "with atomic_write(place) as f: f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    assert run_in_subprocess(code, place).returncode == -signal.SIGKILL
    assert place.read_bytes() == b"old"


FULL = """
import resource, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    with atomic_write(place) as file:
        {write}
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("write", ["file.write(bytes(10**6))", "torch.save(torch.rand(10**6), file)"])
def test_a_full_disk_is_reported_in_one_sentence_and_keeps_the_old_file(write: str, tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"old")
    done = run_in_subprocess(FULL.format(write=write), place)
    assert done.stdout.decode().strip() == (
        f"{str(place)!r} cannot be written (File too large); what was there before is as it was; make room or choose "
        "another place."
    ), done.stderr.decode()
    assert place.read_bytes() == b"old"
    assert is_only_file(place)


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").write_bytes(b"")
    message = r"folder/file' cannot be written \(File exists\); what was there before .* choose another place\.$"
    with pytest.raises(OSError, match=message), atomic_write(tmp_path / "folder" / "file"):
        pass


def test_a_path_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match=r"cannot be written \(Is a directory\)"), atomic_write(tmp_path / "file"):
        pass
    assert is_only_file(tmp_path / "file")


def test_a_folder_without_write_permission_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may write anywhere
    with pytest.raises(OSError, match=r"cannot be written \(Permission denied\)"), atomic_write(tmp_path / "file"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_file_is_synced_before_it_is_moved_and_the_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, synced = tmp_path / "file", []

    def record(entry: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{entry}"), place.exists(), os.fstat(entry).st_size))

    if not Path("/proc/self/fd").exists():
        pytest.skip("only Linux names the file")
    monkeypatch.setattr(os, "fsync", record)
    with atomic_write(place) as file:
        file.write(b"all of it")
    assert [(Path(name) == tmp_path, there) for name, there, _ in synced] == [(False, False), (True, True)]
    assert synced[0][2] == len(b"all of it")


def test_file_systems_that_cannot_sync_folders_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if Path(path) == tmp_path:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
