"""The labels of an image of several classes, as text; needs no torch."""

from collections.abc import Sequence

BETWEEN = ";"
NO_CLASS = "-"
"""The label of an image that has none of the classes."""


def join_labels(
    given: Sequence[bool], probabilities: Sequence[float], classes: Sequence[str], *, digits: int
) -> tuple[str, str]:
    """Return the names of the classes that an image is given and their probabilities, the most probable first.

    Args:
        given: Whether the image is given each class.
        probabilities: Probability of each class.
        classes: Names of the classes.
        digits: Digits of the probabilities.

    Example:
        >>> join_labels([True, False, True], [0.6, 0.1, 0.9], ["ant", "bee", "landscape"], digits=2)
        ('landscape;ant', '0.90;0.60')
        >>> join_labels([False], [0.1], ["ant"], digits=2)
        ('-', '')
    """
    chosen = sorted((label for label, yes in enumerate(given) if yes), key=lambda label: -probabilities[label])
    names = BETWEEN.join(classes[label] for label in chosen) or NO_CLASS
    return names, BETWEEN.join(f"{probabilities[label]:.{digits}f}" for label in chosen)
