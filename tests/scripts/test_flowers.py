"""The rows on photographs are commands of the command line, their pairs are pairs, and intervals are right."""

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from made_photographs import photograph

pytestmark = pytest.mark.usefixtures("beside_the_scripts")
SCRIPTS = Path(__file__).parents[2] / "scripts"
CLASSES = ["aster", "bellis", "calla"]


@pytest.fixture
def flowers() -> ModuleType:
    return importlib.import_module("reproduce_flowers")


@pytest.fixture
def tables() -> ModuleType:
    return importlib.import_module("flowers_table")


@pytest.fixture
def intervals() -> ModuleType:
    return importlib.import_module("paired_intervals")


def write_flowers(root: Path, train: int = 20, test: int = 4) -> Path:
    """Write photographs of each class into train/ and test/."""
    for split, count in [("train", train), ("test", test)]:
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = photograph(40, 40, seed=1000 * label + number + 500 * (split == "test"))
                image.save(root / split / name / f"{number:03}.jpg")
    return root


# --- the rows


@pytest.mark.parametrize("name", ["teacher", "strong", "few_alone", "few_distilled", "four", "fine"])
def test_each_row_is_a_command_of_the_command_line(
    name: str, flowers: ModuleType, kd: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    settings = flowers.Settings(write_flowers(tmp_path / "images"), tmp_path / "runs", batch_size=4, labels=6)
    settings.folder.mkdir()
    flowers.write_four_classes(settings)
    with pytest.raises(SystemExit) as ended:
        kd(*flowers.fit_command(name, 1, settings), "--print_config")
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    data, model = config["data"]["init_args"], config["model"]["init_args"]
    seed = 0 if name in ("teacher", "four") else 1  # what others learn from is trained once
    assert (data["seed"], data["split_seed"], config["seed_everything"]) == (seed, 0, seed)
    assert data["labels_per_class"] == (6 if name.startswith("few") else None)
    assert config["trainer"]["logger"]["init_args"]["version"] == f"seed_{seed}"
    if name in ("strong", "few_distilled"):
        assert model["teacher"]["init_args"]["path"] == str(settings.folder / "teacher" / "seed_0")
        assert model["student"]["dict_kwargs"]["num_classes"] == 3
    if name == "fine":
        loaded = model["network"]["init_args"]["network"]["init_args"]
        assert model["network"]["init_args"]["num_classes"] == 3
        assert loaded["network"]["dict_kwargs"]["num_classes"] == 2
        assert loaded["path"].endswith("runs/four/seed_0/checkpoints/best.ckpt")
        assert config["trainer"]["max_epochs"] == settings.epochs["fine"]
    if name == "four":
        assert model["network"]["dict_kwargs"]["num_classes"] == 2


def test_a_student_alone_on_few_labels_takes_as_many_steps_and_is_validated_as_often(
    flowers: ModuleType, tmp_path: Path
) -> None:
    from kd_lightning import ImageFolderDataModule

    root = write_flowers(tmp_path / "images")
    settings = flowers.Settings(root, tmp_path / "runs", batch_size=4, labels=6)
    given = dict(
        word.removeprefix("--").split("=", 1)
        for word in flowers.fit_command("few_alone", 0, settings)
        if word.startswith("--")
    )
    data = ImageFolderDataModule(
        str(root), image_size=32, batch_size=4, labels_per_class=6, labelled_only=True, split_seed=0
    )
    data.setup("fit")
    whole = ImageFolderDataModule(str(root), image_size=32, batch_size=4, split_seed=0)
    whole.setup("fit")
    epochs, each = int(given["trainer.max_epochs"]), int(given["trainer.check_val_every_n_epoch"])
    assert epochs // each == settings.epochs["student"]
    assert each * len(data.train_dataloader()) <= len(whole.train_dataloader())
    assert (each + 1) * len(data.train_dataloader()) > len(whole.train_dataloader())


def test_the_network_that_is_fine_tuned_has_seen_no_validation_image(flowers: ModuleType, tmp_path: Path) -> None:
    from kd_lightning import ImageFolderDataModule

    root = write_flowers(tmp_path / "images")
    settings = flowers.Settings(root, tmp_path)
    flowers.write_four_classes(settings)
    all_of_them = ImageFolderDataModule(str(root), image_size=32, split_seed=0)
    without_last = ImageFolderDataModule(str(root), labels=str(tmp_path / flowers.FOUR), image_size=32, split_seed=0)
    names = []
    for data in (all_of_them, without_last):
        data.setup("fit")
        ids = [number for batch in data.val_dataloader() for number in batch.ids.tolist()]
        names.append({Path(data.image_name("val", number)) for number in ids})
    assert without_last.classes == all_of_them.classes[:-1]
    assert names[1] == {name for name in names[0] if name.parent.name != CLASSES[-1]}
    assert len(names[1]) == 4


def test_logits_are_cached_for_each_teacher_and_augmentation(flowers: ModuleType, tmp_path: Path) -> None:
    settings = flowers.Settings(write_flowers(tmp_path / "images", train=2, test=1), tmp_path, batch_size=1, labels=1)
    folders = {}
    for name, arm in flowers.ARMS.items():
        words = flowers.fit_command(name, 2, settings)
        caches = [word.partition("=")[2] for word in words if word.startswith("--model.teacher_cache")]
        if caches:
            preset = next((word for word in words if "preset" in word), None)
            folders[name] = (caches[0], (arm.teacher, preset))
    assert len(folders) == 5
    assert len({cache for cache, _ in folders.values()}) == len(set(folders.values())) == 4
    assert folders["few_distilled"] == folders["distilled"]


def test_rows_come_with_the_rows_that_they_start_from(flowers: ModuleType) -> None:
    assert flowers.with_teachers(["strong"]) == ["teacher", "strong"]
    assert flowers.with_teachers(["fine", "crops"]) == ["crops", "four", "fine"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """The folder of a run of two rows, and what was printed: when it ran, and when it was asked for again."""
    pytest.importorskip("timm")
    place = tmp_path_factory.mktemp("flowers")
    root = write_flowers(place / "images")
    path = os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPTS / "reproduce_flowers.py"), "--root", str(root), "--folder", "runs"]
    command += ["--arms", "four", "fine", "--seeds", "3", "--size", "32", "--batch-size", "8", "--epochs", "1"]
    printed: list[list[str]] = []
    for _ in range(2):
        ended = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=250, env=environment)
        assert ended.returncode == 0, ended.stderr
        printed.append([line for line in ended.stdout.splitlines() if line.startswith("|")])
    first, again = printed
    return place / "runs", first, again


def test_the_figures_are_those_of_the_runs(ran: Any) -> None:
    folder, printed, _ = ran
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["four", "fine"]
    tested = json.loads((folder / "fine" / "seed_3" / "test.json").read_text())
    run = results["fine"][0]
    assert run["test"] == tested["accuracy"]
    assert len(run["right"]) == 12
    assert run["right"].count("1") / 12 == pytest.approx(tested["accuracy"], abs=1e-4)
    assert len(results["four"][0]["right"]) == 8
    assert any(line.startswith("| `fine` | Fine-tuned") for line in printed)


def test_finished_runs_are_kept(ran: Any) -> None:
    folder, first, second = ran
    assert first == second
    log = (folder / "log.txt").read_text()
    commands = [line.split()[2] for line in log.splitlines() if line.startswith("$ kd-lightning")]
    assert commands == ["fit", "fit", "test", "predict", "test", "predict"]


# --- differences


def random_answers(images: int, seeds: int = 3, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    return random.random((seeds, images)) < 0.8, random.random((seeds, images)) < 0.7


def test_the_interval_is_that_of_the_normal_distribution_where_images_are_many(intervals: ModuleType) -> None:
    better, worse = random_answers(4000)
    found = intervals.difference(better, worse)
    each = 100 * (better.astype(float) - worse).mean(0)
    half = 1.959964 * each.std(ddof=1) / len(each) ** 0.5
    assert found.points == pytest.approx(100 * (better.mean() - worse.mean()))
    assert (found.low, found.high) == pytest.approx((found.points - half, found.points + half), abs=0.05 * half)
    assert found.half_width == pytest.approx(half, rel=0.05)


def test_a_network_does_not_differ_from_itself_and_turned_differences_are_negative(intervals: ModuleType) -> None:
    better, worse = random_answers(200)
    assert intervals.difference(better, better) == (0, 0, 0)
    there, back = intervals.difference(better, worse), intervals.difference(worse, better)
    assert (back.points, back.low, back.high) == pytest.approx((-there.points, -there.high, -there.low))


def test_pairs_have_a_shorter_interval_than_networks_that_err_on_different_images(intervals: ModuleType) -> None:
    better, _ = random_answers(500)
    same = better.copy()
    same[:, :25] = False
    other = np.roll(same, 250, axis=1)
    assert intervals.difference(better, same).half_width < 0.5 * intervals.difference(better, other).half_width


def test_answers_to_other_images_are_no_pairs(intervals: ModuleType) -> None:
    with pytest.raises(ValueError, match="are no pairs"):
        intervals.difference(np.ones((1, 3), dtype=bool), np.ones((1, 4), dtype=bool))


def test_the_share_is_that_of_the_gap(intervals: ModuleType) -> None:
    alone, teacher = np.zeros((1, 400), dtype=bool), np.zeros((1, 400), dtype=bool)
    teacher[:, :200] = True
    distilled = teacher.copy()
    distilled[:, :50] = False
    found = intervals.share(distilled, alone, teacher)
    assert found.points == pytest.approx(75)
    assert 65 < found.low < 75 < found.high < 85
    assert intervals.share(teacher, alone, teacher) == (100, 100, 100)


# --- the table


def runs(val: float, right: str) -> list[dict[str, Any]]:
    test = right.count("1") / len(right)
    return [{"val": val, "test": test, "parameters": 90_000, "seconds": 120.0, "right": right}] * 2


def line_of(table: str, start: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(start))


def test_a_table_shows_differences_and_shares(tables: ModuleType) -> None:
    results = {
        "teacher": runs(0.9, "1" * 90 + "0" * 10),
        "alone": runs(0.7, "1" * 70 + "0" * 30),
        "distilled": runs(0.8, "1" * 80 + "0" * 20),
    }
    table = tables.tables(results)
    assert line_of(table, "| `alone`").endswith("| 0.09 M | 70.0 | 70.0, 70.0 | 70.0 | 2.0 |")
    assert "| +20.0 | +20.0 |" in line_of(table, "| `teacher` - `alone`")
    line = line_of(table, "| `distilled` - `alone`")
    assert "| +10.0 | +10.0 |" in line
    assert "| +10.0 to +10.0 | 50% (" in line
    assert "crops" not in table


def test_a_gap_that_is_too_small_has_no_share(tables: ModuleType) -> None:
    alone = runs(0.7, "1" * 70 + "0" * 30)
    for teacher in (runs(0.715, "1" * 90 + "0" * 10), runs(0.9, "1" * 73 + "0" * 27)):
        table = tables.tables({"teacher": teacher, "alone": alone, "distilled": runs(0.71, "1" * 72 + "0" * 28)})
        assert line_of(table, "| `distilled` - `alone`").endswith("| the gap is too small |")


def test_the_list_of_photographs_has_their_splits(flowers: ModuleType, tmp_path: Path) -> None:
    settings = flowers.Settings(write_flowers(tmp_path / "images", train=2, test=1), tmp_path)
    flowers.write_four_classes(settings)
    with (tmp_path / flowers.FOUR).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 4 + ["test"] * 2
    assert {row["label"] for row in rows} == set(CLASSES[:2])
    assert rows[0]["file"] == "train/aster/000.jpg"


def test_the_tables_of_the_readme_are_those_of_the_results_that_are_kept(tables: ModuleType) -> None:
    readme = tables.PAGE.read_text()
    made = tables.tables(json.loads(tables.KEPT.read_text()))
    assert tables.between(readme, *tables.MARKERS, made) == readme
