import warnings
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from torch import Tensor, nn

from kd_lightning import DigitsDataModule, TeacherModule
from kd_lightning.modules.evaluation import Evaluation, LoaderEvaluations

SPLITS = [[103], [1, 50, 7, 45], [64, 39], [1] * 103]


def data(classes: int = 10, rows: int = 103) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits that are often right, labels of which a fifth is -1, and a teacher's logits."""
    logits, teacher = 3 * torch.randn(2, rows, classes)
    labels = torch.randint(classes, (rows,))
    logits[torch.arange(rows), labels] += 2 * torch.rand(rows)
    labels[torch.rand(rows) < 0.2] = -1
    return logits, labels, teacher


def measure(splits: Sequence[int], *columns: Tensor) -> dict[str, Tensor]:
    evaluation = Evaluation(columns[0].shape[1])
    for batch in zip(*(column.split(list(splits)) for column in columns), strict=True):
        evaluation.update(*batch)
    return evaluation.compute()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Guo et al., equation 3: bins (m - 1) / M < confidence <= m / M, weighted by their number of rows."""
    probabilities = logits.double().softmax(1)
    confidence, predicted = probabilities.max(1)
    error = 0.0
    for m in range(1, bins + 1):
        inside = ((m - 1) / bins < confidence) & (confidence <= m / bins)
        if inside.any():
            correct = (predicted == labels)[inside].double()
            error += abs(float(correct.mean() - confidence[inside].mean())) * int(inside.sum()) / len(labels)
    return error


@pytest.mark.parametrize("classes", [2, 4, 5, 6, 10])
@pytest.mark.parametrize("splits", SPLITS[:3])
def test_metrics_equal_scikit_learn_and_the_formulas(classes: int, splits: list[int]) -> None:
    logits, labels, teacher = data(classes)
    metrics = measure(splits, logits, labels, teacher)
    labelled, all_classes = labels >= 0, list(range(classes))
    y, z = labels[labelled].numpy(), logits[labelled].double().numpy()
    assert metrics["accuracy"].item() == pytest.approx(accuracy_score(y, z.argmax(1)))
    assert metrics["loss"].item() == pytest.approx(log_loss(y, softmax(z, axis=1), labels=all_classes), rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(-log_softmax(z, axis=1)[range(len(y)), y].mean(), rel=1e-5)
    assert metrics["ece"].item() == pytest.approx(calibration_error(logits[labelled], labels[labelled]), abs=1e-5)
    assert metrics["confusion"].tolist() == confusion_matrix(y, z.argmax(1), labels=all_classes).tolist()
    assert ("top5" in metrics) == (classes > 5)
    if classes > 5:
        assert metrics["top5"].item() == pytest.approx(top_k_accuracy_score(y, z, k=5, labels=all_classes))


@pytest.mark.parametrize("splits", SPLITS)
def test_agreement_and_kl_include_unlabelled_rows(splits: list[int]) -> None:
    logits, labels, teacher = data()
    metrics = measure(splits, logits, labels, teacher)
    z, t = logits.double().numpy(), teacher.double().numpy()
    assert metrics["agreement"].item() == pytest.approx((z.argmax(1) == t.argmax(1)).mean())
    divergence = rel_entr(softmax(t, axis=1), softmax(z, axis=1)).sum() / len(z)
    assert metrics["kl"].item() == pytest.approx(divergence, rel=1e-5)


@pytest.mark.parametrize("splits", SPLITS[1:])
def test_metrics_do_not_depend_on_the_split_into_batches(splits: list[int]) -> None:
    columns = data()
    undivided, parts = measure([103], *columns), measure(splits, *columns)
    assert undivided.keys() == parts.keys()
    for name, value in undivided.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


def test_metrics_do_not_depend_on_the_order_of_rows() -> None:
    columns, order = data(), torch.randperm(103)
    for name, value in measure([50, 53], *columns).items():
        shuffled = measure([50, 53], *(column[order] for column in columns))[name]
        torch.testing.assert_close(shuffled, value, rtol=1e-5, atol=1e-6)


def test_label_probabilities_count_as_their_argmax_except_in_the_loss() -> None:
    logits, labels, _ = data()
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    one_hot = torch.eye(10)[labels]
    soft_labels = 0.9 * one_hot + 0.01
    index_metrics, one_hot_metrics, soft_metrics = (
        measure([len(labels)], logits, rows) for rows in (labels, one_hot, soft_labels)
    )
    for name, value in index_metrics.items():
        torch.testing.assert_close(one_hot_metrics[name], value)
        if name != "loss":
            torch.testing.assert_close(soft_metrics[name], value)
    expected = -(soft_labels.double() * logits.double().log_softmax(1)).sum(1).mean()
    assert soft_metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_unlabelled_rows_count_only_for_agreement_and_kl() -> None:
    logits, labels, teacher = data()
    labelled = labels >= 0
    all_rows = measure([60, 43], logits, labels, teacher)
    only_labelled = measure([int(labelled.sum())], logits[labelled], labels[labelled], teacher[labelled])
    for name in all_rows.keys() - {"agreement", "kl"}:
        torch.testing.assert_close(all_rows[name], only_labelled[name], rtol=1e-5, atol=1e-6)
    assert all_rows["confusion"].sum() == labelled.sum()
    assert all_rows["kl"] != only_labelled["kl"]


def test_an_unlabelled_batch_does_not_change_metrics_of_labels() -> None:
    logits, labels, _ = data()
    evaluation = Evaluation(10)
    evaluation.update(logits, labels)
    before = evaluation.compute()
    evaluation.update(logits, torch.full_like(labels, -1))
    assert all(torch.equal(value, before[name]) for name, value in evaluation.compute().items())


def test_metrics_without_rows_are_left_out() -> None:
    logits, labels, teacher = data()
    assert measure([103], logits, labels).keys() == {"accuracy", "top5", "ece", "confusion", "loss"}
    assert measure([50, 53], logits, torch.full_like(labels, -1), teacher).keys() == {"agreement", "kl"}


def test_a_student_equal_to_the_teacher_agrees_fully() -> None:
    logits, labels, _ = data()
    metrics = measure([103], logits, labels, logits.clone())
    assert metrics["agreement"] == 1
    assert metrics["kl"].item() == pytest.approx(0, abs=1e-6)


def test_evaluations_are_independent() -> None:
    first, second = data(), data()
    evaluations = Evaluation(10), Evaluation(10)
    for evaluation, columns in zip(evaluations, (first, second), strict=True):
        evaluation.update(*columns)
    for evaluation, columns in zip(evaluations, (first, second), strict=True):
        expected = measure([103], *columns)
        assert all(torch.equal(value, expected[name]) for name, value in evaluation.compute().items())


def test_finish_resets_the_evaluations() -> None:
    evaluations = LoaderEvaluations()
    assert evaluations.finish() == ({}, None, None, None)
    for columns in (data(), data()):
        with torch.inference_mode():
            evaluations.update(0, *columns)
        values, confusion, *_ = evaluations.finish()
        expected = measure([103], *columns)
        assert confusion is not None
        assert torch.equal(confusion, expected.pop("confusion"))
        assert values == expected
    assert evaluations.finish() == ({}, None, None, None)


def test_each_validation_of_a_trainer_starts_from_zero(
    small: Callable[..., nn.Module], digits: DigitsDataModule, make_trainer: Callable[..., pl.Trainer]
) -> None:
    trainer, module = make_trainer(), TeacherModule(small())
    first, second = (trainer.validate(module, digits, verbose=False) for _ in range(2))
    assert first == second
    assert set(first[0]) == {"val/accuracy", "val/top5", "val/ece", "val/loss"}
    assert module.confusion is not None
    assert module.confusion.sum() == 287


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_evaluated_in_float32(dtype: torch.dtype) -> None:
    logits, labels, teacher = data()
    half = measure([50, 53], logits.to(dtype), labels, teacher.to(dtype))
    expected = measure([50, 53], logits.to(dtype).float(), labels, teacher.to(dtype).float())
    for name, value in expected.items():
        torch.testing.assert_close(half[name], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saturated_logits_give_finite_metrics(dtype: torch.dtype) -> None:
    logits = 1e4 * torch.randn(20, 10).sign()
    metrics = measure([8, 12], logits.to(dtype), torch.randint(10, (20,)), -logits.to(dtype))
    assert all(value.isfinite().all() for value in metrics.values())


def test_no_graph_is_kept() -> None:
    logits, labels, teacher = data()
    metrics = measure([103], logits.requires_grad_(), labels, teacher.requires_grad_())
    assert not any(value.requires_grad for value in metrics.values())


def test_the_state_dict_is_empty() -> None:
    assert Evaluation(10).state_dict() == {}


@pytest.mark.parametrize("splits", SPLITS[:2])
def test_small_logits_are_not_taken_for_probabilities(splits: list[int]) -> None:
    logits, labels = torch.rand(103, 10), torch.randint(10, (103,))
    assert measure(splits, logits, labels)["ece"].item() == pytest.approx(calibration_error(logits, labels), abs=1e-5)


def test_full_confidence_is_in_the_last_bin() -> None:
    # rows 0-9: confidence 1, nine correct; rows 10-19: confidence 0.95, all correct: nearly calibrated on average
    logits = torch.tensor([[200.0, 0.0]] * 10 + [[2.944439, 0.0]] * 10)
    labels = torch.tensor([1] + [0] * 19)
    assert calibration_error(logits, labels) == pytest.approx(0.025, abs=1e-6)
    assert measure([20], logits, labels)["ece"].item() == pytest.approx(0.025, abs=1e-5)


def test_nan_logits_give_a_nan_loss() -> None:
    logits, labels, _ = data()
    logits[labels >= 0] = torch.where(torch.arange(int((labels >= 0).sum()))[:, None] == 0, torch.nan, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert measure([50, 53], logits, labels)["loss"].isnan()
