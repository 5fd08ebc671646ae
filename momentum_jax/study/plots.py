"""All plots of the study. Each function draws on a matplotlib Axes and returns it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float
from matplotlib.axes import Axes

from momentum_jax.diagnostics import Measurement
from momentum_jax.study._drawing import COLORS as COLORS
from momentum_jax.study._drawing import cap_line, label, loss_axis, run_dims, style
from momentum_jax.study.charts import families as families
from momentum_jax.study.charts import forest as forest
from momentum_jax.study.charts import rate_curve as rate_curve
from momentum_jax.study.charts import variance_bars as variance_bars
from momentum_jax.study.statistics import final


def final_loss(results: xr.Dataset, arms: Sequence[str], axes: Axes) -> Axes:
    """Draws the final loss against the initial scale: median, with bars from 10% to 90%.

    Args:
      results: what `run` returned.
      arms: the names of the arms.
      axes: where to draw.

    Returns:
      `axes`.

    Example:
      >>> from matplotlib.figure import Figure
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> arms = [Arm("mu 0.9", mj.momentum, learning_rate=0.02, mu=0.9)]
      >>> results = run(problems.quadratic(), arms, range(3), init_scales=[0.5, 2.0], steps=10)
      >>> print(final_loss(results, ["mu 0.9"], Figure().subplots()).get_xlabel())
      initial scale
    """
    loss = final(results).loss
    scales = results.init_scale.values
    for place, arm in enumerate(arms):
        low, middle, high = loss.sel(arm=arm).quantile([0.1, 0.5, 0.9], run_dims(loss)).values
        # Shifted sideways, so that the bars of one scale do not hide each other.
        at = scales * 1.06 ** (place - (len(arms) - 1) / 2)
        errors = [middle - low, high - middle]
        axes.errorbar(at, middle, errors, label=label(arm), capsize=3, **style(place))
    cap_line(axes, results, loss.sel(arm=list(arms)).values)
    loss_axis(axes, "y", loss.sel(arm=list(arms)).values)
    axes.set(xscale="log", xlabel="initial scale", ylabel="final loss")
    axes.set_xlim(scales.min() / 1.3, scales.max() * 1.3)
    axes.set_xticks(scales, [f"x{scale:g}" for scale in scales], minor=False)
    axes.minorticks_off()
    return axes


def loss_curves(
    results: xr.Dataset, arms: Sequence[str], init_scale: float, axes: Axes, variable: str = "loss"
) -> Axes:
    """Draws the loss, or another variable, over the steps: median, with a 10-90% band.

    Args:
      results: what `run` returned.
      arms: the names of the arms.
      init_scale: the initial scale.
      axes: where to draw.
      variable: a variable of the dataset with the dimension `step`. A value that is not finite
        counts as larger than all others.

    Returns:
      `axes`.

    Example:
      >>> from matplotlib.figure import Figure
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> arms = [Arm("mu 0.9", mj.momentum, learning_rate=0.02, mu=0.9)]
      >>> results = run(problems.quadratic(), arms, range(3), steps=10)
      >>> print(loss_curves(results, ["mu 0.9"], 1.0, Figure().subplots()).get_title())
      initial scale x1
    """
    values = results[variable].sel(init_scale=init_scale)
    values = values.where(np.isfinite(values), np.inf)
    # At most 101 points per line, because more cannot be seen.
    values = values.isel(step=slice(None, None, -(-len(values.step) // 101)))
    for place, arm in enumerate(arms):
        runs = values.sel(arm=arm)
        low, middle, high = runs.quantile([0.1, 0.5, 0.9], run_dims(runs), method="nearest").values
        steps = runs.coords.get("steps_taken", runs.step)
        looks = style(place)
        every = max(1, len(steps) // 6)
        # Each line has its markers at different steps, so that equal curves can be distinguished.
        offset = (place * every // max(1, len(arms)), every)
        axes.plot(steps, middle, label=label(arm), markevery=offset, ms=4, **looks)
        axes.fill_between(steps, low, high, color=looks["color"], alpha=0.15, linewidth=0)
    if variable == "loss":
        cap_line(axes, results, values.sel(arm=list(arms)).values)
    loss_axis(axes, "y", values.sel(arm=list(arms)).values)
    axes.set(xlabel="step", ylabel=variable.replace("_", " "))
    axes.set_title(f"initial scale x{init_scale:g}", fontsize="medium")
    return axes


def paired(results: xr.Dataset, baseline: str, arm: str, axes: Axes) -> Axes:
    """Draws each pair of runs as a point: final loss of an arm against the baseline.

    Args:
      results: what `run` returned.
      baseline: the name of the baseline arm, for the horizontal axis.
      arm: the name of the other arm, for the vertical axis. Below the diagonal it ended lower.
      axes: where to draw.

    Returns:
      `axes`. A pair is "rescued" if the baseline failed and the arm solved the problem, "lost" in
      the reverse case, and has the "same status" if both solved it or both failed.

    Example:
      >>> from matplotlib.figure import Figure
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> arms = [Arm(f"mu {mu}", mj.momentum, learning_rate=0.02, mu=mu) for mu in (0, 0.9)]
      >>> results = run(problems.quadratic(), arms, range(3), steps=10)
      >>> print(paired(results, "mu 0", "mu 0.9", Figure().subplots()).get_xlabel())
      final loss, mu 0
    """
    ends = final(results)
    before, after = (ends.sel(arm=name) for name in (baseline, arm))
    rescued = (~before.solved & after.solved).values
    lost = (before.solved & ~after.solved).values
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "same status": (~rescued & ~lost, {"color": "0.6", "marker": "."}),
        "rescued": (rescued, {"color": COLORS[3], "marker": "^"}),
        "lost": (lost, {"color": COLORS[5], "marker": "x"}),
    }
    for name, (chosen, looks) in kinds.items():
        axes.scatter(
            before.loss.values[chosen],
            after.loss.values[chosen],
            label=f"{name} ({chosen.sum()})",
            s=18,
            alpha=0.8,
            rasterized=True,  # As vectors, many pairs would need several megabytes.
            **looks,
        )
    both = ends.loss.sel(arm=[baseline, arm]).values
    limits = [both.min(), both.max()]
    axes.plot(limits, limits, color="0.5", linewidth=0.8)
    loss_axis(axes, "x", both)
    loss_axis(axes, "y", both)
    axes.set(xlim=axes.get_ylim())
    axes.set(xlabel=f"final loss, {label(baseline)}", ylabel=f"final loss, {label(arm)}")
    axes.legend(fontsize="small")
    return axes


def path(
    loss: Callable[[Float[Array, "2"]], Any],
    paths: Mapping[str, Float[np.ndarray | Array, "points 2"]],
    axes: Axes,
) -> Axes:
    """Draws paths over the contour map of a loss of two params.

    Args:
      loss: `loss(params) -> scalar`; it must work under `jax.vmap`.
      paths: the params of each path, by its name, in order of the steps.
      axes: where to draw.

    Returns:
      `axes`. The start of a path is an open circle, its end a filled circle. Contour levels are
      equally spaced in the square root of the loss minus its minimum on the map, so the contours
      of a round bowl are equally far apart.

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
    # A margin around the paths, also around a path that runs along an axis.
    room = 0.15 * np.maximum(high - low, 0.3 * np.max(high - low))
    x, y = (
        jnp.linspace(start, stop, 201) for start, stop in zip(low - room, high + room, strict=True)
    )
    height = np.asarray(jax.jit(jax.vmap(jax.vmap(loss)))(jnp.stack(jnp.meshgrid(x, y), axis=-1)))
    height = np.sqrt(height - height.min())
    axes.contour(x, y, height, levels=15, colors="0.8", linewidths=0.8)
    for place, (name, points) in enumerate(finite.items()):
        color = COLORS[place % len(COLORS)]
        line = ("-", "--", "-.", ":")[place % 4]
        axes.plot(
            *points.T, color=color, label=label(name), marker=".", markersize=3, lw=1, ls=line
        )
        axes.plot(*points[0], color=color, marker="o", markerfacecolor="#ffffff", linestyle="")
        axes.plot(*points[-1], color=color, marker="o", linestyle="")
    axes.set(xlabel="first param", ylabel="second param")
    return axes


def energies(
    measured: Measurement, axes: Axes, steps: Sequence[int] | np.ndarray | None = None
) -> Axes:
    """Draws the kinetic, potential and total energy of a run over its steps.

    Args:
      measured: a `Measurement` with a loss, with one value per step in each entry. `jax.lax.scan`
        stacks it so; otherwise use `jax.tree.map(lambda *x: jnp.stack(x), *measurements)`.
      axes: where to draw.
      steps: the numbers of the steps; by default 1, 2, 3 and so on.

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
        raise ValueError(
            "potential_energy=None of the Measurement cannot be drawn: give measure(...) the loss."
        )
    lines = {"total": "-", "kinetic": "--", "potential": "-."}
    for (name, line), color in zip(lines.items(), COLORS, strict=False):
        values = np.asarray(getattr(measured, f"{name}_energy"))
        at = _steps(values) if steps is None else steps
        axes.plot(at, values, color=color, linestyle=line, label=f"{name} energy")
    axes.set(xlabel="step", ylabel="energy, in the unit of the loss")
    axes.legend()
    return axes


def alignment_and_gain(measured: Measurement, axes: Axes) -> Axes:
    """Draws the alignment of the velocity with the negative gradient, and the gain.

    The gain says how many steps of plain gradient descent one step is worth.

    Args:
      measured: as for `energies`; it needs no loss.
      axes: where to draw the alignment; the gain has its own axis at the right.

    Returns:
      `axes`. The dotted line is 1 / (1 - mu), the largest gain under a constant gradient.

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
    # 1 - mu = friction^2 * effective learning rate. With mu 1 the gain has no upper limit.
    friction = np.asarray(measured.friction)
    if np.all(friction > 0):
        ceiling = 1 / (friction**2 * np.asarray(measured.effective_learning_rate))
        right.plot(_steps(gain), ceiling, color=other, linestyle=":", label="gain 1 / (1 - mu)")
        # The legend is above the axes, because lines may be anywhere inside.
        right.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    # Where the gradient passes through 0, the gain is many times larger than elsewhere.
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    right.set_ylabel("gain, in steps without momentum", color=other)
    return axes


def _steps(values):
    return np.arange(1, len(values) + 1)
