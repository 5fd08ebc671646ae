"""`python docs/study/collect.py FOLDER NAME` copies what the page needs from a finished study.

It writes `docs/study/NAME/numbers.json`, with four significant digits, and copies the pictures that
the page shows. Tables are stored as columns: {"arm": [...], "value": [...], ...}.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import pandas as pd
import xarray as xr

from momentum_jax import study

HERE = Path(__file__).parent
QUESTIONS = (
    "std", "total std", "std of log loss", "10-90% range", "failures", "rescued", "lost", "loss",
    "accuracy",
)  # fmt: skip
TUNED = ("std", "failures", "rescued", "lost", "loss")
MEASURES = ("std", "total std", "interquartile mean loss", "failed", "mean accuracy")
COMPARED = (
    "contrast", "arm", "baseline", "effective_rate", "scale", "question", "value", "low", "high",
    "p_adjusted", "adjusted_low", "adjusted_high",
)  # fmt: skip
DESCRIBED = ("arm", "family", "effective_rate", "scale", "measure", "value", "low", "high")
PROPORTIONS = ("arm", "family", "effective_rate", "scale", "source", "proportion", "low", "high")


def columns(table, names):
    """Converts some columns of a table for JSON: numbers are rounded, and nan becomes None."""

    def four_digits(value):
        if not isinstance(value, float):
            return value
        return float(f"{value:.4g}") if math.isfinite(value) else None

    return {name: [four_digits(value) for value in table[name].tolist()] for name in names}


def main(folder, name):
    """Writes the numbers and copies the pictures of one study."""
    summary = json.loads((folder / "summary.json").read_text())
    dataset = xr.load_dataset(folder / "results.nc", engine="scipy")
    table = pd.read_csv(folder / "comparisons.csv")
    arms = study.describe(dataset)
    kept = {
        key: summary[key]
        for key in ("problem", "design", "primary", "verdict", "disagreements", "tuned_rates")
    }
    kept |= {"provenance": summary["provenance"], "sizes": dict(dataset.sizes)}
    kept["steps"] = int(dataset.step[-1])
    kept["initial_sharpness"] = {
        f"{scale:g}": float(
            f"{float(dataset.initial_sharpness.sel(init_scale=scale).median()):.4g}"
        )
        for scale in dataset.init_scale.values
    }
    tuned = table.contrast.str.startswith("tuned")
    asked = table.question.isin(QUESTIONS) & (table.contrast != "same rate")
    kept["comparisons"] = columns(table[asked & (~tuned | table.question.isin(TUNED))], COMPARED)
    kept["arms"] = columns(arms[arms.measure.isin(MEASURES)], DESCRIBED)
    if summary["design"] == "crossed":
        kept["components"] = columns(study.variance_components(dataset), PROPORTIONS)
    out = HERE / name
    out.mkdir(exist_ok=True)
    (out / "numbers.json").write_text(json.dumps(kept, allow_nan=False) + "\n")
    page = (HERE / "index.md.j2").read_text()
    for picture in folder.glob("*.png"):
        if f"({name}/{picture.name})" in page:
            shutil.copy(picture, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
