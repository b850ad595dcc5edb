"""Files of teachers and folders of images that were moved are found by their digests, and that is said."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_options import QUICK, QUIET
from PIL import Image

from kd_lightning import Run
from kd_lightning.runs.moved import describe_file, describe_images, find_file, find_folder
from kd_lightning.runs.source import Source

Command = Callable[..., str]

TEACHER = Path("lightning_logs/digits/teacher/version_0")
STUDENT = Path("lightning_logs/digits/distill/version_0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a teacher was trained and a student distilled."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from kd_lightning.__main__ import main

        for recipe in ("digits/teacher", "digits/distill"):
            patch.setattr("sys.argv", ["kd-lightning", "fit", "-c", recipe, *QUICK])
            main()
    return folder


def test_a_run_knows_its_teacher(here: Path) -> None:
    run = Run(STUDENT)
    assert run.fit is not None
    assert run.fit["teachers"] == [describe_file(TEACHER / "checkpoints/best.ckpt")]


@pytest.mark.parametrize(
    ("moved", "found"),
    [
        ("lightning_logs/teachers/mine", "lightning_logs/teachers/mine/checkpoints/best.ckpt"),
        ("archive/teacher", None),  # a folder within a folder of the working folder is not searched
        ("best.ckpt", "best.ckpt"),
        ("weights/teacher.ckpt", "weights/teacher.ckpt"),
    ],
)
def test_a_moved_teacher_is_found(kd: Command, here: Path, moved: str, found: str | None) -> None:
    Path(moved).parent.mkdir(parents=True, exist_ok=True)
    source = TEACHER / "checkpoints/best.ckpt" if moved.endswith(".ckpt") else TEACHER
    shutil.move(source, moved)
    if moved.endswith(".ckpt"):
        shutil.rmtree(TEACHER)
    printed = kd("test", "-c", "digits/distill", *QUIET)
    if found is None:
        assert "agreement with the teacher is left out" in printed
        return
    assert f"{TEACHER}/checkpoints/best.ckpt has moved: {found} has the same digest." in printed
    assert "test/agreement" in printed


def test_a_student_that_moved_together_with_its_teacher_finds_it(kd: Command, here: Path) -> None:
    Path("archive").mkdir()
    shutil.move("lightning_logs/digits", "archive/digits")
    folder = "archive/digits/distill/version_0"
    printed = kd("test", "-c", folder, *QUIET)
    teacher = "archive/digits/teacher/version_0/checkpoints/best.ckpt"
    assert f"has moved: {teacher} has the same digest." in printed
    assert f"The checkpoint is {folder}/checkpoints/best.ckpt." in printed
    assert Source(folder).teacher() is not None
    resumed = kd("fit", "-c", folder, "--ckpt_path", "last", *QUICK, "--trainer.max_epochs=3")
    assert f"has moved: {teacher}" in resumed
    assert Run(folder).fit["epochs"] == 3  # type: ignore[index]


def test_a_checkpoint_in_its_run_finds_the_teacher_too(kd: Command, here: Path) -> None:
    shutil.move(TEACHER, "lightning_logs/kept")
    printed = kd("test", "--ckpt_path", str(STUDENT / "checkpoints/best.ckpt"), *QUIET)
    assert "has moved: lightning_logs/kept/checkpoints/best.ckpt has the same digest." in printed


def test_another_file_of_the_same_size_is_not_taken(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    described = describe_file(TEACHER / "checkpoints/best.ckpt")
    content = bytearray((TEACHER / "checkpoints/best.ckpt").read_bytes())
    shutil.rmtree(TEACHER)
    content[-1] ^= 1
    Path("other.ckpt").write_bytes(content)
    assert find_file(described) is None
    content[-1] ^= 1
    Path("same.pth").write_bytes(content)
    assert find_file(described) == Path("same.pth")


# --- images


def save_images(root: Path, colour: int = 0) -> None:
    for name in ("ants", "bees"):
        for number in range(20):
            file = root / "train" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 8), (colour, 12 * number, len(name) + (name == "bees"))).save(file)


def test_a_moved_folder_of_images_is_found(kd: Command, tmp_path: Path) -> None:
    save_images(tmp_path / "my_images")
    network = [
        "--model.network=kd_lightning.networks.ResNet",
        "--model.network.blocks=[1]",
        "--model.network.widths=[4]",
    ]
    data = ["--data.root=my_images", "--data.image_size=8", "--data.batch_size=4", "--model.network.num_classes=2"]
    kd("fit", "-c", "photos/student", *network, *data, *QUICK)
    shutil.copytree("my_images", "decoy/images")
    Path("decoy/images/train/ants/3.png").unlink()
    (tmp_path / "elsewhere").mkdir()
    shutil.move("my_images", "elsewhere/insects")
    printed = kd("validate", "-c", "photos/student", *QUIET)
    assert "my_images has moved: elsewhere/insects has the same images." in printed
    assert "val/accuracy" in printed
    data_module = Run.find("photos/student").data()
    assert data_module is not None
    assert Path(data_module.root) == Path("elsewhere/insects")  # type: ignore[attr-defined]
    shutil.rmtree("elsewhere")
    shutil.rmtree("decoy")
    with pytest.raises(SystemExit, match="There is no folder 'my_images"):
        kd("validate", "-c", "photos/student", *QUIET)


def test_folders_with_the_same_names_and_other_files_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "first")
    described = describe_images("first")
    (tmp_path / "first").rename("second")
    (tmp_path / "second/train/ants/0.png").write_bytes(b"another image")
    assert find_folder(described) is None
    save_images(tmp_path / "third/deep")
    assert find_folder(described) == Path("third/deep")
