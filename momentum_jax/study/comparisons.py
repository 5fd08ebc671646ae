"""What a study found: all comparisons in one table, and the verdict on the primary one."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import xarray as xr
from tqdm import tqdm

from momentum_jax.study import contrasts as plan
from momentum_jax.study import statistics
from momentum_jax.study._answers import SPREADS, Runs, answer
from momentum_jax.study._pairs import TUNED, coordinate, every_pair, is_primary, key
from momentum_jax.study.descriptions import describe as describe

COLUMNS = [
    *("contrast", "arm", "baseline", "effective_rate", "scale", "question", "value", "low", "high"),
    *("p", "p_exchange", "p_adjusted", "adjusted_low", "adjusted_high", "low_90", "high_90"),
    *("n", "note"),
]


def compare(dataset: xr.Dataset, *, progress: str | None = None) -> pd.DataFrame:
    """Compares the arms that the contrasts of a dataset name, and the primary ones.

    Ratios are arm / baseline of spreads within a scale, differences arm - baseline; combined over
    scales they are the geometric mean and the mean of those within scales. Ratios of standard
    deviations have intervals and `p` of a studentized bootstrap of whole units
    (`spread_tests.bootstrap_reference`), and `p_exchange` of a permutation test.

    `p_adjusted` is Holm's over all rows at one scale that ask the same question, each pair of arms
    counted once, and over all combined rows; adjusted intervals are Bonferroni's over the same
    rows. The primary comparison, declared before the runs, is not adjusted.

    The tuned comparison is split: the first ratio is the product of the other two.
    "tuned": the arm at its tuned rate, against the baseline at its own;
    "tuned, rate alone": the baseline at the arm's effective rate, against the baseline at its own;
    "tuned, method alone": the arm, against the baseline at the arm's effective rate.
    Their intervals include the error of tuning: the tuning seeds are drawn again 2000 times, the
    rates with the lowest interquartile mean are chosen again, and each choice is followed by draws
    of its own estimate.

    Args:
      dataset: what `run` returned.
      progress: what to call the work in a progress bar; None shows none.

    Returns:
      One row for each contrast, arm, baseline, scale (nan: combined) and question. The columns
      are `COLUMNS`; `low` and `high` are 95% intervals, `low_90` and `high_90` those of two
      one-sided tests at 5%. Undefined values are nan, with a `note` that says why.

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
    # Contrasts may share a pair of arms: what both ask is asked once.
    asked = {key(pair): pair for pair in reversed(pairs)}
    scales = np.arange(len(runs.scales))
    rates = coordinate(dataset, "effective_rate")
    family = {False: len(asked) * len(scales), True: len(asked)}
    # The smallest adjusted p is below 0.01.
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
    """What the primary comparison found.

    Attributes:
      word: "narrower", "wider", "equivalent", "inconclusive" or "undefined".
      sentence: the same in one sentence, with ratio and interval.
      value: the ratio of the spreads, arm / baseline ...
      low: ... with its 95% interval.
      high: its upper bound.
      p: of a ratio of 1.
      margin: ratios from 1 / (1 + margin) to 1 + margin count as equivalent.
      detectable: the smallest reduction, as a ratio below 1, that a study with this precision
        finds with a probability of 80%.

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
    """The answer of the primary comparison: equivalent, narrower, wider or inconclusive.

    "equivalent" comes first: two one-sided tests at 5%, that is, the 90% interval lies within the
    margin. Else the 95% interval decides.

    Args:
      dataset: what `run` returned.
      table: of `compare`; None: it is computed.

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
    # The half width is 1.960 standard errors; another 0.842 give a power of 80%.
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
    """The rows of the primary comparison, each once."""
    rows = table[(table.arm == primary.arm) & (table.baseline == primary.baseline)]
    rows = rows[~rows.contrast.isin(TUNED)]
    return rows.drop_duplicates(["scale", "question"])


# What the spread is over, by design.
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
        # A note ends with the reason.
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
    # A table read from CSV has nan for an empty note.
    note = f"; {row.note}" if isinstance(row.note, str) and row.note else ""
    return f"{word.capitalize()}: {ratio}{more}{note}."


def _one_rate(dataset, primary):
    rates = dict(zip(dataset.arm.values, coordinate(dataset, "effective_rate"), strict=True))
    return bool(np.isclose(rates[primary.arm], rates[primary.baseline]))


def disagreements(table: pd.DataFrame, dataset: xr.Dataset) -> list[str]:
    """Where the questions about the primary comparison have opposite answers.

    An answer counts if its unadjusted 95% interval excludes a ratio of 1 or a difference of 0.

    Args:
      table: of `compare`.
      dataset: what it was computed from.

    Returns:
      A sentence where scales point in different directions, and one for each scale, and for all
      combined, at which measures of spread and failures, or loss, failures and metrics, do.

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
    # By question: whether a ratio below 1, or a negative difference, goes under the first word.
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
                f"The scales disagree: compared with {primary.baseline}, the {question} of "
                f"{primary.arm} is lower at initial scale {below}, but higher at {above}."
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
                    said[words[0 if first else 1]].append(f"{row['question']} ({numbers})")
            one, other = (" and ".join(said[word]) for word in words)
            if one and other:
                sentences.append(
                    f"{where}, compared with {primary.baseline}, {primary.arm} is {words[0]} in "
                    f"{one}, but {words[1]} in {other}."
                )
    return sentences
