import pytest

from kd_lightning.cli.errors import causes, exit_on_error, innermost_cause
from kd_lightning.errors import MissingFileError, UserError, add_user_message, find_cause


def _raise(error: Exception, cause: Exception | None = None) -> None:
    with exit_on_error("fit", OSError):
        raise error from cause


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (UserError("Say why."), None),
        (MissingFileError("Say why."), None),
        (TypeError("of a parser"), UserError("Say why.")),
        (OSError("Say\nwhy."), None),
    ],
)
def test_a_user_error_is_one_sentence(error: Exception, cause: Exception | None) -> None:
    with pytest.raises(SystemExit) as ended:
        _raise(error, cause)
    assert ended.value.code == "kd-lightning fit: Say why."


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug")])
def test_a_bug_shows_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="a bug"):
        _raise(error)


def test_a_message_that_a_callback_attached_is_printed_instead() -> None:
    error = RuntimeError("of CUDA")
    add_user_message(error, "Lower batch_size.")
    with pytest.raises(SystemExit, match=r"^kd-lightning fit: Lower batch_size\.$"):
        _raise(error)
    assert error.__notes__ == ["Lower batch_size."]


def test_every_error_shows_its_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(UserError):
        _raise(UserError("Say why."))


def test_causes() -> None:
    inner, outer = UserError("inner"), TypeError("outer")
    outer.__cause__ = inner
    assert find_cause(outer, UserError) is inner
    assert find_cause(outer, KeyError) is None
    assert innermost_cause(outer) is inner


def test_errors_that_form_a_circle_end() -> None:
    first, second = ValueError("first"), TypeError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(causes(first)) == [first, second]
    assert innermost_cause(first) is second
    first.__cause__ = first
    assert innermost_cause(first) is first
