"""Splits the variance of the final loss into initial weights, data order and their interaction."""

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from momentum_jax.study import statistics
from momentum_jax.study._pairs import coordinate

SOURCES = ("weights", "order", "interaction")

# Draws of the mean squares.
DRAWS = 4000


def variance_components(dataset: xr.Dataset, *, of: str = "loss") -> pd.DataFrame:
    """Computes the proportions of the variance due to weights, data order and their interaction.

    The model is two-way random effects of W initial weights x O data orders, with one run in each
    cell. From the mean squares MW, MO and MI,

        variance_weights = (MW - MI) / O
        variance_order = (MO - MI) / W
        variance_interaction = MI

    and each is at least 0. The interaction includes everything that is specific to one pair of
    weights and order. The proportions are relative to the sum of the three.

    Args:
      dataset: what `run` returned, of a crossed design.
      of: "loss" (the final loss, capped) or the name of a metric.

    Returns:
      A table with one row for each arm, scale and source: its variance, its proportion of the sum,
      and the 95% interval of the proportion from `proportions`. The proportion and its interval
      are nan if all runs end with the same value.

    Raises:
      ValueError: the design is not crossed.

    Source:
      Searle, Casella and McCulloch (1992), Variance components, chapter 4.

    Example:
      >>> ends = np.random.default_rng(0).normal(size=(1, 1, 50, 1, 1)) + np.zeros((1, 1, 50, 4, 1))
      >>> results = xr.Dataset(
      ...     {"loss": (["arm", "init_scale", "seed", "order_seed", "step"], ends)},
      ...     coords={"arm": ["mu 0"], "init_scale": [1.0]},
      ...     attrs={"loss_cap": 9.0},
      ... )
      >>> print(variance_components(results).set_index("source").proportion.round(2).to_dict())
      {'weights': 1.0, 'order': 0.0, 'interaction': 0.0}
    """
    ends = statistics.final(dataset)[of]
    sizes = {name: ends.sizes.get(name, 0) for name in ("seed", "order_seed")}
    if min(sizes.values()) < 2:
        raise ValueError(
            f"the design of {sizes['seed']} seeds x {sizes['order_seed']} order seeds must be "
            "crossed, with at least 2 of each, to separate weights from data order: run the study "
            "with order_seeds=range(16), for example."
        )
    values = statistics.units(ends)
    families = dataset.get("family", dataset.arm).values
    rates = coordinate(dataset, "effective_rate")
    rows = []
    for arm, scale in np.ndindex(values.shape[:2]):
        where = {
            "arm": str(ends.arm.values[arm]),
            "family": str(families[arm]),
            "effective_rate": rates[arm],
            "scale": float(ends.init_scale.values[scale]),
        }
        variances, low, high = proportions(values[arm, scale])
        total = variances.sum()
        proportion = variances / total if total > 0 else np.full(3, np.nan)
        for source, *numbers in zip(SOURCES, proportion, low, high, variances, strict=True):
            names = ("proportion", "low", "high", "variance")
            rows.append({**where, "source": source, **dict(zip(names, numbers, strict=True))})
    return pd.DataFrame(rows)


def proportions(
    values: Float[np.ndarray, "weights order"],
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Computes the three variances, and 95% intervals of their proportions.

    The intervals are generalized confidence intervals: each mean square M is drawn as
    M * d / chi2(d). With normal effects, d is its degrees of freedom. If heavy tails make M less
    certain, d is lowered to 2 / (jackknife variance of log M); for the order, only with 6 orders or
    more.

    The table shows how many of 100 intervals cover the true proportion of the weights, with 16 or
    50 weights and true proportions of 0.05 to 0.9, by the distribution of all effects (see
    benchmarks/results/spread-tests.json):

        orders             2       4      16
        normal         93-97   94-99   95-99
        t3             89-99   89-99   84-97
        lognormal     84-100   78-99   76-97
        10% failed    83-100  68-100   80-97

    The intervals are too short if rare events make most of a component, because a few orders
    cannot show them.

    Args:
      values: the final values, one run in each cell.

    Returns:
      The three variances, then the lower and the upper bounds of their proportions, each in the
      order of `SOURCES`.

    Source:
      Weerahandi (1993), Generalized confidence intervals.

    Example:
      >>> variances, low, high = proportions(np.random.default_rng(0).normal(size=(50, 16)))
      >>> print(variances.round(1), low[2] > 0.9)
      [0. 0. 1.] True
    """
    rows, columns = values.shape
    away = values - values.mean()
    by_row, by_column = away.mean(1), away.mean(0)
    rest = away - by_row[:, None] - by_column
    # The contributions of rows and columns to the three sums of squares.
    parts = columns * by_row**2, rows * by_column**2, np.square(rest).sum(1)
    degrees = [rows - 1, columns - 1, (rows - 1) * (columns - 1)]
    squares = np.array([part.sum() for part in parts]) / degrees
    certain = [_degrees(part, limit) for part, limit in zip(parts, degrees, strict=True)]
    if np.ptp(values) == 0:
        return np.zeros(3), np.full(3, np.nan), np.full(3, np.nan)

    def components(squares):
        of_weights, of_order, of_rest = np.moveaxis(squares, -1, 0)
        each = [(of_weights - of_rest) / columns, (of_order - of_rest) / rows, of_rest]
        return np.maximum(np.stack(each, -1), 0)

    drawn = np.random.default_rng(0).chisquare(certain, (DRAWS, 3)) / certain
    variances = components(squares / drawn)
    low, high = np.quantile(variances / variances.sum(1, keepdims=True), [0.025, 0.975], axis=0)
    return components(squares), low, high


def _degrees(parts, limit):
    """The degrees of freedom that match the jackknife variance of the log of a sum of squares."""
    count, total = len(parts), parts.sum()
    if count < statistics.FEWEST or total == 0:
        return limit
    left = np.log(np.maximum(total - parts, 1e-12 * total))
    variance = (count - 1) * left.var()
    return min(limit, 2 / variance) if variance > 0 else limit
