"""Whatever a configuration says: `kd-lightning fit` trains it, or refuses it in one sentence before the first step."""

import contextlib
import copy
import io
import os
import tempfile
from collections.abc import Iterator
from inspect import isabstract
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_lightning import losses
from kd_lightning.losses import AlignmentLoss, Term

Configuration = dict[str, Any]

HERE = __name__


class Mine(nn.Module):
    """A user's network, with one of the habits of users' networks."""

    def __init__(self, habit: str = "none", width: int = 4) -> None:
        super().__init__()
        self.habit = habit
        self.layer1 = nn.Conv2d(1, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=habit == "in place")
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.Conv2d(1, 1, 1)
        self.fc = nn.Linear(width, 10)
        self.requires_grad_(habit != "frozen")

    def forward(self, images: Tensor) -> Any:
        maps = self.relu(self.layer1(images))
        logits = self.fc(self.dropout(maps.mean((2, 3))))
        return {"tuple": (logits, maps), "nan": logits / 0, "maps": maps}.get(self.habit, logits)


class TwoSteps(pl.Callback):
    """Ends the training after two steps of the optimizer."""

    taken = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        TwoSteps.taken = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        TwoSteps.taken = trainer.global_step
        trainer.should_stop = trainer.global_step >= 2


def _class(
    path: str, required: dict[str, st.SearchStrategy[Any]] | None = None, **optional: Any
) -> st.SearchStrategy[Configuration]:
    """Draw a class with its required arguments and some of the optional ones, each given as a strategy."""
    chosen = st.fixed_dictionaries(required or {}, optional=optional)
    return st.fixed_dictionaries({"class_path": st.just(path), "init_args": chosen})


def _of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


LAYERS = st.lists(_of(*["layer1", "layer2", "layer3", "avgpool"] * 4, "fc", "layer1.0.conv1", "layer9"), max_size=3)
SMALL = _of(0, 1, 2, 5)
POSITIVE = _of(0.07, 0.5, 1.0, 4.0)
ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "weight": _of(0.0, 0.5, 1.0, 100.0),
    "warmup_epochs": SMALL,
    "student_layers": LAYERS,
    "teacher_layers": st.none() | st.none() | LAYERS,
    "gather": st.booleans(),
    "dimensions": _of(1, 8),
    "queue_size": _of(1, 7, 64),
    "temperature": POSITIVE,
    "label_smoothing": _of(0.0, 0.1, 1.0),
    "initial_variance": POSITIVE,
    "power": _of(1, 2, 3),
    "regressor": st.booleans(),
    "standardize": st.booleans(),
    **{name: _of(0.0, 1.0, 25.0) for name in ("alpha", "beta", "gamma", "distance_weight", "angle_weight")},
}


def _loss(name: str) -> st.SearchStrategy[Configuration]:
    names = {name for name in _parameters(getattr(losses, name)) if name in ARGUMENTS}
    optional: dict[str, Any] = {name: ARGUMENTS[name] for name in sorted(names)}
    return _class(f"kd_lightning.losses.{name}", **optional)


def _parameters(kind: type) -> list[str]:
    return list(kind.__init__.__annotations__)  # type: ignore[misc]


NAMES = [
    name
    for name in losses.__all__
    if isinstance(getattr(losses, name), type)
    and issubclass(getattr(losses, name), Term)
    and not isabstract(getattr(losses, name))
]


def _terms(names: list[str]) -> st.SearchStrategy[Configuration]:
    called = _of(*["hard", "soft", "features"] * 4, "loss", "two words")
    return st.dictionaries(called, st.one_of(*map(_loss, names)), min_size=1, max_size=3)


BETWEEN_DOMAINS = [name for name in NAMES if issubclass(getattr(losses, name), AlignmentLoss)]
BETWEEN_NETWORKS = [name for name in NAMES if name not in BETWEEN_DOMAINS]

RESNET = _class(
    "kd_lightning.networks.ResNet",
    {"blocks": st.just([1, 1, 1]), "widths": _of([2, 4, 8], [2, 2, 2], [8, 4, 2]), "in_channels": st.just(1)},
    shortcut=_of("A", "B"),
    num_classes=_of(10, 10, 10, 10, 10, 7),
    stem_width=_of(4, 8, None),
)
NETWORK = st.one_of(
    *[RESNET] * 6,
    _class("kd_lightning.networks.resnet8x4", {"in_channels": st.just(1)}),
    *[_class("kd_lightning.networks.replace_head", {"network": RESNET, "num_classes": _of(10, 10, 3)})] * 2,
    _class(f"{HERE}.Mine", habit=_of("none", "none", "none", "in place", "frozen", "tuple", "nan", "maps")),
    _of({"class_path": "torch.nn.Flatten"}, {"class_path": "torch.nn.LazyLinear", "init_args": {"out_features": 10}}),
)
ENSEMBLE = _class(
    "kd_lightning.networks.EnsembleTeacher",
    {"networks": st.lists(RESNET, min_size=1, max_size=2)},
    average=_of("logits", "probabilities"),
    weights=_of(None, [1.0, 2.0]),
)

OPTIMIZER = st.one_of(
    _class("torch.optim.SGD", lr=_of(0.01, 0.1), momentum=_of(0.0, 0.9), nesterov=st.booleans()),
    _class("torch.optim.AdamW", lr=_of(0.001), betas=_of([0.9, 0.99], [0.9, 0.9])),
    _of({"class_path": "torch.optim.LBFGS"}, {"class_path": "torch.optim.SparseAdam"}),
)
SCHEDULER = st.one_of(
    _class("torch.optim.lr_scheduler.StepLR", {"step_size": _of(1, 2)}, gamma=_of(0.1, 1.0)),
    _class("torch.optim.lr_scheduler.CosineAnnealingLR", {"T_max": _of(1, 2)}),
    _class("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": st.just(0.1), "total_steps": _of(1, 2, 9)}),
    _class("torch.optim.lr_scheduler.ReduceLROnPlateau", factor=_of(0.1), patience=SMALL),
)
OPTIMIZATION = {
    "learning_rate": _of(0.001, 0.1),
    "weight_decay": _of(0.0, 5e-4),
    "optimizer": OPTIMIZER,
    "lr_scheduler": SCHEDULER,
    "lr_interval": _of("epoch", "epoch", "step"),
    "on_nonfinite": _of("stop", "skip"),
}
CACHED = _of(False, True, "cache")


def _module(path: str, needed: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[Configuration]:
    arguments = st.fixed_dictionaries(needed, optional={**OPTIMIZATION, **optional})
    return st.fixed_dictionaries({"class_path": st.just(path), "init_args": arguments})


TEACHING = _module(
    "kd_lightning.TeacherModule", {"network": NETWORK}, {"label_smoothing": _of(0.0, 0.1), "feature_cache": CACHED}
)
STUDENT = {
    "student": NETWORK,
    "teacher_check": _of("off", "off", "off", "warn", "error"),
    "teacher": st.one_of(NETWORK, NETWORK, ENSEMBLE),
}
DISTILLATION = _module(
    "kd_lightning.DistillationModule",
    {**STUDENT, "losses": _terms(BETWEEN_NETWORKS) | _terms(BETWEEN_NETWORKS) | _terms(NAMES)},
    {"teacher_cache": CACHED},
)
HINTON = _module(
    "kd_lightning.DistillationModule",
    STUDENT,
    {"temperature": POSITIVE, "alpha": _of(0.0, 0.5, 1.0), "teacher_cache": CACHED},
)
ADAPTATION = _module(
    "kd_lightning.AdaptationModule",
    {"network": NETWORK, "losses": _terms([*BETWEEN_DOMAINS * 3, "HardTargetLoss", "SoftTargetLoss"])},
    {},
)
DATA = _class(
    "kd_lightning.DigitsDataModule",
    batch_size=_of(1, 2, 7, 64, 64, 10**9),
    val_fraction=_of(0.001, 0.2, 0.999),
    augmentation=st.fixed_dictionaries(
        {},
        optional={
            "padding": _of(0, 1, 9),
            "flip": st.booleans(),
            "mixup": _of(0.0, 0.2),
            "cutmix": _of(0.0, 1.0),
        },
    ),
    num_workers=st.just(0),
    views=_of(None, 1, 2),
)
TRAINER = st.fixed_dictionaries(
    {},
    optional={
        "precision": _of("32", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
        "accumulate_grad_batches": _of(1, 2, 3),
        "gradient_clip_val": _of(None, 0.0, 0.5),
        "gradient_clip_algorithm": _of("norm", "value"),
        "max_epochs": _of(0, 1, 2, 2),
        "max_steps": _of(-1, -1, 0, 1, 2),
        "check_val_every_n_epoch": _of(1, 1, 2, None),
        "val_check_interval": _of(1, 2, 0.5, 1.0),
        "num_sanity_val_steps": _of(0, 2, -1),
        "log_every_n_steps": _of(1, 2, 50),
        "fast_dev_run": _of(False, True, 2),
        "enable_checkpointing": _of(True, True, True, False),
        "logger": st.booleans(),
        "limit_val_batches": _of(0, 1),
    },
)
PAIR = _class("kd_lightning.DomainPairDataModule", {"source": DATA, "target": DATA})
TASKS = st.one_of(
    *[st.fixed_dictionaries({"model": m, "data": DATA}) for m in (TEACHING, DISTILLATION, DISTILLATION, HINTON)],
    st.fixed_dictionaries({"model": ADAPTATION, "data": PAIR}),
    st.fixed_dictionaries({"model": TEACHING | HINTON | ADAPTATION, "data": DATA | PAIR}),
)
SETTINGS = st.fixed_dictionaries(
    {"trainer": TRAINER},
    optional={
        "checkpoint": st.fixed_dictionaries(
            {},
            optional={
                "monitor": _of("val/accuracy", "val/loss", "val/loss", "nonsense"),
                "save_top_k": _of(-1, 0, 1, 2),
            },
        ),
        "progress": st.fixed_dictionaries({}, optional={"every_n_train_steps": SMALL}),
        "seed_everything": _of(0, True, 7),
    },
)

NUMBERS = _of(-1, 0, 1, 3, -0.5, 0.0, 0.5, 1.5, 1e30, float("nan"), float("inf"))
NAMED = _of(
    "", "nonsense", "layer9", "no.such.Class", "torch.nn.Identity", "torch.optim.Adam", "kd_lightning.losses.No"
)
ANYTHING = (
    NUMBERS | NAMED | _of(None, True, [], {}, [-1], ["layer9"], [0, 0], {"weight": 1.0}, {"class_path": "no.Such"})
)
"""What may stand anywhere by mistake."""


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """A configuration in which each value may stand, with up to two that are replaced, added or left out."""
    configuration = copy.deepcopy({**draw(TASKS), **draw(SETTINGS)})
    for _ in range(draw(_of(0, 0, 1, 1, 1, 2))):
        holder, name = draw(st.sampled_from(list(_places(configuration))))
        kind = draw(_of("similar", "similar", "similar", "any", "added", "left out"))
        if kind == "added" and isinstance(holder, dict):
            holder["surplus"] = draw(ANYTHING)
        elif kind == "left out":
            del holder[name]
        elif kind == "similar" and isinstance(holder[name], int | float):
            holder[name] = draw(NUMBERS)
        elif kind == "similar" and isinstance(holder[name], str):
            holder[name] = draw(NAMED)
        elif kind == "any" or not isinstance(holder[name], dict | list):
            holder[name] = draw(ANYTHING)
    return configuration


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield value, name
        yield from _places(item)


def _refusal(configuration: Configuration) -> str | None:
    """What `kd-lightning fit` says against a configuration; ``None`` if it trains."""
    from kd_lightning.cli.lightning_cli import run

    TwoSteps.taken = 0
    errors = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        Path("random.yaml").write_text(yaml.safe_dump(configuration))
        arguments = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        arguments += ["--trainer.enable_model_summary=false", f"--trainer.callbacks+={HERE}.TwoSteps"]
        patch.setattr("sys.argv", ["kd-lightning", "fit", "-c", "random.yaml", *arguments])
        try:
            run()
        except SystemExit as stop:
            if stop.code in (None, 0):
                return None
            return stop.code if isinstance(stop.code, str) else errors.getvalue()
        finally:
            os.environ.pop("PL_GLOBAL_SEED", None)
    return None


def _check(configuration: Configuration) -> None:
    refusal = _refusal(configuration)
    event("trained" if refusal is None else "refused")
    if refusal is None:
        return
    assert refusal.startswith(("kd-lightning fit: ", "usage: ")), refusal
    if refusal.startswith("kd-lightning"):
        assert len(refusal.splitlines()) == 1
        # which figures there are to monitor only the first validation shows
        late = ", step " in refusal or "could not find the monitored key" in refusal
        assert TwoSteps.taken == 0 or late, f"after {TwoSteps.taken} steps: {refusal}"


COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=15, **COMMON)
@given(configurations())
def test_a_configuration_is_trained_or_refused(configuration: Configuration) -> None:
    _check(configuration)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=500, **COMMON)
@given(configurations())
def test_many_configurations_are_trained_or_refused(configuration: Configuration) -> None:
    _check(configuration)
