"""The three numbers that a report begins with: accuracy, size and latency of one student."""

from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Model
from kd_lightning.report.page import Number


def choose_student(models: list[Model], metrics: list[Metrics]) -> tuple[int, int]:
    """Return the numbers of the student that is shown first, and of the model that it is compared with.

    The student is the smallest one whose accuracy cannot be distinguished from that of the best: whose 95% interval
    contains the accuracy of the best. Where students were exported, it is an exported file, which is what is shipped.
    The other is the teacher, in the student's runtime if it is there. Without a student, both are the teacher.

    Args:
        models: The models, the teacher first.
        metrics: Their metrics.
    """
    students = [number for number, model in enumerate(models) if not _is_same_network(model, models[0])]
    students = [number for number in students if models[number].file.suffix == ".onnx"] or students or [0]
    best = max(metrics[number].accuracy for number in students)
    possible = [number for number in students if metrics[number].interval[1] >= best]
    chosen = min(possible, key=lambda number: (models[number].size, -metrics[number].accuracy))
    teachers = [number for number, model in enumerate(models) if _is_same_network(model, models[0])]
    alike = [number for number in teachers if models[number].runtime == models[chosen].runtime]
    return chosen, (alike or teachers)[0]


def _is_same_network(model: Model, teacher: Model) -> bool:
    """Return whether a model is the teacher, or a file that was exported from it."""
    if model.source is None or teacher.source is None:
        return model is teacher
    return model.source.path.resolve() == teacher.source.path.resolve()


def headline(models: list[Model], metrics: list[Metrics], images: int) -> tuple[str, list[Number]]:
    """Return a sentence that names the student, and its three numbers.

    Args:
        models: The models, the teacher first.
        metrics: Their metrics.
        images: Number of test images.
    """
    student, teacher = choose_student(models, metrics)
    low, high = (100 * end for end in metrics[student].interval)
    (size, old_size), (time, old_time) = (
        (values[student], values[teacher])
        for values in ([m.size / 1e6 for m in models], [1000 * m.latency[1] for m in metrics])
    )
    accuracy, of_size, of_time = f"95% interval {low:.1f} to {high:.1f}%", "", f"in {models[student].runtime}"
    if student == teacher:
        lead = f"{models[student].name} on {images:,} test images."
    else:
        lead = (
            f"{models[student].name} compared with {models[teacher].name}, the large model (teacher) that it replaces, "
            f"on {images:,} test images."
        )
        accuracy = f"teacher {100 * metrics[teacher].accuracy:.1f}%; {accuracy}"
        of_size = f"teacher {megabytes(old_size)}: {compare(old_size, size, 'smaller', 'larger')}"
        if models[student].runtime == models[teacher].runtime:
            of_time = f"teacher {rounded(old_time)} ms: {compare(old_time, time, 'faster', 'slower')}"
    if student != teacher and len(models) > 2:
        exported = "exported " if models[student].file.suffix == ".onnx" else ""
        lead += f" It is the smallest {exported}student that is as accurate as the best one, apart from chance."
    return lead, [
        Number(
            "Images recognized" if metrics[0].scores is None else "Mean average precision",
            f"{100 * metrics[student].accuracy:.1f}%",
            accuracy,
        ),
        Number("Size", megabytes(size), of_size),
        Number("Time for an image", f"{rounded(time)} ms", of_time),
    ]


def compare(before: float, after: float, less: str, more: str) -> str:
    """Return a factor in words.

    Example:
        >>> compare(3.0, 1.0, "smaller", "larger"), compare(1.0, 1.3, "smaller", "larger")
        ('3.0 times smaller', '1.3 times larger')
    """
    return f"{before / after:.1f} times {less}" if after <= before else f"{after / before:.1f} times {more}"


def megabytes(size: float) -> str:
    """Return a size in MB, or in kB below a tenth of one.

    Example:
        >>> megabytes(0.0183), megabytes(1234.5)
        ('18.3 kB', '1,234 MB')
    """
    return f"{rounded(1000 * size)} kB" if size < 0.1 else f"{rounded(size)} MB"


def rounded(value: float) -> str:
    """Return a positive number with three digits or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
