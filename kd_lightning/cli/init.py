"""`kd-lightning init`: a commented configuration for a folder of images."""

import shlex
from pathlib import Path

from kd_lightning.cli.image_survey import Survey, survey
from kd_lightning.errors import OutputExistsError, UserError
from kd_lightning.files.atomic import atomic_write
from kd_lightning.files.byte_count import describe_bytes

RECIPES = ("photos/finetune", "photos/distill")
"""Recipes that train on a user's own images: a teacher, and its student. Their options are those of their folder."""
_BYTES_PER_IMAGE = 160 * 2**20
"""Memory of a GPU that an image of 224x224 takes while a ResNet-50 trains in half precision, with some room."""
_LOG_EVERY = 50
"""Steps between two logged values that Lightning chooses, and warns if an epoch has fewer."""
_SMALL = 64
"""Pixels up to which images are trained on at their own size."""


def init(name: str, folder: str, labels: str | None = None) -> None:
    """Write a commented YAML file for a folder of images, NAME.yaml, and print the commands that use it.

    Args:
        name: Name of the YAML file, with or without .yaml; a file that exists is never overwritten.
        folder: Folder of images, with a folder for each class, or with train/, val/ and test/ that hold these.
        labels: CSV file in place of class folders, relative to the folder: file,label or, for several classes an image,
            file,label;label.

    Raises:
        OutputExistsError: If the file exists.
        UserError: If the folder does not hold images in class folders, or the file does not name them.
    """
    file = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml").expanduser()
    if file.exists():
        raise OutputExistsError(f"{str(file)!r} exists and is kept as it is; choose another name, or delete it.")
    if file.parent != Path() and not file.parent.is_dir():
        raise UserError(f"There is no folder {str(file.parent)!r} to write {file.name} into; create it first.")
    found = survey(Path(folder).expanduser(), labels)
    commands = [f"kd-lightning fit -c {recipe} -c {shlex.quote(str(file))}" for recipe in RECIPES]
    with atomic_write(file) as opened:
        words = ["kd-lightning", "init", name, folder, *(["--labels", labels] if labels is not None else [])]
        opened.write(_text(found, folder, labels, commands, shlex.join(words)).encode())
    print("\n".join(f"{line}." for line in found.lines))
    print(f"\n{file} is written; look into it, and then fine-tune a teacher and distill it into a student:")
    for command in commands:
        print(f"  {command}")


def _text(found: Survey, folder: str, labels: str | None, commands: list[str], written_by: str) -> str:
    memory = gpu_memory()
    size = batch_size(found.counts["train"], memory)
    device = f"a GPU of {describe_bytes(memory)}" if memory else "the CPU"
    lines = [
        f"# Written by `{written_by}`. Every option of the data module can be set here; see --data.help",
        "# kd_lightning.ImageFolderDataModule. The recipe has the rest. To fine-tune a teacher, and to distill it:",
        *(f"#   {command}" for command in commands),
        "",
        *(f"# {line}" for line in found.lines),
        "data:",
        "  class_path: kd_lightning.ImageFolderDataModule",
        "  init_args:",
        f"    root: {_quoted(folder)}",
        *([] if labels is None else [f"    labels: {_quoted(labels)}"]),
        *_size_lines(found),
        f"    batch_size: {size}  # for {device}; of each process",
        *_split_lines(found),
        *_trainer_lines(found, size),
    ]
    return "\n".join(lines) + "\n"


def _size_lines(found: Survey) -> list[str]:
    side = found.median_side
    if side <= _SMALL:
        return [f"    image_size: {side}  # the shorter side of most images; all are resized to it"]
    return [f"    # image_size: {min(side, 224)}  # the recipe chooses it; the shorter side of most images is {side}"]


def _split_lines(found: Survey) -> list[str]:
    if found.is_split:
        return []
    return [
        "    val_fraction: 0.1  # of each class, to choose the best epoch; of one set another tenth is tested on",
        "    split_seed: 0  # which images these are",
    ]


def _trainer_lines(found: Survey, size: int) -> list[str]:
    steps = int(found.counts["train"] * (1.0 if found.is_split else 0.8)) // size
    if steps >= _LOG_EVERY:
        return []
    return ["trainer:", f"  log_every_n_steps: {max(1, steps)}  # an epoch has few steps"]


def batch_size(images: int, memory: int) -> int:
    """Return a power of two that fits a device, with at least 16 steps an epoch where there are enough images.

    Args:
        images: Number of training images.
        memory: Bytes of the GPU's memory, 0 for a CPU.

    Example:
        >>> batch_size(50_000, memory=80 * 2**30), batch_size(50_000, memory=8 * 2**30), batch_size(50_000, memory=0)
        (256, 32, 32)
        >>> batch_size(244, memory=80 * 2**30)
        8
    """
    fitting = memory // _BYTES_PER_IMAGE if memory else 32
    wanted = max(8, min(fitting, images // 16, 256))
    return int(2 ** (wanted.bit_length() - 1))


def gpu_memory() -> int:
    """Return the bytes of memory of the GPU that trains, 0 where there is none."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def _quoted(text: str) -> str:
    """Return a string as YAML, quoted only if it must be."""
    import yaml

    return str(yaml.safe_dump(text, width=10_000)).splitlines()[0]
