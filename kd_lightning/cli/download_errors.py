"""Files that a library cannot download while objects are built, in one sentence: which file to put where."""

import traceback
from pathlib import Path
from typing import Any

from kd_lightning.cli.errors import causes, innermost_cause, one_line

_TORCH_HUB = "torch.hub"
_DATA_SETS = "torchvision.datasets.utils"
_HUGGING_FACE = "huggingface_hub.file_download"


def explain_download_error(error: BaseException) -> str | None:
    """Return a sentence for an error of ``torch.hub``, torchvision's data sets or ``huggingface_hub``, or ``None``.

    Args:
        error: An error that was raised from it, perhaps by way of others.
    """
    reason = one_line(innermost_cause(error)).removeprefix("<urlopen error ").rstrip(".>")
    if found := _arguments_of("download_url_to_file", _TORCH_HUB, error):
        return _describe(found["url"], Path(str(found["dst"])), reason)
    if "fpath" in (found := _arguments_of("download_url", _DATA_SETS, error)):
        return _describe(found["url"], Path(found["fpath"]), reason)
    if "cached_file" in (found := _arguments_of("load_state_dict_from_url", _TORCH_HUB, error)):
        return f"{found['cached_file']} is damaged ({reason}); delete it, so that it is downloaded again."
    if found := _arguments_of("hf_hub_download", _HUGGING_FACE, error):
        repo, file = str(found["repo_id"]), found["filename"]
        folder = Path(str(found["cache_dir"]), f"models--{repo.replace('/', '--')}")
        return (
            f"The weights of {repo} cannot be downloaded from huggingface.co ({reason}); copy {folder} from a machine "
            f"that has it, or get {file} by other means and set pretrained_cfg_overlay.file in the network's "
            "dict_kwargs to its path."
        )
    return None


def _describe(url: str, file: Path, reason: str) -> str:
    return f"{url} cannot be downloaded ({reason}); get {file.name} by other means and put it into {file.parent}."


def _arguments_of(function: str, module: str, error: BaseException) -> dict[str, Any]:
    """Return the variables of a function that an error or one of its causes came through."""
    frames = [frame for cause in causes(error) for frame, _ in traceback.walk_tb(cause.__traceback__)]
    return next(
        (
            frame.f_locals
            for frame in frames
            if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module
        ),
        {},
    )
