"""Published files, fetched by torchvision: what can go wrong, in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from torchvision.datasets.utils import download_url

from kd_lightning.errors import DownloadError

FAILURES = (RuntimeError, EOFError, OSError, HTTPException)
"""All that a download or a damaged file raises."""


@contextmanager
def downloading(url: str, path: Path) -> Iterator[None]:
    """Explain what goes wrong inside.

    Args:
        url: Of the file.
        path: Where it goes.

    Raises:
        ConnectionError: If it can be neither found nor downloaded, or is not the published one.
    """
    try:
        yield
    except (URLError, ConnectionError, TimeoutError) as error:
        raise DownloadError(
            f"{url} cannot be downloaded ({getattr(error, 'reason', error)}); get it by other means and put the file "
            f"at {str(path)!r}."
        ) from error
    except FAILURES as error:
        raise DownloadError(
            f"The download of {url} is damaged or was interrupted ({str(error).rstrip('.')}); run again, or put the "
            f"file at {str(path)!r} by hand."
        ) from error


def download(url: str, root: str, name: str, md5: str) -> None:
    """Fetch a file unless it is there and whole.

    Args:
        url: Of the file.
        root: Folder.
        name: Of the file in the folder.
        md5: Its published checksum.

    Raises:
        ConnectionError: If it can be neither found nor downloaded, or is not the published one.
    """
    with downloading(url, Path(root, name)):
        download_url(url, root, name, md5)
