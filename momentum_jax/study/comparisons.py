"""Compares the arms of a study: one table of all comparisons, and the verdict."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import xarray as xr
from tqdm import tqdm

from momentum_jax.study import contrasts as plan
from momentum_jax.study import statistics
from momentum_jax.study._answers import SPREADS, Runs, answer, question_name
from momentum_jax.study._pairs import TUNED, coordinate, every_pair, is_primary, key
from momentum_jax.study.descriptions import describe as describe

COLUMNS = [
    *("contrast", "arm", "baseline", "effective_rate", "scale", "question", "value", "low", "high"),
    *("p", "p_exchange", "p_adjusted", "adjusted_low", "adjusted_high", "low_90", "high_90"),
    *("n", "note"),
]


def compare(dataset: xr.Dataset, *, progress: str | None = None) -> pd.DataFrame:
    """Compares the arms of every contrast of a dataset, and those of the primary comparison.

    The questions are, with the final loss unless another quantity is named:

    | question | value |
    | --- | --- |
    | "std" | ratio of standard deviations between units (initial weights) |
    | "total std" | ratio of standard deviations of all runs; only with several data orders |
    | "10-90% range" | ratio of the ranges from the 10% to the 90% quantile of all runs |
    | "std of log loss" | ratio of standard deviations of the log loss; only if losses are above 0 |
    | "failures" | difference of the failure rates |
    | "rescued", "lost" | number of pairs in which only the baseline, or only the arm, failed |
    | "loss" | difference of the interquartile means |
    | "lower loss" | probability that the arm ends with the lower loss |
    | a metric, and "METRIC std" | difference of the means; ratio of standard deviations |

    A ratio is arm / baseline, a difference arm - baseline, each within one scale. Combined over
    scales, the value is the geometric mean of the ratios or the mean of the differences. For ratios
    of standard deviations, intervals and `p` come from a studentized bootstrap of whole units
    (`spread_tests.bootstrap_reference`); `p_exchange` comes from a permutation test.

    `p_adjusted` is Holm-adjusted over all rows at one scale that ask the same question, with each
    pair of arms counted once, and separately over all combined rows. Adjusted intervals are
    Bonferroni-adjusted over the same rows. The primary comparison is declared before the runs and
    is not adjusted.

    A tuned comparison has three rows; the first ratio is the product of the other two.
    "tuned": the arm at its tuned rate, against the baseline at its own tuned rate.
    "tuned, rate alone": the baseline at the arm's effective rate, against the baseline at its own.
    "tuned, method alone": the arm, against the baseline at the arm's effective rate.
    Their intervals include the error of tuning: the tuning seeds are drawn again 2000 times, the
    rates with the lowest interquartile mean are chosen again, and the estimate of each choice is
    drawn too.

    Args:
      dataset: what `run` returned.
      progress: label of the progress bar; None shows no bar.

    Returns:
      A table with one row for each contrast, arm, baseline, scale (nan: combined) and question,
      and with the columns `COLUMNS`. `low` and `high` are 95% intervals; `low_90` and `high_90`
      are 90% intervals, for two one-sided tests at 5%. Undefined values are nan, with a `note` that
      says why.

    Example:
      >>> ends = np.random.default_rng(0).normal(5, [[1], [0.5]], size=(2, 100))
      >>> results = xr.Dataset(
      ...     {"loss": (["arm", "init_scale", "seed", "step"], ends[:, None, :, None])},
      ...     coords={"arm": ["mu 0", "mu 0.9"], "init_scale": [1.0]},
      ...     attrs={"primary": '{"arm": "mu 0.9", "baseline": "mu 0"}'},
      ... )
      >>> table = compare(results)
      >>> print(table[table.question == "std"].high.max() < 1)
      True
    """
    runs = Runs(dataset)
    primary = plan.primary(dataset)
    pairs = list(every_pair(dataset))
    # Several contrasts may have the same pair of arms: each comparison is computed once.
    asked = {key(pair): pair for pair in reversed(pairs)}
    scales = np.arange(len(runs.scales))
    rates = coordinate(dataset, "effective_rate")
    family = {False: len(asked) * len(scales), True: len(asked)}
    # Enough draws for the smallest adjusted p-value to be below 0.01.
    draws = max(4999, 100 * family[False])
    rows = []
    for name, pair in tqdm(asked.items(), desc=progress, disable=progress is None):
        for places in (*scales[:, None], scales):
            combined = places is scales
            rate = rates[pair.arms[places]]
            where = {
                "key": name,
                "effective_rate": rate[0] if np.ptp(rate) == 0 else math.nan,
                "scale": math.nan if combined else runs.scales[places[0]],
                "n": runs.count,
            }
            levels = [0.95, 0.9, 1 - 0.05 / family[combined]]
            for question in runs.questions:
                found = answer(runs, question, pair, places, levels, draws)
                first = question == "std" and combined and is_primary(pair, primary)
                ranges = [*found.intervals[:2], found.intervals[0 if first else 2]]
                names = ("low", "high"), ("low_90", "high_90"), ("adjusted_low", "adjusted_high")
                bounds = {
                    name: bound
                    for both in zip(names, ranges, strict=True)
                    for name, bound in zip(*both, strict=True)
                }
                rows.append(
                    {**where, **found._asdict(), **bounds, "question": question, "first": first}
                )
    if not rows:
        return pd.DataFrame(columns=COLUMNS)
    table = pd.DataFrame(rows)
    table["p_adjusted"] = table.p
    held = table[~table["first"] & table.p.notna()]
    for _, group in held.groupby(["question", held.scale.isna()]):
        table.loc[group.index, "p_adjusted"] = statistics.holm(group.p.to_numpy())
    by_key = dict(iter(table.groupby("key", sort=False)))
    named = [
        by_key[key(pair)].assign(contrast=pair.contrast, arm=pair.arm, baseline=pair.baseline)
        for pair in pairs
    ]
    return pd.concat(named, ignore_index=True).reindex(columns=COLUMNS)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of the primary comparison.

    Attributes:
      word: "narrower", "wider", "equivalent", "inconclusive" or "undefined".
      sentence: the result in one sentence, with the ratio and its interval.
      value: the ratio of the standard deviations of the final loss, arm / baseline.
      low: the lower bound of its 95% interval.
      high: the upper bound of its 95% interval.
      p: the p-value of the hypothesis that the ratio is 1.
      margin: the two arms are equivalent if the 90% interval lies within 1 / (1 + margin) to
        1 + margin.
      detectable: the largest ratio below 1 that a study with this precision detects with 80%
        power.

    Example:
      >>> Verdict("narrower", "Narrower: ...", 0.5, 0.4, 0.6, 0.001, 0.1, 0.8).word
      'narrower'
    """

    word: str
    sentence: str
    value: float
    low: float
    high: float
    p: float
    margin: float
    detectable: float


def verdict(dataset: xr.Dataset, table: pd.DataFrame | None = None) -> Verdict:
    """Returns the result of the primary comparison.

    It is "equivalent" if the 90% interval lies within the margin (two one-sided tests at 5%).
    Otherwise it is "narrower" or "wider" if the 95% interval excludes 1, and "inconclusive" if it
    includes 1. It is "undefined" without an interval or without a primary comparison.

    Args:
      dataset: what `run` returned.
      table: what `compare` returned; None computes it.

    Example:
      >>> verdict(xr.Dataset()).word
      'undefined'
    """
    primary = plan.primary(dataset)
    if primary is None:
        nothing = [math.nan] * 6
        return Verdict("undefined", "No primary comparison was declared.", *nothing)
    table = compare(dataset) if table is None else table
    row = _of_primary(table, primary).query("scale.isna() and question == 'std'").iloc[0]
    value, low, high, p = (float(row[name]) for name in ("value", "low", "high", "p"))
    limit = 1 + primary.margin
    decided = math.isfinite(low)
    # Half the 95% interval is 1.960 standard errors; a power of 80% needs 0.842 more.
    power = (1.960 + 0.842) / 1.960
    detectable = (low / high) ** (power / 2) if decided and low < high else math.nan
    if not decided:
        word = "undefined"
    elif 1 / limit <= row.low_90 and row.high_90 <= limit:
        word = "equivalent"
    elif high < 1 or low > 1:
        word = "narrower" if high < 1 else "wider"
    else:
        word = "inconclusive"
    sentence = _sentence(dataset, primary, row, word)
    return Verdict(word, sentence, value, low, high, p, primary.margin, detectable)


def _of_primary(table, primary):
    """The rows of the primary comparison, without repetitions."""
    rows = table[(table.arm == primary.arm) & (table.baseline == primary.baseline)]
    rows = rows[~rows.contrast.isin(TUNED)]
    return rows.drop_duplicates(["scale", "question"])


# What the standard deviation measures, by design.
OVER = {
    "crossed": "due to the initial weights alone (the weights' variance component)",
    "weights": "across initial weights, all with one data order",
    "order": "across data orders, all from the same initial weights",
}


def _sentence(dataset, primary, row, word):
    """The verdict in one sentence."""
    over = OVER.get(dataset.attrs.get("design", "paired"))
    if over is None:
        together = "batch_size" in dataset.coords
        over = "across initial weights" + (" and data orders together" if together else "")
    scales = [f"{scale:g}" for scale in dataset.init_scale.values]
    where = f"at initial scale {scales[0]}"
    if len(scales) > 1:
        where = f"as the geometric mean over initial scales {', '.join(scales)}"
    compared = f"the standard deviation of the final loss {over}"
    if word == "undefined":
        # The note is the reason.
        return (
            f"Undefined: {compared} cannot be compared between {primary.arm} and "
            f"{primary.baseline}, because {row.note}."
        )
    rate = row.effective_rate
    mu = dataset.coords.get("mu")
    kind = "effective learning rate" if mu is not None and (mu > 0).any() else "learning rate"
    both = f" (both at {kind} {rate:.3g})" if _one_rate(dataset, primary) else ""
    ratio = (
        f"with {primary.arm}, {compared} was {row.value:.3g} times that with {primary.baseline}"
        f"{both}, {where} (95% CI {row.low:.3g} to {row.high:.3g})"
    )
    limit = 1 + primary.margin
    margin = f"{1 / limit:.3g} to {limit:.3g}"
    more = {
        "equivalent": f"; the 90% interval, {row.low_90:.3g} to {row.high_90:.3g}, lies within the "
        f"margin of equivalence, {margin}"
        + ("" if row.low <= 1 <= row.high else ", so the difference is clear but small"),
        "inconclusive": "; the interval includes both a reduction and an increase, and is not "
        f"within the margin of equivalence, {margin}",
    }.get(word, "")
    # In a table read from CSV an empty note is nan.
    note = f"; {row.note}" if isinstance(row.note, str) and row.note else ""
    return f"{word.capitalize()}: {ratio}{more}{note}."


def _one_rate(dataset, primary):
    rates = dict(zip(dataset.arm.values, coordinate(dataset, "effective_rate"), strict=True))
    return bool(np.isclose(rates[primary.arm], rates[primary.baseline]))


def disagreements(table: pd.DataFrame, dataset: xr.Dataset) -> list[str]:
    """Lists where results of the primary comparison point in opposite directions.

    A result counts if its unadjusted 95% interval excludes a ratio of 1 or a difference of 0.

    Args:
      table: what `compare` returned.
      dataset: the dataset from which it was computed.

    Returns:
      Sentences. There is one for each measure that is lower at some initial scales and higher at
      others. For each scale, and for all scales combined, there is one if measures of spread and
      failure rate disagree, and one if loss, failure rate and metrics disagree.

    Example:
      >>> disagreements(compare(xr.Dataset(
      ...     {"loss": (["arm", "init_scale", "seed", "step"], np.ones((1, 1, 8, 1)))},
      ...     coords={"arm": ["mu 0"], "init_scale": [1.0]},
      ... )), xr.Dataset())
      []
    """
    primary = plan.primary(dataset)
    if primary is None or not len(table):
        return []
    metrics = json.loads(dataset.attrs.get("metrics", "[]"))
    # By question: whether a ratio below 1 or a negative difference means the first word.
    spreads = [*SPREADS]
    spreads += [f"{metric['name']} std" for metric in metrics]
    widths = dict.fromkeys([*spreads, "failures"], True)
    results = {"loss": True, "failures": True}
    results |= {metric["name"]: not metric["larger_is_better"] for metric in metrics}
    rows = _of_primary(table, primary)
    scales = rows.scale.dropna().unique()
    sentences = []
    for question in ("std", "total std"):
        here = rows[(rows.question == question) & rows.scale.notna()]
        below, above = (
            ", ".join(f"{scale:g}" for scale in here.scale[chosen])
            for chosen in (here.high < 1, here.low > 1)
        )
        if below and above:
            sentences.append(
                f"The initial scales disagree: compared with {primary.baseline}, the "
                f"{question_name(question)} of {primary.arm} is lower at initial scale {below}, "
                f"but higher at {above}."
            )
    for scale in scales if len(scales) == 1 else [*scales, math.nan]:
        here = rows[rows.scale.isna() if math.isnan(scale) else rows.scale == scale]
        where = "Combined over scales" if math.isnan(scale) else f"At initial scale {scale:g}"
        for questions, words in ((widths, ("lower", "higher")), (results, ("better", "worse"))):
            said = {word: [] for word in words}
            for row in here.loc[here.question.isin(list(questions))].to_dict("records"):
                null = 1.0 if row["question"] in spreads else 0.0
                if row["high"] < null or row["low"] > null:
                    first = (row["high"] < null) == questions[row["question"]]
                    numbers = "{value:.3g}, 95% CI {low:.3g} to {high:.3g}".format(**row)
                    name = question_name(row["question"])
                    said[words[0 if first else 1]].append(f"{name} ({numbers})")
            one, other = (" and ".join(said[word]) for word in words)
            if one and other:
                sentences.append(
                    f"{where}, compared with {primary.baseline}, {primary.arm} is {words[0]} in "
                    f"{one}, but {words[1]} in {other}."
                )
    return sentences
