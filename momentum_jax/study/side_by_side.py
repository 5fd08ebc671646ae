"""Compares two finished studies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from momentum_jax.study import _tables, storing

KEYS = ["contrast", "arm", "baseline", "scale", "question"]
VALUES = ["value", "low", "high", "n"]
SHOWN = ("std", "failures", "loss")


def compare_reports(folders: Sequence[str | Path]) -> pd.DataFrame:
    """Returns the comparisons that two finished studies have in common.

    Args:
      folders: the folders of the two studies.

    Returns:
      A table with one row for each contrast, arm, baseline, scale (nan: combined) and question
      that both studies have. It has `value_1`, `low_1`, `high_1` and `n_1` of the first study, and
      `value_2`, ... of the second. The intervals are 95% intervals, not adjusted.

    Raises:
      ValueError: `folders` are not two, or a folder has no finished study or a damaged one.

    Example:
      >>> compare_reports(["results"])
      Traceback (most recent call last):
      ...
      ValueError: folders=['results'] must be two: give the folders of two finished studies.
    """
    if len(folders) != 2:
        raise ValueError(
            f"folders={[str(folder) for folder in folders]} must be two: give the folders of two "
            "finished studies."
        )
    one, two = (_comparisons(Path(folder)) for folder in folders)
    return one.merge(two, on=KEYS, suffixes=("_1", "_2"))


def compare_studies(folders: Sequence[str | Path], *, csv: bool = False) -> str:
    """Formats two finished studies as text: their verdicts and the comparisons of both.

    Args:
      folders: the folders of the two studies.
      csv: whether to return only the whole table of `compare_reports`, as CSV. By default the text
        has the verdicts, and of the table the rows that combine all initial scales, for the
        questions "std", "failures" and "loss".

    Returns:
      The text.

    Raises:
      ValueError: as for `compare_reports`.

    Example:
      >>> compare_studies(["no-such-folder", "results"])
      Traceback (most recent call last):
      ...
      ValueError: no-such-folder holds no finished study, because it has no summary.json: give the \
folder of a finished study.
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
    note = (
        f"{counted}. The table shows those that combine all initial scales, with 95% intervals "
        "that are not adjusted; --csv prints all."
    )
    return "\n".join([*said, "", _tables.lines(rows, str), "", note])


def _file(folder, name):
    path = folder / name
    if not path.exists():
        raise ValueError(
            f"{folder} holds no finished study, because it has no {name}: give the folder of a "
            "finished study."
        )
    return path


def _comparisons(folder):
    path = _file(folder, "comparisons.csv")
    try:
        # Text is read literally, because an arm may have the name "nan".
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        numbers = ["scale", *VALUES]
        table[numbers] = table[numbers].replace("", "nan").astype(float)
        return table.loc[:, [*KEYS, *VALUES]]
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {reason}.") from None


def _verdict(folder):
    path = _file(folder, "summary.json")
    numbers = storing.read_json(path)
    try:
        return f"{folder}, {numbers['problem']}: {numbers['verdict']['sentence']}"
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}.") from None
