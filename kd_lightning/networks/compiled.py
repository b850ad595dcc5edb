"""Networks that ``torch.compile`` has compiled, and how they are compiled here."""

import os
from pathlib import Path
from typing import Literal, cast

from torch import nn

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""The modes of ``torch.compile``."""

_FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def unwrap_compiled(network: nn.Module) -> tuple[nn.Module, bool]:
    """Return the network inside of ``torch.compile``'s wrapper, and whether there was one.

    The wrapper prefixes all names of weights, which checkpoints must not depend on.

    Example:
        >>> inner = nn.Linear(2, 2)
        >>> unwrap_compiled(inner) == (inner, False)
        True
    """
    inner = getattr(network, "_orig_mod", None)
    return (network, False) if inner is None else (cast("nn.Module", inner), True)


def compile_in_place(module: nn.Module, mode: CompileMode, *, fixed_shapes: bool) -> None:
    """Compile the calls of a module; no key of its state changes.

    Args:
        module: Network or objective.
        mode: Mode of ``torch.compile``.
        fixed_shapes: Compile for each shape of a batch, since there are few; otherwise torch decides.
    """
    module.compile(mode=None if mode == "default" else mode, dynamic=False if fixed_shapes else None)


def kernel_folder() -> Path:
    """Return the folder in which compiled kernels are kept for later runs: ``TORCHINDUCTOR_CACHE_DIR`` if it is set.

    Otherwise it is ``kd_lightning/kernels`` in the user's folder of caches, since torch's own is a temporary one.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(_FOLDER_VARIABLE) or caches / "kd_lightning" / "kernels")


def keep_kernels() -> Path | None:
    """Let torch keep compiled kernels in :func:`kernel_folder`; return it, or ``None`` where it cannot be written."""
    folder = kernel_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    os.environ[_FOLDER_VARIABLE] = str(folder)
    return folder
