"""Tests that the plots show the numbers of their data."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic
import xarray as xr
from matplotlib.figure import Figure

from momentum_jax import theory
from momentum_jax.diagnostics import Measurement
from momentum_jax.study import plots
from momentum_jax.study.statistics import final

ARMS = ["baseline", "heavy"]


@pytest.fixture
def results():
    random = np.random.default_rng(0)
    loss = random.uniform(0.1, 1, size=(2, 3, 11, 4)).astype(np.float32)
    loss[1, 2, 0, -1] = np.nan
    dimensions = ("arm", "init_scale", "seed", "step")
    return xr.Dataset(
        {"loss": (dimensions, loss)},
        coords={"arm": ARMS, "init_scale": [0.5, 1.0, 2.0], "step": [5, 10, 15, 20]},
        attrs={"loss_cap": 2.0, "solved": '{"loss": 0.5}'},
    )


def errorbar(axes, number):
    """Returns x, y and the ends of the bars of the errorbar with this index."""
    line, _, (bars,) = axes.containers[number]
    ends = [bar[:, 1] for bar in bars.get_segments() if len(bar)]
    return line.get_xdata(), line.get_ydata(), np.array(ends)


def test_final_loss_draws_a_median_and_the_middle_80_percent_for_each_scale(results):
    axes: Any = plots.final_loss(results, ARMS, Figure().subplots())
    _, middle, low_high = errorbar(axes, 1)
    last = np.nan_to_num(results.loss.values[1, :, :, -1], nan=2.0)
    np.testing.assert_allclose(middle, np.median(last, axis=1), rtol=1e-6)
    np.testing.assert_allclose(low_high, np.quantile(last, [0.1, 0.9], axis=1).T, rtol=1e-6)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["x0.5", "x1", "x2"]


def test_final_loss_takes_all_runs_of_a_crossed_study():
    results = synthetic.dataset(rates=(0.1,), families={"mu 0": 0.0}, control=False)
    axes: Any = plots.final_loss(results, ["mu 0 at 0.1"], Figure().subplots())
    runs = results.loss.isel(step=-1, arm=0).values.reshape(3, -1)
    np.testing.assert_allclose(errorbar(axes, 0)[1], np.median(runs, axis=1), rtol=1e-6)


def test_loss_curves_draw_the_median_over_the_steps_and_keep_diverged_runs(results):
    axes: Any = plots.loss_curves(results, ARMS, 2.0, Figure().subplots())
    baseline, heavy, cap = axes.lines
    expected = np.sort(np.nan_to_num(results.loss.values[:, 2], nan=np.inf), axis=1)[:, 5]
    np.testing.assert_array_equal(baseline.get_xdata(), [5, 10, 15, 20])
    drawn = [np.asarray(line.get_ydata(), float) for line in (baseline, heavy, cap)]
    np.testing.assert_allclose(drawn[:2], expected)
    assert set(drawn[2]) == {2.0}
    assert baseline.get_marker() != heavy.get_marker()
    assert axes.get_title() == "initial scale x2"


def test_loss_curves_take_the_steps_of_each_arm(results):
    steps = (("arm", "step"), [[5, 10, 15, 20], [1, 2, 3, 4]])
    results = results.assign_coords(steps_taken=steps)
    axes: Any = plots.loss_curves(results, ARMS, 0.5, Figure().subplots())
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [1, 2, 3, 4])


RATES = (0.02, 0.1, 0.5)
FEW: Any = {"rates": RATES, "scales": (1.0, 2.0)}


def test_the_rate_curve_has_one_line_per_family_with_median_and_quantiles():
    results = synthetic.dataset(**FEW)
    axes: Any = plots.rate_curve(results, 2.0, Figure().subplots())
    names = [container.get_label() for container in axes.containers]
    assert names == ["mu 0", "mu 0.9", "mu 0.99"]  # The control arm has only one rate, so no line.
    lines = [container.lines[0] for container in axes.containers]
    assert len({line.get_color() for line in lines}) == 3
    assert len({line.get_marker() for line in lines}) == 3
    x, middle, low_high = errorbar(axes, 1)
    np.testing.assert_allclose(x, RATES)
    arms = [synthetic.arm_name("mu 0.9", 0.9, rate) for rate in RATES]
    ends = final(results).loss.sel(init_scale=2.0, arm=arms).values.reshape(3, -1)
    low, median, high = np.quantile(ends, [0.1, 0.5, 0.9], axis=1)
    np.testing.assert_allclose(middle, median, rtol=1e-6)
    np.testing.assert_allclose(low_high, np.stack([low, high], 1), rtol=1e-6)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "effective learning rate"


def vertical(axes):
    """Returns the positions of the dotted vertical lines."""
    dotted = [line.get_xdata() for line in axes.lines if line.get_linestyle() == ":"]
    return [left for left, right in dotted if left == right]


def test_the_edge_of_stability_is_where_theory_has_it():
    results = synthetic.dataset(families={"mu 0": 0.0, "mu 0.5": 0.5}, **FEW)
    results = results.assign_coords(nesterov=results.nesterov + (results.mu == 0.5))
    for scale in FEW["scales"]:
        axes: Any = plots.rate_curve(results, scale, Figure().subplots())
        drawn = vertical(axes)
        curvature = synthetic.SHARPNESS * scale
        limits = 2.0, theory.stability_limit(0.5, nesterov=True) / 0.5
        edges = [limit / curvature for limit in limits]
        assert drawn == pytest.approx([edge for edge in edges if edge < 0.6])
    axes: Any = plots.rate_curve(results.drop_vars("initial_sharpness"), 2.0, Figure().subplots())
    assert vertical(axes) == []


def test_the_spread_is_that_of_the_description_with_its_interval():
    results = synthetic.dataset(families={"mu 0": 0.0}, control=False, **FEW)
    described = pd.DataFrame({"arm": results.arm.values, "scale": 1.0, "measure": "std"})
    described = described.assign(value=[1, 2, np.nan], low=[0.1, 0, np.nan], high=[3, np.inf, 0])
    figure = Figure(layout="constrained")
    axes: Any = plots.rate_curve(results, 1.0, figure.subplots(), "std", described=described)
    figure.draw_without_rendering()
    _, middle, low_high = errorbar(axes, 0)
    np.testing.assert_array_equal(middle[:2], [1, 2])
    np.testing.assert_allclose(low_high[0], [0.1, 3])
    # The axis fits the values; an interval from 0 to infinity is cut.
    low, high = axes.get_ylim()
    assert (low, high) == (0.5, 4.0)
    assert low_high[1][0] < low
    assert low_high[1][1] > high
    edge = [line for line in axes.lines if line.get_transform() == axes.get_xaxis_transform()]
    assert RATES[2] in edge[0].get_xdata()  # An undefined value is drawn at the edge.


def test_the_spread_is_computed_where_it_is_not_given():
    results = synthetic.dataset(design="weights", families={"mu 0": 0.0}, control=False, **FEW)
    axes: Any = plots.rate_curve(results, 1.0, Figure().subplots(), "std")
    expected = final(results).loss.sel(init_scale=1.0).std("seed", ddof=1).values.ravel()
    np.testing.assert_allclose(errorbar(axes, 0)[1], expected, rtol=1e-6)


def test_points_where_half_of_the_runs_diverged_are_hollow():
    results = synthetic.dataset(families={"mu 0": 0.0}, control=False, **FEW)
    results.loss[1, :, :12, :, -1] = np.nan
    axes: Any = plots.rate_curve(results, 1.0, Figure().subplots())
    [hollow] = [line for line in axes.lines if line.get_markerfacecolor() == "#ffffff"]
    assert list(hollow.get_xdata()) == [RATES[1]]
    assert list(hollow.get_ydata()) == [2.3]  # The loss cap.


def test_negative_losses_have_a_linear_axis():
    results = synthetic.dataset(families={"mu 0": 0.0}, control=False, **FEW)
    results["loss"] = results.loss - 1
    axes: Any = plots.rate_curve(results, 1.0, Figure().subplots())
    assert axes.get_yscale() == "linear"
    assert np.isfinite(errorbar(axes, 0)[1]).all()


def test_a_metric_has_a_curve_too_and_optimizers_without_mu():
    results = synthetic.dataset(families={"Adam": np.nan, "Lion": np.nan}, **FEW)
    axes: Any = plots.rate_curve(results, 1.0, Figure().subplots(), "accuracy")
    assert axes.get_xlabel() == "learning rate"
    assert axes.get_ylabel() == "accuracy"
    assert axes.get_yscale() == "linear"
    assert len(axes.containers) == 2


def comparison(arm, scale, numbers, question="std"):
    value, low, high, adjusted_low, adjusted_high = numbers
    return {
        "arm": arm,
        "baseline": "mu 0",
        "scale": scale,
        "question": question,
        "value": value,
        "low": low,
        "high": high,
        "adjusted_low": adjusted_low,
        "adjusted_high": adjusted_high,
    }


def test_the_forest_has_a_row_per_arm_and_scale_with_both_intervals():
    rows = [
        comparison("mu 0.9", np.nan, (0.6, 0.5, 0.7, 0.4, 0.8)),
        comparison("mu 0.9", 2.0, (0.5, 0.4, 0.6, 0.3, 0.7)),
        comparison("mu 0.99", 2.0, [np.nan] * 5),
        comparison("mu 0.9", 2.0, (9.0, 8.0, 10.0, 7.0, 11.0), "loss"),
    ]
    axes: Any = plots.forest(pd.DataFrame(rows), Figure().subplots(), margin=0.1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x2", "all scales", "x2"]
    texts = [text.get_text() for text in axes.texts]
    for text in ("mu 0.9", "mu 0.99", "0.500 [0.300, 0.700]", "0.600 [0.400, 0.800]", "undefined"):
        assert text in texts
    spans = {
        tuple(np.round(line.get_xdata(), 6)): line.get_linewidth()
        for line in axes.lines
        if len(line.get_xdata()) == 2
    }
    assert spans[0.4, 0.6] == spans[0.5, 0.7] > spans[0.3, 0.7] == spans[0.4, 0.8]
    markers = {line.get_marker() for line in axes.lines if line.get_markersize() == 6}
    assert "D" in markers  # The diamond of the combined row.
    [band] = axes.patches
    low, high = band.get_extents().transformed(axes.transData.inverted()).intervalx
    assert (low, high) == pytest.approx((1 / 1.1, 1.1))
    assert axes.get_xscale() == "log"


def test_a_difference_is_drawn_around_0_and_an_endless_interval_ends_in_an_arrow():
    rows = [
        comparison("mu 0.9", 1.0, (-0.1, -0.2, 0.1, -0.3, 0.2), "loss"),
        comparison("mu 0.9", 2.0, (-0.1, -np.inf, np.inf, -np.inf, np.inf), "loss"),
    ]
    axes: Any = plots.forest(pd.DataFrame(rows), Figure().subplots(), "loss")
    assert axes.get_xscale() == "linear"
    assert list(axes.lines[0].get_xdata()) == [0, 0]
    low, high = axes.get_xlim()
    assert -2 < low < -0.3
    assert 0.2 < high < 2
    assert {"<", ">"} <= {line.get_marker() for line in axes.lines}


def test_the_bars_are_the_shares_one_after_the_other():
    parts = {"weights": 0.5, "order": 0.2, "interaction": 0.3}
    rows = [
        {"arm": arm, "scale": 1.0, "source": source, "proportion": part, "low": 0.1, "high": 0.7}
        for arm in ("mu 0", "mu 0.9")
        for source, part in parts.items()
    ]
    rows[3]["proportion"] = np.nan
    axes: Any = plots.variance_bars(pd.DataFrame(rows), Figure().subplots())
    bars: Any = axes.containers
    widths = [[bar.get_width() for bar in of_source] for of_source in bars]
    np.testing.assert_allclose(widths, [[0.5, 0], [0.2, 0.2], [0.3, 0.3]])
    np.testing.assert_allclose([bar[0].get_x() for bar in bars], [0, 0.5, 0.7])
    assert len({bar[0].get_hatch() for bar in bars}) == 3
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mu 0", "mu 0.9"]
    assert "undefined" in [text.get_text() for text in axes.texts]
    assert list(axes.lines[0].get_xdata()) == [0.1, 0.7]


def bowl(w):
    return (w[0] ** 2 + 4 * w[1] ** 2) / 2


def test_the_path_is_drawn_from_its_start_to_its_end_over_a_map_that_holds_it():
    points = np.array([[4.0, 1.0], [2.0, -0.5], [0.5, 0.25], [np.inf, np.nan]])
    axes: Any = plots.path(bowl, {"mu 0.9": points, "mu 0": points[:2]}, Figure().subplots())
    drawn = [np.asarray(line.get_xydata()) for line in axes.lines]
    np.testing.assert_array_equal(drawn[0], points[:3])  # Points that are not finite are left out.
    np.testing.assert_array_equal(np.concatenate(drawn[1:3]), points[[0, 2]])
    assert axes.get_legend_handles_labels()[1] == ["mu 0.9", "mu 0"]
    (low_x, high_x), (low_y, high_y) = axes.get_xlim(), axes.get_ylim()
    assert low_x < 0.5
    assert high_x > 4
    assert low_y < -0.5
    assert high_y > 1


def test_the_map_is_that_of_the_loss():
    """The loss is constant along each contour, which is an ellipse."""
    points = np.array([[2.0, 1.0], [-2.0, -1.0]])
    axes: Any = plots.path(bowl, {"": points}, Figure().subplots())
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
    axes: Any = plots.energies(whole, Figure().subplots())
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
    # Learning rate 4 and mu 0.75.
    motion = motion._replace(effective_learning_rate=np.full(3, 16.0), friction=np.full(3, 0.125))
    axes: Any = plots.alignment_and_gain(motion, Figure().subplots())
    right = axes.figure.axes[1]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, 0.5, -0.5])
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [1, 2, 4])
    np.testing.assert_allclose(np.asarray(right.lines[1].get_ydata(), float), 4)  # 1 / (1 - mu).
    no_friction = motion._replace(effective_learning_rate=np.full(3, np.inf), friction=np.zeros(3))
    axes: Any = plots.alignment_and_gain(no_friction, Figure().subplots())
    assert len(axes.figure.axes[1].lines) == 1


def test_pairs_are_drawn_at_their_losses_and_marked(results):
    axes: Any = plots.paired(results, "baseline", "heavy", Figure().subplots())
    ends = np.nan_to_num(results.loss.values[..., -1], nan=2.0)
    solved = ends <= 0.5
    expected = {
        "rescued": ~solved[0] & solved[1],
        "lost": solved[0] & ~solved[1],
        "same status": solved[0] == solved[1],
    }
    drawn: Any = {points.get_label(): points.get_offsets() for points in axes.collections}
    for name, chosen in expected.items():
        assert chosen.any()
        points = drawn[f"{name} ({chosen.sum()})"]
        np.testing.assert_allclose(points, ends[:, chosen].T, rtol=1e-6)
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_losses_of_0_and_below_are_drawn(results):
    """Losses of 0 are at the edge of a logarithmic axis; negative losses need a linear axis."""
    results.loss[0, 0, 0, -1] = 0
    axes: Any = plots.paired(results, "baseline", "heavy", Figure().subplots())
    assert axes.get_yscale() == "log"
    results.loss[0, 0, 0, -1] = -1
    axes: Any = plots.paired(results, "baseline", "heavy", Figure().subplots())
    assert axes.get_yscale() == "linear"


def test_every_arm_is_drawn_however_many(results):
    many = xr.concat([results] * 4, "arm", coords="minimal", data_vars="minimal")
    names = [f"arm {i}" for i in range(8)]
    axes: Any = plots.loss_curves(many.assign_coords(arm=names), names, 0.5, Figure().subplots())
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 8


def test_the_pairs_of_a_crossed_study_are_those_of_all_its_runs():
    results = synthetic.dataset(seeds=5, **FEW)
    axes: Any = plots.paired(results, "mu 0 at 0.1", "mu 0.9 at 0.01", Figure().subplots())
    assert sum(len(np.asarray(each.get_offsets())) for each in axes.collections) == 2 * 5 * 2


def test_a_name_cannot_hide_from_a_legend(results):
    names = ["_plain", "x" * 99]
    axes: Any = plots.final_loss(results.assign_coords(arm=names), names, Figure().subplots())
    labels = axes.get_legend_handles_labels()[1]
    assert labels[-2:] == [" _plain", "x" * 39 + "\N{HORIZONTAL ELLIPSIS}"]
