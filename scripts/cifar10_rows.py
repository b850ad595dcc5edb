"""Rows of reproduce_cifar10.py: recipes, their options and the networks they start from."""

import json
from dataclasses import dataclass, replace
from typing import Any

RESNET56 = [
    "--model.network=kd_lightning.networks.from_checkpoint",
    "--model.network.network=kd_lightning.networks.resnet56",
    "--model.network.network.shortcut=A",
    '--model.network.rename={"linear.": "fc."}',
    "--model.network.mean=[0.485, 0.456, 0.406]",
    "--model.network.std=[0.229, 0.224, 0.225]",
]
RESNET56_TEACHER = ["--model.teacher.network=kd_lightning.networks.resnet56", "--model.teacher.network.shortcut=A"]
BLOCKS = {f"layer{i}.{k}": f"layer{i}.{4 * k}" for i in (1, 2, 3) for k in (0, 1, 2)}
EVERY_FOURTH_BLOCK = [
    "--model.student=kd_lightning.networks.from_checkpoint",
    "--model.student.network=kd_lightning.networks.resnet20",
    "--model.student.network.shortcut=A",
    f"--model.student.layers={json.dumps(BLOCKS)}",
]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: Description.
        recipe: Name of a packaged recipe.
        epochs: Epochs of training.
        options: Options of fit.
        teacher: Row of the teacher.
        alone: Row of the same student without a teacher.
        initial: Row whose network, or some layers of it, initializes the student.
        repeated: Run with several seeds.
        published_weights: Start from the published weights (``--weights``).
        cache: Folder of the teacher's cached logits, if they are cached.
        tested: Measure on the test images, as trials that select a recipe do not.
        stage: Position in the order of training: rows of lower stages run first.
    """

    what: str
    recipe: str
    epochs: int
    options: tuple[str, ...] = ()
    teacher: str | None = None
    alone: str | None = None
    initial: str | None = None
    repeated: bool = False
    published_weights: bool = False
    cache: str | None = None
    tested: bool = True
    stage: int = 1


def _short(
    what: str,
    recipe: str,
    *options: str,
    initial: str | None = None,
    repeated: bool = False,
    stage: int = 1,
    cached: bool = True,
) -> Row:
    options = (*RESNET56_TEACHER, "--model.learning_rate=0.2", "--data.views=10", *options)
    cache = "resnet56_v10" if cached else None
    return Row(what, recipe, 10, options, "teacher_resnet56", "student_10", initial, repeated, cache=cache, stage=stage)


def _long(what: str, epochs: int, views: int | None = None, repeated: bool = False, stage: int = 3) -> Row:
    options, cache = ((), None) if views is None else ((f"--data.views={views}",), f"resnet34_v{views}")
    teacher, alone = "teacher_resnet34", f"student_{epochs}"
    return Row(what, "cifar10/distill", epochs, options, teacher, alone, repeated=repeated, cache=cache, stage=stage)


def _hint_losses(weight: float) -> str:
    """Return the option of KD with hints: blocks of the student learn the outputs of the blocks they copy."""
    blocks = {student: teacher for student, teacher in BLOCKS.items() if student.endswith(".2")}
    hint = {"weight": weight, "student_layers": [*blocks], "teacher_layers": [*blocks.values()], "regressor": False}
    losses = {
        "hard": {"class_path": "HardTargetLoss", "init_args": {"weight": 0.1}},
        "soft": {"class_path": "SoftTargetLoss", "init_args": {"weight": 0.9, "temperature": 4.0}},
        "hint": {"class_path": "HintLoss", "init_args": hint},
    }
    return f"--model.losses={json.dumps(losses)}"


SHORT = {
    "teacher_resnet56": Row(
        "ResNet-56, published weights, 3 epochs of fine-tuning",
        "cifar10/teacher",
        3,
        (*RESNET56, "--model.learning_rate=0.02"),
        published_weights=True,
        stage=0,
    ),
    "student_10": Row(
        "ResNet-20 alone", "cifar10/student", 10, ("--model.learning_rate=0.2", "--data.views=10"), repeated=True
    ),
    "kd_10": _short("KD, T = 4, alpha = 0.9", "cifar10/distill", repeated=True),
    "kd_online_10": _short("KD, the teacher run in each step", "cifar10/distill", cached=False),
    "dkd_10": _short("DKD", "cifar10/dkd", "--model.losses.decoupled.warmup_epochs=1"),
    "dist_10": _short("DIST", "cifar10/dist"),
    "standardized_10": _short("KD on standardized logits", "cifar10/logit_standardization"),
    "kd_layers_10": _short(
        "KD, the student begins with every fourth block of the teacher",
        "cifar10/distill",
        "--model.learning_rate=0.05",
        *EVERY_FOURTH_BLOCK,
        initial="teacher_resnet56",
        repeated=True,
    ),
    "kd_layers_hints_10": _short(
        "the same, and its blocks learn the outputs of the teacher's (hints, weight 10)",
        "cifar10/distill",
        "--model.learning_rate=0.05",
        *EVERY_FOURTH_BLOCK,
        _hint_losses(10.0),
        initial="teacher_resnet56",
        cached=False,
    ),
    "pruned_10": _short(
        "`kd_10`, half of its multiply-accumulates pruned, 10 epochs more of KD",
        "cifar10/prune",
        "--model.learning_rate=0.1",
        "--trainer.callbacks=kd_lightning.callbacks.PruneNetwork",
        "--trainer.callbacks.round_to=16",
        initial="kd_10",
        stage=2,
    ),
}
TEACHER, KD, KD_LAYERS = SHORT["teacher_resnet56"], SHORT["kd_10"], SHORT["kd_layers_10"]


def _trial(row: Row, what: str, *options: str, **changes: Any) -> Row:
    """Return a shorter training of a row with other options, compared by validation accuracy."""
    changes = {"options": (*row.options, *options), "alone": None, "repeated": False, "tested": False, **changes}
    return replace(row, what=what, epochs=3, **changes)


SEARCH = {
    "teacher_smooth": _trial(TEACHER, "the teacher, label smoothing 0.1", "--model.label_smoothing=0.1"),
    "search_student": _trial(SHORT["student_10"], "ResNet-20 alone"),
    "search_kd": _trial(KD, "KD: T = 4, alpha = 0.9, one cycle to 0.2, V = 10"),
    "search_kd_t2": _trial(KD, "KD, T = 2", "--model.temperature=2"),
    "search_kd_t8": _trial(KD, "KD, T = 8", "--model.temperature=8"),
    "search_kd_alpha_0.5": _trial(KD, "KD, alpha = 0.5", "--model.alpha=0.5"),
    "search_kd_alpha_1": _trial(KD, "KD, alpha = 1", "--model.alpha=1"),
    "search_kd_lr_0.1": _trial(KD, "KD, one cycle to 0.1", "--model.learning_rate=0.1"),
    "search_kd_lr_0.4": _trial(KD, "KD, one cycle to 0.4", "--model.learning_rate=0.4"),
    "search_kd_smooth": _trial(KD, "KD from `teacher_smooth`", teacher="teacher_smooth", cache="smooth_v10"),
    "search_layers": _trial(KD_LAYERS, "KD from every fourth block: T = 4, alpha = 0.9, one cycle to 0.05"),
    "search_layers_lr_0.02": _trial(KD_LAYERS, "the same, one cycle to 0.02", "--model.learning_rate=0.02"),
    "search_layers_hints_1": _trial(KD_LAYERS, "the same and hints, weight 1", _hint_losses(1.0), cache=None),
    "search_layers_hints_10": _trial(KD_LAYERS, "the same and hints, weight 10", _hint_losses(10.0), cache=None),
}
LONG = {
    "teacher_resnet34": Row("ResNet-34", "cifar10/teacher", 30, stage=0),
    "student_50": Row("ResNet-20 alone", "cifar10/student", 50, repeated=True),
    "kd_50": _long("KD, the teacher run in each step", 50, repeated=True, stage=1),
    **{f"kd_v{v}_50": _long(f"KD, V = {v}", 50, views=v) for v in (1, 4, 16, 32)},
    "student_200": Row("ResNet-20 alone", "cifar10/student", 200, stage=4),
    "kd_200": _long("KD, the teacher run in each step", 200, stage=4),
}
ROWS = {**SHORT, **SEARCH, **LONG}
GROUPS = {"short": list(SHORT), "search": list(SEARCH), "long": list(LONG)}
