"""The study's pictures. Each function draws on an Axes and returns it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from momentum_jax.diagnostics import Measurement
from momentum_jax.study.statistics import final

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00")


def final_loss(results: xr.Dataset, arms: Sequence[str], axes: Axes) -> Axes:
    """The final loss against the initial scale: a line an arm, median and middle 80%.

    Example:
      >>> from matplotlib.figure import Figure
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> arms = [Arm("mu 0.9", mj.momentum, learning_rate=0.02, mu=0.9)]
      >>> results = run(problems.digits(), arms, range(3), init_scales=[0.5, 2.0], steps=20)
      >>> print(final_loss(results, ["mu 0.9"], Figure().subplots()).get_xlabel())
      initial scale
    """
    loss = final(results).loss
    scales = results.init_scale.values
    for place, (arm, color) in enumerate(zip(arms, itertools.cycle(COLORS), strict=False)):
        low, middle, high = loss.sel(arm=arm).quantile([0.1, 0.5, 0.9], dim="seed").values
        # Side by side, so that the bars of one scale do not hide each other.
        at = scales * 1.06 ** (place - (len(arms) - 1) / 2)
        axes.errorbar(
            at, middle, [middle - low, high - middle], color=color, label=arm, capsize=3, marker="o"
        )
    _worst(axes, results)
    _loss_axis(axes, "y", loss.sel(arm=list(arms)))
    axes.set(xscale="log", xlabel="initial scale", ylabel="final loss")
    axes.set_xticks(scales, [f"x{scale:g}" for scale in scales], minor=False)
    axes.minorticks_off()
    return axes


def loss_curves(results: xr.Dataset, arms: Sequence[str], init_scale: float, axes: Axes) -> Axes:
    """Loss over the steps: a line an arm, the median, with a band for the middle 80%.

    Example:
      >>> from matplotlib.figure import Figure
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> arms = [Arm("mu 0.9", mj.momentum, learning_rate=0.02, mu=0.9)]
      >>> results = run(problems.digits(), arms, range(3), steps=20)
      >>> print(loss_curves(results, ["mu 0.9"], 1.0, Figure().subplots()).get_title())
      initial scale x1
    """
    # A diverged run stays in the picture, at its top.
    loss = results.loss.sel(init_scale=init_scale).fillna(np.inf)
    loss = loss.isel(step=slice(None, None, -(-len(loss.step) // 101)))  # No eye sees more.
    for arm, color in zip(arms, itertools.cycle(COLORS), strict=False):
        low, middle, high = np.quantile(
            loss.sel(arm=arm).values, [0.1, 0.5, 0.9], axis=0, method="nearest"
        )
        axes.plot(loss.step, middle, color=color, label=arm)
        axes.fill_between(loss.step, low, high, color=color, alpha=0.15, linewidth=0)
    _worst(axes, results)
    _loss_axis(axes, "y", loss.sel(arm=list(arms)))
    axes.set(xlabel="step", ylabel="loss", title=f"initial scale x{init_scale:g}")
    return axes


def paired(results: xr.Dataset, plain: str, arm: str, axes: Axes) -> Axes:
    """Each pair of runs as a point: the final loss with an arm against that of the plain arm.

    Below the diagonal the arm ended lower. Pairs in which the plain arm failed and the other
    solved the problem are rescued, those of the reverse are lost.

    Example:
      >>> from matplotlib.figure import Figure
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> arms = [Arm(f"mu {mu}", mj.momentum, learning_rate=0.02, mu=mu) for mu in (0, 0.9)]
      >>> results = run(problems.digits(), arms, range(3), steps=20)
      >>> print(paired(results, "mu 0", "mu 0.9", Figure().subplots()).get_xlabel())
      final loss, mu 0
    """
    ends = final(results)
    before, after = (ends.sel(arm=name) for name in (plain, arm))
    rescued = (~before.solved & after.solved).values
    lost = (before.solved & ~after.solved).values
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "no difference": (~rescued & ~lost, {"color": "0.6", "marker": "."}),
        "rescued": (rescued, {"color": COLORS[3], "marker": "^"}),
        "lost": (lost, {"color": COLORS[5], "marker": "x"}),
    }
    for name, (chosen, style) in kinds.items():
        axes.scatter(
            before.loss.values[chosen],
            after.loss.values[chosen],
            label=f"{name} ({chosen.sum()})",
            s=18,
            alpha=0.8,
            rasterized=True,  # Else a page of many pairs is several megabytes large.
            **style,
        )
    both = ends.loss.sel(arm=[plain, arm])
    limits = [float(both.min()), float(both.max())]
    axes.plot(limits, limits, color="0.5", linewidth=0.8)
    _loss_axis(axes, "x", both)
    _loss_axis(axes, "y", both)
    axes.set(xlabel=f"final loss, {plain}", ylabel=f"final loss, {arm}")
    axes.legend(fontsize="small")
    return axes


def path(
    loss: Callable[[Float[Array, "2"]], Any],
    paths: Mapping[str, Float[np.ndarray | Array, "points 2"]],
    axes: Axes,
) -> Axes:
    """Paths over the contour map of a loss of two params: where each started, went and ended.

    Args:
      loss: `loss(params) -> scalar`, which JAX can vmap.
      paths: the params from the first point to the last, by the name of the path.
      axes: where to draw.

    Returns:
      `axes`. The levels are equally spaced in the square root of the loss above its least, so
      that those of a round bowl are equally far apart.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import momentum_jax as mj
      >>> from matplotlib.figure import Figure
      >>> def ravine(w):
      ...     return (w[0] ** 2 + 20 * w[1] ** 2) / 2
      >>> tx = mj.momentum(0.02, 0.9)
      >>> w = jnp.array([4.0, 1.0])
      >>> state, points = tx.init(w), [w]
      >>> for _ in range(50):
      ...     updates, state = tx.update(jax.grad(ravine)(w), state)
      ...     w = w + updates
      ...     points.append(w)
      >>> print(path(ravine, {"mu 0.9": jnp.array(points)}, Figure().subplots()).get_xlabel())
      first param
    """
    finite = {
        name: points[np.isfinite(points).all(axis=1)]
        for name, points in ((name, np.asarray(points)) for name, points in paths.items())
    }
    everywhere = np.concatenate(list(finite.values()))
    low, high = everywhere.min(axis=0), everywhere.max(axis=0)
    # Room around the paths, also around one that runs along an axis.
    room = 0.15 * np.maximum(high - low, 0.3 * np.max(high - low))
    x, y = (
        jnp.linspace(start, stop, 201) for start, stop in zip(low - room, high + room, strict=True)
    )
    height = np.asarray(jax.jit(jax.vmap(jax.vmap(loss)))(jnp.stack(jnp.meshgrid(x, y), axis=-1)))
    height = np.sqrt(height - height.min())
    axes.contour(x, y, height, levels=15, colors="0.8", linewidths=0.8)
    for (name, points), color in zip(finite.items(), itertools.cycle(COLORS), strict=False):
        axes.plot(*points.T, color=color, label=name, marker=".", markersize=3, linewidth=1)
        axes.plot(*points[0], color=color, marker="o", markerfacecolor="white", linestyle="")
        axes.plot(*points[-1], color=color, marker="o", linestyle="")
    axes.set(xlabel="first param", ylabel="second param")
    return axes


def energies(
    measured: Measurement, axes: Axes, steps: Sequence[int] | np.ndarray | None = None
) -> Axes:
    """Kinetic, potential and total energy of a run over its steps.

    Args:
      measured: a `Measurement` with a loss, whose entries hold one value a step: what
        `jax.lax.scan` stacks, or `jax.tree.map(lambda *x: jnp.stack(x), *measurements)`.
      axes: where to draw.
      steps: which steps these are; by default all, from the first.

    Returns:
      `axes`.

    Raises:
      ValueError: no loss was given to `measure`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import momentum_jax as mj
      >>> from matplotlib.figure import Figure
      >>> tx = mj.momentum(0.1, 0.9)
      >>> def step(carry, _):
      ...     w, state = carry
      ...     loss, g = jax.value_and_grad(lambda w: w**2 / 2)(w)
      ...     update, state = tx.update(g, state)
      ...     found = mj.diagnostics.measure(
      ...         g, state.velocity, learning_rate=0.1, mu=0.9, loss=loss
      ...     )
      ...     return (w + update, state), found
      >>> w = jnp.array(1.0)
      >>> _, measured = jax.lax.scan(step, (w, tx.init(w)), None, 30)
      >>> print(energies(measured, Figure().subplots()).get_ylabel())
      energy, in the unit of the loss
    """
    if measured.potential_energy is None:
        raise ValueError("there is no potential energy to draw: give measure(...) the loss.")
    for name, color in zip(
        ("total", "kinetic", "potential"), itertools.cycle(COLORS), strict=False
    ):
        values = np.asarray(getattr(measured, f"{name}_energy"))
        at = _steps(values) if steps is None else steps
        axes.plot(at, values, color=color, label=f"{name} energy")
    axes.set(xlabel="step", ylabel="energy, in the unit of the loss")
    axes.legend()
    return axes


def alignment_and_gain(measured: Measurement, axes: Axes) -> Axes:
    """How far the velocity points downhill, and how many plain steps each step is worth.

    Args:
      measured: as for `energies`; needs no loss.
      axes: where to draw; the gain has a scale of its own at the right.

    Returns:
      `axes`, with the alignment. Dotted is 1 / (1 - mu), the ceiling of the gain under a
      constant gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> import momentum_jax as mj
      >>> from matplotlib.figure import Figure
      >>> tx = mj.momentum(0.1, 0.9)
      >>> g = jnp.ones(3)
      >>> def step(state, _):
      ...     _, state = tx.update(g, state)
      ...     return state, mj.diagnostics.measure(g, state.velocity, learning_rate=0.1, mu=0.9)
      >>> _, measured = jax.lax.scan(step, tx.init(g), None, 30)
      >>> print(alignment_and_gain(measured, Figure().subplots()).get_ylabel())
      alignment of the velocity with -gradient
    """
    alignment, gain = np.asarray(measured.alignment), np.asarray(measured.gain)
    ink, other = COLORS[2], COLORS[5]
    axes.plot(_steps(alignment), alignment, color=ink)
    axes.set(xlabel="step", ylim=(-1.05, 1.05))
    axes.set_ylabel("alignment of the velocity with -gradient", color=ink)
    right = axes.twinx()
    right.plot(_steps(gain), gain, color=other)
    # (1 - mu) = friction^2 times the effective learning rate; with mu 1 there is no ceiling.
    friction = np.asarray(measured.friction)
    if np.all(friction > 0):
        ceiling = 1 / (friction**2 * np.asarray(measured.effective_learning_rate))
        right.plot(_steps(gain), ceiling, color=other, linestyle=":", label="gain 1 / (1 - mu)")
        # Above, for the lines go everywhere.
        right.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    # Where the gradient passes through 0, the gain is many times that of the other steps.
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    right.set_ylabel("gain, in plain steps", color=other)
    return axes


def _steps(values):
    return np.arange(1, len(values) + 1)


def _worst(axes, results):
    worst = results.attrs["worst"]
    if np.isfinite(worst):
        axes.axhline(worst, color="0.6", linestyle=":", label="the most a run is charged with")


def _loss_axis(axes, which, losses):
    """Logarithmic where no loss is negative; 0 and what is nearly 0 do not stretch it."""
    finite = losses.values[np.isfinite(losses.values)]
    positive = finite[finite > 1e-12]
    if len(positive) == 0 or finite.min() < 0:
        return
    low, high = positive.min(), positive.max()
    axes.set(**{f"{which}scale": "log"})
    if finite.min() < low:
        axes.set(**{f"{which}lim": (low / 2, None)})
    axis = getattr(axes, f"{which}axis")
    # Labels also where the losses span less than a power of ten.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
