"""Plots of the tables: curves against the learning rate, forest plots, variance bars."""

import math
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from momentum_jax import theory
from momentum_jax.study._answers import is_ratio
from momentum_jax.study._drawing import (
    COLORS,
    cap_line,
    label,
    log_ticks,
    run_dims,
    style,
    three_digits,
)
from momentum_jax.study.statistics import final, log_std, units
from momentum_jax.theory._formulas import (
    effective_learning_rate,
    largest_stable_learning_rate,
    one_minus_mu,
)

HATCHES = {"weights": "", "order": "////", "interaction": "xxxx"}


def families(dataset: xr.Dataset, scale: float) -> dict[str, dict[str, float]]:
    """Returns the arms of each family that was trained at two or more learning rates.

    Args:
      dataset: what `run` returned.
      scale: the initial scale; a learning rate may depend on it.

    Returns:
      For each family, the effective learning rate of each of its arms, in ascending order.

    Example:
      >>> arms = {"arm": ["a", "b"], "init_scale": [1.0], "family": ("arm", ["mu 0", "mu 0"])}
      >>> families(xr.Dataset(coords={**arms, "effective_rate": ("arm", [0.2, 0.1])}), 1.0)
      {'mu 0': {'b': 0.1, 'a': 0.2}}
    """
    found: dict[str, dict[str, float]] = {}
    at = dataset.sel(init_scale=scale)
    rates = at.get("effective_rate", xr.full_like(at.arm, np.nan, float))
    if "learning_rate" in at.coords:
        mu = at.mu.fillna(0) if "mu" in at.coords else 0.0
        rates = rates.fillna(effective_learning_rate(at.learning_rate, one_minus_mu(mu)))
    order = np.argsort(rates.values, kind="stable")
    for name in dict.fromkeys(at.family.values.tolist()):
        arms = [i for i in order if at.family.values[i] == name and np.isfinite(rates.values[i])]
        if len(set(rates.values[arms])) > 1:
            found[str(name)] = {str(at.arm.values[i]): float(rates.values[i]) for i in arms}
    return found


def rate_curve(
    dataset: xr.Dataset,
    scale: float,
    axes: Axes,
    quantity: str = "loss",
    *,
    described: pd.DataFrame | None = None,
) -> Axes:
    """Draws a final quantity against the effective learning rate, with one line per family.

    Args:
      dataset: what `run` returned.
      scale: the initial scale.
      axes: where to draw.
      quantity: "loss" or a metric (median, with bars from the 10% to the 90% quantile), or
        "std" (standard deviation of the final loss between units).
      described: what `describe(dataset)` returned, which has the standard deviation with 95%
        intervals. Without it, the standard deviation is computed here, without intervals.

    Returns:
      `axes`. A hollow marker means that at least half of the runs diverged or ended above the loss
      cap. A marker at the lower edge of the axis means that the standard deviation is undefined or
      estimated as 0. A dotted vertical line is the edge of stability for the mu of a family,
      stability_limit(mu) / curvature / (1 - mu), where the curvature is the median of
      `initial_sharpness`; it is left out if it lies outside the plotted rates.

    Example:
      >>> from matplotlib.figure import Figure
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> arms = [
      ...     Arm(f"{rate}", mj.momentum, family="mu 0", learning_rate=rate, mu=0.0)
      ...     for rate in (0.01, 0.1)
      ... ]
      >>> results = run(problems.quadratic(), arms, range(3), steps=10)
      >>> print(rate_curve(results, 1.0, Figure().subplots()).get_xlabel())
      learning rate
    """
    ends, raw = (each.sel(init_scale=scale) for each in (final(dataset), dataset.isel(step=-1)))
    capped = ~(raw.loss <= ends.loss + 1e-6 * abs(ends.loss))
    logarithmic = quantity == "std" or (quantity == "loss" and bool((ends.loss >= 0).all()))
    bars: list[float] = []
    extent: list[float] = []
    for place, (family, rates) in enumerate(families(dataset, scale).items()):
        x, looks = np.array(list(rates.values())), style(place)
        arms = list(rates)
        low, middle, high = _curve(ends.sel(arm=arms), arms, scale, quantity, described)
        hollow = capped.sel(arm=arms).mean(run_dims(capped)).values >= 0.5
        if logarithmic:
            # A logarithmic axis cannot show 0 or less: such bars reach down to its edge.
            middle, high = (np.where(each > 0, each, np.nan) for each in (middle, high))
            low = np.where(low > 0, low, 1e-30)
            # Values that are undefined or not above 0 are drawn at the edge.
            gone = np.isnan(middle)
            edge = {"transform": axes.get_xaxis_transform(), "clip_on": False, "in_layout": False}
            for rate in x[gone]:
                axes.plot(rate, 0, ls="", mfc="#ffffff", ms=5, zorder=3, **looks, **edge)
        errors = np.nan_to_num([middle - low, high - middle]).clip(0, 1e30)
        axes.errorbar(x, middle, errors, label=label(family), capsize=2, lw=1.3, ms=5, **looks)
        axes.plot(x[hollow], middle[hollow], ls="", mfc="#ffffff", ms=5, zorder=3, **looks)
        # The interval of a standard deviation near 0 can span many powers of ten, so it is cut.
        bars += [*middle] if quantity == "std" else [*middle, *high, *low[low > 1e-30]]
        extent += [x[0] / 1.2, x[-1] * 1.2]
    axes.set_xscale("log")
    if extent:
        axes.set_xlim(min(extent), max(extent))
    if quantity == "loss":
        cap_line(axes, dataset, np.array(bars))
    shown = np.array([value for value in bars if np.isfinite(value)])
    margin = 2 if quantity == "std" else 1.3
    if logarithmic and len(shown):
        axes.set(yscale="log", ylim=(shown.min() / margin, shown.max() * margin))
        log_ticks(axes.yaxis, shown)
    _edges(axes, dataset, scale)
    log_ticks(axes.xaxis, np.array(axes.get_xlim()))
    mu = dataset.coords.get("mu")
    effective = mu is not None and bool((mu > 0).any())
    names = {"loss": "final loss", "std": "standard deviation of final loss"}
    name = names.get(quantity, quantity)
    axes.set(xlabel="effective learning rate" if effective else "learning rate", ylabel=label(name))
    return axes


def _curve(ends, arms, scale, quantity, described):
    """Three arrays (low, middle, high), each with one value per arm."""
    if quantity != "std":
        return ends[quantity].quantile([0.1, 0.5, 0.9], dim=run_dims(ends)).values
    if described is None:
        loss = units(ends.loss.expand_dims("init_scale"))
        std = np.exp(log_std(loss).value[:, 0])
        return np.full_like(std, np.nan), std, np.full_like(std, np.nan)
    rows = described[(described.measure == "std") & (described.scale == scale)]
    return rows.set_index("arm").loc[arms, ["low", "value", "high"]].to_numpy(float).T


def _edges(axes, dataset, scale):
    """Draws the edge of stability of each family, if it lies within the plotted rates."""
    if "initial_sharpness" not in dataset or "mu" not in dataset.coords:
        return
    curvature = float(dataset.initial_sharpness.sel(init_scale=scale).median())
    low, high = axes.get_xlim()
    for place, arms in enumerate(families(dataset, scale).values()):
        settings = dataset.sel(arm=next(iter(arms)))
        mu = float(settings.mu)
        if not (curvature > 0 and -1 < mu < 1):
            continue
        nesterov = bool(settings.coords.get("nesterov", False))
        limit = theory.stability_limit(mu, nesterov=nesterov)
        rate = largest_stable_learning_rate(curvature, limit)
        edge = effective_learning_rate(rate, one_minus_mu(mu))
        if low < edge < high:
            axes.axvline(edge, color=style(place)["color"], ls=":", lw=1.2, zorder=0)


def forest(
    table: pd.DataFrame, axes: Axes, question: str = "std", *, margin: float | None = None
) -> Axes:
    """Draws each comparison as a point with its intervals: one row per arm and initial scale.

    Args:
      table: rows of what `compare` returned, all against one baseline.
      axes: where to draw.
      question: the question to draw. Ratios (measures of spread) get a logarithmic axis.
      margin: the margin of equivalence; ratios from 1 / (1 + margin) to 1 + margin are shaded.
        None shades nothing.

    Returns:
      `axes`. The thick bar is the 95% interval. The thin bar with caps is the interval adjusted for
      all comparisons, which is also printed at the right. A diamond combines all initial scales. An
      arrow means that an interval extends beyond the axis.

    Example:
      >>> from matplotlib.figure import Figure
      >>> row = {"arm": "mu 0.9", "baseline": "mu 0", "scale": 1.0, "question": "std"}
      >>> row |= {"value": 0.7, "low": 0.6, "high": 0.8, "adjusted_low": 0.5, "adjusted_high": 0.9}
      >>> print(forest(pd.DataFrame([row]), Figure().subplots()).get_xscale())
      log
    """
    rows: Any = table[table.question == question]
    ratio = is_ratio(question)
    neutral = 1.0 if ratio else 0.5 if question == "lower loss" else 0.0
    low, high = _forest_limits(rows, neutral, ratio)
    if ratio and margin is not None:
        axes.axvspan(1 / (1 + margin), 1 + margin, color="0.6", alpha=0.25, lw=0)
    axes.axvline(neutral, color="0.5", lw=0.8)
    places, labels, place = [], [], 0
    for number, (arm, group) in enumerate(rows.groupby("arm", sort=False)):
        header: dict[str, Any] = {"fontsize": "small", "fontweight": "bold", "va": "center"}
        axes.text(0.01, place, label(str(arm)), transform=axes.get_yaxis_transform(), **header)
        for row in group.sort_values("scale").itertuples():
            place += 1
            combined = math.isnan(row.scale)
            places.append(place)
            labels.append("all scales" if combined else f"x{row.scale:g}")
            looks = style(number) | ({"marker": "D"} if combined else {})
            _forest_row(axes, row, place, (low, high), looks)
        place += 1.3
    heading = {"transform": axes.get_yaxis_transform(), "fontsize": "x-small", "va": "center"}
    axes.text(1.02, 0, f"{'ratio' if ratio else 'value'} [adjusted interval]", **heading)
    axes.set(yticks=places, yticklabels=labels, ylim=(place - 0.5, -0.8), xlim=(low, high))
    axes.tick_params("y", length=0, labelsize="small")
    if ratio:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        log_ticks(axes.xaxis, np.array([low, high]))
    return axes


def _forest_limits(rows, neutral, ratio):
    """The limits of the axis: all intervals, but not much wider than points and usual intervals."""
    wanted = rows[["value", "low", "high", "adjusted_low", "adjusted_high"]].to_numpy(float)
    if ratio:
        wanted, neutral = np.log(np.where(wanted > 0, wanted, np.nan)), math.log(neutral)
    away = np.abs(wanted - neutral)
    away = away[np.isfinite(wanted).all(1)] if np.isfinite(wanted).all(1).any() else away
    away = away[np.isfinite(away).all(1)]
    points, usual = (away[:, 0].max(), np.median(away.max(1))) if len(away) else (0.0, 0.0)
    farthest = max(2 * points, 3 * usual, 0.15)
    ends = np.append(wanted[np.isfinite(wanted)], [neutral - 0.15, neutral + 0.15])
    low, high = np.clip([ends.min(), ends.max()], neutral - farthest, neutral + farthest)
    room = 0.08 * (high - low)
    limits = low - room, high + room
    return tuple(math.exp(end) for end in limits) if ratio else limits


def _forest_row(axes, row, place, limits, looks):
    """Draws a point with its two intervals, and prints the numbers."""
    values = tuple(float(v) for v in (row.value, row.adjusted_low, row.adjusted_high))
    value = values[0]
    numbers = "undefined"
    if math.isfinite(value):
        interval = ", ".join(map(three_digits, values[1:]))
        numbers = three_digits(value) + ("" if "nan" in interval else f" [{interval}]")
        for ends, width in (((row.low, row.high), 3.0), (values[1:], 1.0)):
            if math.isnan(ends[0]) or math.isnan(ends[1]):
                continue
            low, high = np.clip(ends, *limits)
            axes.plot([low, high], [place] * 2, color=looks["color"], lw=width, zorder=2)
            if width == 1.0:
                for end, given, arrow in ((low, ends[0], "<"), (high, ends[1], ">")):
                    mark = "|" if end == given else arrow
                    axes.plot(end, place, marker=mark, color=looks["color"], ms=5, clip_on=False)
        axes.plot(value, place, ls="", ms=6, zorder=3, **looks)
    axes.text(
        1.02, place, numbers, transform=axes.get_yaxis_transform(), va="center", fontsize="small"
    )


def variance_bars(components: pd.DataFrame, axes: Axes) -> Axes:
    """Draws the proportion of the variance due to each source: one bar per arm and scale.

    Args:
      components: rows of what `variance_components` returned.
      axes: where to draw.

    Returns:
      `axes`. The black line is the 95% interval of the proportion due to the weights.

    Example:
      >>> from matplotlib.figure import Figure
      >>> row = {"arm": "mu 0", "scale": 1.0, "low": 0.1, "high": 0.4}
      >>> sources = {"weights": 0.25, "order": 0.5, "interaction": 0.25}
      >>> rows = pd.DataFrame([row | {"source": k, "proportion": v} for k, v in sources.items()])
      >>> print(variance_bars(rows, Figure().subplots()).get_xlabel())
      proportion of the variance
    """
    several = components.scale.nunique() > 1
    keys = list(dict.fromkeys(zip(components.arm, components.scale, strict=True)))
    names = [label(arm, 30) + (f", x{scale:g}" if several else "") for arm, scale in keys]
    table = components.set_index(["source", "arm", "scale"])
    places, left = np.arange(len(keys)), np.zeros(len(keys))
    for color, (source, hatch) in zip((2, 1, 4), HATCHES.items(), strict=True):
        proportion = np.array([table.proportion[source, *key] for key in keys], float)
        width = np.nan_to_num(proportion).clip(0, 1)
        looks: dict[str, Any] = {"facecolor": COLORS[color], "edgecolor": "#ffffff", "lw": 0.3}
        axes.barh(places, width, 0.75, left, hatch=hatch, label=source, **looks)
        left += width
    for place, key in enumerate(keys):
        row = table.loc[("weights", *key)]
        axes.plot([row.low, row.high], [place] * 2, color=COLORS[0], lw=1.2)
        if math.isnan(row.proportion):
            axes.text(0.02, place, "undefined", va="center", fontsize="x-small")
    axes.set(xlim=(0, 1), xlabel="proportion of the variance", yticks=places, yticklabels=names)
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    axes.tick_params("y", length=0, labelsize="small")
    return axes
