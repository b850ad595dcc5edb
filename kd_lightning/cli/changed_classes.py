"""Networks inside others whose class changes, of which jsonargparse would keep arguments of the former class."""

from typing import Any

Node = dict[str, Any]


def is_changed_inside(before: Any, after: Any) -> bool:
    """Return whether a network keeps its class, and one inside it gets another and had ``dict_kwargs``.

    Those are then kept, unlike ``init_args``, and given to the new class: ``weights`` of a network of torchvision to
    ``from_checkpoint``, for example.

    Args:
        before: The network in a configuration.
        after: The configuration that overrides it.

    Example:
        >>> before = {"class_path": "a", "init_args": {"b": {"class_path": "b", "dict_kwargs": {"weights": 1}}}}
        >>> is_changed_inside(before, {"class_path": "a", "init_args": {"b": {"class_path": "c"}}})
        True
        >>> is_changed_inside(before, {"class_path": "c"})
        False
    """
    if not isinstance(before, dict) or not isinstance(after, dict) or _is_other_class(before, after):
        return False
    old, new = before.get("init_args"), after.get("init_args")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return False
    for name in old.keys() & new.keys():
        if isinstance(old[name], dict) and old[name].get("dict_kwargs") and _is_other_class(old[name], new[name]):
            return True
        if is_changed_inside(old[name], new[name]):
            return True
    return False


def overridden(before: Any, after: Any) -> Any:
    """Return a network of which parts are overridden, where another class has nothing of the former one.

    Example:
        >>> before = {"class_path": "b", "dict_kwargs": {"weights": 1}}
        >>> overridden(before, "c"), overridden(before, {"init_args": {"d": 2}})["dict_kwargs"]
        ({'class_path': 'c'}, {'weights': 1})
    """
    if isinstance(before, str) and isinstance(after, dict):
        before = {"class_path": before}
    if not isinstance(before, dict):
        return after
    if "class_path" in before and isinstance(after, str):
        after = {"class_path": after}
    if not isinstance(after, dict) or _is_other_class(before, after):
        return after
    return {**before, **{key: overridden(before.get(key), value) for key, value in after.items()}}


def _is_other_class(before: Node, after: Any) -> bool:
    """Return whether a network is given another class than it has."""
    named = after.get("class_path") if isinstance(after, dict) else after
    return isinstance(named, str) and "class_path" in before and named != before["class_path"]
