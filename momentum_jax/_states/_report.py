"""The report of `transplant`: one row per array, and the table of the rows."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

KEPT, RESIZED, FRESH, DROPPED, NOTED = "kept", "resized", "fresh", "dropped", "noted"


class TransplantRow(NamedTuple):
    """What `transplant` did with one array of a state.

    Attributes:
      path: the path of the param in the new state; for a dropped array, in the old state. None for
        a value that belongs to no param, such as a count.
      array: the type and the field of the state that holds it, such as "MomentumState.velocity".
      outcome: "kept", "resized", "fresh" or "dropped"; or "noted" for a value that belongs to no
        param.
      note: details: the old path, dtypes, shapes, values.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(0.1)
      >>> params, wider = {"w": jnp.ones(2)}, {"w": jnp.ones(2), "b": jnp.ones(1)}
      >>> _, report = mj.transplant(tx.init(params), tx.init(wider))
      >>> report.rows[-1].path, report.rows[-1].outcome
      ("['w']", 'kept')
    """

    path: str | None
    array: str
    outcome: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class TransplantReport:
    """What `transplant` did with each array that belongs to a param, and notes on other values.

    Printed, it is a table.

    Attributes:
      rows: one `TransplantRow` per array.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> tx = mj.momentum(0.1)
      >>> params, wider = {"w": jnp.ones(2)}, {"w": jnp.ones(2), "b": jnp.ones(1)}
      >>> _, report = mj.transplant(tx.init(params), tx.init(wider))
      >>> print(report)
      param  array                   outcome
      ['b']  MomentumState.velocity  fresh
      ['w']  MomentumState.velocity  kept
      >>> report.fresh
      ("['b']",)
    """

    rows: tuple[TransplantRow, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """The paths of params with an array that was carried over in its shape.

        Its dtype may have changed.
        """
        return self._paths(KEPT)

    @property
    def resized(self) -> tuple[str, ...]:
        """The paths of params with an array that was carried over in another shape."""
        return self._paths(RESIZED)

    @property
    def fresh(self) -> tuple[str, ...]:
        """The paths of params with an array that is as `init` made it: a velocity of 0."""
        return self._paths(FRESH)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The old paths of params with an array that is not in the new state."""
        return self._paths(DROPPED)

    def _paths(self, outcome):
        paths = [row.path for row in self.rows if row.outcome == outcome]
        return tuple(dict.fromkeys(path for path in paths if path is not None))

    def __str__(self) -> str:
        """The rows as a table."""
        return _table(self.rows)


def _table(rows: Sequence[TransplantRow]) -> str:
    lines = [("param", "array", "outcome", "")]
    names = ["-" if row.path is None else row.path or "the root" for row in rows]
    lines += [(name, *row[1:]) for name, row in zip(names, rows, strict=True)]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]

    def line_of(line):
        columns = [text.ljust(width) for text, width in zip(line, widths, strict=False)]
        return "  ".join([*columns, line[3]]).rstrip()

    return "\n".join(map(line_of, lines))
