"""Two finished studies side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from momentum_jax.study import _tables

KEYS = ["contrast", "arm", "baseline", "scale", "question"]
VALUES = ["value", "low", "high", "n"]
SHOWN = ("std", "failures", "loss")


def compare_reports(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The comparisons that both of two finished studies have made.

    Args:
      folders: the two folders.

    Returns:
      One row per contrast, arm, baseline, scale (nan: all scales together) and question of both
      studies, with `value_1`, `low_1`, `high_1` and `n_1` of the first and `value_2`, ... of the
      second. The intervals are 95% intervals, not adjusted.

    Raises:
      ValueError: not two folders; a folder without a finished study, or with a damaged one.

    Example:
      >>> compare_reports(["results"])
      Traceback (most recent call last):
      ...
      ValueError: folders=['results'] must be two folders.
    """
    if len(folders) != 2:
        raise ValueError(f"folders={[str(folder) for folder in folders]} must be two folders.")
    one, two = (_comparisons(Path(folder)) for folder in folders)
    return one.merge(two, on=KEYS, suffixes=("_1", "_2"))


def compare_studies(folders: Sequence[str | Path], *, csv: bool = False) -> str:
    """Two finished studies as text: the verdicts, and the comparisons that both have made.

    Args:
      folders: the two folders.
      csv: the whole table of `compare_reports` as CSV, and nothing else. By default the verdicts,
        and of the table what combines all initial scales and asks for spread, failures or loss.

    Returns:
      The text.

    Raises:
      ValueError: as `compare_reports`.

    Example:
      >>> compare_studies(["no-such-folder", "results"])
      Traceback (most recent call last):
      ...
      ValueError: no-such-folder holds no finished study: there is no summary.json.
    """
    verdicts = [_verdict(Path(folder)) for folder in folders]
    table = compare_reports(folders)
    if csv:
        return table.to_csv(index=False)
    chosen: Any = table[table.scale.isna() & table.question.isin(SHOWN)]
    rows = [
        {
            **{name: str(row[name]) for name in ("contrast", "arm", "baseline", "question")},
            **{
                f"({i})": _tables.interval(*(row[f"{name}_{i}"] for name in VALUES[:3]))
                for i in (1, 2)
            },
        }
        for row in chosen.to_dict("records")
    ]
    said = [f"({i}) {text}" for i, text in enumerate(verdicts, 1)]
    counted = f"{len(table)} comparisons are in both studies"
    if not rows:
        return "\n".join([*said, "", f"{counted}."])
    note = f"{counted}; these combine all initial scales, with 95% intervals. --csv prints all."
    return "\n".join([*said, "", _tables.lines(rows, str), "", note])


def _comparisons(folder):
    path = folder / "comparisons.csv"
    if not path.exists():
        raise ValueError(f"{folder} holds no finished study: there is no {path.name}.")
    try:
        # An arm may be called "nan": only numbers can be missing.
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        numbers = ["scale", *VALUES]
        table[numbers] = table[numbers].replace("", "nan").astype(float)
        return table.loc[:, [*KEYS, *VALUES]]
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {reason}.") from None


def _verdict(folder):
    path = folder / "summary.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no finished study: there is no {path.name}.")
    try:
        numbers: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return f"{folder}, {numbers['problem']}: {numbers['verdict']['sentence']}"
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {reason}.") from None
