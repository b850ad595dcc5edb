"""The README's results are those of the runs in lightning_logs/published."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "lightning_logs" / "published"


def loaded(name: str) -> ModuleType:
    """Return a script as a module, which may import those beside it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def beside_the_scripts() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return loaded("published_results")


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    return loaded("reproduce_cifar10")


def test_the_table_of_the_readme_is_that_of_the_runs(results: ModuleType) -> None:
    readme = (PUBLISHED / "README.md").read_text()
    assert readme == results.with_tables(readme, results.published())


def test_every_published_run_has_its_configuration(reproduce: ModuleType) -> None:
    folders = [file.parent for file in PUBLISHED.glob("*/seed=*/metrics.json")]
    assert folders
    for folder in folders:
        row, seed = reproduce.ROWS[folder.parent.name], int(folder.name.partition("=")[2])
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["trainer"]["max_epochs"] == row.epochs
        assert config["seed_everything"] == seed
        assert len(json.loads((folder / "metrics.json").read_text())["val_accuracy"]) == row.epochs
        for option, value in dict(word.removeprefix("--").split("=", 1) for word in row.options).items():
            part, *names = option.split(".")
            if part != "trainer":
                assert matches(looked_up(config[part], names), yaml.safe_load(value)), f"{folder}: {option}"
        assert not any(Path(word).is_absolute() for word in words_of(config)), "a path of the machine it ran on"


def looked_up(node: Any, names: list[str]) -> Any:
    for name in names:
        node = node["init_args"][name] if "init_args" in node else node[name]
    return node


def matches(stored: Any, value: Any) -> bool:
    """Return whether a configuration holds the value of an option; a class may have more arguments."""
    if isinstance(stored, dict) and isinstance(value, str):
        return bool(stored["class_path"].endswith(value))
    if isinstance(stored, dict):
        return all(matches(stored[name], part) for name, part in value.items())
    if isinstance(stored, str) and isinstance(value, str):  # a class by its short name
        return stored.endswith(value)
    return bool(stored == value)


def words_of(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [word for value in node.values() for word in words_of(value)]
    if isinstance(node, list):
        return [word for value in node for word in words_of(value)]
    return [node] if isinstance(node, str) else []


def run(accuracy: float, teacher: str | None = None, alone: str | None = None) -> dict[str, Any]:
    test = {"accuracy": accuracy, "ece": 0.05}
    return {"what": "it", "teacher": teacher, "alone": alone, "val_accuracy": [0.5], "test": test, "hours": 0.25}


def test_a_row_has_mean_spread_and_fraction_of_the_gap(results: ModuleType) -> None:
    rows = {
        "big": [run(0.9)],
        "alone": [run(0.8), run(0.82)],
        "kd": [run(0.84, "big", "alone"), run(0.87, "big", "alone")],
    }
    lines = results.table(rows).splitlines()
    assert lines[2] == "| `big` | it | 90.00 |  |  | 0.050 | 1 | 0.25 |"
    assert lines[3] == "| `alone` | it | 81.00 ± 1.41 | 80.00 to 82.00 |  | 0.050 | 2 | 0.25 |"
    assert lines[4] == "| `kd` | it | 85.50 ± 2.12 | 84.00 to 87.00 | 50% | 0.050 | 2 | 0.25 |"
    rows["big"] = [run(0.81)]
    assert "| 84.00 to 87.00 |  | 0.050 |" in results.table(rows), "a teacher that is no better leaves no gap"


def test_the_trials_that_chose_a_recipe_are_a_table_of_validation_accuracy(results: ModuleType) -> None:
    tried = {"what": "it", "teacher": None, "alone": None, "val_accuracy": [0.5, 0.62, 0.61], "hours": 0.1}
    rows = {"big": [run(0.9)], "search_b": [tried], "search_a": [tried]}
    assert results.search_table(rows).splitlines()[2:] == [
        "| `search_a` | it | 62.0 | 0.10 |",
        "| `search_b` | it | 62.0 | 0.10 |",
    ]
    assert "search" not in results.table(rows)
    with pytest.raises(ValueError, match=r"README.md has no <!-- results, made by"):
        results.with_tables("# A page", rows)


def test_the_runs_of_a_row_begin_with_its_teacher(reproduce: ModuleType) -> None:
    runs = [(run.name, run.seed) for run in reproduce._runs(["kd_10", "dkd_10"], [0, 1])]
    assert runs == [("teacher_resnet56", 0), ("kd_10", 0), ("dkd_10", 0), ("kd_10", 1)]
    runs = [(run.name, run.seed) for run in reproduce._runs(["pruned_10", "kd_10"], [2])]
    assert runs == [("teacher_resnet56", 0), ("kd_10", 0), ("kd_10", 2), ("pruned_10", 0)]


@pytest.mark.parametrize(
    "name", ["teacher_resnet56", "kd_10", "dkd_10", "search_kd_smooth", "search_layers_hints_1", "kd_v4_50"]
)
def test_the_command_of_a_row_is_one_of_the_command_line(
    name: str, reproduce: ModuleType, kd: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    added = ["--data=kd_lightning.ImageFolderDataModule", "--data.root=images"]
    fit = reproduce.RowRun(name, 1)._fit(added, tmp_path / "weights.th")
    with pytest.raises(SystemExit) as ended:
        kd(*fit, "--print_config")
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["init_args"]["root"] == "images"
    assert config["trainer"]["max_epochs"] == reproduce.ROWS[name].epochs
    assert config["trainer"]["logger"]["init_args"]["version"] == "seed=1"


def test_an_interrupted_run_resumes_from_its_own_configuration(
    reproduce: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = reproduce.RowRun("student_10", 2)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("")
    commands = reproduce.commands_left(reproduce.Run(run.folder), run._fit([], None))
    assert commands[0] == ["fit", "-c", str(run.folder / "config.yaml"), "--ckpt_path=auto"]


def test_published_runs_are_repeated_in_another_folder_only(
    reproduce: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for row, seed in [("teacher_resnet56", 0), ("kd_10", 0)]:
        figures = tmp_path / row / f"seed={seed}" / "metrics.json"
        figures.parent.mkdir(parents=True)
        figures.write_text("{}")
    command = ["reproduce_cifar10", "kd_10", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--seeds", "0"])
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    assert ended.value.code == 0
    assert "contains all of these runs; name another --folder to repeat them" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*command, "--seeds", "1"])  # which needs the teacher's weights
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert (
        f"{tmp_path / 'teacher_resnet56' / 'seed=0'} contains metrics, but not best.ckpt; train it in another"
        in printed
    )


def test_a_run_finds_its_teacher_and_the_logits_in_its_folder(reproduce: ModuleType, tmp_path: Path) -> None:
    fit = reproduce.RowRun("kd_layers_10", 1, tmp_path)._fit([], None)
    teacher = tmp_path / "teacher_resnet56" / "seed=0"
    assert f"--teacher={teacher}" in fit
    assert f"--model.student.path={teacher / 'checkpoints' / 'best.ckpt'}" in fit
    assert f"--model.teacher_cache={tmp_path / 'teacher_logits' / 'resnet56_v10'}" in fit
