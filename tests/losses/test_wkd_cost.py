import numpy as np
import pytest
import torch
from random_inputs import random_rotation

from kd_lightning.losses import group_by_class, wkd_cost_cka, wkd_cost_fc


@pytest.mark.parametrize("sharpen", [0.0, 1.0, 2.5])
def test_costs_of_a_classifier_match_the_published_formula(sharpen: float) -> None:
    weight = torch.randn(6, 4, dtype=torch.float64)
    costs = wkd_cost_fc(weight, sharpen=sharpen)
    for i, a in enumerate(weight.numpy()):
        for j, b in enumerate(weight.numpy()):
            distance = 1 - a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)
            expected = 1 - np.exp(-sharpen * distance) if sharpen else distance
            assert costs[i, j].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sharpen", [0.0, 1.0, 2.5])
def test_costs_of_features_match_the_published_formula(sharpen: float) -> None:
    features = torch.randn(3, 6, 4, dtype=torch.float64)
    costs = wkd_cost_cka(features, sharpen=sharpen)
    centered = [x - x.mean(axis=0) for x in features.numpy()]
    for i, a in enumerate(centered):
        for j, b in enumerate(centered):
            lengths = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
            distance = 1 - np.linalg.norm(b.T @ a) ** 2 / lengths
            expected = 1 - np.exp(-sharpen * distance) if sharpen else distance
            assert costs[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_costs_are_symmetric_and_ignore_scale() -> None:
    weight, features = torch.randn(5, 4).double(), torch.randn(3, 6, 4).double()
    factors = torch.rand(5, 1).double() + 0.1
    torch.testing.assert_close(wkd_cost_fc(factors * weight), wkd_cost_fc(weight))
    turned = 3 * features @ random_rotation(4) + torch.randn(3, 1, 4).double()
    torch.testing.assert_close(wkd_cost_cka(turned), wkd_cost_cka(features))
    for costs in (wkd_cost_fc(weight), wkd_cost_cka(features)):
        torch.testing.assert_close(costs, costs.T)
        torch.testing.assert_close(costs.diagonal(), torch.zeros_like(costs.diagonal()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_features_and_zero_weights_give_finite_costs(dtype: torch.dtype) -> None:
    weight, features = torch.randn(3, 4), torch.randn(3, 6, 4)
    weight[1], features[1] = 0, 7
    for costs in (wkd_cost_fc(weight.to(dtype)), wkd_cost_cka(features.to(dtype))):
        assert costs.dtype == torch.float32
        assert costs.isfinite().all()


def test_features_are_grouped_by_class() -> None:
    labels = torch.tensor([2, 0, 1, 0, -1, 2, 2, 1])
    features = torch.arange(8.0)[:, None]
    assert group_by_class(features, labels).squeeze(2).tolist() == [[1, 3], [2, 7], [0, 5]]
    with pytest.raises(ValueError, match="at least one sample to compare classes, but one has none"):
        group_by_class(features, torch.tensor([2, 0, 2, 0, -1, 2, 2, 0]))
