import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from local_server import Handler, Server
from small_sets import SmallSet


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


@pytest.fixture
def publish(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Serve the files of a small set, which its data module then takes for the real one; return torchvision's class."""

    def call(small: SmallSet) -> Any:
        server.files = dict(small.files)
        dataset = small.dataset_at(server.url)
        monkeypatch.setattr(small.module, "dataset", dataset)
        return dataset

    return call
