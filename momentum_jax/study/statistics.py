"""What the runs of an arm say together: estimates over the initial weights, with intervals."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its 95% confidence interval.

    Example:
      >>> print(Estimate(0.5, 0.25, 0.75))
      0.500 [0.250, 0.750]
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`value [low, high]`, to three decimals."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interquartile_mean(values: Float[np.ndarray, " *n"], axis: int = -1) -> Any:
    """The mean of the middle half: a quarter of the values is cut off at either end.

    Example:
      >>> print(interquartile_mean(np.array([0.0, 1.0, 3.0, 100.0])))
      2.0
    """
    return stats.trim_mean(values, 0.25, axis=axis)


def spread(values: Float[np.ndarray, " *n"], axis: int = -1) -> Any:
    """The standard deviation of the population that the values are drawn from.

    Example:
      >>> print(spread(np.array([1.0, 2.0, 3.0])))
      1.0
    """
    return np.std(values, axis=axis, ddof=1)


def bootstrap(
    statistic: Callable[..., Any], *samples: Float[np.ndarray, " n"], resamples: int = 2000
) -> Estimate:
    """A statistic of one sample, or of paired ones, with its BCa bootstrap interval.

    Args:
      statistic: `statistic(*samples, axis)`.
      samples: arrays of one length; entries in one place are drawn together.
      resamples: how often to draw.

    Returns:
      The estimate; where all that was drawn agrees, an interval of no width.

    Source:
      Efron (1987), Better bootstrap confidence intervals; scipy.stats.bootstrap.

    Example:
      >>> print(bootstrap(np.mean, np.array([2.0, 2.0, 2.0])))
      2.000 [2.000, 2.000]
    """
    value = float(statistic(*samples, axis=-1))
    if all(np.ptp(sample) == 0 for sample in samples):
        return Estimate(value, value, value)

    def interval(method):
        result = stats.bootstrap(
            samples,
            statistic,
            paired=len(samples) > 1,
            vectorized=True,
            n_resamples=resamples,
            confidence_level=CONFIDENCE,
            method=method,
            rng=np.random.default_rng(0),
        )
        return result.confidence_interval

    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bounds = interval("BCa")
        if np.isnan(bounds).any():  # All resamples agree, and BCa is undefined.
            bounds = interval("percentile")
    return Estimate(value, float(bounds.low), float(bounds.high))


def share(happened: Bool[np.ndarray, " n"]) -> Estimate:
    """How often something happened, with its Wilson interval.

    Source:
      Wilson (1927), Probable inference, the law of succession, and statistical inference.

    Example:
      >>> print(share(np.array([True, False, False, False])))
      0.250 [0.046, 0.699]
    """
    test = stats.binomtest(int(np.sum(happened)), len(happened))
    interval = test.proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(test.statistic, float(interval.low), float(interval.high))


def final(results: xr.Dataset) -> xr.Dataset:
    """Loss and metric after the last step, and which runs failed.

    A loss above that of guessing counts as that of guessing, and so does one that is not a
    number: every run counts, and none makes a mean infinite. A run has failed if it diverged
    or if its metric is below what passes.
    """
    last = results.isel(step=-1)
    chance, passing = results.attrs["chance"], results.attrs["passing"]
    return xr.Dataset(
        {
            "loss": last.loss.where(last.loss < chance, chance),
            "metric": last.metric.fillna(0.0),
            "failed": ~(np.isfinite(last.loss) & (last.metric >= passing)),
        }
    )


def summarize(results: xr.Dataset) -> list[dict[str, Any]]:
    """The estimates over the seeds: a row for each initial scale and arm.

    Args:
      results: what `sweep.run` returned.

    Returns:
      Rows with `init_scale`, `arm`, `failed` (a share), and, for `loss` and `metric` each,
      the estimates `mean`, `interquartile_mean` and `spread`.
    """
    ends = final(results)
    return [
        {
            "init_scale": float(scale),
            "arm": str(arm),
            "failed": share(cell.failed.values),
            **{
                name: {
                    statistic.__name__: bootstrap(statistic, cell[name].values.astype(np.float64))
                    for statistic in (np.mean, interquartile_mean, spread)
                }
                for name in ("loss", "metric")
            },
        }
        for scale in results.init_scale.values
        for arm in results.arm.values
        for cell in [ends.sel(init_scale=scale, arm=arm)]
    ]


def spread_ratio(results: xr.Dataset, arm: str, plain: str, init_scale: float) -> Estimate | None:
    """The spread of the final loss with one arm over that with another, runs paired by seed.

    Below 1, the result depends less on the initial weights with `arm` than with `plain`.

    Returns:
      The estimate, or None where the runs of an arm all end alike: a ratio says nothing then.
    """
    loss = final(results).loss.sel(init_scale=init_scale).astype(np.float64)
    pair = loss.sel(arm=arm).values, loss.sel(arm=plain).values
    if any(np.ptp(sample) == 0 for sample in pair):
        return None
    return bootstrap(lambda a, b, axis: spread(a, axis) / spread(b, axis), *pair)
