"""What the runs say together: estimates over the initial weights, and comparisons of pairs.

The unit is the seed. Two arms are compared on runs of the same initial weights and the same
order of the data, and where several initial scales are looked at together, all runs of a seed
are resampled, or swapped, together: they share their initial weights up to a factor.
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from tqdm import tqdm

CONFIDENCE = 0.95

# How often to resample, or to permute: the smallest p is 2 / (RESAMPLES + 1).
RESAMPLES = 4999

# With fewer seeds no paired test can reach 5%: the chance that n fair coins agree is 2 / 2^n.
# An interval that is computed from fewer is a guess, and is left undefined.
FEWEST = 6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its 95% confidence interval; None where there is none.

    Example:
      >>> print(Estimate(0.5, 0.25, 0.75))
      0.500 [0.250, 0.750]
      >>> print(Estimate(12.0))
      12.0 [undefined]
      >>> print(Estimate(None))
      undefined
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """`value [low, high]`, to three significant digits."""
        if self.value is None:
            return "undefined"
        if self.low is None or self.high is None:
            return f"{_digits(self.value)} [undefined]"
        return f"{_digits(self.value)} [{_digits(self.low)}, {_digits(self.high)}]"


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Where the final values of an arm lie.

    Attributes:
      mean: with its BCa interval, as the others.
      interquartile_mean: the mean of the middle half.
      spread: the standard deviation.
    """

    mean: Estimate
    interquartile_mean: Estimate
    spread: Estimate


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one arm.

    Attributes:
      arm: its name.
      init_scale: of these runs; None: of all.
      n: how many seeds.
      failed: the share of runs that did not solve the problem, with its Wilson interval.
      diverged: how many runs ended at a loss that is not finite; they are among the failed.
      loss: the final loss, capped (see `final`).
      metric: the final metric; None where the problem has none.
    """

    arm: str
    init_scale: float | None
    n: int
    failed: Estimate
    diverged: int
    loss: Distribution
    metric: Distribution | None


@dataclasses.dataclass(frozen=True)
class Escape:
    """How often momentum made the difference between failed and solved.

    Attributes:
      rescued: pairs in which the plain arm failed and the other solved the problem.
      lost: the reverse.
      p: of as many rescued as lost by chance: exact McNemar test; over several initial scales
        a test that swaps the arms of whole seeds.
      p_holm: p, adjusted for all comparisons that ask this.
    """

    rescued: int
    lost: int
    p: float
    p_holm: float | None = None


@dataclasses.dataclass(frozen=True)
class Improvement:
    """How often the arm ends lower than the plain arm.

    Attributes:
      probability: the share of pairs in which it does; a tie counts half. Its interval is
        Wilson's, of the effective number of pairs (see `share`).
      p: of 1/2: exact sign test; over several initial scales a test that swaps the arms of
        whole seeds.
      p_holm: p, adjusted for all comparisons that ask this.
    """

    probability: Estimate
    p: float
    p_holm: float | None = None


@dataclasses.dataclass(frozen=True)
class Spread:
    """How much the final loss depends on the initial weights, against the plain arm.

    Attributes:
      ratio: the standard deviation with the arm over that with the plain arm (see
        `spread_ratio`); undefined where the runs of either all end alike.
      p: of 1, by the same permutations as the interval; None where the ratio is undefined.
      p_holm: p, adjusted for all comparisons that ask this.
    """

    ratio: Estimate
    p: float | None
    p_holm: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm against the plain arm of its contrast, in pairs of equal initial weights.

    Attributes:
      contrast: its name.
      arm: what is compared ...
      plain: ... with what.
      init_scale: of these runs; None: of all.
      n: how many seeds.
      escape: runs rescued and lost.
      difference: of the interquartile means of the final loss, arm - plain, with the paired BCa
        interval; below 0, the arm ends lower.
      improvement: the probability that the arm ends lower.
      spread: the ratio of the spreads of the final loss; below 1, the arm depends less on the
        initial weights.
    """

    contrast: str
    arm: str
    plain: str
    init_scale: float | None
    n: int
    escape: Escape
    difference: Estimate
    improvement: Improvement
    spread: Spread


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a study found.

    Three questions are asked of each comparison: escape, improvement, spread. Holm's adjustment
    is made over all comparisons that ask the same question, each pair of arms counted once:
    those at one initial scale are one family a question, and those over all scales another.

    Attributes:
      cells: one for each arm and initial scale.
      comparisons: one for each contrast, arm and initial scale.
      pooled_cells: one for each arm, over all initial scales.
      pooled_comparisons: one for each contrast and arm, over all initial scales: how much the
        result depends on the initial weights, in direction (the seed) and size.
    """

    cells: list[Cell]
    comparisons: list[Comparison]
    pooled_cells: list[Cell]
    pooled_comparisons: list[Comparison]


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
    statistic: Callable[..., Any], *samples: Float[np.ndarray, "n *k"], resamples: int = RESAMPLES
) -> Estimate:
    """A statistic of one sample, or of paired ones, with its BCa bootstrap interval.

    Args:
      statistic: `statistic(*samples, axis)`, of samples without structure.
      samples: arrays of one length; entries, or rows, in one place are drawn together.
      resamples: how often to draw.

    Returns:
      The estimate; where all that was drawn agrees, an interval of no width; of fewer than 6
      values or rows, no interval.

    Source:
      Efron (1987), Better bootstrap confidence intervals; scipy.stats.bootstrap.

    Example:
      >>> print(bootstrap(np.mean, np.full(6, 2.0)))
      2.00 [2.00, 2.00]
    """
    rows = np.arange(len(samples[0]))

    def of_rows(drawn, axis):
        flat = (sample[drawn].reshape(*drawn.shape[:-1], -1) for sample in samples)
        return statistic(*flat, axis=axis)

    value = float(of_rows(rows, -1))
    if len(rows) < FEWEST:
        return Estimate(value)
    if all(np.ptp(sample) == 0 for sample in samples):
        return Estimate(value, value, value)

    def interval(method):
        result = stats.bootstrap(
            (rows,),
            of_rows,
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


def share(scores: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"]) -> Estimate:
    """How often something happened, with its Wilson interval.

    Args:
      scores: one a seed: whether it happened, or in which share of the runs of that seed, a tie
        counted as half.

    Returns:
      The mean of the scores, with Wilson's interval for as many yes-or-no answers as would
      leave that mean as uncertain: n p (1 - p) / variance, which is n where all scores are 0 or
      1, more where there are ties, and less where runs of a seed fail together. No interval
      where all scores are one number between 0 and 1.

    Source:
      Wilson (1927), Probable inference, the law of succession, and statistical inference;
      Korn and Graubard (1998), Confidence intervals for proportions with small expected number
      of positive counts (the effective number).

    Example:
      >>> print(share(np.array([True, False, False, False])))
      0.250 [0.0456, 0.699]
    """
    n, value, variance = len(scores), float(np.mean(scores)), float(np.var(scores))
    if 0 < value < 1:
        if variance == 0:
            return Estimate(value)
        n *= value * (1 - value) / variance
    bounds: Any = proportion_confint(value * n, n, alpha=1 - CONFIDENCE, method="wilson")
    low, high = bounds
    # At 0 and at 1 the bound is the share itself, which rounding misses by a little.
    return Estimate(value, float(low) if value > 0 else 0.0, float(high) if value < 1 else 1.0)


def spread_ratio(
    arm: Float[np.ndarray, "seed scale"],
    plain: Float[np.ndarray, "seed scale"],
    resamples: int = RESAMPLES,
) -> Spread:
    """The spread of one arm's values over that of another's, from paired runs.

    Both arms are shifted to a median of 0, and the two arms of a seed are swapped at random. If
    the arms are alike up to a shift, every swap was as likely to be observed; p is the
    (two-sided) share of the swaps that give as unequal standard deviations. The interval holds
    the ratios r for which the same test does not reject arm / r against plain at 5%, so that it
    excludes 1 where p < 0.05.

    How often each method finds a difference at 5% between two arms that follow one law, and
    how often its 95% interval misses their ratio: measured at 20 and at 100 pairs, of
    correlations 0.5 and 0.9 (500 to 4000 studies each; the least and the most of the four).

                                     normal      lognormal    10% failed
        this                         4 to 5%      5 to 6%      2 to 5%
        this about the means         5 to 6%      7 to 21%     6 to 24%
        Pitman and Morgan            4 to 5%     47 to 61%    16 to 34%
        Pitman and Morgan, ranks     5%           9 to 10%     4 to 8%
        bootstrap, BCa               4 to 8%     12 to 17%     4 to 9%
        bootstrap, studentized       4 to 8%      9 to 18%     8 to 19%

    Between laws of equal spread and different shape no method is safe if the sample may miss
    the tail that makes the spread: between a normal and a lognormal law this one finds a
    difference in 25 to 35% of studies; between a normal law and 10% failures in 13% at 20
    pairs, and in 3 to 4% at 100.

    Args:
      arm: final values, paired with ...
      plain: ... these by place.
      resamples: how often to swap; with few seeds, p is of all swaps there are.

    Returns:
      The ratio and its p; undefined where the values of an arm are all alike, and without an
      interval where no ratio can be excluded (few seeds; one outlier that makes the spread).

    Source:
      Pitman (1937), Significance tests which may be applied to samples from any populations;
      scipy.stats.permutation_test.

    Example:
      >>> values = np.random.default_rng(0).normal(size=(50, 1))
      >>> print(spread_ratio(values / 2, values).ratio)
      0.500 [0.500, 0.500]
    """
    if np.ptp(arm) == 0 or np.ptp(plain) == 0:
        return Spread(Estimate(None), None)
    a, b = arm - np.median(arm), plain - np.median(plain)
    value = float(np.std(a) / np.std(b))
    # All that a swap moves: the first and second moments of a seed's runs, of arm and plain.
    parts = np.stack([a.sum(1), b.sum(1), np.square(a).sum(1), np.square(b).sum(1)], 1) / a.size

    def moments(swapped):
        """Those of the runs that stayed in their arm, and of those that were moved."""
        moved = swapped @ parts
        return (*np.moveaxis(parts.sum(0) - moved, -1, 0), *np.moveaxis(moved, -1, 0))

    def inequality(moments, ratio):
        """(variance of arm / ratio - variance of plain) / their sum."""
        stayed_a, stayed_b, stayed_aa, stayed_bb, moved_a, moved_b, moved_aa, moved_bb = moments
        arm = stayed_aa / ratio**2 + moved_bb - np.square(stayed_a / ratio + moved_b)
        plain = stayed_bb + moved_aa / ratio**2 - np.square(stayed_b + moved_a / ratio)
        total = np.asarray(arm + plain)
        # A swap that leaves no spread in either arm leaves them equal.
        return np.divide(arm - plain, total, out=np.zeros_like(total), where=total > 0)

    # The first sample says which seeds are swapped: none in the data as they are.
    test = _permutation_test(
        (np.zeros(len(a)), np.ones(len(a))),
        lambda swapped, _, axis: inequality(moments(swapped), 1.0),
        resamples,
    )
    if len(a) < FEWEST:
        return Spread(Estimate(value), test)

    draws = moments(np.random.default_rng(0).integers(0, 2, (resamples, len(a))).astype(float))
    observed = moments(np.zeros(len(a)))

    def rejected(ratio):
        drawn, seen = inequality(draws, ratio), inequality(observed, ratio)
        tail = min(np.sum(drawn >= seen - 1e-9), np.sum(drawn <= seen + 1e-9))
        return 2 * (tail + 1) / (len(drawn) + 1) < 1 - CONFIDENCE

    def bound(direction):
        """Where rejection begins, from the ratio outwards; None if beyond a factor of e^16."""

        def outside(step):
            return rejected(value * math.exp(direction * step))

        far = next((step for step in 2.0 ** np.arange(-3, 5) if outside(step)), None)
        if far is None:
            return None
        near = 0.0
        for _ in range(40):
            middle = (near + far) / 2
            near, far = (near, middle) if outside(middle) else (middle, far)
        return float(value * math.exp(direction * far))

    low, high = bound(-1), bound(1)
    if low is None or high is None:
        low = high = None
    return Spread(Estimate(value, low, high), test)


def final(dataset: xr.Dataset) -> xr.Dataset:
    """How every run ended, each (arm, init_scale, seed).

    Args:
      dataset: what `run` returned.

    Returns:
      A dataset with the variables
      `loss`: the final loss. A loss above `worst`, or not finite, counts as `worst`; where
        `worst` is nan, as the run's own loss at step 0: every run counts, and none makes a mean
        infinite.
      `metric`: the final metric, 0 where it is not finite; absent where the dataset has none.
      `diverged`: whether the final loss is not finite.
      `solved`: whether the final loss is at most `solved_loss` and the final metric at least
        `solved_metric`; where neither is given, if the run did not diverge. A run that diverged
        is never solved.

    Example:
      >>> end = (["arm", "init_scale", "seed", "step"], np.array([[[[2.0, 0.5], [3.0, np.nan]]]]))
      >>> results = xr.Dataset({"loss": end}, attrs={"solved_loss": 1.0})
      >>> print(final(results).loss.values.ravel(), final(results).solved.values.ravel())
      [0.5 3. ] [ True False]
    """
    limits = {
        name: float(dataset.attrs.get(name, math.nan))
        for name in ("worst", "solved_loss", "solved_metric")
    }
    first, last = (dataset.isel(step=step, drop=True) for step in (0, -1))
    diverged = ~np.isfinite(last.loss)
    solved = ~diverged
    # In float32, as measured: a Python number does not widen it.
    if not math.isnan(limits["solved_loss"]):
        solved &= last.loss <= limits["solved_loss"]
    if not math.isnan(limits["solved_metric"]):
        solved &= last.metric >= limits["solved_metric"]

    if math.isnan(limits["worst"]):
        start = first.loss.astype(np.float64)
        known = start.values[np.isfinite(start.values)]
        cap = start.where(np.isfinite(start), known.max() if known.size else 1e38)
    else:
        cap = xr.full_like(last.loss, limits["worst"], np.float64)
    loss = last.loss.astype(np.float64)
    ends = {"loss": loss.where(~diverged & (loss <= cap), cap), "solved": solved}
    if "metric" in dataset:
        ends["metric"] = last.metric.astype(np.float64).where(np.isfinite(last.metric), 0.0)
    return xr.Dataset({**ends, "diverged": diverged})


def summarize(
    dataset: xr.Dataset, *, resamples: int = RESAMPLES, progress: str | None = None
) -> Summary:
    """Estimates of every arm, and comparisons of the pairs that its `contrasts` name.

    Deterministic: the same dataset gives the same numbers.

    Args:
      dataset: what `run` returned.
      resamples: how often to resample, or to permute.
      progress: what to call the work in a progress bar; None shows none.

    Returns:
      Cells and comparisons, which `json.dumps(summary, default=dataclasses.asdict)` writes.

    Example:
      >>> ends = np.random.default_rng(0).normal(5, [[1], [0.5]], size=(2, 100))
      >>> results = xr.Dataset(
      ...     {"loss": (["arm", "init_scale", "seed", "step"], ends[:, None, :, None])},
      ...     coords={"arm": ["mu 0", "mu 0.9"], "init_scale": [1.0]},
      ...     attrs={"contrasts": '[{"name": "same", "plain": "mu 0", "arms": ["mu 0.9"]}]'},
      ... )
      >>> [comparison] = summarize(results).comparisons
      >>> print(comparison.spread.ratio.high < 1)
      True
    """
    ends = final(dataset).transpose("arm", "seed", "init_scale")
    arms = {str(arm): place for place, arm in enumerate(ends.arm.values)}
    scales = [float(scale) for scale in ends.init_scale.values]
    asked = [
        (contrast["name"], arm, contrast["plain"])
        for contrast in json.loads(dataset.attrs.get("contrasts", "[]"))
        for arm in contrast["arms"]
        if arm != contrast["plain"]
    ]

    def runs(arm, scale):
        """The variables, as (seed, init_scale)."""
        chosen = slice(None) if scale is None else [scales.index(scale)]
        return {name: variable.values[arms[arm]][:, chosen] for name, variable in ends.items()}

    rounds = len(scales) + (len(scales) > 1)
    work = rounds * (len(arms) + len({(arm, plain) for _, arm, plain in asked}))
    bar = tqdm(total=work, desc=progress, unit="estimate", disable=progress is None)

    def told(estimate):
        bar.update()
        return estimate

    def cells(scales):
        return [
            told(_cell(arm, scale, runs(arm, scale), resamples)) for arm in arms for scale in scales
        ]

    def comparisons(scales):
        # Contrasts may share a pair of arms: what both ask is asked once.
        pairs = dict.fromkeys((arm, plain, scale) for _, arm, plain in asked for scale in scales)
        compared = [
            told(_compare(runs(arm, scale), runs(plain, scale), resamples))
            for arm, plain, scale in pairs
        ]
        answers = dict(zip(pairs, _adjusted(compared), strict=True))
        return [
            Comparison(name, arm, plain, scale, ends.sizes["seed"], **answers[arm, plain, scale])
            for name, arm, plain in asked
            for scale in scales
        ]

    with bar:
        single, compared = cells(scales), comparisons(scales)
        if len(scales) > 1:
            return Summary(single, compared, cells([None]), comparisons([None]))
    return Summary(
        single,
        compared,
        [dataclasses.replace(cell, init_scale=None) for cell in single],
        [dataclasses.replace(comparison, init_scale=None) for comparison in compared],
    )


def _cell(arm, init_scale, runs, resamples):
    def distribution(values):
        return Distribution(
            mean=bootstrap(np.mean, values, resamples=resamples),
            interquartile_mean=bootstrap(interquartile_mean, values, resamples=resamples),
            spread=bootstrap(spread, values, resamples=resamples)
            if values.size > 1
            else Estimate(None),
        )

    return Cell(
        arm=arm,
        init_scale=init_scale,
        n=len(runs["loss"]),
        failed=share((~runs["solved"]).mean(1)),
        diverged=int(runs["diverged"].sum()),
        loss=distribution(runs["loss"]),
        metric=distribution(runs["metric"]) if "metric" in runs else None,
    )


def _compare(arm, plain, resamples):
    """The answers to the three questions, and the difference; runs are (seed, init_scale)."""
    solved = arm["solved"].astype(float) - plain["solved"]
    lower = np.sign(plain["loss"] - arm["loss"])

    def difference(arm, plain, axis):
        return interquartile_mean(arm, axis) - interquartile_mean(plain, axis)

    return {
        "escape": Escape(
            int(np.sum(solved > 0)), int(np.sum(solved < 0)), _sign_test(solved, resamples)
        ),
        "difference": bootstrap(difference, arm["loss"], plain["loss"], resamples=resamples),
        "improvement": Improvement(share((1 + lower.mean(1)) / 2), _sign_test(lower, resamples)),
        "spread": spread_ratio(arm["loss"], plain["loss"], resamples),
    }


def _sign_test(signs, resamples):
    """The p of as many +1 as -1; at several initial scales, those of a seed are one draw."""
    if signs.shape[1] == 1:
        test: Any = mcnemar([[0, np.sum(signs > 0)], [np.sum(signs < 0), 0]], exact=True)
        return float(test.pvalue)
    sums = signs.sum(1)
    return _permutation_test(
        (sums, -sums), lambda kept, _, axis: np.sum(kept, axis=axis), resamples
    )


def _permutation_test(pairs, statistic, resamples):
    if len(pairs[0]) < 2:
        return 1.0
    result = stats.permutation_test(
        pairs,
        statistic,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _adjusted(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds `p_holm` to the answers to each question."""
    adjusted = [dict(comparison) for comparison in comparisons]
    for question in ("escape", "improvement", "spread"):
        asked = [answers for answers in adjusted if answers[question].p is not None]
        if asked:
            ps = _holm([answers[question].p for answers in asked])
            for answers, p in zip(asked, ps, strict=True):
                answers[question] = dataclasses.replace(answers[question], p_holm=float(p))
    return adjusted


def _holm(ps: Sequence[float]) -> np.ndarray:
    """The p of one family, adjusted by Holm's method.

    statsmodels' `multipletests` collects the whole process's garbage at each call, 0.25 s beside a
    compiled study.
    """
    order = np.argsort(ps)
    stepwise = np.sort(ps) * np.arange(len(ps), 0, -1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepwise), 1)
    return adjusted


def _digits(number):
    return f"{number:#.3g}".rstrip(".")
