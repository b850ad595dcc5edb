"""The sections of a report: pictures, tables of classes, and images."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from matplotlib import rc_context
from torch import Tensor

from kd_lightning.callbacks.class_results import ClassResult, class_results, most_confused
from kd_lightning.callbacks.label_results import LabelResult, label_results
from kd_lightning.networks.data_config import thresholds_or_default
from kd_lightning.report import drawing
from kd_lightning.report.label_photographs import choose_label_images, describe_label_image
from kd_lightning.report.metrics import Metrics
from kd_lightning.report.model import Model, by_runtime
from kd_lightning.report.page import Section, Table
from kd_lightning.report.photographs import choose_images, describe_image, photograph_svg

Result = TypeVar("Result", ClassResult, LabelResult)

_READABLE = 20
"""Classes up to which a confusion matrix can be read."""
_WORST = 10
_SHOWN = 12


@rc_context({"text.parse_math": False})  # $ in a name is a dollar
def costs(models: list[Model], metrics: list[Metrics]) -> Section:
    """Return the section of accuracy against size, and against latency for each runtime.

    Args:
        models: The models.
        metrics: Their metrics.
    """
    names = [model.name for model in models]
    measure = "accuracy" if metrics[0].scores is None else "mean average precision"
    sizes = {number: model.size / 1e6 for number, model in enumerate(models)}
    pictures = {f"{measure} and size": drawing.trade_off(names, sizes, metrics, "size (MB)")}
    for runtime, group in by_runtime(models).items():
        times = {number: 1000 * metrics[number].latency[1] for number in group}
        pictures[f"{measure} and latency in {runtime}"] = drawing.trade_off(
            names, times, metrics, f"time for one image (ms), {runtime}"
        )
    note = (
        "The best place is the top left: accurate, and small or fast. The grey line joins the models that no other one "
        "beats in both (the Pareto front). The bar of a point is its 95% interval: where two bars overlap widely, the "
        "difference may be chance. Times in different runtimes are not compared, so each runtime has its own picture."
    )
    return Section(f"{measure.capitalize()} against cost", note, pictures=pictures, kind="plot")


@rc_context({"text.parse_math": False})
def details(models: list[Model], metrics: list[Metrics], images: Tensor, labels: Tensor) -> list[Section]:
    """Return the sections on classes, images, training and calibration, without those that have nothing to show.

    Args:
        models: The models, the teacher first.
        metrics: Their metrics.
        images: Test images in [0, 1], ``(N, channels, H, W)``.
        labels: Their labels ``(N,)``, -1 where unlabelled; or ``(N, C)`` of several classes an image.
    """
    classes, names = class_names(models, metrics), [model.name for model in models]
    several = metrics[0].scores is not None
    of_classes = (
        [label_table(models, metrics, classes)]
        if several
        else [
            _each_class(models, metrics, classes),
            _most_confused(models, metrics, classes),
            _confusion(models, metrics, classes),
        ]
    )
    found = [
        *of_classes,
        _training(models),
        Section(
            "Calibration",
            "Does a model know what it does not know? Of the predictions made with 80% probability, 80% should be "
            "correct: the dashed line. Below it a model is too sure of itself, above it too careful.",
            pictures={"correct predictions by their probability": drawing.reliability(names, metrics, labels)},
            kind="plot",
        ),
        *(_label_disagreements if several else _disagreements)(models, metrics, images, labels, classes),
    ]
    return [section for section in found if section.tables or section.pictures]


def class_names(models: list[Model], metrics: list[Metrics]) -> tuple[str, ...]:
    """Return the class names, which are numbers where no names are known."""
    return models[0].classes or tuple(map(str, range(metrics[0].logits.shape[1])))


def _disagreements(
    models: list[Model], metrics: list[Metrics], images: Tensor, labels: Tensor, classes: Sequence[str]
) -> list[Section]:
    """Return two sections of images, in neither of which is one of the other."""
    names, logits = [model.name for model in models], [m.logits for m in metrics]
    chosen = choose_images(labels, logits[0], logits[1:], _SHOWN) if len(models) > 1 else ([], [])
    return _photographs(chosen, images, lambda number: describe_image(number, labels, logits, names, classes))


def _label_disagreements(
    models: list[Model], metrics: list[Metrics], images: Tensor, labels: Tensor, classes: Sequence[str]
) -> list[Section]:
    """Return the same of images that may have several classes."""
    names, logits = [model.name for model in models], [m.logits for m in metrics]
    thresholds = [thresholds_or_default(model.thresholds, len(classes)) for model in models]
    chosen = choose_label_images(labels, logits, thresholds, _SHOWN) if len(models) > 1 else ([], [])
    return _photographs(
        chosen, images, lambda number: describe_label_image(number, labels, logits, thresholds, names, classes)
    )


def _photographs(chosen: Sequence[list[int]], images: Tensor, describe: Callable[[int], str]) -> list[Section]:
    titles = {
        "What a student gets wrong and the teacher right": "The surest mistakes first. Below an image are its "
        "label, and each answer with the models that give it and how sure they are.",
        "Other images on which they do not agree": "The teacher is wrong here, or the image has no label.",
    }
    sections = []
    for (title, note), numbers in zip(titles.items(), chosen, strict=True):
        captions = {number: describe(number) for number in numbers}
        pictures = {text: photograph_svg(images[number], text) for number, text in captions.items()}
        sections.append(Section(title, note, pictures=pictures, kind="photograph"))
    return sections


def label_table(models: list[Model], metrics: list[Metrics], classes: Sequence[str]) -> Section:
    """Return average precision and F1 of each class, where an image may have several.

    Args:
        models: The models.
        metrics: Their metrics, with scores.
        classes: Class names.
    """
    results = [
        label_results(m.scores, classes, thresholds_or_default(model.thresholds, len(classes)))
        for model, m in zip(models, metrics, strict=True)
        if m.scores is not None
    ]
    note = (
        "Average precision: how well a class's images are ranked before the others by its probability. F1: how right "
        "and how complete the decisions are where the class is given above the threshold."
    )
    titles = "Each class, average precision and F1 in per cent", "average precision, and F1"
    return _by_class(
        models,
        results,
        titles,
        note,
        value=lambda result: result.average_precision,
        cell=lambda result: (
            f"{_per_cent(result.average_precision)}\nF1 {_per_cent(result.f1)} above {result.threshold:.2f}"
        ),
    )


def _each_class(models: list[Model], metrics: list[Metrics], classes: Sequence[str]) -> Section:
    results = [class_results(_counts(m), classes) for m in metrics]
    note = "The share of a class's test images that a model recognizes. With few images, a difference may be chance."
    return _by_class(
        models,
        results,
        ("Each class, accuracy in per cent", "accuracy"),
        note,
        value=lambda result: result.accuracy,
        cell=lambda result: _per_cent(result.accuracy),
    )


def _by_class(
    models: list[Model],
    results: Sequence[Sequence[Result]],
    titles: tuple[str, str],
    note: str,
    *,
    value: Callable[[Result], float | None],
    cell: Callable[[Result], str],
) -> Section:
    """Return a table of the classes that have images; of many those of the lowest values.

    Args:
        models: The models.
        results: Results of each class, by model.
        titles: The title, and the name of the values.
        note: Explanation of the values.
        value: Returns the value by which classes are ordered.
        cell: Returns the text for a result.
    """
    labels = [label for label, result in enumerate(results[0]) if result.images]
    title = titles[0]
    if len(labels) > _READABLE:
        title = f"The {_WORST} of {len(labels)} classes with the lowest {titles[1]}, in per cent"
        labels.sort(key=lambda label: min(value(one[label]) or 0.0 for one in results))
        labels = labels[:_WORST]
    rows = [
        {
            "class": results[0][label].name,
            "images": str(results[0][label].images),
            **{model.name: cell(one[label]) for model, one in zip(models, results, strict=True)},
        }
        for label in labels
    ]
    columns = ["class", "images", *(model.name for model in models)]
    return Section(title, note, tables={title: Table(columns, rows)} if rows else {})


def _counts(metrics: Metrics) -> Tensor:
    assert metrics.confusion is not None
    return metrics.confusion


def _per_cent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _most_confused(models: list[Model], metrics: list[Metrics], classes: Sequence[str]) -> Section:
    title = "Classes that are confused most, in images"
    pairs = most_confused(sum(map(_counts, metrics)), classes, _WORST)  # type: ignore[arg-type]
    places = {name: label for label, name in enumerate(classes)}
    rows = [
        {
            "class": true,
            "taken for": predicted,
            **{
                model.name: str(int(_counts(m)[places[true], places[predicted]]))
                for model, m in zip(models, metrics, strict=True)
            },
        }
        for true, predicted, *_ in pairs
    ]
    columns = ["class", "taken for", *(model.name for model in models)]
    note = "The number of test images of the class that a model takes for the other one."
    return Section(title, note, tables={title: Table(columns, rows, texts=2)} if rows else {})


def _confusion(models: list[Model], metrics: list[Metrics], classes: Sequence[str]) -> Section:
    """Return the matrices, one for models that have the same; nothing for more classes than can be read."""
    alike: list[tuple[list[str], Tensor]] = []
    for model, m in zip(models, metrics, strict=True):
        same = next((names for names, matrix in alike if _counts(m).equal(matrix)), None)
        if same is None:
            alike.append(([model.name], _counts(m)))
        else:
            same.append(model.name)
    columns = ["class", *classes]
    tables = {}
    for names, counts in alike if len(classes) <= _READABLE else []:
        values = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).tolist()
        rows = [
            {
                "class": name,
                **{other: f"{value:.0f}" if value else "" for other, value in zip(classes, row, strict=True)},
            }
            for name, row in zip(classes, values, strict=True)
        ]
        tables[", ".join(names)] = Table(columns, rows)
    note = (
        "A row shows what the test images of a class are taken for, a column a model's answers: a model without errors "
        "has 100 on the diagonal and nothing elsewhere."
    )
    return Section("Confusion, in per cent of a class", note, tables=tables, kind="heat")


def _training(models: list[Model]) -> Section:
    note = (
        "The loss is the error that training lowers. A distilled student's contains more than that of the others: "
        "compare its course, not its height. Exported files have the curve of their run."
    )
    return Section("Training", note, pictures=drawing.curves(models), kind="plot")
