"""The programs of docs/recipes.md, for the tests and for what they cost."""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import momentum_jax as mj

_PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
# By the title of the section.
PROGRAMS: dict[str, str] = dict(
    re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", _PAGE, re.DOTALL | re.MULTILINE)
)
# By section: the function that is given to `recurrence`, and with what.
RECURRENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "Lion": ("lion", {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.99}),
    "Signum": ("signum", {"learning_rate": 1e-3, "mu": 0.9}),
    "An average of the gradients": ("average", {"mu": 0.9}),
    "Two velocities: Adam": (
        "adam",
        {"velocities": 2, "learning_rate": 1e-3, "step": lambda count: count + 1},
    ),
    "Quasi-hyperbolic momentum": ("qhm", {"learning_rate": 1.0, "mu": 0.999, "nu": 0.7}),
    "STORM: less variance from two gradients": ("storm", {"learning_rate": 0.1}),
    "Muon": ("muon", {"step": lambda count: count + 1}),
}


def run(section: str) -> dict[str, Any]:
    """What the program of a section defines."""
    names: dict[str, Any] = {}
    exec(PROGRAMS[section], names)
    return names


def makers() -> dict[str, Callable[..., Any]]:
    """Of each section with a recurrence, what makes it with a `velocity_dtype`."""
    return {
        section: functools.partial(mj.recurrence, run(section)[name], **given)
        for section, (name, given) in RECURRENCES.items()
    }
