"""The study's pictures. Each function draws on an Axes and returns it."""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from momentum_jax.study.statistics import final

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00")


def final_loss(results: xr.Dataset, arms: Sequence[str], axes: Axes) -> Axes:
    """The final test loss against the initial scale: a line an arm, median and middle 80%.

    Example:
      >>> from matplotlib.figure import Figure
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import problems, sweep
      >>> arms = [sweep.Arm("mu 0.9", mj.momentum, {"learning_rate": 0.02, "mu": 0.9})]
      >>> results = sweep.run(problems.digits(), arms, seeds=[0, 1, 2], init_scales=[0.5, 2.0],
      ...                     steps=20, batch_size=32)
      >>> print(final_loss(results, ["mu 0.9"], Figure().subplots()).get_xlabel())
      initial scale
    """
    loss = final(results).loss
    scales = results.init_scale.values
    for place, (arm, color) in enumerate(zip(arms, COLORS, strict=False)):
        low, middle, high = loss.sel(arm=arm).quantile([0.1, 0.5, 0.9], dim="seed").values
        # Side by side, so that the bars of one scale do not hide each other.
        at = scales * 1.06 ** (place - (len(arms) - 1) / 2)
        axes.errorbar(
            at, middle, [middle - low, high - middle], color=color, label=arm, capsize=3, marker="o"
        )
    _chance(axes, results)
    _loss_axis(axes)
    axes.set(xscale="log", xlabel="initial scale", ylabel="final test loss")
    axes.set_xticks(scales, [f"x{scale:g}" for scale in scales], minor=False)
    axes.minorticks_off()
    return axes


def loss_curves(results: xr.Dataset, arms: Sequence[str], init_scale: float, axes: Axes) -> Axes:
    """Test loss over the steps: a line an arm, the median, with a band for the middle 80%.

    Example:
      >>> from matplotlib.figure import Figure
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import problems, sweep
      >>> arms = [sweep.Arm("mu 0.9", mj.momentum, {"learning_rate": 0.02, "mu": 0.9})]
      >>> results = sweep.run(problems.digits(), arms, seeds=[0, 1, 2], init_scales=[1.0],
      ...                     steps=20, batch_size=32)
      >>> print(loss_curves(results, ["mu 0.9"], 1.0, Figure().subplots()).get_title())
      initial scale x1
    """
    # A diverged run stays in the picture, at its top.
    loss = results.loss.sel(init_scale=init_scale).fillna(np.inf)
    for arm, color in zip(arms, COLORS, strict=False):
        low, middle, high = np.quantile(
            loss.sel(arm=arm).values, [0.1, 0.5, 0.9], axis=0, method="nearest"
        )
        axes.plot(results.step, middle, color=color, label=arm)
        axes.fill_between(results.step, low, high, color=color, alpha=0.15, linewidth=0)
    _chance(axes, results)
    axes.set(
        yscale="log", xlabel="step", ylabel="test loss", title=f"initial scale x{init_scale:g}"
    )
    return axes


def _chance(axes, results):
    axes.axhline(results.attrs["chance"], color="0.6", linestyle=":", label="guessing")


def _loss_axis(axes):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
