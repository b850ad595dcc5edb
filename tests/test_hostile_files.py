"""Files that are damaged or meant to hurt: none runs code, gives wrong weights, or reaches beyond its place."""

import csv
import json
import os
import pickle
import random
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, DistillationModule, TeacherModule
from kd_lightning.callbacks import PredictionWriter
from kd_lightning.files.atomic import atomic_write
from kd_lightning.losses import ContrastiveLoss, HardTargetLoss, HintLoss
from kd_lightning.networks import EnsembleTeacher, ResNet, from_checkpoint, read_checkpoint
from kd_lightning.teacher.output_cache import OutputCache

Command = Callable[..., str]
Networks = Callable[..., nn.Module]
Trainers = Callable[..., pl.Trainer]

RUN = Path("lightning_logs/digits/student/version_0")
LAST = RUN / "checkpoints/last.ckpt"
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SHORT = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]
COMMANDS = ["fit", "validate", "test", "predict"]
SHAPE: dict[str, Any] = {"blocks": [1, 1, 1], "widths": [2, 4, 8], "in_channels": 1}
"""Of the digits' student."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run of the digits' student."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["kd-lightning", "fit", "-c", "digits/student", *SHORT])
        from kd_lightning.__main__ import main

        main()
    return folder


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """A module that could be imported; records whether it was."""
    (tmp_path / "stranger.py").write_text(
        "from torch import nn\nopen('ran', 'w').close()\nclass Network(nn.Linear): pass\nmake = Network\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: "stranger" in sys.modules or (tmp_path / "ran").exists()
    sys.modules.pop("stranger", None)


class Bomb:
    """Unpickled carelessly, it creates the file ``ran``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def bomb(path: Path, content: dict[str, Any] | None = None, layout: str = "zip") -> Path:
    """A checkpoint with code in it, which is a live one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": {}, **(content or {}), "extra": Bomb()}
    if layout == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
        torch.load(path, weights_only=False)
    Path("ran").rmdir()
    return path


def sentence(kd: Command, *arguments: str) -> str:
    """The one sentence with which a command is refused."""
    with pytest.raises(SystemExit) as refusal:
        kd(*arguments)
    message = str(refusal.value.code)
    assert message.startswith(f"kd-lightning {arguments[0]}: ")
    assert "\n" not in message
    return message


def filled(path: str | Path, role: str = "network", **shape: Any) -> list[str]:
    """The flags that fill a network of a recipe from a file."""
    flags = {"": "kd_lightning.networks.from_checkpoint", ".path": path, ".network": "kd_lightning.networks.ResNet"}
    flags |= {f".network.{name}": json.dumps(value) for name, value in {**SHAPE, **shape}.items()}
    return [f"--model.{role}{name}={value}" for name, value in flags.items()]


def student() -> ResNet:
    return ResNet(**SHAPE)


def same(first: Any, second: Any) -> bool:
    """Whether nested plain data and tensors are equal to the bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


# --- code in a file


@pytest.mark.parametrize("role", ["network", "teacher"])
@pytest.mark.parametrize("command", [*COMMANDS, "layers"])
def test_no_command_runs_code_from_a_file_that_fills_a_network(kd: Command, command: str, role: str) -> None:
    path = bomb(Path("evil.ckpt"))
    recipe = "digits/student" if role == "network" else "digits/distill"
    options = [] if command == "layers" else QUIET
    if role == "teacher" and command not in ("fit", "layers"):
        torch.save({"state_dict": {}, "kd_lightning_format": 1}, "own.ckpt")
        options = [*options, "--ckpt_path", "own.ckpt"]
    message = sentence(kd, command, "-c", recipe, *filled(path, role), *options)
    assert "'evil.ckpt' is not a checkpoint of tensors and plain data" in message
    assert not Path("ran").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_from_a_checkpoint(kd: Command, here: Path, command: str) -> None:
    for path in LAST.parent.iterdir():
        bomb(path, read_checkpoint(path))
    for given in ("last", str(LAST)):
        assert str(LAST) in sentence(kd, command, "-c", "digits/student", "--ckpt_path", given, *SHORT)
    assert not Path("ran").exists()


def test_no_run_that_goes_on_by_itself_runs_code(kd: Command, here: Path) -> None:
    for path in LAST.parent.iterdir():
        bomb(path, read_checkpoint(path))
    printed = kd("fit", "-c", "digits/student", "--ckpt_path", "auto", *SHORT)
    assert printed.count("Skipped: ") == 2
    assert "There is no checkpoint to resume from, so the run starts from the beginning." in printed
    assert not Path("ran").exists()


@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE")
@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".th", ".safetensors"])
def test_no_format_runs_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Networks, suffix: str, layout: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what torch reads where it is not told
    path = bomb(Path("evil"), layout=layout).rename(f"evil{suffix}")
    reads: list[Callable[[], Any]] = [
        lambda: read_checkpoint(path),
        lambda: from_checkpoint(small(), path),
        lambda: EnsembleTeacher([small(), from_checkpoint(small(), path)]),
        lambda: TeacherModule.load_from_checkpoint(path, network=small()),
        lambda: DistillationModule.load_from_checkpoint(path, student=small()),
    ]
    for read in reads:
        with pytest.raises(ValueError, match=re.escape(repr(str(path)))):
            read()
    assert not Path("ran").exists()


@pytest.mark.parametrize("method", COMMANDS)
def test_no_trainer_runs_code(
    monkeypatch: pytest.MonkeyPatch, here: Path, make_trainer: Trainers, digits: DigitsDataModule, method: str
) -> None:
    path = bomb(here / "evil.ckpt", read_checkpoint(LAST))
    with pytest.raises(ValueError, match=r"evil\.ckpt' is not a checkpoint of tensors and plain data"):
        getattr(make_trainer(), method)(TeacherModule(student()), datamodule=digits, ckpt_path=path)
    with pytest.raises(ValueError, match=r"evil\.ckpt' is not a checkpoint of tensors and plain data"):
        getattr(make_trainer(), method)(TeacherModule(student()), datamodule=digits, ckpt_path=path, weights_only=False)
    assert not Path("ran").exists()


def test_no_data_module_runs_code(here: Path) -> None:
    """Lightning reads it."""
    content = read_checkpoint(LAST)
    with pytest.raises(pickle.UnpicklingError):
        DigitsDataModule.load_from_checkpoint(bomb(here / "evil.ckpt", content))
    assert not Path("ran").exists()


def test_a_script_in_a_file_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        torch.jit.save(torch.jit.script(nn.Linear(2, 3)), tmp_path / "script.pt")
    with pytest.raises(ValueError, match=r"script\.pt' cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "script.pt")


def test_figures_of_a_run_are_read_as_data(kd: Command, here: Path) -> None:
    """By ``compare``, which does not open checkpoints."""
    bomb(LAST)
    for content in (pickle.dumps(Bomb()), b"", b"[]", b"{}", b'{"parameters": "x"}', b"[" * 100_000, b"\xff"):
        (RUN / "test.json").write_bytes(content)
        message = sentence(kd, "compare", "digits/student")
        assert f"'{RUN}/test.json' is damaged; run `kd-lightning test" in message
    assert not Path("ran").exists()


def test_a_cache_is_read_as_data(kd: Command, tmp_path: Path) -> None:
    torch.save(student().state_dict(), "teacher.pt")
    arguments = ["fit", "-c", "digits/distill", *SHORT, *filled(Path("teacher.pt"), "teacher")]
    arguments += ["--data.views=1", "--model.teacher_cache=logits", "--model.teacher_check=off"]
    kd(*arguments)
    view, record = Path("logits/view-0000.float16"), Path("logits/created_from.json")
    whole, evil = view.read_bytes(), pickle.dumps(Bomb())
    view.write_bytes(evil + bytes(len(whole) - len(evil)))
    kd(*arguments)  # asks the teacher again
    assert view.read_bytes() == whole
    record.write_bytes(evil)
    assert f"'{record}' is damaged; delete the folder" in sentence(kd, *arguments)
    assert not Path("ran").exists()


def test_a_record_that_is_nested_without_end_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "created_from.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"is damaged; delete the folder or name another one"):
        OutputCache(6, 3, 4, {"teacher": "a"}, tmp_path)


# --- classes that a file names

NETWORK = {"class_path": "stranger.Network", "init_args": {"in_features": 2, "out_features": 3}}
LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
FOREIGN: dict[str, dict[str, Any]] = {
    "network": {"network": NETWORK},
    "string": {"network": "stranger.Network"},
    "optimizer": {"optimizer": {"class_path": "stranger.make"}},
    "optimizer string": {"optimizer": "stranger.make"},
    "losses": {"losses": {"hard": {"class_path": "torch.nn.ReLU", "init_args": {"inner": NETWORK}}}},
    "list": {"teacher": {"class_path": "torch.nn.Linear", "init_args": {"networks": [LINEAR, [NETWORK]]}}},
    "dict_kwargs": {"network": {**LINEAR, "dict_kwargs": {"device": NETWORK}}},
    "dotted": {"network.class_path": "stranger.Network"},
    "module": {"_class_path": "stranger.Network"},
    "instantiator": {"_instantiator": "stranger.make"},
}
UNTYPED = "torch.ao.nn.intrinsic.ConvBn2d"
"""A network with an argument that takes whatever is given."""
SPELLED: dict[str, dict[str, Any]] = {
    "json": {"network": json.dumps(NETWORK)},
    "yaml": {"network": "class_path: stranger.Network\ninit_args: {in_features: 2, out_features: 3}"},
    "optimizer": {"optimizer": json.dumps({"class_path": "stranger.make"})},
    "untyped": {"network": {"class_path": UNTYPED, "init_args": {"conv": json.dumps(NETWORK)}}},
}
CLI = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "kd_lightning.TeacherModule"}


def naming(path: Path, hyper_parameters: dict[str, Any]) -> Path:
    """The checkpoint of a run, with other hyper-parameters added to its own."""
    content = read_checkpoint(path)
    torch.save({**content, "hyper_parameters": {**content["hyper_parameters"], **hyper_parameters}}, path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_a_checkpoint_that_names_a_foreign_class(
    kd: Command, here: Path, stranger: Callable[[], bool], command: str
) -> None:
    naming(LAST, FOREIGN["list"])
    message = sentence(kd, command, "-c", "digits/student", "--ckpt_path", "last", *SHORT)
    assert f"'{LAST}' names the class 'stranger.Network', which is not part of kd_lightning" in message
    assert not stranger()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_class_is_refused(here: Path, stranger: Callable[[], bool], kind: str) -> None:
    naming(LAST, FOREIGN[kind])
    with pytest.raises(ValueError, match=r"last\.ckpt' names the class 'stranger\..*in Python import 'stranger' first"):
        TeacherModule.load_from_checkpoint(LAST)
    assert not stranger()


@pytest.mark.parametrize("kind", SPELLED)
def test_a_foreign_class_is_refused_however_it_is_spelled(here: Path, stranger: Callable[[], bool], kind: str) -> None:
    naming(LAST, SPELLED[kind])
    with pytest.raises(ValueError, match=r"last\.ckpt' does not describe a module that can be rebuilt \(Parser key"):
        TeacherModule.load_from_checkpoint(LAST)
    assert not stranger()


def test_a_file_of_hyper_parameters_names_no_foreign_class(here: Path, stranger: Callable[[], bool]) -> None:
    Path("hparams.yaml").write_text(yaml.safe_dump({**CLI, "network": LINEAR, "optimizer": "stranger.make"}))
    with pytest.raises(ValueError, match="does not describe a module that can be rebuilt"):
        TeacherModule.load_from_checkpoint(LAST, hparams_file="hparams.yaml")
    assert not stranger()


def test_a_data_module_names_no_foreign_class(here: Path, stranger: Callable[[], bool]) -> None:
    content = read_checkpoint(LAST)
    torch.save({**content, "datamodule_hyper_parameters": {**CLI, "_class_path": "stranger.Network"}}, LAST)
    with pytest.raises(ValueError, match="blocked to prevent arbitrary code execution"):  # by Lightning
        DigitsDataModule.load_from_checkpoint(LAST)
    assert not stranger()


@pytest.mark.parametrize(
    ("command", "role"), [("fit", "network"), ("test", "network"), ("fit", "teacher"), ("layers", "teacher")]
)
def test_of_a_file_that_fills_a_network_only_the_weights_are_used(
    kd: Command, here: Path, stranger: Callable[[], bool], command: str, role: str
) -> None:
    """So a teacher that was trained with a class of the user's can be used where that class is missing."""
    path = shutil.copy(naming(LAST, {**FOREIGN["network"], **SPELLED["optimizer"]}), "file.ckpt")
    arguments = ["-c", "digits/student" if role == "network" else "digits/distill", *filled(path, role)]
    if command != "layers":
        arguments += [*SHORT, *(["--model.teacher_check=off"] if role == "teacher" else [])]
    assert "ResNet" in kd(command, *arguments) or command != "layers"
    assert not stranger()


RUNS = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"
PROCESS: dict[str, Any] = {
    "entrypoint": "touch", "args": ["ran"], "env": {}, "stdout": None, "stderr": None, "local_rank_id": 0,
    "numa_options": None,
}  # fmt: skip


@pytest.mark.parametrize("spelled", ["plain", "json"])
def test_no_class_that_is_known_starts_a_process(here: Path, spelled: str) -> None:
    """Torch has some."""
    starts: Any = {"class_path": RUNS, "init_args": PROCESS}
    starts = json.dumps(starts) if spelled == "json" else starts
    network = {"class_path": UNTYPED, "init_args": {"conv": starts, "bn": starts}}
    naming(LAST, {"network": network})
    with pytest.raises(ValueError, match=r"not a network, loss, optimizer or scheduler|can be rebuilt \(Parser key"):
        TeacherModule.load_from_checkpoint(LAST)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["torch.hub.load", "torch.load", "subprocess.Popen", "os.system", "builtins.exec"])
def test_what_is_no_part_of_a_module_is_refused(here: Path, name: str) -> None:
    naming(LAST, {"network": {"class_path": name, "init_args": {"f": "x"}}})
    with pytest.raises(ValueError, match=f"names '{name}', which is not a network, loss, optimizer or scheduler; pass"):
        TeacherModule.load_from_checkpoint(LAST)
    assert isinstance(TeacherModule.load_from_checkpoint(LAST, network=student()), TeacherModule)


# --- tags in YAML


TAGS = ["!!python/object/apply:os.mkdir [ran]", "!!python/object/new:os.mkdir [[ran]]"]


@pytest.mark.parametrize("place", ["-c", "--trainer", "--model", "--data", "--model.network", "--optimizer"])
def test_no_tag_in_a_file_makes_an_object(kd: Command, place: str) -> None:
    for tag in TAGS if place == "-c" else TAGS[:1]:
        Path("evil.yaml").write_text(f"trainer:\n  logger: {tag}\n" if place == "-c" else f"x: {tag}\n")
        for command in (*COMMANDS, "layers") if place == "-c" else ("fit",):
            _fails(kd, command, "-c", "digits/student", place, "evil.yaml")


@pytest.mark.parametrize("place", ["--trainer.logger", "--model.network", "--model.learning_rate", "--model.optimizer"])
def test_no_tag_in_an_argument_makes_an_object(kd: Command, place: str) -> None:
    _fails(kd, "fit", "-c", "digits/student", f"{place}={TAGS[0]}")


def _fails(kd: Command, *arguments: str) -> None:
    with pytest.raises((SystemExit, ValueError)) as ended:
        kd(*arguments)
    assert getattr(ended.value, "code", 2) not in (0, None)
    assert not Path("ran").exists()


# --- what is written


@pytest.mark.parametrize("method", ["ema", pytest.param("crd", marks=pytest.mark.slow)])
def test_what_a_command_writes_is_plain_data(kd: Command, method: str) -> None:
    torch.save(ResNet([2, 2, 2], [16, 32, 64], in_channels=1).state_dict(), "teacher.pt")
    kd("fit", "-c", f"digits/{method}", "--teacher", "teacher.pt", "--model.teacher_check=off", *SHORT)
    for command in ("test", "predict") if method == "ema" else ():
        kd(command, "-c", f"digits/{method}", *QUIET)
    assert sum(map(is_plain, Path("lightning_logs").rglob("*"))) >= 5


def is_plain(path: Path) -> bool:
    """Read a written file as what it is."""
    if path.suffix == ".ckpt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".yaml":
        yaml.safe_load(path.read_text())
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.is_file():
        assert path.suffix == ".csv" or path.name.startswith("events.out.tfevents")
        assert not path.read_bytes().startswith(b"\x80")
    return path.is_file()


@pytest.mark.filterwarnings("ignore:You are using the WeightAveraging.*")
def test_what_python_writes_is_plain_data(
    small: Networks, make_trainer: Trainers, digits: DigitsDataModule, tmp_path: Path
) -> None:
    losses = {
        "hard": HardTargetLoss(),
        "hint": HintLoss(student_layers=["layer1"], teacher_layers=["layer2"]),
        "crd": ContrastiveLoss(student_layers=["avgpool"], teacher_layers=["avgpool"], queue_size=64),
    }
    module = DistillationModule(small(), small(8), losses=losses, teacher_check="off", optimizer=torch.optim.AdamW)
    callbacks = [pl.callbacks.EMAWeightAveraging(), pl.callbacks.ModelCheckpoint(tmp_path / "saved", save_last=True)]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, limit_train_batches=2)
    trainer.fit(module, digits)
    trainer.save_checkpoint(tmp_path / "saved" / "by_hand.ckpt")
    files = list((tmp_path / "saved").iterdir())
    assert len(files) == 3
    for file in files:
        assert any(key.startswith("losses.") for key in torch.load(file, weights_only=True)["state_dict"])


# --- damage


def damaged(content: bytes, seed: int) -> bytes:
    """Cut somewhere, or one to three bits flipped."""
    draw = random.Random(seed)
    if seed % 2:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        bit = draw.randrange(8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def refuse_unless_ours(error: BaseException, path: str, seed: int) -> None:
    """Whether it is one of the package's sentences."""
    assert isinstance(error, ValueError | OSError), seed
    assert str(error).startswith(path), seed
    assert "\n" not in str(error), seed


def outcomes(path: Path, count: int, read: Callable[[], Any], expected: Any) -> tuple[int, int]:
    """How many of so many damages were refused in a sentence, and how many did not matter; others fail."""
    content, refused = path.read_bytes(), 0
    for seed in range(count):
        path.write_bytes(damaged(content, seed))
        try:
            found = read()
        except (ValueError, OSError) as error:
            refuse_unless_ours(error, repr(str(path)), seed)
            refused += 1
        else:
            assert same(found, expected), seed
    path.write_bytes(content)
    assert same(read(), expected)
    return refused, count - refused


def test_a_damaged_checkpoint_of_a_run_never_gives_wrong_weights(here: Path) -> None:
    expected = read_checkpoint(LAST)
    refused, harmless = outcomes(LAST, 200, lambda: read_checkpoint(LAST), expected)
    assert refused > 150 and harmless < 50  # noqa: PT018
    weights = from_checkpoint(student(), LAST).state_dict()
    outcomes(LAST, 200, lambda: from_checkpoint(student(), LAST).state_dict(), weights)
    outcomes(LAST, 20, lambda: TeacherModule.load_from_checkpoint(LAST).network.state_dict(), weights)


def test_a_damaged_state_dict_never_gives_wrong_weights(tmp_path: Path) -> None:
    path, expected = tmp_path / "weights.pt", student().state_dict()
    torch.save(expected, path)
    refused, _ = outcomes(path, 200, lambda: from_checkpoint(student(), path).state_dict(), expected)
    assert refused > 150


@pytest.mark.parametrize("format", ["safetensors", "th"])
def test_a_format_without_checksums_is_refused_where_it_is_cut(tmp_path: Path, format: str) -> None:
    path, weights = tmp_path / f"weights.{format}", student().state_dict()
    if format == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for seed in range(1, 400, 2):
        path.write_bytes(damaged(content, seed))
        with pytest.raises(ValueError, match=re.escape(repr(str(path)))):
            from_checkpoint(student(), path)


def test_a_damaged_cache_never_gives_wrong_logits(tmp_path: Path) -> None:
    folder, logits = tmp_path / "logits", torch.randn(40, 10)
    made_of = {"teacher": "a" * 64, "statistics": "mean (0.5,), std (0.2,)", "view_seed": "0"}
    opened = lambda: OutputCache(40, 10, 2, made_of, folder)  # noqa: E731
    opened().put(1, logits)

    def read() -> Tensor | None:
        cache = opened()
        if 1 not in cache:
            return None  # the teacher is asked again
        cache.load(1, torch.device("cpu"))
        return cache(torch.arange(40) * 2 + 1)

    expected = read()
    view, record = folder / "view-0001.float16", folder / "created_from.json"
    content = view.read_bytes()
    for seed in range(200):
        view.write_bytes(damaged(content, seed))
        assert read() is None, seed
    view.write_bytes(content)
    content, refused, said = record.read_bytes(), 0, set()
    for seed in range(200):
        record.write_bytes(damaged(content, seed))
        try:
            assert same(read(), expected), seed
        except ValueError as error:
            said.add(re.sub(r" \(.*\)", "", str(error).replace(str(folder), "")))
            refused += 1
    assert refused > 150
    assert said == {
        "'/created_from.json' is damaged; delete the folder or name another one.",
        "The logits in '' were computed differently; name another folder with teacher_cache, or delete this one.",
    }


def _tested_damaged(kd: Command, count: int) -> None:
    kd("test", "-c", str(RUN / "config.yaml"), "--ckpt_path", str(LAST), *QUIET)
    whole, content = json.loads((RUN / "test.json").read_text()), LAST.read_bytes()
    for seed in range(count):
        LAST.write_bytes(damaged(content, seed))
        (RUN / "test.json").unlink(missing_ok=True)
        try:
            kd("test", "--ckpt_path", str(LAST), *QUIET)
        except SystemExit as refusal:
            refuse_unless_ours(ValueError(refusal.code), f"kd-lightning test: '{LAST}' ", seed)
        else:
            found = json.loads((RUN / "test.json").read_text())
            assert (found["accuracy"], found["loss"]) == (whole["accuracy"], whole["loss"]), seed


def test_a_damaged_checkpoint_is_not_tested(kd: Command, here: Path) -> None:
    _tested_damaged(kd, 20)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_tested_often(kd: Command, here: Path) -> None:
    _tested_damaged(kd, 200)


# --- another network


def test_a_checkpoint_of_another_network_is_told_in_one_sentence(kd: Command, here: Path) -> None:
    for command in ("fit", "predict"):
        options = ["--model.network.widths=[2,4]", "--model.network.blocks=[1,1]", "--ckpt_path", str(LAST)]
        message = sentence(kd, command, "-c", "digits/student", *options, *SHORT)
        assert "The checkpoint does not fit this TeacherModule (unexpected: network.layer3.0.conv1.weight, " in message
        assert "of another shape: network.fc.weight is (10, 8) in the file and (10, 4) in the network)" in message
    other = TeacherModule(ResNet([1, 1], [2, 4], in_channels=1))
    with pytest.raises(ValueError, match=r"missing: network\.layer3\.0\.conv1\.weight.*build the network and the loss"):
        TeacherModule(student()).load_state_dict(other.state_dict())


@pytest.mark.parametrize("command", ["fit", "test"])
def test_weights_alone_are_no_checkpoint_of_a_run(kd: Command, command: str) -> None:
    weights = student().state_dict()
    for content in (weights, {"state_dict": weights}):
        torch.save(content, "weights.pt")
        message = sentence(kd, command, "-c", "digits/student", "--ckpt_path", "weights.pt", *QUIET)
        assert "'weights.pt' is not a checkpoint of a run; to use the weights in it, fill a network" in message
    with pytest.raises(ValueError, match="is not a checkpoint of a run"):
        TeacherModule.load_from_checkpoint("weights.pt", network=student())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.to(torch.complex64),
        lambda value: value.to_sparse(),
        lambda value: value.to("meta"),
    ],
    ids=["complex", "sparse", "meta"],
)
def test_numbers_that_cannot_be_copied_as_they_are_are_refused(
    tmp_path: Path, damage: Callable[[Tensor], Tensor]
) -> None:
    network, path = student(), tmp_path / "weights.pt"
    weights, before = network.state_dict(), {key: value.clone() for key, value in network.state_dict().items()}
    torch.save({**{key: value + 1 for key, value in weights.items()}, "fc.weight": damage(weights["fc.weight"])}, path)
    with pytest.raises(ValueError, match=r"weights\.pt' does not fit ResNet \(of another kind: fc\.weight\)"):
        from_checkpoint(network, path)
    assert same(network.state_dict(), before)


def test_keys_that_are_no_names_are_passed_over(tmp_path: Path) -> None:
    weights: dict[Any, Tensor] = {0: torch.rand(2), **student().state_dict()}
    torch.save(weights, tmp_path / "weights.pt")
    from_checkpoint(student(), tmp_path / "weights.pt")
    torch.save({0: torch.rand(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not contain weights"):
        from_checkpoint(student(), tmp_path / "weights.pt")


# --- places


@pytest.mark.parametrize("kind", ["up", "folder", "address"])
def test_a_checkpoint_cannot_have_files_deleted(kd: Command, here: Path, kind: str) -> None:
    """It says which checkpoint is superseded; Lightning would delete any folder."""
    precious = here / "precious"
    precious.mkdir()
    (precious / "thesis.ckpt").write_text("mine")
    content = read_checkpoint(LAST)
    for state in (state for name, state in content["callbacks"].items() if name.startswith("ModelCheckpoint")):
        up = f"{state['dirpath']}/../../../../../precious"
        target = {"up": f"{up}/thesis.ckpt", "folder": up, "address": f"local://{precious}"}[kind]
        low = torch.tensor(-1.0)
        state.update(dict.fromkeys(("kth_best_model_path", "best_model_path", "last_model_path"), target))
        state.update(best_k_models={target: low}, kth_value=low, best_model_score=low)
    torch.save(content, LAST)
    kd("fit", "-c", "digits/student", "--ckpt_path", "last", *SHORT, "--trainer.max_epochs=2")
    assert (precious / "thesis.ckpt").read_text() == "mine"


def test_a_checkpoint_that_is_superseded_is_deleted(kd: Command, here: Path) -> None:
    options = [*SHORT, "--checkpoint.filename={epoch}", "--checkpoint.save_top_k=1", "--checkpoint.monitor=null"]
    kd("fit", "-c", "digits/student", *options)
    kd("fit", "-c", "digits/student", "--ckpt_path", "last", *options, "--trainer.max_epochs=3")
    folder = RUN.with_name("version_1") / "checkpoints"
    assert {file.name for file in folder.iterdir()} - {"last-step.ckpt"} == {"epoch=2.ckpt", "last.ckpt"}


@pytest.mark.parametrize("name", ["../elsewhere", "digits/../../elsewhere", "/elsewhere", "digits/student/.."])
def test_a_recipe_s_name_leads_nowhere_else(kd: Command, tmp_path: Path, name: str) -> None:
    assert "is neither a file nor a recipe" in sentence(kd, "fit", "-c", name, *SHORT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "a.b", ""])
def test_the_name_of_a_loss_is_a_plain_word(small: Networks, name: str) -> None:
    with pytest.raises(ValueError, match="A loss cannot be called"):
        DistillationModule(small(), small(), losses={name: HardTargetLoss()})


class Named(DigitsDataModule):
    """Images and classes that are called like paths, formulas and rows."""

    classes = ("../../a", "/b", "=1+1", 'd"', "e\nf", "g,h", "", " ", "{i}", "\u202ej")

    def image_name(self, split: str, sample: int) -> str:
        return f"../../{self.classes[sample % 10]}"


def test_names_of_images_and_classes_stay_in_their_cells(
    small: Networks, make_trainer: Trainers, tmp_path: Path
) -> None:
    folder = tmp_path / "deep" / "folder"
    writer = PredictionWriter()
    make_trainer(callbacks=[writer], default_root_dir=folder).predict(TeacherModule(small()), Named(batch_size=360))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / "predictions.csv"]
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[0] for row in rows] == [f"../../{Named.classes[i % 10]}" for i in range(360)]
    assert {row[1] for row in rows} <= set(Named.classes)


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    """Someone else may write to the folder of a cache as well."""
    mine, folder = tmp_path / "mine", tmp_path / "logits"
    folder.mkdir()
    mine.write_text("mine")
    for name in ("created_from.json", "view-0001.float16"):
        (folder / name).symlink_to(mine)
        (folder / f"{name}.{os.getpid()}.tmp").symlink_to(mine)
    mine.write_text('{"kd_lightning_format": 1}')
    cache = OutputCache(6, 3, 4, {}, folder)
    cache.put(1, torch.ones(6, 3))
    assert 1 in cache
    with atomic_write(folder / "created_from.json") as file:
        file.write(b"{ }")
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert mine.read_text() == '{"kd_lightning_format": 1}'


def test_a_linked_folder_is_a_folder_like_others(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "logits").symlink_to(tmp_path / "disk")
    OutputCache(6, 3, 4, {}, tmp_path / "logits").put(1, torch.ones(6, 3))
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["created_from.json", "view-0001.float16"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "logits"]
