"""Tests of variance components against analysis of variance and simulated data."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from momentum_jax.study import components
from momentum_jax.study.components import SOURCES, proportions, variance_components


def simulated(random, truth, weights, orders) -> Any:
    """Draws final values (weights, order) with total variance 1 and these proportions."""
    sizes = (weights, 1), (1, orders), (weights, orders)
    return sum(
        part**0.5 * random.normal(size=size) for part, size in zip(truth, sizes, strict=True)
    )


def dataset(loss, **variables):
    """Makes a crossed dataset from final losses (arm, init_scale, seed, order_seed)."""
    dims = ("arm", "init_scale", "seed", "order_seed", "step")
    return xr.Dataset(
        {name: (dims, each[..., None]) for name, each in {"loss": loss, **variables}.items()},
        coords={
            "arm": [f"arm {place}" for place in range(len(loss))],
            "init_scale": 2.0 ** np.arange(loss.shape[1]),
        },
        attrs={
            "loss_cap": 100.0,
            "metrics": json.dumps([{"name": name, "larger_is_better": True} for name in variables]),
        },
    )


def test_variances_are_those_of_an_analysis_of_variance():
    random = np.random.default_rng(0)
    values = simulated(random, (0.5, 0.2, 0.3), 7, 5)
    rows, columns = np.indices(values.shape)
    frame = pd.DataFrame({"y": values.ravel(), "w": rows.ravel(), "o": columns.ravel()})
    table = anova_lm(ols("y ~ C(w) + C(o)", frame).fit())
    of_weights, of_order, rest = table.mean_sq
    expected = np.maximum([(of_weights - rest) / 5, (of_order - rest) / 7, rest], 0)
    np.testing.assert_allclose(proportions(values)[0], expected)


@pytest.mark.parametrize("truth", [(0.9, 0.05, 0.05), (0.25, 0.12, 0.63), (0.0, 0.1, 0.9)])
def test_proportions_are_found_in_simulated_data(truth):
    random = np.random.default_rng(1)
    studies, covered, found = 200, np.zeros(3), []
    for _ in range(studies):
        variances, low, high = proportions(simulated(random, truth, 30, 8))
        found.append(variances)
        covered += (low <= np.array(truth)) & (np.array(truth) <= high)
    # Estimates are cut off at 0, so those of a variance near 0 are slightly too large.
    np.testing.assert_allclose(np.mean(found, 0), truth, atol=0.04)
    assert (covered / studies >= 0.9).all()


def test_heavy_tails_widen_the_interval(monkeypatch):
    random = np.random.default_rng(2)
    studies, truth, covered = 100, np.array([0.25, 0.12, 0.63]), {}
    samples = []
    for _ in range(studies):
        sizes = (50, 1), (1, 16), (50, 16)
        effects = [np.exp(random.normal(size=size)) / 2.161 for size in sizes]
        samples.append(sum(part**0.5 * each for part, each in zip(truth, effects, strict=True)))
    for name in ("jackknife", "normal"):
        if name == "normal":
            monkeypatch.setattr(components, "_degrees", lambda parts, limit: limit)
        bounds = [components.proportions(sample)[1:] for sample in samples]
        covered[name] = np.mean([low[0] <= truth[0] <= high[0] for low, high in bounds])
    assert covered["jackknife"] > covered["normal"] + 0.2


def test_a_row_for_each_arm_scale_and_source():
    random = np.random.default_rng(3)
    loss = np.stack([[simulated(random, (1.0, 0, 0), 9, 4), 5 + random.normal(size=(9, 4))]] * 2)
    accuracy = simulated(random, (0.0, 1.0, 0.0), 9, 4) + np.zeros((2, 2, 9, 4))
    built = dataset(loss, accuracy=accuracy).assign_coords(
        family=("arm", ["a", "b"]), effective_rate=("arm", [0.1, 0.2])
    )
    table = variance_components(built)
    assert list(table.columns) == [
        *("arm", "family", "effective_rate", "scale"),
        *("source", "proportion", "low", "high", "variance"),
    ]
    assert table.source.tolist() == list(SOURCES) * 4
    assert table.scale.tolist() == [1.0] * 3 + [2.0] * 3 + [1.0] * 3 + [2.0] * 3
    assert table.family.tolist() == ["a"] * 6 + ["b"] * 6
    sums = table.groupby(["arm", "scale"]).proportion.sum()
    np.testing.assert_allclose(sums, 1)
    first = table[(table.arm == "arm 0") & (table.scale == 1)].set_index("source")
    assert first.proportion["weights"] == pytest.approx(1)
    other = variance_components(built, of="accuracy").set_index("source")
    assert (other.proportion["order"] > 0.999).all()


def test_runs_with_equal_losses_have_no_proportions():
    table = variance_components(dataset(np.ones((1, 1, 8, 4))))
    assert table[["proportion", "low", "high"]].isna().to_numpy().all()
    assert (table.variance == 0).all()


@pytest.mark.parametrize("chosen", [{"order_seed": [0]}, {"seed": [0]}, {"order_seed": 0}])
def test_other_designs_are_told_what_to_do(chosen):
    built = dataset(np.random.default_rng(4).normal(size=(1, 1, 5, 3))).isel(chosen)
    with pytest.raises(ValueError, match=r"order_seeds=range\(16\)"):
        variance_components(built)
