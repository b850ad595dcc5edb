"""Labels in a CSV file in place of class folders."""

import re
from pathlib import Path

import pytest
from test_folder_layout import listed, write

from kd_lightning import ImageFolderDataModule
from kd_lightning.errors import UserError

FILES = [f"{number:02}.png" for number in range(20)]
LABELS = [("cat", "dog")[number % 2] for number in range(20)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "images", *FILES)


def data(root: Path, *lines: str, header: str = "file,label", place: str = "labels.csv") -> ImageFolderDataModule:
    (root / place).write_text("\n".join([header, *lines, ""]), encoding="utf-8")
    return ImageFolderDataModule(str(root), labels=place, image_size=8, batch_size=4)


def test_without_a_split_the_images_are_divided_by_class(root: Path) -> None:
    found = data(root, *map(",".join, zip(FILES, LABELS, strict=True)))
    assert found.classes == ("cat", "dog")
    parts = {split: listed(found, split) for split in ("train", "val", "test")}
    assert {split: sorted(part.values()) for split, part in parts.items()} == {
        "train": [0] * 8 + [1] * 8,
        "val": [0, 1],
        "test": [0, 1],
    }
    assert {file: ("cat", "dog")[label] for part in parts.values() for file, label in part.items()} == dict(
        zip(FILES, LABELS, strict=True)
    )
    found.setup("fit")
    again = data(root, *map(",".join, zip(FILES, LABELS, strict=True)))
    again.load_state_dict(found.state_dict())
    assert {split: listed(again, split) for split in parts} == parts


def test_a_column_says_the_split(root: Path) -> None:
    splits = ["train"] * 14 + ["val"] * 3 + ["test"] * 3
    rows = [",".join(row) for row in zip(splits, FILES, LABELS, strict=True)]
    found = data(root, *rows, header="split, file ,label")
    for split in ("train", "val", "test"):
        expected = {file: label for which, file, label in zip(splits, FILES, LABELS, strict=True) if which == split}
        assert {file: found.classes[label] for file, label in listed(found, split).items()} == expected
    without_val = data(root, *(row.replace("val", "train") for row in rows), header="split,file,label")
    without_val.setup("fit")
    assert not without_val.splits.has_val


def test_rows_without_a_label_and_a_folder_beside_are_unlabelled(root: Path) -> None:
    write(root, "unlabelled/a.png", "unlabelled/deep/b.png")
    found = data(root, *(f"{file},{label if number > 3 else ''}" for number, (file, label) in enumerate(
        zip(FILES, LABELS, strict=True))))  # fmt: skip
    train = listed(found, "train")
    assert {file for file, label in train.items() if label == -1} == {*FILES[:4], "unlabelled/a.png",
                                                                      "unlabelled/deep/b.png"}  # fmt: skip
    assert not found.all_labelled
    assert -1 not in listed(found, "test").values()


def test_files_may_lie_in_folders_and_the_csv_elsewhere(root: Path, tmp_path: Path) -> None:
    write(root, "a b/ö, 1.png", "deep/er/2.png", "deep/3.png", "4.png")
    lines = '\ufefffile,label\n"a b/ö, 1.png",x\r\n"deep/er/2.png", y\n./deep/3.png,x\n4.png,y\n'
    (tmp_path / "elsewhere.csv").write_text(lines, encoding="utf-8")
    found = ImageFolderDataModule(str(root), labels=str(tmp_path / "elsewhere.csv"), image_size=8)
    assert found.classes == ("x", "y")
    listing = found.layout.training_images()
    assert [file.name for file in listing.files] == ["ö, 1.png", "2.png", "3.png", "4.png"]
    assert listing.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"too few images .*; add a column 'split' with train and val to '.*elsewhere"):
        found.setup("fit")


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("file,label", ["00.png,cat", "77.png,dog", "deep/78.png,dog"],
         r"labels\.csv' names 2 of 3 files that do not exist: .*77\.png, .*deep/78\.png; correct them, or set root"),
        ("file,class", ["00.png,cat"], r"labels\.csv' has no column 'label' but 'file', 'class'; its first"),
        ("file;label", ["00.png;cat"], r"has no column 'file' but 'file;label'; .* separated by commas: file,label\.$"),
        ("file,label,splitt", ["00.png,cat,train"], r"has the column 'splitt', which is not read; columns are file"),
        ("file,label", ["00.png,cat", "00.png,dog"], r"00\.png' is in two classes, 'cat' and 'dog' in "),
        ("file,label", ["00.png,cat", "00.png,cat"], r"00\.png' is named twice in .*; keep one"),
        ("file,label", ["00.png,cat", "01.png,cat"], r"labels\.csv' has one class only, 'cat', and there is nothing"),
        ("file,label", ["00.png,cat", ",dog"], r"^Line 3 of .*labels\.csv' does not have one value for each column"),
        ("file,label", ["00.png,cat,x"], r"^Line 2 of .*labels\.csv' does not have one value for each column"),
        ("file,label,split", ["00.png,cat,train", "01.png,dog,train", "02.png,bird,val"],
         r"^Line 4 of .* has the class 'bird' in 'val', which no row of 'train' has; add training images of it"),
        ("file,label,split", ["00.png,cat,trian"], r"^Line 2 of .* has the split 'trian'; it must be train, val, test"),
        ("file,label,split", ["00.png,,test"], r"^Line 2 of .* has no label; images of 'test' need one\.$"),
        ("", [], r"has no column 'file' but"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence(root: Path, header: str, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        data(root, *lines, header=header).setup("fit")
    assert "\n" not in str(error.value)


def test_a_missing_file_or_folder_is_named(root: Path) -> None:
    with pytest.raises(UserError, match=r"^There is no file 'other\.csv' of labels; check its name\.$"):
        ImageFolderDataModule(str(root), labels="other.csv").setup("fit")
    with pytest.raises(UserError, match=r"^There is no folder 'nowhere'; set root"):
        ImageFolderDataModule("nowhere", labels="other.csv").setup("fit")
    (root / "labels.csv").write_bytes(b"file,label\n\xff\xfe")
    with pytest.raises(UserError, match=r"labels\.csv' is not a CSV file in UTF-8 \("):
        ImageFolderDataModule(str(root), labels="labels.csv").setup("fit")


def test_no_row_of_a_split_is_one_sentence(root: Path) -> None:
    found = data(root, "00.png,cat,train", "01.png,dog,train", header="file,label,split")
    with pytest.raises(UserError, match=r"labels\.csv' has no row of the split 'test'; add some\.$"):
        found.setup("test")


# --- the same of folders


def test_a_file_in_two_class_folders_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/a.png", "train/cat/b.png", "train/dog/c.png")
    (tmp_path / "train/dog/a.png").write_bytes((tmp_path / "train/cat/a.png").read_bytes())
    message = (
        r"train/dog/a\.png' is in two classes, since it is the same file as .*cat/a\.png'; remove it from 'cat' or"
    )
    with pytest.raises(UserError, match=message):
        ImageFolderDataModule(str(tmp_path)).setup("fit")


def test_one_class_folder_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/a.png", "train/cat/b.png")
    with pytest.raises(UserError, match=re.escape("train' has one class only, 'cat', and there is nothing to learn")):
        ImageFolderDataModule(str(tmp_path)).setup("fit")
