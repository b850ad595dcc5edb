"""Every recipe of the package runs for two steps on tiny data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from kd_lightning.networks import resnet34
from kd_lightning.recipes import describe, recipe_files, recipe_names, recipes

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.batch_size=4",
]


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for label in range(10):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40, 36), (25 * label, 100 * number, 0)).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("name", recipe_names())
def test_it_runs(name: str, kd: Callable[..., str], image_folder: Path, tmp_path: Path) -> None:
    arguments = ["fit", "-c", name, *QUICK]
    if not name.startswith("digits/"):
        arguments += ["--data=ImageFolderDataModule", f"--data.root={image_folder}", "--data.image_size=32"]
        arguments.append("--data.batch_size=4")
    if name.endswith("/distill"):
        arguments.append("--model.teacher_check=off")
        if name.startswith("digits/"):
            kd("fit", "-c", "digits/teacher", *QUICK)
        else:
            torch.save(resnet34().state_dict(), tmp_path / "teacher.pt")
            arguments += ["--teacher", str(tmp_path / "teacher.pt")]
    assert "The best checkpoint is" in kd(*arguments)


def test_each_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    recipes()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(20 < len(describe(name)) < 110 for name in recipe_names())


def test_an_unknown_one_lists_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'digits/distil' is neither a file nor a recipe; near ones are digits/dis"):
        recipe_files("digits/distil")
