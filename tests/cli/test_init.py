"""`kd-lightning init`: a commented configuration for a folder of images."""

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_options import QUIET
from PIL import Image

import kd_lightning.cli.init as init_module
from kd_lightning import ImageFolderDataModule
from kd_lightning.cli.image_survey import survey
from kd_lightning.recipes import recipe_names

Command = Callable[..., str]


def save_images(folder: Path, count: int, size: tuple[int, int] = (40, 36)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):  # no two classes share a file
        colour = 30 * number % 256, 10 * count % 256, zlib.crc32(folder.name.encode()) % 256
        Image.new("RGB", size, colour).save(folder / f"{number}.png")


@pytest.fixture
def images(kd: Command, tmp_path: Path) -> Path:
    """Ants and bees in folders without a split; two of them larger."""
    save_images(tmp_path / "my_images/ants", 24)
    save_images(tmp_path / "my_images/bees", 20)
    save_images(tmp_path / "my_images/bees/more", 2, (200, 100))
    return tmp_path / "my_images"


def refusal(kd: Command, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        kd("init", *arguments)
    message = str(ended.value.code)
    assert "\n" not in message
    assert len(message) < 400
    assert not list(Path().glob("*.yaml")), "nothing is written"
    return message


@pytest.mark.usefixtures("images")
def test_it_writes_what_it_found_and_prints_the_next_commands(kd: Command) -> None:
    printed = kd("init", "insects", "my_images")
    text = Path("insects.yaml").read_text()
    found = "Images: train 46, in 2 classes", "ants 24, bees 22", "1.1 times", "40x36 to 200x100; half of them have a s"
    for sentence in found:
        assert sentence in printed
        assert sentence in text
    arguments = yaml.safe_load(text)["data"]["init_args"]
    assert arguments == {
        "root": "my_images",
        "image_size": 36,
        "batch_size": 8,
        "val_fraction": 0.1,
        "split_seed": 0,
    }
    commands = [line.strip() for line in printed.splitlines() if line.startswith("  kd-lightning fit")]
    assert [command in text for command in commands] == [True, True]
    assert all("-c insects.yaml" in command for command in commands)


@pytest.mark.usefixtures("images")
def test_the_printed_command_trains(kd: Command) -> None:
    printed = kd("init", "insects.yaml", "my_images")
    command = next(line.split() for line in printed.splitlines() if line.startswith("  kd-lightning fit"))
    small = ["--data.image_size=32", "--model.network=torchvision/resnet18"]  # without published weights
    assert "The best checkpoint is" in kd(*command[1:], *QUIET, "--trainer.max_epochs=1", *small)
    config = yaml.safe_load(next(Path("lightning_logs").rglob("config.yaml")).read_text())
    assert config["data"]["init_args"]["batch_size"] == 8
    assert config["data"]["init_args"]["augmentation"]["preset"] == "standard", "the recipe's settings stay"


def test_its_recipes_exist() -> None:
    assert set(init_module.RECIPES) <= set(recipe_names())


def test_splits_sizes_and_imbalance_are_seen(kd: Command, tmp_path: Path) -> None:
    for split, count in (("train", 40), ("val", 3), ("test", 2)):
        save_images(tmp_path / "set" / split / "rare", max(1, count // 10), (300, 240))
        save_images(tmp_path / "set" / split / "usual", count, (300, 240))
    save_images(tmp_path / "set/unlabelled", 5, (300, 240))
    (tmp_path / "set/train/usual/notes.txt").touch()
    (tmp_path / "set/train/usual/broken.jpg").write_bytes(b"no image")
    printed = kd("init", "split", "set")
    assert "Images: train 45, val 4, test 3, unlabelled 5, in 2 classes" in printed
    assert "The largest class, usual, has 10.2 times as many as the smallest, rare; look at the accuracy of" in printed
    assert "300x240 each" in printed
    assert "1 image cannot be read, as 'set/train/usual/broken.jpg' cannot be read" in printed
    assert "1 file of 'set/train' is left out" in printed
    arguments = yaml.safe_load(Path("split.yaml").read_text())["data"]["init_args"]
    assert set(arguments) == {"root", "batch_size"}, "the recipe chooses the size of photographs"


@pytest.fixture
def table(kd: Command, tmp_path: Path) -> Path:
    """Images in one folder, and a file of their labels."""
    save_images(tmp_path / "loose", 8, (90, 70))
    labels = ("ant;bee", "ant", "-", "bee", "ant;bee", "", "ant", "bee;new ant")
    rows = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    (tmp_path / "loose/my labels.csv").write_text("\n".join(["file,label", *rows]))
    return tmp_path / "loose/my labels.csv"


@pytest.mark.usefixtures("table")
def test_labels_in_a_csv_file_are_counted_and_written(kd: Command) -> None:
    printed = kd("init", "several", "loose", "--labels", "my labels.csv")
    assert "Images: train 7, unlabelled 1, in 3 classes" in printed
    assert "Images of each class: ant 4, bee 4, new ant 1" in printed
    assert "An image may have several classes; it has 1.3 on average, and 1 have none" in printed
    config = yaml.safe_load(Path("several.yaml").read_text())["data"]["init_args"]
    assert (config["labels"], config["val_fraction"]) == ("my labels.csv", 0.1)
    data = ImageFolderDataModule(config["root"], labels=config["labels"])
    assert (data.classes, data.multi_label) == (("ant", "bee", "new ant"), True)


def test_a_csv_files_own_splits_are_kept(kd: Command, table: Path) -> None:
    rows = [f"{number}.png,{'ab'[number % 2]},{'train' if number < 4 else 'val'}" for number in range(8)]
    table.write_text("\n".join(["file,label,split", *rows]))
    assert "Images: train 4, val 4, in 2 classes" in kd("init", "split", "loose", "--labels", "my labels.csv")
    assert "val_fraction" not in Path("split.yaml").read_text()


def test_labels_that_cannot_be_read_are_refused(kd: Command, table: Path) -> None:
    assert "if my labels.csv has the columns file,label, add --labels 'my labels.csv'" in refusal(kd, "a", "loose")
    assert "There is no file 'other.csv' of labels" in refusal(kd, "a", "loose", "--labels", "other.csv")
    table.write_text("file,label\n0.png,\n")
    assert "gives no training image a label; label some." in refusal(kd, "a", "loose", "--labels", "my labels.csv")


def test_many_classes_are_shortened(tmp_path: Path) -> None:
    for number in range(30):
        save_images(tmp_path / f"{number:02}", 1 + number % 3, (8, 8))
    assert "..., " in survey(tmp_path).lines[1]
    assert len(survey(tmp_path).lines[1]) < 200


@pytest.mark.usefixtures("images")
def test_a_gpu_gets_larger_batches(kd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init_module, "gpu_memory", lambda: 24 * 2**30)
    assert init_module.batch_size(100_000, 24 * 2**30) == 128
    kd("init", "large", "my_images")
    assert "for a GPU of 24.0 GiB; of each process" in Path("large.yaml").read_text()


@pytest.mark.usefixtures("images")
def test_a_file_that_exists_is_never_overwritten(kd: Command) -> None:
    Path("mine.yaml").write_text("kept: true\n")
    for name in ("mine", "mine.yaml"):
        with pytest.raises(SystemExit, match=r"init: 'mine\.yaml' exists and is kept as it is; choose another name"):
            kd("init", name, "my_images")
    assert Path("mine.yaml").read_text() == "kept: true\n"


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("missing", "There is no folder 'missing'; name the folder of your images."),
        ("empty", "'empty' holds no images; put those of each class into empty/<class>/."),
        ("my_images/ants/0.png", "'my_images/ants/0.png' is a file; name the folder that holds a folder of images"),
        ("my_images/ants", "'my_images/ants' holds images and no class folders; put the images of each class into"),
        ("deep", "The folders in 'deep' (animals, plants) hold no images but further folders (cats, dogs); name the"),
        ("above", "'above' has no folder train/, and only the folder 'deep'"),
        ("unsure", "has no folder train/, but 'training'; rename that to 'train'"),
        ("broken", "None of the 2 images can be read"),
    ],
)
def test_folders_that_are_no_classes_are_refused(kd: Command, tmp_path: Path, folder: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("animals/cats", "animals/dogs", "plants/trees"):
        save_images(tmp_path / "deep" / name, 2)
        save_images(tmp_path / "above/deep" / name, 2)
    save_images(tmp_path / "unsure/training/a", 1)
    save_images(tmp_path / "unsure/other/a", 1)
    for name in ("a", "b"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "x.jpg").write_bytes(f"no image {name}".encode())
    assert reason in refusal(kd, "insects", folder)


@pytest.mark.usefixtures("images")
def test_a_folder_to_write_into_must_exist(kd: Command) -> None:
    assert "There is no folder 'configs' to write insects.yaml into; create it" in refusal(
        kd, "configs/insects", "my_images"
    )
