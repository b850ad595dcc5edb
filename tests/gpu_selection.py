"""Which tests may see the GPUs of a machine."""

from typing import Any

from _pytest.mark.expression import Expression


def selects_gpu_tests(expression: str) -> bool:
    """Return whether a ``-m`` expression selects tests that are marked ``gpu``, or ``gpu`` and ``slow``."""
    if not expression:
        return True

    def matcher(*marks: str) -> Any:
        return lambda name, **_: name in marks

    compiled = Expression.compile(expression)
    return compiled.evaluate(matcher("gpu")) or compiled.evaluate(matcher("gpu", "slow"))
