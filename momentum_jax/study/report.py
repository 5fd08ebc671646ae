"""What a person reads: the tables, the answer in a sentence, and the folder of results."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import xarray as xr
from matplotlib.figure import Figure

from momentum_jax.study import plots
from momentum_jax.study.statistics import spread_ratio, summarize

# Contrast -> the names of its arms, plain gradient descent first.
Contrasts = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a study and what was estimated from them.

    Attributes:
      results: what `sweep.run` returned.
      contrasts: the names of the arms that are compared, the plain one first, by contrast.
      rows: what `statistics.summarize` returned.
      spread_ratios: for each contrast, arm and initial scale: the spread of the final loss over
        that of the plain arm, or None where all runs of one end alike.
    """

    results: xr.Dataset
    contrasts: Contrasts
    rows: Sequence[Mapping[str, Any]]
    spread_ratios: Sequence[Mapping[str, Any]]


def report(results: xr.Dataset, contrasts: Contrasts) -> Report:
    """Estimates all that the report shows."""
    ratios = [
        {
            "contrast": contrast,
            "arm": arm,
            "init_scale": float(scale),
            "ratio": spread_ratio(results, arm, plain, scale),
        }
        for contrast, (plain, *others) in contrasts.items()
        for arm in others
        for scale in results.init_scale.values
    ]
    return Report(results, contrasts, summarize(results), ratios)


def text(study: Report) -> str:
    """The tables, a set for each contrast, and the answer."""
    seeds = study.results.sizes["seed"]
    parts = []
    for contrast, arms in study.contrasts.items():
        rows = [row for row in study.rows if row["arm"] in arms]
        parts.append(f"== {contrast.capitalize()} ==")
        for name, title in (("loss", "Final test loss"), ("metric", "Final test accuracy")):
            parts.append(f"{title} over {seeds} initial weights, with 95% intervals")
            parts.append(_table([_cells(row, name) for row in rows]))
        parts.append("Share of failed runs, with 95% intervals")
        parts.append(_by_scale(rows, "failed"))
        parts.append(f"Spread of the final test loss, as a multiple of that of {arms[0]}")
        ratios = [row for row in study.spread_ratios if row["contrast"] == contrast]
        parts.append(_by_scale(ratios, "ratio"))
    return "\n\n".join([*parts, LEGEND, answer(study)])


LEGEND = (
    "An arm is mu at its learning rate. Spread is the standard deviation over the initial\n"
    "weights. A loss above that of guessing counts as that of guessing. A run has failed if\n"
    "it diverged, or classifies less than half of the test images correctly. A narrow spread\n"
    "is good news only beside a low mean: runs that have not left their start are alike too."
)


def answer(study: Report) -> str:
    """For each contrast: in how many comparisons the spread was narrower, and wider."""
    lines = ["Does momentum reduce the dependence on the initial weights?"]
    for contrast in study.contrasts:
        ratios = [row["ratio"] for row in study.spread_ratios if row["contrast"] == contrast]
        told = [ratio for ratio in ratios if ratio is not None]
        lines.append(
            f"  {contrast}: of {len(ratios)} comparisons (arm and initial scale), momentum "
            f"narrowed the spread in {sum(ratio.high < 1 for ratio in told)}, widened it in "
            f"{sum(ratio.low > 1 for ratio in told)}, and the others do not tell."
        )
    lines.append("  (Told by 95% intervals one by one, without a correction for their number.)")
    return "\n".join(lines)


def write(study: Report, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Writes `results.nc`, `summary.json` and the pictures; returns their paths.

    Args:
      study: what `report` returned.
      folder: an existing folder.
      facts: what else to record in `summary.json`: the settings, the time it took.
    """
    packages = ("momentum_jax", "jax", "jaxlib", "optax", "flax", "scikit-learn", "scipy")
    summary = {
        **facts,
        "device": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "contrasts": study.contrasts,
        "rows": study.rows,
        "spread_ratios": study.spread_ratios,
    }
    paths = [folder / name for name in ("results.nc", "summary.json")]
    study.results.to_netcdf(paths[0], engine="scipy")
    paths[1].write_text(json.dumps(summary, indent=1, default=dataclasses.asdict) + "\n")
    for name, figure in _figures(study).items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _figures(study):
    scales = study.results.init_scale.values
    ends = Figure(figsize=(5.5 * len(study.contrasts), 4.5), layout="constrained")
    panels = ends.subplots(1, len(study.contrasts), sharey=True, squeeze=False)[0]
    for axes, (contrast, arms) in zip(panels, study.contrasts.items(), strict=True):
        plots.final_loss(study.results, arms, axes).set_title(contrast)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize="small")
    ends.suptitle("Median and middle 80% over the initial weights")

    size = (2 + 2.8 * len(scales), 3.2 * len(study.contrasts))
    curves = Figure(figsize=size, layout="constrained")
    rows = curves.subplots(
        len(study.contrasts), len(scales), sharey=True, sharex=True, squeeze=False
    )
    for row, (contrast, arms) in zip(rows, study.contrasts.items(), strict=True):
        for axes, scale in zip(row, scales, strict=True):
            plots.loss_curves(study.results, arms, scale, axes).label_outer()
        row[0].set_ylabel(f"test loss\n{contrast}")
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return {"final_loss": ends, "loss_curves": curves}


def _cells(row, name):
    return {
        "init": f"x{row['init_scale']:g}",
        "arm": row["arm"],
        **{statistic.replace("_", " "): str(row[name][statistic]) for statistic in row[name]},
    }


def _by_scale(rows, name):
    table = {}
    for row in rows:
        cells = table.setdefault(row["arm"], {"arm": row["arm"]})
        cells[f"x{row['init_scale']:g}"] = str(row[name] or "undefined")
    return _table(list(table.values()))


def _table(rows):
    lines = [{key: key for key in rows[0]}, *rows]
    widths = [max(len(line[key]) for line in lines) for key in rows[0]]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line.values(), widths, strict=True)
        ).rstrip()
        for line in lines
    )
