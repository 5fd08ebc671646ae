"""Tests of a ratio of standard deviations, with the reference distributions that they use."""

import functools

import numpy as np
from jaxtyping import Float
from scipy import stats


@functools.lru_cache(4)
def resampled(units: int, draws: int) -> Float[np.ndarray, "draw unit"]:
    """Returns how often each unit occurs in each bootstrap draw.

    Example:
      >>> print(resampled(6, 10).sum(1)[:3])
      [6. 6. 6.]
    """
    even = np.full(units, 1 / units)
    return np.random.default_rng(0).multinomial(units, even, draws).astype(float)


def bootstrap_reference(
    influences: Float[np.ndarray, "std unit"],
    weights: Float[np.ndarray, " std"],
    counts: Float[np.ndarray, "draw unit"],
) -> Float[np.ndarray, " draw"]:
    """Computes the bootstrap distribution of |T| for a weighted sum of log standard deviations.

    T is the sum divided by its standard error, in bootstrap draws whose true sum is 0. The
    interval is value +- quantile * standard error, and the p-value is that of the observed |T|:
    this is the symmetric studentized bootstrap.

    The table shows in how many of 100 simulated studies this test finds a difference between two
    arms at the 5% level, and in how many the permutation test of `exchange_p` does. A range covers
    correlations of 0.5 and 0.9 within pairs. The standard deviations are equal unless a ratio is
    given. Other candidate tests, several scales and crossed designs are in
    benchmarks/results/spread-tests.json.

                                   studentized bootstrap         permutation
        pairs                           20      50     100      20      50     100
        normal                           6       6     6-7       4     4-5     5-7
        t3                            8-11     6-7     6-8       5     5-6     6-7
        lognormal                    11-17    8-10     6-8       6       4     4-5
        10% failed                     5-8       1     2-3     1-3     4-5     5-6
        5% capped                      6-9     2-6     0-1     2-4     3-4     3-4
        normal against 5% capped     37-41   13-14     4-6   35-38    9-10       6
        normal against t3            19-28   14-24   18-27   16-30   17-33   24-39
        normal against lognormal     21-24   15-18   16-17   28-35   27-32   25-28
        normal, ratio 0.7            38-81  80-100  98-100   30-76  78-100  98-100
        t3, ratio 0.7                20-42   34-58   41-71   18-50   40-81   53-88
        lognormal, ratio 0.7         13-33   18-34   19-44   13-36   20-50   26-64
        10% failed, ratio 0.7        14-31   25-40   57-79      14   24-47   44-71

    The permutation test keeps its 5% level if both arms have the same distribution. The bootstrap
    test has fewer errors if they do not. No test is reliable if the sample misses the tail that
    makes most of the standard deviation: with 20 pairs of which 5% fail in one arm, both tests find
    a difference between equal standard deviations in more than a third of the studies. The 95%
    interval misses the true ratio as often as this test errs.

    Source:
      Davison and Hinkley (1997), Bootstrap methods and their application, chapter 5.

    Args:
      influences: the influences of `log_std`, one row per standard deviation. Each unit is drawn
        with all its rows.
      weights: the weights of the sum: 1 / scales for an arm, -1 / scales for its baseline.
      counts: the draws of `resampled`.

    Returns:
      The values of |T|, sorted.

    Example:
      >>> from momentum_jax.study import statistics
      >>> values = np.random.default_rng(0).normal(size=(2, 50, 1))
      >>> influences = statistics.log_std(values).influence
      >>> reference = bootstrap_reference(influences, np.array([1.0, -1]), resampled(50, 999))
      >>> print(1.8 < np.quantile(reference, 0.95) < 2.5)
      True
    """
    units = influences.shape[1]
    # The contribution of each unit to each variance, scaled so that every variance is 1.
    parts = 1 + 2 * influences.T
    rows, columns = np.triu_indices(len(influences))
    sums = counts @ np.hstack([parts, parts[:, rows] * parts[:, columns]]) / units
    variances, products = np.split(sums, [len(influences)], 1)
    # With several replicates a variance may not be above 0. Then log x is replaced by x - 1.
    positive = np.all(variances > 0, axis=1, keepdims=True)
    level = np.where(positive, variances, 1)
    value = np.abs((np.log(level) + variances / level - 1) @ weights / 2)
    slopes = weights / level / 2
    twice = np.where(rows == columns, 1, 2)
    squares = np.sum(products * twice * slopes[:, rows] * slopes[:, columns], 1)
    centre = np.sum(slopes * variances, 1)
    error = np.sqrt(np.maximum(squares - centre**2, 0) / (units - 1))
    value = np.where(value < 1e-9, 0, value)
    none = np.where(value > 0, np.inf, 0.0)
    return np.sort(np.divide(value, error, out=none, where=error > 1e-12))


@functools.lru_cache(4)
def swaps(units: int, draws: int) -> Float[np.ndarray, "draw unit"]:
    """Draws which units are swapped between two arms in each permutation: 1 swapped, 0 not.

    Example:
      >>> swaps(6, 10).shape
      (10, 6)
    """
    return np.random.default_rng(0).integers(0, 2, (draws, units)).astype(float)


def exchange_p(
    arm: Float[np.ndarray, "scale unit replicate"],
    baseline: Float[np.ndarray, "scale unit replicate"],
    swapped: Float[np.ndarray, "draw unit"],
) -> float:
    """Computes the p-value of a permutation test that two arms differ only by a shift.

    Both arms are shifted to median 0, and whole units are swapped between them. The statistic is
    the log ratio of standard deviations, averaged over the scales. The test is exact, except for
    the estimated medians, if both arms have the same distribution. For its error rates otherwise,
    see `bootstrap_reference`.

    Source:
      Pitman (1937), Significance tests which may be applied to samples from any populations.

    Example:
      >>> values = np.random.default_rng(0).normal(size=(1, 50, 1))
      >>> print(exchange_p(values, 2 * values, swaps(50, 999)))
      0.001
    """
    scales, units, replicates = arm.shape
    # What a swap moves: the sum of each replicate, and the sum of the products within units.
    moved = []
    for values in (arm, baseline):
        away = values - np.median(values, 1, keepdims=True)
        square = np.square(away).sum(-1)
        within = square if replicates == 1 else np.square(away.sum(-1)) - square
        moved.append(
            np.concatenate([away, within[..., None]], -1).swapaxes(0, 1).reshape(units, -1)
        )
    shift = np.vstack([np.zeros(units), swapped]) @ (moved[1] - moved[0])
    logs = []
    for sums in (moved[0].sum(0) + shift, moved[1].sum(0) - shift):
        sums = sums.reshape(-1, scales, replicates + 1)
        means, within = sums[..., :-1] / units, sums[..., -1]
        square = np.square(means).sum(-1)
        centre = square if replicates == 1 else np.square(means.sum(-1)) - square
        logs.append(np.log(np.maximum(within - units * centre, 1e-300)))
    observed, *drawn = np.abs((logs[0] - logs[1]).mean(-1))
    return float((1 + np.sum(np.array(drawn) >= observed - 1e-9)) / (1 + len(drawn)))


@functools.lru_cache(8)
def t_reference(degrees: float, size: int) -> Float[np.ndarray, " size"]:
    """Returns evenly spaced quantiles of |t| of Student's distribution, sorted.

    Example:
      >>> print(np.quantile(t_reference(10.0, 9999), 0.95).round(2))
      2.23
    """
    return np.asarray(stats.t.ppf(0.5 + (np.arange(size) + 0.5) / (2 * size), degrees))
