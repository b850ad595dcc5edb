import logging
import warnings

import pytest

from kd_lightning.export.silence import silenced


def fail(level: int) -> None:
    with silenced():
        warnings.warn("of an exporter", stacklevel=1)  # would be an error
        assert logging.root.manager.disable == max(level, logging.ERROR)
        raise RuntimeError("the export failed")


@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO, logging.CRITICAL])
def test_the_users_logging_level_is_kept_and_restored(level: int) -> None:
    logging.disable(level)
    try:
        with pytest.raises(RuntimeError, match="the export failed"):
            fail(level)
        assert logging.root.manager.disable == level
    finally:
        logging.disable(logging.NOTSET)
