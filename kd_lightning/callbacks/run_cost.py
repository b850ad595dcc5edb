"""The time that a training took, and its parts."""

from typing import NamedTuple

from kd_lightning.files.progress import describe_duration


class RunCost(NamedTuple):
    """Seconds of a training.

    Attributes:
        seconds: All of it.
        training: Its training steps, waiting for batches included.
        waiting: Waiting for batches.
        teacher: The teacher's outputs within the training steps.
        caching: The computation of a teacher's outputs that are cached, between the steps.
    """

    seconds: float = 0.0
    training: float = 0.0
    waiting: float = 0.0
    teacher: float = 0.0
    caching: float = 0.0


def describe_cost(cost: RunCost, *, has_teacher: bool, student: str = "student") -> str:
    """Return a sentence about the time that a training took and what it was spent on.

    Args:
        cost: The seconds.
        has_teacher: Name the teacher, also where it took no time.
        student: Role of the network that was trained.

    Example:
        >>> print(describe_cost(RunCost(200.0, 180.0, 10.0, 60.0), has_teacher=True))
        The training took 4 min: 5% waiting for images, 30% the teacher, 55% the student, 10% validation and the rest.
        >>> print(describe_cost(RunCost(8.0, 6.0, 0.2), has_teacher=False, student="network"))
        The training took 8 s: 2% waiting for images, 72% the network, 25% validation and the rest.
    """
    whole = max(cost.seconds, 1e-9)
    teacher, waiting = cost.teacher + cost.caching, min(cost.waiting, cost.training)
    trained = max(0.0, cost.training - waiting - cost.teacher)
    rest = max(0.0, cost.seconds - cost.training - cost.caching)
    parts = [
        f"{waiting / whole:.0%} waiting for images",
        *([f"{teacher / whole:.0%} the teacher"] if has_teacher else []),
        f"{trained / whole:.0%} the {student}",
        f"{rest / whole:.0%} validation and the rest",
    ]
    return f"The training took {describe_duration(cost.seconds)}: {', '.join(parts)}."
