"""Makes the tables of a report: rows of text, and their Markdown."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from momentum_jax.study import statistics
from momentum_jax.study._answers import SPREADS, is_ratio, question_name
from momentum_jax.study._drawing import three_digits
from momentum_jax.study.contrasts import Contrast, contrasts, primary

# The headings of columns, by question or contrast.
RATIOS = {question: question_name(question) for question in SPREADS}
FAILURES = {"failures": "difference of failure rates", "rescued": "rescued", "lost": "lost"}
LOSSES = {"loss": "difference of final loss", "lower loss": "P(lower loss)"}
TUNED = {
    "tuned": "each at its tuned rate",
    "tuned, rate alone": "rate alone",
    "tuned, method alone": "method alone",
}
SIGNIFICANT = 0.05
# An interval in brackets is not a Markdown link, so it is not escaped.
INTERVAL = re.compile(r"(\[-?[\d.e+-]+, (?:-?[\d.e+-]+|inf)\](?=[\s,;.]|$))")

Rows = Sequence[Mapping[str, str]]


class Markdown(str):
    """Text that is already Markdown; all other text is escaped."""


def escape(text: Any) -> Markdown:
    """Converts a value to Markdown that shows it literally, also inside a table."""
    if isinstance(text, Markdown):
        return text
    parts = re.split(INTERVAL, re.sub(r"\s+", " ", str(text)))
    parts[::2] = [re.sub(r"([\\`*_{}\[\]<>|~$&])", r"\\\1", part) for part in parts[::2]]
    # Characters that would start a heading, a list or a rule at the start of a line.
    first = r"^(?:(\d+)(?=[.)](?:\s|$))|(?=[#+=-](?!\d)))"
    return Markdown(re.sub(first, r"\1\\", "".join(parts)))


def lines(rows: Rows, shown: Callable[[Any], str] = escape) -> Markdown:
    """Formats rows as a Markdown table, padded so that columns line up in a terminal."""
    if not rows:
        return Markdown()
    cells = [[shown(key) for key in rows[0]], *([shown(v) for v in row.values()] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in cells]
    return Markdown("\n".join("| " + " | ".join(row) + " |" for row in padded))


def main_contrast(dataset: xr.Dataset) -> Contrast | None:
    """Returns the contrast with the primary comparison; else the first contrast, or None."""
    found, decides = contrasts(dataset), primary(dataset)
    if decides is None:
        return next((each for each in found if each.kind != "tuned"), None)
    for each in found:
        if each.baseline == decides.baseline and decides.arm in each.arms:
            return each
    # If no contrast has the primary comparison, `compare` gives it the kind "arms".
    return Contrast("arms", decides.baseline, (decides.arm,))


def rows_of(table: pd.DataFrame, contrast: Contrast) -> pd.DataFrame:
    """Returns the rows of a table of comparisons that belong to a contrast."""
    chosen = table.contrast.eq(contrast.kind) & table.baseline.eq(contrast.baseline)
    return by_scale(table.loc[chosen & table.arm.isin(contrast.arms)])


def by_scale(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows at each scale and those combined over scales.

    With one scale both are equal except for the adjustment. The combined rows are kept, because
    there the primary comparison is not adjusted.
    """
    scales = rows.scale.dropna().unique()
    return rows.loc[rows.scale.isna()].assign(scale=scales[0]) if len(scales) == 1 else rows


def of_main_families(dataset: xr.Dataset, components: pd.DataFrame) -> pd.DataFrame:
    """Returns the variance components of the families that the main contrast compares.

    If there is a primary comparison, only its two families are kept, at all their rates.
    """
    main, decides = main_contrast(dataset), primary(dataset)
    if main is None:
        return components
    arms = [decides.baseline, decides.arm] if decides else [main.baseline, *main.arms]
    shown = components[components.arm.isin(arms)].family.unique()
    return components.loc[components.family.isin(shown)]


def comparison_table(
    rows: pd.DataFrame, questions: Mapping[str, str], with_p: str | None = None
) -> Rows:
    """Makes one row per arm and initial scale, with one column per question.

    Args:
      rows: rows of a table of comparisons.
      questions: the headings of the columns, by question; questions without a row are left out.
      with_p: the question whose adjusted p-value is the last column; None for no such column.
    """
    asked = {name: title for name, title in questions.items() if (rows.question == name).any()}
    found: dict[tuple[str, float], dict[str, str]] = {}
    for row in rows.to_dict("records"):
        key = row["arm"], row["scale"] if row["scale"] == row["scale"] else math.inf
        shown = found.setdefault(key, {"arm": row["arm"], "initial scale": _scale(row["scale"])})
        if row["question"] in asked:
            shown[asked[row["question"]]] = estimate(row)
        if row["question"] == with_p:
            p = row["p_adjusted"]
            shown["adjusted p"] = "" if math.isnan(p) else "< 0.001" if p < 1e-3 else f"{p:.3f}"
    if with_p:
        for shown in found.values():
            shown["adjusted p"] = shown.pop("adjusted p", "")
    arms = list(dict.fromkeys(rows.arm))
    return [found[key] for key in sorted(found, key=lambda key: (arms.index(key[0]), key[1]))]


def estimate(row: Mapping[str, Any]) -> str:
    """Formats a value with its adjusted interval; a ratio with adjusted p < 0.05 is bold."""
    if row["question"] in ("rescued", "lost"):
        return f"{row['value']:.0f}"
    text = interval(row["value"], row["adjusted_low"], row["adjusted_high"])
    clear = is_ratio(row["question"]) and row["p_adjusted"] < SIGNIFICANT
    return Markdown(f"**{text}**") if clear else text


def interval(value: float, low: float, high: float) -> str:
    """Formats `value [low, high]`."""
    if math.isnan(value):
        return "undefined"
    known = not (math.isnan(low) or math.isnan(high))
    return three_digits(value) + (f" [{three_digits(low)}, {three_digits(high)}]" if known else "")


def _scale(scale: float) -> str:
    return "all" if math.isnan(scale) else f"x{scale:g}"


def rate_table(table: pd.DataFrame, chosen: Sequence[Contrast]) -> Rows:
    """Makes the ratios of standard deviations: a row per rate and arm, a column per scale."""
    found = []
    for contrast in chosen:
        rows = rows_of(table, contrast).query("question == 'std'")
        for arm, group in rows.groupby("arm", sort=False):
            cells = group.sort_values("scale", na_position="first").to_dict("records")
            shown = {"rate": three_digits(contrast.rate), "arm": str(arm)}
            shown |= {_scale(cell["scale"]): estimate(cell) for cell in cells}
            found.append(shown | {"relative to": contrast.baseline})
    return found


def proportion_table(components: pd.DataFrame | None) -> Rows:
    """Makes the proportions of the variance, by arm and initial scale."""
    if components is None:
        return []
    found: dict[Any, dict[str, str]] = {}
    for row in components.to_dict("records"):
        first = {"arm": row["arm"], "initial scale": _scale(row["scale"])}
        shown = found.setdefault((row["arm"], row["scale"]), first)
        bounds = [100 * row[name] for name in ("proportion", "low", "high")]
        undefined = math.isnan(bounds[0])
        known = "" if math.isnan(bounds[1]) else f" [{bounds[1]:.0f}, {bounds[2]:.0f}]"
        shown[row["source"]] = "undefined" if undefined else f"{bounds[0]:.0f}%{known}"
    return list(found.values())


def tuned_table(table: pd.DataFrame) -> Rows:
    """Makes the tuned ratio of standard deviations and its factors, by family and scale."""
    found: dict[Any, dict[str, str]] = {}
    for row in by_scale(table.loc[table.contrast.isin(TUNED)]).to_dict("records"):
        key = row["arm"], row["baseline"], _scale(row["scale"])
        shown = found.setdefault(key, {"family": key[0], "initial scale": key[2]})
        if row["question"] == "std":
            shown[TUNED[row["contrast"]]] = estimate(row)
        elif row["question"] == "loss" and row["contrast"] == "tuned":
            shown[LOSSES["loss"]] = estimate(row)
    for (_, baseline, _), shown in found.items():
        shown["relative to"] = baseline
    return list(found.values())


def decomposition(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the tuned ratio and its two factors, over all scales, for each family."""
    chosen = table.contrast.isin(TUNED) & (table.question == "std") & table.scale.isna()
    rows: Any = table[chosen]
    found = []
    for (arm, baseline), group in rows.groupby(["arm", "baseline"], sort=False):
        each = {row["contrast"]: row for row in group.to_dict("records")}
        whole, rate, method = (each[kind] for kind in TUNED)
        logs = [math.log(row["value"]) for row in (whole, rate) if row["value"] > 0]
        clear = whole["p_adjusted"] < SIGNIFICANT and len(logs) == 2
        found.append(
            {
                "arm": arm,
                "baseline": baseline,
                **{
                    name: estimate(row)
                    for name, row in zip(
                        ("whole", "rate", "method"), (whole, rate, method), strict=True
                    )
                },
                "proportion": round(100 * logs[1] / logs[0]) if clear else None,
            }
        )
    return found


def all_arms_table(described: pd.DataFrame, metrics: Sequence[str]) -> Rows:
    """Makes the description of all arms, by initial scale."""
    measures = ("mean loss", "interquartile mean loss", "std", "failed", "diverged")
    measures += tuple(f"mean {name}" for name in metrics)
    found: dict[Any, dict[str, str]] = {}
    for row in described.loc[described.measure.isin(measures)].to_dict("records"):
        first = {"arm": row["arm"], "initial scale": _scale(row["scale"])}
        shown = found.setdefault((row["arm"], row["scale"]), first)
        if row["measure"] == "diverged":
            shown["diverged"] = f"{row['value']:.0%}"
        else:
            heading = question_name(row["measure"])
            shown[heading] = interval(row["value"], row["low"], row["high"])
    return list(found.values())


def found_rates_table(rows: Sequence[Mapping[str, Any]], rate_name: str) -> Rows:
    """Makes the table of the rates that `tuned_rates` returns."""
    return [
        {
            "family": row["family"],
            "initial scale": _scale(row["scale"]),
            rate_name: three_digits(row["rate"]),
            "at the edge of the grid": row["edge"] or "no",
        }
        for row in rows
    ]


def tuned_rates(dataset: xr.Dataset) -> list[dict[str, Any]]:
    """Returns the tuned rate by family and scale, and whether it is at an edge of the grid."""
    if "tuning_loss" not in dataset:
        return []
    losses = dataset.tuning_loss.transpose("arm", "init_scale", "tuning_seed")
    rates = dataset.effective_rate.values
    found = []
    for family in dict.fromkeys(dataset.family.values.tolist()):
        chosen = (dataset.family.values == family) & np.isfinite(losses.values).all((1, 2))
        [members] = np.nonzero(chosen)
        members = members[np.argsort(rates[members], kind="stable")]
        for place, scale in enumerate(dataset.init_scale.values if len(members) else ()):
            middle = statistics.interquartile_mean(losses.values[members, place], -1)
            best = int(np.argmin(middle))
            edges = {0: "lowest", len(members) - 1: "highest"}
            found.append(
                {
                    "family": str(family),
                    "scale": float(scale),
                    "rate": float(rates[members[best]]),
                    "edge": edges.get(best, ""),
                }
            )
    return found
