"""Helpers of all plots: colours, markers, labels, numbers and logarithmic axes."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter

# The colours of Okabe and Ito, which colour-blind readers can distinguish. Markers differ too.
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00")
MARKERS = ("o", "s", "^", "v", "P", "X", "*")


def style(place: int) -> dict[str, Any]:
    """Returns the colour and marker of the line with this index."""
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}


def label(name: str, width: int = 40) -> str:
    """Shortens a name to one line, for a label that legends show even with a leading underscore."""
    name = " ".join(name.split())
    name = name if len(name) <= width else name[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return " " + name if name.startswith("_") else name


def run_dims(of: xr.Dataset | xr.DataArray) -> list[str]:
    """Returns the dimensions over which the runs of one arm and scale vary."""
    return [name for name in ("seed", "order_seed") if name in of.dims]


def three_digits(value: float) -> str:
    """Formats a number with three significant digits.

    Example:
      >>> three_digits(0.5), three_digits(12.0), three_digits(12345.6), three_digits(1e-7)
      ('0.500', '12.0', '12346', '1.00e-07')
    """
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 999.5:
        return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.2e}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.2e}"


def cap_line(axes: Axes, dataset: xr.Dataset, losses: np.ndarray) -> None:
    """Draws a dotted line at the loss cap, if there is one and some loss is near it."""
    cap = float(dataset.attrs.get("loss_cap", np.nan))
    if np.isfinite(cap) and (losses > cap / 1.3).any():
        axes.axhline(cap, color="0.6", linestyle=":", label="loss cap", zorder=0)


def log_ticks(axis: Axis, values: np.ndarray) -> None:
    """Labels a logarithmic axis, even if the values span less than a factor of ten."""
    low, high = values.min(), values.max()
    subs = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    for factor, fewer in ((2, (1, 1.5, 2, 3, 5, 7)), (4, (1, 2, 5)), (300, (1,))):
        subs = fewer if high >= factor * low else subs
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def loss_axis(axes: Axes, which: str, losses: np.ndarray) -> None:
    """Makes an axis logarithmic if no loss is negative; losses near 0 are left off the axis."""
    finite = losses[np.isfinite(losses)]
    positive = finite[finite > 1e-12]
    narrow = len(positive) and finite.min() > 0 and positive.max() < 2 * positive.min()
    if len(positive) == 0 or finite.min() < 0 or narrow:
        return  # Within a factor of 2 a linear axis looks the same and has more labels.
    axes.set(**{f"{which}scale": "log"})
    if finite.min() < positive.min():
        axes.set(**{f"{which}lim": (positive.min() / 2, None)})
    log_ticks(getattr(axes, f"{which}axis"), positive)
