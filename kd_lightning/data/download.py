"""Download published files with torchvision, and explain failures in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from torchvision.datasets.utils import download_url

from kd_lightning.errors import DownloadError

FAILURES = (RuntimeError, EOFError, OSError, HTTPException)
"""All errors that a download or a damaged file raises."""


@contextmanager
def downloading(url: str, path: Path) -> Iterator[None]:
    """Explain errors of a download inside a ``with`` block.

    Args:
        url: Address of the file.
        path: Path at which it is saved.

    Raises:
        DownloadError: If the file can be neither found nor downloaded, or is not the published one.
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


def download(url: str, *, root: str, name: str, md5: str) -> None:
    """Download a file unless it is there and complete.

    Args:
        url: Address of the file.
        root: Folder in which it is saved.
        name: Name of the file in the folder.
        md5: Published checksum.

    Raises:
        DownloadError: If the file can be neither found nor downloaded, or is not the published one.
    """
    with downloading(url, Path(root, name)):
        download_url(url, root, name, md5)
