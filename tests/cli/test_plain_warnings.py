"""What a command shows beside its output: that it starts, and warnings without a place in the source."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import kd_lightning
from kd_lightning.__main__ import main
from kd_lightning.cli.plain_warnings import show_plain_warnings


def test_a_warning_of_the_package_is_a_sentence_and_others_keep_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", lambda message, category, filename, *_: f"{filename}: {message}")
    for _ in range(2):  # a second call changes nothing
        show_plain_warnings()
    own = str(Path(kd_lightning.__file__).parent / "data" / "layout.py")
    assert warnings.formatwarning("A file is left out.", UserWarning, own, 7) == "Warning: A file is left out.\n"
    assert warnings.formatwarning("Old.", FutureWarning, own, 7) == f"{own}: Old."
    assert warnings.formatwarning("Other.", UserWarning, "/somewhere.py", 7) == "/somewhere.py: Other."


def test_a_command_shows_it_so(tmp_path: Path) -> None:
    (tmp_path / "images/ants").mkdir(parents=True)
    (tmp_path / "images/ants/notes.txt").touch()
    code = """
import sys
import kd_lightning.cli.functions as functions
from kd_lightning.__main__ import main
from kd_lightning.data.folder_layout import FolderLayout
from pathlib import Path
functions.parse_function = lambda command, words: (lambda: FolderLayout(Path("images")).unlabelled_images(), {})
Path("images/unlabelled").mkdir()
Path("images/unlabelled/notes.txt").touch()
sys.argv = ["kd-lightning", "doctor"]
main()
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stderr.startswith(
        "Warning: 1 file of 'images/unlabelled' is left out, since Pillow does not read it as an"
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_that_a_command_starts(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kd-lightning", "doctor", "--help"])
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == ("Starting\r\033[K" if terminal else "")
