"""The pictures show the numbers that they name."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from momentum_jax.study import plots

ARMS = ["plain", "heavy"]


@pytest.fixture
def results():
    random = np.random.default_rng(0)
    loss = random.uniform(0.1, 1, size=(2, 3, 11, 4)).astype(np.float32)
    loss[1, 2, 0, -1] = np.nan
    dimensions = ("arm", "init_scale", "seed", "step")
    return xr.Dataset(
        {"loss": (dimensions, loss), "metric": (dimensions, np.ones_like(loss))},
        coords={"arm": ARMS, "init_scale": [0.5, 1.0, 2.0], "step": [5, 10, 15, 20]},
        attrs={"chance": 2.0, "passing": 0.5},
    )


def test_final_loss_draws_a_median_and_the_middle_80_percent_for_each_scale(results):
    axes = plots.final_loss(results, ARMS, Figure().subplots())
    line, _, (bars,) = axes.containers[1]
    last = np.nan_to_num(results.loss.values[1, :, :, -1], nan=2.0)
    np.testing.assert_allclose(line.get_ydata(), np.median(last, axis=1), rtol=1e-6)
    low_high = [segment[:, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(low_high, np.quantile(last, [0.1, 0.9], axis=1).T, rtol=1e-6)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["x0.5", "x1", "x2"]
    assert axes.get_legend_handles_labels()[1] == ["guessing", *ARMS]


def test_loss_curves_draw_the_median_over_the_steps_and_keep_diverged_runs(results):
    axes = plots.loss_curves(results, ARMS, 2.0, Figure().subplots())
    plain, heavy, chance = axes.lines
    expected = np.sort(np.nan_to_num(results.loss.values[:, 2], nan=np.inf), axis=1)[:, 5]
    np.testing.assert_array_equal(plain.get_xdata(), [5, 10, 15, 20])
    drawn = [np.asarray(line.get_ydata(), float) for line in (plain, heavy, chance)]
    np.testing.assert_allclose(drawn[:2], expected)
    assert set(drawn[2]) == {2.0}
    assert axes.get_title() == "initial scale x2"
