"""The pictures show the numbers that they name."""

from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from momentum_jax.diagnostics import Measurement
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
        attrs={"worst": 2.0, "solved_loss": 0.5, "solved_metric": np.nan},
    )


def test_final_loss_draws_a_median_and_the_middle_80_percent_for_each_scale(results):
    axes = plots.final_loss(results, ARMS, Figure().subplots())
    line, _, (bars,) = axes.containers[1]
    last = np.nan_to_num(results.loss.values[1, :, :, -1], nan=2.0)
    np.testing.assert_allclose(line.get_ydata(), np.median(last, axis=1), rtol=1e-6)
    low_high = [segment[:, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(low_high, np.quantile(last, [0.1, 0.9], axis=1).T, rtol=1e-6)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["x0.5", "x1", "x2"]
    assert axes.get_legend_handles_labels()[1] == ["the most a run is charged with", *ARMS]


def test_loss_curves_draw_the_median_over_the_steps_and_keep_diverged_runs(results):
    axes = plots.loss_curves(results, ARMS, 2.0, Figure().subplots())
    plain, heavy, chance = axes.lines
    expected = np.sort(np.nan_to_num(results.loss.values[:, 2], nan=np.inf), axis=1)[:, 5]
    np.testing.assert_array_equal(plain.get_xdata(), [5, 10, 15, 20])
    drawn = [np.asarray(line.get_ydata(), float) for line in (plain, heavy, chance)]
    np.testing.assert_allclose(drawn[:2], expected)
    assert set(drawn[2]) == {2.0}
    assert axes.get_title() == "initial scale x2"


def bowl(w):
    return (w[0] ** 2 + 4 * w[1] ** 2) / 2


def test_the_path_is_drawn_from_its_start_to_its_end_over_a_map_that_holds_it():
    points = np.array([[4.0, 1.0], [2.0, -0.5], [0.5, 0.25], [np.inf, np.nan]])
    axes = plots.path(bowl, {"mu 0.9": points, "mu 0": points[:2]}, Figure().subplots())
    drawn = [np.asarray(line.get_xydata()) for line in axes.lines]
    np.testing.assert_array_equal(drawn[0], points[:3])  # What is not finite is left out.
    np.testing.assert_array_equal(np.concatenate(drawn[1:3]), points[[0, 2]])
    assert axes.get_legend_handles_labels()[1] == ["mu 0.9", "mu 0"]
    (low_x, high_x), (low_y, high_y) = axes.get_xlim(), axes.get_ylim()
    assert low_x < 0.5
    assert high_x > 4
    assert low_y < -0.5
    assert high_y > 1


def test_the_map_is_that_of_the_loss():
    """Each level is an ellipse of the bowl: the loss is the same all along it."""
    points = np.array([[2.0, 1.0], [-2.0, -1.0]])
    axes = plots.path(bowl, {"": points}, Figure().subplots())
    lines: Any = axes.collections[0].get_paths()
    levels = [line.vertices for line in lines if len(line.vertices)]
    assert len(levels) > 5
    for vertices in levels:
        heights = np.sqrt(np.apply_along_axis(bowl, 1, vertices))
        assert np.ptp(heights) < 0.02


def measured(**given):
    values: dict[str, Any] = dict.fromkeys(Measurement._fields, np.ones(3)) | given
    return Measurement(**values)


def test_the_energies_are_those_measured():
    energies = {"kinetic_energy": np.array([1.0, 2, 3]), "potential_energy": np.array([5.0, 4, 2])}
    whole = measured(**energies, total_energy=np.array([6.0, 6, 5]))
    axes = plots.energies(whole, Figure().subplots())
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_array_equal(drawn["total energy"], [6, 6, 5])
    np.testing.assert_array_equal(drawn["kinetic energy"], [1, 2, 3])
    np.testing.assert_array_equal(drawn["potential energy"], [5, 4, 2])
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 3])


def test_energies_without_a_loss_are_refused():
    with pytest.raises(ValueError, match=r"give measure\(\.\.\.\) the loss"):
        plots.energies(measured(potential_energy=None), Figure().subplots())


def test_alignment_and_gain_have_a_scale_each_and_the_gain_its_ceiling():
    motion = measured(alignment=np.array([1.0, 0.5, -0.5]), gain=np.array([1.0, 2.0, 4.0]))
    # At learning rate 4 and mu 0.75.
    motion = motion._replace(effective_learning_rate=np.full(3, 16.0), friction=np.full(3, 0.125))
    axes = plots.alignment_and_gain(motion, Figure().subplots())
    right = axes.figure.axes[1]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, 0.5, -0.5])
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [1, 2, 4])
    np.testing.assert_allclose(np.asarray(right.lines[1].get_ydata(), float), 4)  # 1 / (1 - mu)
    no_friction = motion._replace(effective_learning_rate=np.full(3, np.inf), friction=np.zeros(3))
    axes = plots.alignment_and_gain(no_friction, Figure().subplots())
    assert len(axes.figure.axes[1].lines) == 1


def test_pairs_are_drawn_at_their_losses_and_marked(results):
    axes = plots.paired(results, "plain", "heavy", Figure().subplots())
    ends = np.nan_to_num(results.loss.values[..., -1], nan=2.0)
    solved = ends <= 0.5
    expected = {
        "rescued": ~solved[0] & solved[1],
        "lost": solved[0] & ~solved[1],
        "no difference": solved[0] == solved[1],
    }
    drawn: Any = {points.get_label(): points.get_offsets() for points in axes.collections}
    for name, chosen in expected.items():
        assert chosen.any()
        points = drawn[f"{name} ({chosen.sum()})"]
        np.testing.assert_allclose(points, ends[:, chosen].T, rtol=1e-6)
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_losses_of_0_and_below_are_drawn(results):
    """Those of 0 at the lower edge of a logarithmic axis, negative ones on a linear axis."""
    results.loss[0, 0, 0, -1] = 0
    axes = plots.paired(results, "plain", "heavy", Figure().subplots())
    assert axes.get_yscale() == "log"
    results.loss[0, 0, 0, -1] = -1
    axes = plots.paired(results, "plain", "heavy", Figure().subplots())
    assert axes.get_yscale() == "linear"


def test_every_arm_is_drawn_however_many(results):
    many = xr.concat([results] * 4, "arm", coords="minimal", data_vars="minimal")
    names = [f"arm {i}" for i in range(8)]
    axes = plots.loss_curves(many.assign_coords(arm=names), names, 0.5, Figure().subplots())
    assert len(axes.lines) == 8 + 1
