"""Answers one question about one pair of arms: value, interval and p-value."""

import json
import math
from typing import NamedTuple

import numpy as np
import xarray as xr

from momentum_jax.study import spread_tests, statistics
from momentum_jax.study._pairs import Pair

# Measures of spread of the final loss.
SPREADS = ("std", "total std", "10-90% range", "std of log loss")
NAMES = {
    "std": "standard deviation",
    "total std": "standard deviation of all runs",
    "10-90% range": "10-90% range",
    "std of log loss": "standard deviation of log loss",
    "failures": "failure rate",
    "loss": "final loss",
}
TOTALS = {"total std": statistics.log_total_std}
COUNTS = ("rescued", "lost")
PAIRED = ("failures", "lower loss")
FEW = f"there are fewer than {statistics.FEWEST} units, so no interval is computed"


class Answer(NamedTuple):
    """A value with its intervals at the requested levels, and its p-value.

    `p_exchange` is the p-value of the permutation test for "std". `note` says why a value or an
    interval is undefined.
    """

    value: float
    intervals: list[tuple[float, float]]
    p: float = math.nan
    p_exchange: float = math.nan
    note: str = ""


class Runs:
    """The final results of all runs, and every statistic of every arm and scale."""

    def __init__(self, dataset: xr.Dataset):
        """Computes the statistics of the final values of a dataset of `run`."""
        ends = statistics.final(dataset)
        self.values = {str(name): statistics.units(ends[name]) for name in ends}
        self.arms = [str(arm) for arm in ends.arm.values]
        self.scales = [float(scale) for scale in ends.init_scale.values]
        loss = self.values["loss"]
        self.count, self.replicates = loss.shape[2:]
        self.metrics = [each["name"] for each in json.loads(dataset.attrs.get("metrics", "[]"))]
        # The values whose standard deviation each question compares.
        self.std_of = {"std": loss}
        if self.replicates > 1:
            self.std_of["total std"] = loss
        if (loss > 0).all():
            self.std_of["std of log loss"] = np.log(loss)
        for name in self.metrics:
            self.std_of[f"{name} std"] = self.values[name]
        self.measured = {
            **{
                name: TOTALS.get(name, statistics.log_std)(values)
                for name, values in self.std_of.items()
            },
            "10-90% range": statistics.log_range(loss),
            "loss": statistics.middle(loss),
            **{name: statistics.mean(self.values[name]) for name in self.metrics},
        }
        # If all runs of an arm diverged, the standard deviation would only measure the loss caps.
        lost = self.values["diverged"].astype(bool).all((2, 3))
        for name in (*self.std_of, "10-90% range"):
            self.measured[name].value[lost] = np.nan
        names = [*SPREADS, "failures", *COUNTS, "loss", "lower loss"]
        names += [name for metric in self.metrics for name in (metric, f"{metric} std")]
        self.questions = [name for name in names if name in (*self.measured, *PAIRED, *COUNTS)]

    def scores(self, question, arms, baselines, scales):
        """Net counts of runs per unit, for choices of arms (choice, scale), as (choice, unit).

        For "lower loss": runs in which the arm ended lower, minus runs in which the baseline did.
        For "failures": runs in which only the arm failed, minus runs in which only the baseline
        did.
        """
        if question == "lower loss":
            values = self.values["loss"]
            each = np.sign(values[baselines, scales] - values[arms, scales])
        else:
            solved = self.values["solved"]
            each = solved[baselines, scales] - solved[arms, scales]
        return each.sum((1, 3))

    def estimates(self, question, arms, baselines, scales):
        """The estimate and its standard error, for choices of arms (choice, scale)."""
        if question in PAIRED:
            scores = self.scores(question, arms, baselines, scales) / self.per_unit(scales)
            # One unit is added in favour of each arm. Source: Bonett and Price (2012), Adjusted
            # Wald confidence interval for a difference of binomial proportions based on paired
            # data.
            count = self.count + 2
            centre = scores.sum(1) / count
            square = (np.square(scores).sum(1) + 2) / count
            return centre, np.sqrt((square - centre**2) / count)
        value, influence = self.measured[question]
        away = (influence[arms, scales] - influence[baselines, scales]).mean(1)
        centre = (value[arms, scales] - value[baselines, scales]).mean(1)
        return centre, away.std(1, ddof=1) / math.sqrt(away.shape[1])

    def value(self, question, arms, baselines, scales):
        """The value for one choice of arms (scale), without the units that `estimates` adds."""
        if question in PAIRED:
            [scores] = self.scores(question, arms[None], baselines[None], scales)
            return scores.mean() / self.per_unit(scales)
        values = self.measured[question].value
        return (values[arms, scales] - values[baselines, scales]).mean()

    def per_unit(self, scales):
        """The number of runs of each unit."""
        return len(scales) * self.replicates


def is_ratio(question: str) -> bool:
    """Says whether a question compares a measure of spread, as a ratio; others are differences."""
    return question in SPREADS or question.endswith(" std")


def question_name(question: str) -> str:
    """Returns what a question compares, in words."""
    if question not in NAMES and question.endswith(" std"):
        return f"standard deviation of {question.removesuffix(' std')}"
    return NAMES.get(question, question)


def answer(
    runs: Runs, question: str, pair: Pair, scales: np.ndarray, levels: list[float], draws: int
) -> Answer:
    """Answers one question at one scale, or combined over several scales.

    Args:
      runs: the results of all arms.
      question: the question, as in the table.
      pair: the arms to compare.
      scales: indices of the initial scales.
      levels: the confidence levels of the intervals.
      draws: number of bootstrap draws, or of permutations.
    """
    nothing = [(math.nan, math.nan)] * len(levels)
    arms, baselines = pair.arms[scales], pair.baselines[scales]
    if runs.count < 2 and is_ratio(question):
        return Answer(math.nan, nothing, note=FEW)
    if min(*arms, *baselines) < 0:
        note = "the baseline was not trained at the arm's effective learning rate"
        return Answer(math.nan, nothing, note=note)
    if question in COUNTS:
        solved = runs.values["solved"]
        gained = solved[arms, scales] - solved[baselines, scales]
        return Answer(float(np.sum(gained == (1 if question == "rescued" else -1))), nothing)
    note = ""
    if question not in PAIRED:
        values = runs.measured[question].value
        defined = np.isfinite(values[arms, scales]) & np.isfinite(values[baselines, scales])
        if not defined.any():
            return Answer(math.nan, nothing, note=_why(runs, question, arms, baselines, scales))
        if not defined.all():
            left_out = ", ".join(f"{runs.scales[scale]:g}" for scale in scales[~defined])
            note = f"initial scale {left_out} is left out: the spread of one arm is undefined there"
        arms, baselines, scales = arms[defined], baselines[defined], scales[defined]
    value = runs.value(question, arms, baselines, scales)
    if runs.count < statistics.FEWEST:
        return Answer(_table_scale(question, value), nothing, note=FEW)

    choices, chosen = np.stack([arms, baselines])[None], np.zeros(1, int)
    if pair.drawn is not None:
        # The actual choice, and the choices of the drawn tuning seeds.
        drawn = np.concatenate([choices, pair.drawn[:, :, scales]])
        drawn = drawn[(drawn >= 0).all((1, 2))]
        choices, chosen = np.unique(drawn, axis=0, return_inverse=True)
    centres, errors = runs.estimates(question, choices[:, 0], choices[:, 1], scales)
    chosen = chosen[np.isfinite(centres[chosen])]
    # The reference distribution of T is taken from the most frequent choice with a known error.
    often = np.argmax(np.bincount(chosen, minlength=len(choices)) * (errors > 0))
    reference = _reference(runs, question, choices[often, 0], choices[often, 1], scales, draws)
    if len(choices) == 1:
        intervals, p = _fixed_interval(centres[0], errors[0], reference, levels)
    else:
        intervals, p = _mixed_interval(centres, errors, chosen, reference, levels)
    if question in PAIRED and len(choices) == 1:
        [scores] = runs.scores(question, choices[:, 0], choices[:, 1], scales)
        p = statistics.swap_test(scores)
        if question == "lower loss":
            proportions = (1 + scores / runs.per_unit(scales)) / 2
            wilson = [statistics.proportion(proportions, level) for level in levels]
            intervals = [(2 * low - 1, 2 * high - 1) for low, high in wilson]
    if is_ratio(question) and not np.isfinite(intervals[0]).all():
        note = note or "the interval excludes no ratio"
    p_exchange = math.nan
    if question == "std" and pair.drawn is None:
        values = runs.std_of[question]
        swapped = spread_tests.swaps(runs.count, draws)
        p_exchange = spread_tests.exchange_p(
            values[arms, scales], values[baselines, scales], swapped
        )
    return Answer(
        _table_scale(question, value),
        [
            (_table_scale(question, low), _table_scale(question, high))
            if np.isfinite([low, high]).all()
            else (math.nan, math.nan)
            for low, high in intervals
        ],
        # The smallest two-sided p-value that a test of n pairs can have.
        max(p, 2.0 ** (1 - runs.count)),
        p_exchange,
        note,
    )


def _table_scale(question, value):
    """Converts an estimate for the table: from the log of a ratio, or from 2 P(lower loss) - 1."""
    if question == "lower loss":
        return float((1 + np.clip(value, -1, 1)) / 2)
    return float(np.exp(value)) if is_ratio(question) else float(value)


def _reference(runs, question, arms, baselines, scales, draws):
    """The reference distribution of |T| if nothing differs, sorted: bootstrap or Student's t."""
    if question in runs.std_of:
        influence = runs.measured[question].influence
        rows = np.concatenate([influence[arms, scales], influence[baselines, scales]])
        weights = np.repeat([1.0, -1.0], len(scales)) / len(scales)
        counts = spread_tests.resampled(runs.count, draws)
        return spread_tests.bootstrap_reference(rows, weights, counts)
    count = runs.count - 2 * (runs.count // 4) if question == "loss" else runs.count
    return spread_tests.t_reference(math.inf if question in PAIRED else count - 1.0, draws)


def _fixed_interval(centre, error, reference, levels):
    """The intervals and p-value of one estimate."""
    if error == 0:
        return [(centre, centre)] * len(levels), float(centre == 0)
    places = [math.ceil(level * (1 + len(reference))) - 1 for level in levels]
    halves = [error * reference[place] if place < len(reference) else math.inf for place in places]
    beyond = len(reference) - np.searchsorted(reference, abs(centre) / error - 1e-9)
    return [(centre - half, centre + half) for half in halves], (1 + beyond) / (1 + len(reference))


def _mixed_interval(centres, errors, chosen, reference, levels):
    """The intervals and p-value of an estimate that depends on the tuning seeds.

    For each draw of the tuning seeds (`chosen`), the estimate of that choice is drawn too.
    """
    random = np.random.default_rng(2)
    chosen = np.repeat(chosen, math.ceil(2 * len(reference) / len(chosen)))
    grid = random.permutation((np.arange(len(chosen)) + 0.5) / len(chosen))
    ts = reference[(np.abs(2 * grid - 1) * len(reference)).astype(int)] * np.sign(grid - 0.5)
    known = errors[chosen] > 0
    points = centres[chosen] + np.where(known, errors[chosen], 1) * np.where(known, ts, 0)
    tail = min(np.sum(points <= 1e-12), np.sum(points >= -1e-12))
    sides = [[(1 - level) / 2, (1 + level) / 2] for level in levels]
    bounds = np.quantile(points, sides, method="nearest")
    return [(low, high) for low, high in bounds], min(2 * (1 + tail) / (1 + len(points)), 1.0)


def _why(runs, question, arms, baselines, scales):
    """The reason why a ratio is undefined."""
    diverged = runs.values["diverged"]
    for name, places in (("arm", arms), ("baseline", baselines)):
        if diverged[places, scales].all():
            return f"all runs of the {name} diverged"
    values = runs.measured[question].value
    name = "baseline" if np.isfinite(values[arms, scales]).any() else "arm"
    ends = runs.values["loss"][arms if name == "arm" else baselines, scales]
    if runs.replicates > 1 and np.ptp(ends, (-2, -1)).any():
        return f"the runs of the {name} show no variance due to the initial weights"
    return f"all runs of the {name} end with the same loss"
