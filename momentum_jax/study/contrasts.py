"""Defines which arms are compared. These records are stored with the results."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import xarray as xr

# What makes the arms of a contrast comparable.
ContrastKind = Literal["same effective rate", "same rate", "tuned", "control", "arms"]

# The heading of each kind in the report.
HEADINGS: dict[ContrastKind, str] = {
    "same effective rate": "At the same effective learning rate, learning_rate / (1 - mu)",
    "same rate": "At the same learning rate",
    "tuned": "Each at its own tuned learning rate",
    "control": "Controls, against the baseline at the primary learning rate",
    "arms": "The arms as given",
}


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One baseline arm, and the arms that are compared with it.

    Attributes:
      kind: why the arms are comparable, a `ContrastKind`.
      baseline: the name of the baseline arm; for the kind "tuned", the name of a family.
      arms: the names of the other arms or families.
      rate: the learning rate that all arms have ("same rate"), or their effective learning rate;
        nan if they have no rate in common.

    Raises:
      ValueError: an unknown kind, or no arm to compare.

    Example:
      >>> Contrast("arms", "mu 0", ("mu 0.9",)).arms
      ('mu 0.9',)
    """

    kind: ContrastKind
    baseline: str
    arms: tuple[str, ...]
    rate: float = math.nan

    def __post_init__(self):
        """Checks the kind."""
        if self.kind not in HEADINGS:
            raise ValueError(f"kind={self.kind!r} of a contrast must be one of {list(HEADINGS)}.")
        object.__setattr__(self, "arms", tuple(self.arms))
        if not self.arms or self.baseline in self.arms:
            raise ValueError(
                f"arms={list(self.arms)} of a contrast must name at least one arm, and not its "
                f"baseline {self.baseline!r}."
            )


@dataclasses.dataclass(frozen=True)
class Primary:
    """The primary comparison, which decides the verdict. It is declared before any run.

    It compares the standard deviation of the final loss, as a ratio, arm / baseline. Over several
    initial scales it is the geometric mean of the ratios.

    Attributes:
      arm: the name of the arm.
      baseline: the name of the arm that it is compared with.
      margin: the two arms are equivalent if the 90% confidence interval of the ratio lies within
        1 / (1 + margin) to 1 + margin; default 0.1.

    Raises:
      ValueError: a margin that is not above 0, or an arm compared with itself.

    Example:
      >>> Primary("mu 0.9", "mu 0").margin
      0.1
    """

    arm: str
    baseline: str
    margin: float = 0.1

    def __post_init__(self):
        """Checks the margin."""
        if not 0 < self.margin < math.inf:
            raise ValueError(f"margin={self.margin} must be above 0 and finite; 0.1 is usual.")
        if self.arm == self.baseline:
            raise ValueError(
                f"the primary comparison compares {self.arm!r} with itself: give another baseline."
            )


def contrasts(dataset: xr.Dataset) -> list[Contrast]:
    """Returns the contrasts of a dataset of `run`.

    Example:
      >>> contrasts(xr.Dataset())
      []
    """
    return [contrast_from_json(each) for each in json.loads(dataset.attrs.get("contrasts", "[]"))]


def primary(dataset: xr.Dataset) -> Primary | None:
    """Returns the primary comparison of a dataset of `run`; None if it has none.

    Example:
      >>> print(primary(xr.Dataset()))
      None
    """
    found = json.loads(dataset.attrs.get("primary", "null"))
    return None if found is None else Primary(**found)


def as_json(record: Contrast | Primary) -> dict:
    """Converts a record for `json.dumps`; nan becomes None.

    Example:
      >>> as_json(Contrast("arms", "mu 0", ("mu 0.9",)))["rate"] is None
      True
    """
    fields = dataclasses.asdict(record)
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in fields.items()
    }


def contrast_from_json(fields: Mapping[str, Any]) -> Contrast:
    """Makes the contrast that `as_json` converted.

    Example:
      >>> contrast_from_json(as_json(Contrast("arms", "mu 0", ("mu 0.9",)))).arms
      ('mu 0.9',)
    """
    rate = math.nan if fields["rate"] is None else fields["rate"]
    return Contrast(**{**fields, "arms": tuple(fields["arms"]), "rate": rate})
