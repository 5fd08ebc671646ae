"""Estimators and tests on the final values of paired runs.

Every function takes arrays (..., unit, replicate): the units are what is drawn at random (initial
weights, say), the replicates are runs of one unit. Two arms are compared on the same units.
"""

import functools
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

# With fewer units no paired test can reach 5%: n fair coins agree with probability 2 / 2^n.
# An interval computed from fewer units is a guess, and is left undefined.
FEWEST = 6


class Measured(NamedTuple):
    """A statistic of every arm and scale, and what each unit contributes to it.

    Attributes:
      value: the statistic; nan where it is undefined.
      influence: the influence of each unit, with mean 0: the standard error of a value, or of a
        difference of values, is the standard deviation of the influences over sqrt(units).
    """

    value: Float[np.ndarray, " *cells"]
    influence: Float[np.ndarray, "*cells unit"]


def final(dataset: xr.Dataset) -> xr.Dataset:
    """How every run ended: (arm, init_scale, seed), with order_seed where the dataset has it.

    Args:
      dataset: what `run` returned.

    Returns:
      A dataset with the variables
      `loss`: the final loss. A loss above `loss_cap`, or not finite, is set to `loss_cap`; where
        that is nan, to the run's own loss at step 0.
      one variable for each metric. Where it is not finite, the worst finite value of all runs,
        and at most 0 if larger values are better.
      `diverged`: whether the final loss is not finite.
      `solved`: whether the run did not diverge and reached every limit in `solved`.

    Example:
      >>> end = (["arm", "init_scale", "seed", "step"], np.array([[[[2.0, 0.5], [3.0, np.nan]]]]))
      >>> results = xr.Dataset({"loss": end}, attrs={"solved": '{"loss": 1.0}'})
      >>> print(final(results).loss.values.ravel(), final(results).solved.values.ravel())
      [0.5 3. ] [ True False]
    """
    first, last = (dataset.isel(step=step, drop=True) for step in (0, -1))
    diverged = ~np.isfinite(last.loss)
    metrics = json.loads(dataset.attrs.get("metrics", "[]"))
    larger = {metric["name"]: metric["larger_is_better"] for metric in metrics}
    solved = ~diverged
    for name, limit in json.loads(dataset.attrs.get("solved", "{}")).items():
        # In float32, as measured: a Python number does not widen it.
        solved &= last[name] >= limit if larger.get(name, False) else last[name] <= limit

    cap = float(dataset.attrs.get("loss_cap", math.nan))
    if math.isnan(cap):
        start = first.loss.astype(np.float64)
        caps = start.where(np.isfinite(start), _largest(start, 1e38))
    else:
        caps = xr.full_like(last.loss, cap, np.float64)
    loss = last.loss.astype(np.float64)
    ends = {"loss": loss.where(~diverged & (loss <= caps), caps)}
    for name, larger_is_better in larger.items():
        values = last[name].astype(np.float64)
        worst = min(0.0, -_largest(-values, 0.0)) if larger_is_better else _largest(values, 0.0)
        ends[name] = values.where(np.isfinite(values), worst)
    return xr.Dataset({**ends, "diverged": diverged, "solved": solved})


def _largest(values, otherwise):
    known = values.values[np.isfinite(values.values)]
    return float(known.max()) if known.size else otherwise


def units(variable: xr.DataArray) -> Float[np.ndarray, "arm scale unit replicate"]:
    """A variable of `final` as an array (arm, init_scale, unit, replicate).

    Example:
      >>> dims = ["arm", "init_scale", "seed", "order_seed"]
      >>> units(xr.DataArray(np.zeros((2, 3, 1, 8)), dims=dims)).shape  # One seed: orders vary.
      (2, 3, 8, 1)
    """
    if "order_seed" not in variable.dims:
        variable = variable.expand_dims("order_seed")
    values = variable.transpose("arm", "init_scale", "seed", "order_seed").values.astype(float)
    return values.swapaxes(2, 3) if values.shape[2] == 1 and values.shape[3] > 1 else values


def unit_name(dataset: xr.Dataset) -> str:
    """What varies from unit to unit, in words.

    Example:
      >>> unit_name(xr.Dataset(attrs={"design": "order"}))
      'data orders'
    """
    design = dataset.attrs.get("design", "paired")
    if design == "order":
        return "data orders"
    if design == "paired" and "batch_size" in dataset.coords:
        return "initial weights and data order together"
    return "initial weights"


def interquartile_mean(values: Float[np.ndarray, " *n"], axis: int = -1) -> Any:
    """The mean of the middle half: a quarter of the values is cut off at either end.

    Example:
      >>> print(interquartile_mean(np.array([0.0, 1.0, 3.0, 100.0])))
      2.0
    """
    return stats.trim_mean(values, 0.25, axis=axis)


def variances(
    values: Float[np.ndarray, "*cells unit replicate"],
) -> Float[np.ndarray, "*cells unit"]:
    """What each unit contributes to the variance between units; their sum is that variance.

    With one replicate: its squared deviation / (units - 1). With several: the mean product of the
    deviations in two different replicates, so that noise within a unit cancels. The sum is then
    the unbiased estimate (MS_units - MS_interaction) / replicates of two-way random effects, and
    can be negative.

    Example:
      >>> print(variances(np.array([[1.0], [2.0], [3.0]])))
      [0.5 0.  0.5]
    """
    away = values - values.mean(-2, keepdims=True)
    replicates = values.shape[-1]
    products = np.square(away).sum(-1)
    if replicates > 1:
        products = (np.square(away.sum(-1)) - products) / (replicates * (replicates - 1))
    return products / max(values.shape[-2] - 1, 1)


def log_std(values: Float[np.ndarray, "*cells unit replicate"]) -> Measured:
    """The log of the standard deviation between units, with the influence of each.

    Undefined where it is not above 0.

    Example:
      >>> print(np.exp(log_std(np.array([[1.0], [2.0], [3.0]])).value))
      1.0
    """
    parts = variances(values)
    total = parts.sum(-1)
    defined = (total > 0) & (np.ptp(values, axis=(-2, -1)) > 0)
    total = np.where(defined, total, np.nan)
    count = parts.shape[-1]
    return Measured(np.log(total) / 2, (count * parts / total[..., None] - 1) / 2)


def log_total_std(values: Float[np.ndarray, "*cells unit replicate"]) -> Measured:
    """The log of the standard deviation of all runs, whatever makes it, with each unit's influence.

    Example:
      >>> print(np.exp(log_total_std(np.array([[1.0, 3.0], [2.0, 2.0]])).value).round(3))
      0.816
    """
    away = values - values.mean((-2, -1), keepdims=True)
    parts = np.square(away).sum(-1)
    total = np.where(np.ptp(values, axis=(-2, -1)) > 0, parts.sum(-1), np.nan)
    count, runs = parts.shape[-1], parts.shape[-1] * values.shape[-1]
    logs = np.log(total / max(runs - 1, 1)) / 2
    return Measured(logs, (count * parts / total[..., None] - 1) / 2)


def log_range(values: Float[np.ndarray, "*cells unit replicate"]) -> Measured:
    """The log of the range from the 10% to the 90% quantile of all runs.

    Its influences are those of 1000 bootstrap draws. The 95% interval of a ratio from them and
    Student's t covers the truth in 95 to 99% of studies, but in 84 to 90% where a share of just
    10% fails: the quantile then lies on the edge.

    Example:
      >>> print(np.exp(log_range(np.arange(11.0)[:, None]).value).round(6))
      8.0
    """
    drawn = _draws(values.shape[-2])

    def of_rows(each):
        with np.errstate(divide="ignore"):
            return np.log(np.diff(np.quantile(each, [0.1, 0.9], axis=(-2, -1)), axis=0)[0])

    value = np.array(of_rows(values))
    value[~np.isfinite(value)] = np.nan
    influence = np.zeros((*value.shape, len(drawn)))
    for cell in np.argwhere(np.isfinite(value)):
        logs = of_rows(values[*cell][drawn])
        # A draw without a range counts as the narrowest that has one.
        logs[~np.isfinite(logs)] = logs[np.isfinite(logs)].min()
        influence[*cell] = (logs - logs.mean()) * math.sqrt(len(drawn))
    return Measured(value, influence)


@functools.lru_cache(4)
def _draws(count, resamples=1000):
    return np.random.default_rng(0).integers(0, count, (resamples, count))


def middle(values: Float[np.ndarray, "*cells unit replicate"]) -> Measured:
    """The interquartile mean of all runs, with the influence of each unit.

    Source:
      Yuen (1974), The two-sample trimmed t for unequal population variances.

    Example:
      >>> print(middle(np.array([[0.0], [1.0], [3.0], [100.0]])).value)
      2.0
    """
    *cells, count, replicates = values.shape
    runs = np.sort(values.reshape(*cells, -1), -1)
    size = count * replicates
    cut = size // 4
    low, high = runs[..., cut, None, None], runs[..., size - cut - 1, None, None]
    kept = np.clip(values, low, high).mean(-1)
    left = count - 2 * (count // 4)
    factor = math.sqrt(count * (count - 1) / max(left * (left - 1), 1))
    return Measured(
        np.asarray(interquartile_mean(runs)), (kept - kept.mean(-1, keepdims=True)) * factor
    )


def mean(values: Float[np.ndarray, "*cells unit replicate"]) -> Measured:
    """The mean of all runs, with the influence of each unit.

    Example:
      >>> print(mean(np.array([[0.0], [2.0]])).influence)
      [-1.  1.]
    """
    means = values.mean(-1)
    return Measured(means.mean(-1), means - means.mean(-1, keepdims=True))


def swap_test(scores: Float[np.ndarray, " unit"]) -> float:
    """The p of as much gained as lost: the arms of whole units are swapped, all 2^n ways.

    Args:
      scores: integers: in how many of a unit's runs one arm was better, less the reverse.

    Returns:
      The two-sided p. With one run per unit it is McNemar's exact test, or the sign test.

    Example:
      >>> print(swap_test(np.array([1.0, 1, 1, 1, 1, 0])))  # 2 / 2^5
      0.0625
    """
    steps = np.abs(scores).astype(int)
    steps = steps[steps > 0]
    law = np.ones(1)
    for step in steps:
        law = (np.pad(law, (0, 2 * step)) + np.pad(law, (2 * step, 0))) / 2
    sums = np.arange(len(law)) - steps.sum()
    return min(float(law[np.abs(sums) >= abs(round(scores.sum()))].sum()), 1.0)


def bootstrap(
    statistic: Callable[..., Any], sample: Float[np.ndarray, "n *k"], resamples: int = 1999
) -> tuple[float, float]:
    """The 95% BCa bootstrap interval of a statistic of rows.

    Args:
      statistic: `statistic(values, axis)`, of values without structure.
      sample: rows that are drawn together.
      resamples: how often to draw.

    Returns:
      Its bounds; nan with fewer than 6 rows.

    Source:
      Efron (1987), Better bootstrap confidence intervals; scipy.stats.bootstrap.

    Example:
      >>> bootstrap(np.mean, np.full(6, 2.0))
      (2.0, 2.0)
    """
    rows = np.arange(len(sample))

    def of_rows(drawn, axis):
        return statistic(sample[drawn].reshape(*drawn.shape[:-1], -1), axis=axis)

    if len(rows) < FEWEST:
        return math.nan, math.nan
    value = float(of_rows(rows, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = of_rows(_draws(len(rows), resamples), -1)
        if np.ptp(drawn) == 0:
            return value, value
        left_out = of_rows(np.array([np.delete(rows, row) for row in rows]), -1)
        away = left_out.mean() - left_out
        total = np.sum(away**2)
        skew = np.sum(away**3) / (6 * total**1.5) if total > 0 else 0.0
        below = (np.mean(drawn < value) + np.mean(drawn <= value)) / 2
        shift = stats.norm.ppf(np.clip(below, 1 / resamples, 1 - 1 / resamples))
        z = shift + stats.norm.ppf([0.025, 0.975])
        low, high = np.quantile(drawn, stats.norm.cdf(shift + z / (1 - skew * z)))
    return float(low), float(high)


def proportion(
    scores: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"], level: float = 0.95
) -> tuple[float, float]:
    """Wilson's interval of a share.

    Args:
      scores: one per unit: whether it happened, or in which share of the runs of that unit, a
        tie counted as half.
      level: of confidence.

    Returns:
      Wilson's interval for as many yes-or-no answers as would leave that mean as uncertain:
      n p (1 - p) / variance. Undefined (nan) where all scores are one number between 0 and 1.

    Source:
      Wilson (1927), Probable inference, the law of succession, and statistical inference;
      Korn and Graubard (1998), Confidence intervals for proportions with small expected number
      of positive counts (the effective number).

    Example:
      >>> low, high = proportion(np.array([True, False, False, False]))
      >>> print(f"{low:.3f} to {high:.3f}")
      0.046 to 0.699
    """
    n, value, variance = len(scores), float(np.mean(scores)), float(np.var(scores))
    if 0 < value < 1:
        if variance == 0:
            return math.nan, math.nan
        n *= value * (1 - value) / variance
    bounds: Any = proportion_confint(value * n, n, alpha=1 - level, method="wilson")
    # At 0 and at 1 the bound is the share itself, which rounding misses by a little.
    return float(bounds[0]) if value > 0 else 0.0, float(bounds[1]) if value < 1 else 1.0


def holm(ps: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The p of one family, adjusted by Holm's method.

    Example:
      >>> print(holm(np.array([0.01, 0.5, 0.04])))
      [0.03 0.5  0.08]
    """
    order = np.argsort(ps)
    stepwise = np.sort(ps) * np.arange(len(ps), 0, -1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepwise), 1)
    return adjusted
