"""The programs of docs/recipes.md, for the tests and for the benchmarks."""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import momentum_jax as mj

_PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
# By section title.
PROGRAMS: dict[str, str] = dict(
    re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", _PAGE, re.DOTALL | re.MULTILINE)
)
# By section: the function passed to `recurrence`, and the other arguments.
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
    """Runs the program of a section and returns the names that it defines."""
    names: dict[str, Any] = {}
    exec(PROGRAMS[section], names)
    return names


def makers() -> dict[str, Callable[..., Any]]:
    """Returns, for each section with a recurrence, a factory that takes a `velocity_dtype`."""
    return {
        section: functools.partial(mj.recurrence, run(section)[name], **given)
        for section, (name, given) in RECURRENCES.items()
    }
