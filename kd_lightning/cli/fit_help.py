"""The beginning of `kd-lightning fit --help`: the options that matter; imports nothing."""

from typing import NamedTuple


class Option(NamedTuple):
    """An option of ``fit``.

    Attributes:
        flag: Its name.
        value: Placeholder for its value, an empty string for a switch.
        text: Its use, in one line.
        choices: Values that can be completed.
    """

    flag: str
    value: str
    text: str
    choices: tuple[str, ...] = ()


CONFIG = Option("-c", "NAME", "a recipe, a run to train again, or a YAML file; a later -c overrides an earlier one")
OPTIONS = {
    "The run": [
        CONFIG,
        Option("--teacher", "NAME", "the teacher: a recipe (its newest run), a run, or a file of weights"),
        Option(
            "--ckpt_path", "WHICH", "resume from last, auto (last, if there is one) or a file", ("last", "auto", "best")
        ),
        Option("--seed_everything", "N", "seed of weights and order (0)"),
        Option("--print_config", "", "print the whole configuration as YAML, and train nothing"),
    ],
    "The data": [
        Option("--data.root", "FOLDER", "your images, in a folder for each class"),
        Option("--data.image_size", "N", "height and width that images are cut to; the network's by default"),
        Option("--data.batch_size", "N", "images in a step of one process"),
        Option("--data.augmentation.preset", "NAME", "random changes", ("none", "light", "standard", "strong")),
        Option("--data.num_workers", "N", "processes that read images; 0 is best for images in memory"),
    ],
    "The networks and the objective": [
        Option("--model.student", "CLASS", "the student, by its import path (without a teacher: --model.network)"),
        Option("--model.temperature", "T", "softness of the teacher's probabilities (4)"),
        Option("--model.alpha", "A", "weight of the teacher's term, in [0, 1] (0.9)"),
        Option("--model.learning_rate", "LR", "highest rate of the schedule"),
        Option("--model.optimizer", "CLASS", "SGD, AdamW or another of torch.optim", ("SGD", "AdamW", "Adam")),
    ],
    "Time": [
        Option("--trainer.max_epochs", "N", "length of the training"),
        Option(
            "--trainer.precision", "P", "bf16-mixed is faster on most hardware", ("32-true", "bf16-mixed", "16-mixed")
        ),
        Option("--trainer.devices", "N", "how many GPUs; all by default"),
        Option("--trainer.accelerator", "NAME", "where to train; a GPU by default", ("auto", "gpu", "cpu")),
        Option(
            "--model.teacher_cache", "true", "run the teacher once for each of --data.views N views", ("true", "false")
        ),
    ],
}
"""The options that matter, by what they are about."""
_REST = """The rest:
  kd-lightning fit --help-all                     all options of Trainer and callbacks
  kd-lightning fit --model.help CLASS             the options of a module, as kd_lightning.DistillationModule
  kd-lightning fit --data.help CLASS              the options of a data module, as kd_lightning.ImageFolderDataModule
  kd-lightning fit -c digits/distill --print_config
  kd-lightning recipes                            what -c takes by name"""


def fit_help() -> str:
    """Return the options that matter, and how to see the rest.

    Example:
        >>> print(fit_help().splitlines()[0])
        usage: kd-lightning fit -c NAME [options]
    """
    lines = ["usage: kd-lightning fit -c NAME [options]", "", "Train a teacher, or distill a student."]
    for title, options in OPTIONS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {f'{option.flag} {option.value}':<34}{option.text}" for option in options]
    return "\n".join([*lines, "", _REST])
