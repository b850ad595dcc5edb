"""Image files are found in folders; what is left out is counted."""

from collections import Counter
from pathlib import Path

import pytest

from kd_lightning.errors import UserError
from kd_lightning.files.find_images import describe_left_out, find_images


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_images_of_any_suffix_that_pillow_reads_are_found_at_any_depth(tmp_path: Path) -> None:
    names = ["a.jpg", "b.JPG", "c.jfif", "d.gif", "deep/e.webp", "deep/deeper/f.TIFF", "g.bmp"]
    touch(tmp_path, *names)
    assert find_images(tmp_path).files == sorted(tmp_path / name for name in names)
    assert [file.name for file in find_images(tmp_path, recursive=False).files] == [
        "a.jpg",
        "b.JPG",
        "c.jfif",
        "d.gif",
        "g.bmp",
    ]


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/._a.jpg", "__MACOSX/b.jpg")
    touch(tmp_path, ".ipynb_checkpoints/a-checkpoint.jpg", "@eaDir/a.jpg")
    found = find_images(tmp_path)
    assert (found.files, found.left_out) == ([tmp_path / "a.jpg"], Counter())


def test_other_files_are_counted_by_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.xyz", "deep/c.XYZ", "labels.csv", "README")
    assert find_images(tmp_path).left_out == {".xyz": 2, ".csv": 1, "": 1}


@pytest.mark.parametrize(
    ("left_out", "sentence"),
    [
        (
            {".heic": 2},
            "2 files of 'photos' are left out, since Pillow does not read them as images: 2 .heic; install pillow-heif "
            "to read more of them.",
        ),
        ({"": 1}, "1 file of 'photos' is left out, since Pillow does not read it as an image: 1 without suffix."),
    ],
)
def test_what_is_left_out_is_described_in_one_sentence(left_out: dict[str, int], sentence: str) -> None:
    assert describe_left_out(Path("photos"), Counter(left_out)) == sentence


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "a.jpg")
    touch(tmp_path / "photos", "b.jpg")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "photos" / "circle").symlink_to(tmp_path / "photos")
    found = [str(file.relative_to(tmp_path / "photos")) for file in find_images(tmp_path / "photos").files]
    assert found == ["b.jpg", "linked/a.jpg", "linked.jpg"]


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^The folder '.*none' cannot be listed \(No such file or directory\)"):
        find_images(tmp_path / "none")
