import pytest
import torch

from kd_lightning.losses._multilinear import MultilinearMap, outer_product, random_product


def test_the_outer_product_matches_einsum() -> None:
    features, probabilities = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    expected = torch.einsum("bc,bd->bcd", probabilities, features).reshape(4, 15)
    torch.testing.assert_close(outer_product(features, probabilities), expected)


def test_the_random_map_preserves_inner_products_in_expectation() -> None:
    """The paper's theorem 1: its inner products estimate those of the outer products."""
    features, probabilities = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    maps = [torch.randn(width, 200_000, dtype=torch.float64) for width in (4, 2)]
    mapped = random_product(features, probabilities, *maps)
    exact = outer_product(features, probabilities)
    torch.testing.assert_close(mapped @ mapped.T, exact @ exact.T, rtol=0.03, atol=0.03)


def test_the_random_map_matches_a_value_by_hand() -> None:
    mapped = random_product(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[0.5, 0.5]]),
        torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]]),
        torch.tensor([[2.0, 2.0, 0.0, 1.0], [0.0, 2.0, 4.0, 1.0]]),
    )
    torch.testing.assert_close(mapped, torch.tensor([[1.0 * 1, 2.0 * 2, 3.0 * 2, 0.0]]) / 2)


@pytest.mark.parametrize(("largest", "random"), [(14, True), (15, False), (16, False)])
def test_the_random_map_is_used_only_above_the_largest_product(largest: int, random: bool) -> None:
    condition = MultilinearMap(3, 5, largest, random_dimensions=7)
    assert condition.random is random
    assert condition.dimensions == (7 if random else 15)
    features, logits = torch.randn(4, 3), torch.randn(4, 5)
    mapped = condition(features, logits)
    assert mapped.shape == (4, condition.dimensions)
    expected = (
        random_product(features, logits.softmax(1), condition.feature_map, condition.probability_map)
        if random
        else outer_product(features, logits.softmax(1))
    )
    torch.testing.assert_close(mapped, expected)


def test_the_random_maps_are_fixed_saved_and_not_trained() -> None:
    """Whatever the seed, since the ranks of a run do not send each other the buffers of losses."""
    maps = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        maps.append(MultilinearMap(30, 50, 4, 70).state_dict())
    assert {name: tuple(value.shape) for name, value in maps[0].items()} == {
        "feature_map": (30, 70),
        "probability_map": (50, 70),
    }
    assert all(torch.equal(maps[0][name], maps[1][name]) for name in maps[0])
    assert list(MultilinearMap(30, 50, 4, 70).parameters()) == []
    for value in maps[0].values():  # standard normal
        assert abs(value.mean()) < 0.1
        assert value.std().item() == pytest.approx(1, abs=0.05)


def test_the_map_is_linear_in_features_and_invariant_to_shifts_of_logits() -> None:
    features, logits = torch.randn(4, 3), torch.randn(4, 5)
    for largest in (4, 15):
        condition = MultilinearMap(3, 5, largest, 7)
        torch.testing.assert_close(condition(3 * features, logits), 3 * condition(features, logits))
        torch.testing.assert_close(condition(features, logits + 4), condition(features, logits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    features, logits = torch.randn(4, 3).to(dtype), torch.randn(4, 5).to(dtype)
    for largest in (4, 15):
        condition = MultilinearMap(3, 5, largest, 7)
        expected = condition(features.float(), logits.float())
        assert condition(features, logits).dtype == torch.float32
        torch.testing.assert_close(condition(features, logits), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(condition(features, logits), expected)
        assert condition(features.double(), logits.double()).dtype == torch.float64
