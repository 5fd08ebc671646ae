"""Describes the final results of every arm in one table."""

import math

import numpy as np
import pandas as pd
import xarray as xr

from momentum_jax.study import spread_tests, statistics
from momentum_jax.study._answers import SPREADS, Runs
from momentum_jax.study._pairs import coordinate


def describe(dataset: xr.Dataset) -> pd.DataFrame:
    """Describes the final results of each arm at each scale.

    Means have BCa bootstrap intervals, proportions Wilson intervals, and measures of spread have
    intervals from a studentized bootstrap of their logarithm. The interval of one standard
    deviation covers the truth in 94% of normal samples of 20 to 100 units. It covers the truth in
    only 78 to 83% of samples from a lognormal or t3 distribution, and in 60% of samples of 20
    units of which 5% fail: no method can know about a tail that the sample misses.

    Args:
      dataset: what `run` returned.

    Returns:
      A table with one row for each arm, scale and measure. `low` and `high` are a 95% interval;
      undefined numbers are nan.

    Example:
      >>> ends = (["arm", "init_scale", "seed", "step"], np.ones((1, 1, 8, 1)))
      >>> results = xr.Dataset({"loss": ends}, coords={"arm": ["mu 0"], "init_scale": [1.0]})
      >>> found = describe(results).set_index("measure")
      >>> print(found.loc["mean loss", "value"], found.loc["failed", "value"])
      1.0 0.0
    """
    runs = Runs(dataset)
    rates = coordinate(dataset, "effective_rate")
    middle = statistics.interquartile_mean
    proportions = {"failed": 1 - runs.values["solved"], "diverged": runs.values["diverged"]}
    rows = []
    for place, scale in np.ndindex(len(runs.arms), len(runs.scales)):
        loss = runs.values["loss"][place, scale]
        found = {
            "mean loss": (loss.mean(), *statistics.bootstrap(np.mean, loss)),
            "interquartile mean loss": (middle(loss.ravel()), *statistics.bootstrap(middle, loss)),
        }
        for name in SPREADS:
            if name in runs.measured:
                found[name] = _std(runs, name, place, scale)
        for name, values in proportions.items():
            each = values[place, scale].mean(-1)
            found[name] = (each.mean(), *statistics.proportion(each))
        for name in runs.metrics:
            values = runs.values[name][place, scale]
            found[f"mean {name}"] = (values.mean(), *statistics.bootstrap(np.mean, values))
        where = {
            "arm": runs.arms[place],
            "family": str(dataset.get("family", dataset.arm).values[place]),
            "effective_rate": rates[place],
            "scale": runs.scales[scale],
        }
        for measure, (value, low, high) in found.items():
            numbers = dict(value=float(value), low=float(low), high=float(high), n=runs.count)
            rows.append({**where, "measure": measure, **numbers})
    return pd.DataFrame(rows)


def _std(runs, name, place, scale):
    value, influence = (each[place, scale] for each in runs.measured[name])
    if not math.isfinite(value) or runs.count < statistics.FEWEST:
        return math.exp(value), math.nan, math.nan
    if name in runs.std_of:
        counts = spread_tests.resampled(runs.count, 1999)
        reference = spread_tests.bootstrap_reference(influence[None], np.ones(1), counts)
    else:
        reference = spread_tests.t_reference(runs.count - 1.0, 1999)
    half = float(reference[1899] * influence.std(ddof=1) / math.sqrt(len(influence)))
    if not half < 700:  # exp(700) is close to the largest float: no interval.
        return math.exp(value), math.nan, math.nan
    return math.exp(value), math.exp(value - half), math.exp(value + half)
