"""Lists the pictures of a report, and draws each of them."""

import dataclasses
import functools
import io
import statistics as quantiles
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from momentum_jax.diagnostics import Measurement
from momentum_jax.study import plots
from momentum_jax.study._drawing import label, log_ticks
from momentum_jax.study._tables import by_scale, main_contrast, of_main_families, rows_of
from momentum_jax.study.contrasts import contrasts, primary
from momentum_jax.study.statistics import final

INK = ("#1b1f24", "#d7dae0")  # The text colours of light and dark pages.
PAPER = ("#ffffff", "#15181d")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # Text as text, because outlines would make the files much larger.
    "svg.hashsalt": "momentum_jax",
    "text.parse_math": False,  # The name of an arm may contain dollar signs.
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
} | {f"{part}.facecolor": "none" for part in ("axes", "figure", "legend")}
TITLES = {
    "tuned": "Each at its own tuned rate",
    "tuned, rate alone": "Rate alone: {0} at the arm's tuned rate / at its own",
    "tuned, method alone": "Method alone: both at the arm's tuned rate",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a report.

    Attributes:
      name: the name of its file, without the suffix.
      alt: a description of what it shows, for readers who cannot see it.
      draw: a function that draws it on an empty figure.
      size: width and height of the figure, in inches.

    Example:
      >>> Picture("empty", "Nothing.", lambda figure: None, (5.0, 3.0)).name
      'empty'
    """

    name: str
    alt: str
    draw: Callable[[Figure], None]
    size: tuple[float, float]

    def render(self) -> tuple[bytes, str]:
        """Draws the picture as PNG, and as SVG whose black and white follow the page's theme."""
        with rc_context(STYLE):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure)
            # The layout solver differs in the last digits between calls, so positions are rounded.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            for axes in figure.axes:
                left, bottom, width, height = np.round(axes.get_position().bounds, 6)
                axes.set_position((left, bottom, width, height))
            png, svg = io.BytesIO(), io.StringIO()
            figure.savefig(png, format="png", dpi=120, facecolor="white")
            figure.savefig(svg, format="svg", metadata={"Date": None})
        head, root, rest = svg.getvalue().partition("<svg ")
        for color, name in (("#000000", "currentColor"), ("#ffffff", "var(--paper)")):
            rest = rest.replace(color, name)
        attributes, _, rest = rest.partition(">")
        light, dark = (
            f"svg {{ color: {ink}; fill: currentColor; --paper: {paper} }}"
            for ink, paper in zip(INK, PAPER, strict=True)
        )
        theme = f"<style>{light} @media (prefers-color-scheme: dark) {{ {dark} }}</style>"
        return png.getvalue(), f"{head}{root}{attributes}>{theme}{rest}"


def pictures(
    dataset: xr.Dataset,
    table: pd.DataFrame,
    described: pd.DataFrame,
    components: pd.DataFrame | None = None,
) -> list[Picture]:
    """Lists the pictures of a report, in their order.

    Args:
      dataset: what `run` returned.
      table: what `compare` returned.
      described: what `describe` returned.
      components: what `variance_components` returned; None for a design that is not crossed.

    Returns:
      The pictures for which the dataset has data.

    Example:
      >>> empty = xr.Dataset(coords={"init_scale": [], "arm": []})
      >>> pictures(empty, pd.DataFrame(columns=["contrast", "question", "scale"]), pd.DataFrame())
      []
    """
    main = main_contrast(dataset)
    scales = dataset.init_scale.values.tolist()
    arms = dataset.arm.values.tolist()[:12]
    found: list[Picture] = []

    def add(name, alt, draw, *given, size):
        found.append(Picture(name, alt, functools.partial(draw, *given), size))

    if main is not None:
        arms = [main.baseline, *main.arms]
        rows = rows_of(table, main).query("question == 'std'")
        height = 1.0 + 0.25 * (len(rows) + 1.3 * len(main.arms))
        alt = f"Ratios of the standard deviation of the final loss to {main.baseline}."
        add("std-ratios", alt, _forest, dataset, rows, main, size=(5.0, height))
    if any(plots.families(dataset, scale) for scale in scales):
        alt = "Final loss and its standard deviation against the learning rate, by family."
        size = (1.2 + 2.5 * len(scales), 5.6) if len(scales) > 1 else (5.0, 6.0)
        add("rate-curves", alt, _curves, dataset, described, size=size)
    if components is not None:
        shown = of_main_families(dataset, components)
        alt = "Proportions of the variance due to weights, data order and their interaction."
        size = (2.2 + 1.7 * len(scales), 1.3 + 0.2 * shown.arm.nunique())
        add("variance-proportions", alt, _variance, shown, size=size)
    tuned = by_scale(table.loc[table.contrast.isin(TITLES) & table.question.eq("std")])
    if len(tuned):
        alt = (
            "Tuned ratios of standard deviations, with the factors of rate alone and method alone."
        )
        height = 1.3 + 0.9 + 0.25 * (len(tuned) + 3 * 1.3 * tuned.arm.nunique())
        add("tuned-std-ratios", alt, _tuned, tuned, size=(5.0, height))
    if arms and "loss" in dataset:
        alt = "Final loss against the initial scale."
        add("final-loss", alt, _final_loss, dataset, arms, size=(5.0, 3.6 + 0.2 * len(arms)))
        for name in ("loss", "sharpness", "gradient_norm"):
            if name in dataset:
                alt = f"{name.replace('_', ' ').capitalize()} over the steps."
                height = 2.5 * -(-len(scales) // 2) + 0.5 + 0.2 * len(arms)
                stem = f"{name.replace('_', '-')}-over-steps"
                add(stem, alt, _over_steps, dataset, arms, name, size=(5.6, height))
    if main is not None:
        columns = min(2, len(main.arms))
        size = (2.9 * columns, 0.2 + 3.0 * -(-len(main.arms) // columns))
        alt = f"Final losses of pairs of runs: each arm against {main.baseline}."
        add("pairs", alt, _pairs, dataset, main, size=size if columns > 1 else (4.5, 4.0))
    for kind in ("rescued", "lost") if dataset.sizes.get("param") == 2 else ():
        typical = _typical_pair(dataset, kind)
        if typical is not None:
            alt = f"The {{}} of the {kind} run with the median final loss."
            add(f"energy-{kind}", alt.format("energies"), _energy, typical, size=(5.0, 3.8))
            add(f"path-{kind}", alt.format("path"), _path, dataset, typical, size=(5.0, 4.4))
    return found


def _forest(dataset, rows, main, figure):
    axes = figure.subplots()
    decides = primary(dataset)
    plots.forest(rows, axes, margin=None if decides is None else decides.margin)
    text = f"ratio of standard deviations, relative to {label(main.baseline)}"
    axes.set_xlabel(text, fontsize="small")


def _tuned(tuned, figure):
    shown = [kind for kind in TITLES if (tuned.contrast == kind).any()]
    groups = [tuned[tuned.contrast == kind] for kind in shown]
    heights = [len(group) + 1.3 * group.arm.nunique() + 1.5 for group in groups]
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)
    limits = []
    for kind, group, axes in zip(shown, groups, panels[:, 0], strict=True):
        plots.forest(group, axes)
        limits += [axes.get_xlim()]
        title = TITLES[kind].format(label(group.baseline.iloc[0], 16))
        axes.set_title(title, fontsize="small", loc="left")
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    panels[0, 0].set_xlim(low, high)
    log_ticks(panels[0, 0].xaxis, np.array([low, high]))
    panels[-1, 0].set_xlabel("ratio of standard deviations", fontsize="small")


def _curves(dataset, described, figure):
    scales = dataset.init_scale.values
    panels = figure.subplots(2, len(scales), squeeze=False)
    for row, quantity in zip(panels, ("loss", "std"), strict=True):
        for axes, scale in zip(row, scales, strict=True):
            plots.rate_curve(dataset, float(scale), axes, quantity, described=described)
            axes.set(title="", xlabel="" if quantity == "loss" else axes.get_xlabel())
            axes.label_outer(remove_inner_ticks=False)
        _same_limits(row)
    for axes, scale in zip(panels[0], scales, strict=True):
        axes.set_title(f"initial scale x{scale:g}", fontsize="medium")
    lines = dict(zip(*panels[0, 0].get_legend_handles_labels()[::-1], strict=True))
    if any(line.get_linestyle() == ":" for axes in panels[1] for line in axes.lines):
        lines["edge of stability"] = Line2D([], [], color="0.4", ls=":", lw=1.2)
    hollow = Line2D([], [], color="0.4", marker="o", mfc="#ffffff", ls="")
    lines["at least half diverged or ended above the cap"] = hollow
    _legend(figure, lines)


def _same_limits(row):
    ends = np.array([axes.get_ylim() for axes in row if axes.get_yscale() == "log"])
    for axes in row if len(ends) else ():
        axes.set(yscale="log", ylim=(ends[:, 0].min(), ends[:, 1].max()))
        log_ticks(axes.yaxis, ends.ravel())


def _legend(figure, lines, columns=2):
    columns = columns if max(map(len, lines)) < 25 or figure.get_figwidth() > 6 else 1
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": "small"}
    figure.legend(lines.values(), lines.keys(), **place)


def _variance(components, figure):
    scales = components.scale.unique()
    panels = figure.subplots(1, len(scales), squeeze=False, sharey=True)[0]
    for axes, scale in zip(panels, scales, strict=True):
        plots.variance_bars(components[components.scale == scale], axes)
        axes.set_title(f"scale x{scale:g}", fontsize="medium")
        axes.set_xlabel("proportion of variance", fontsize="small")
    _legend(figure, dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True)), 3)


def _final_loss(dataset, arms, figure):
    axes = plots.final_loss(dataset, arms, figure.subplots())
    _legend(figure, dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True)))


def _over_steps(dataset, arms, variable, figure):
    scales = dataset.init_scale.values
    columns = min(2, len(scales))
    panels = _panels(figure, len(scales), columns)
    for scale, axes in zip(scales, panels, strict=True):
        plots.loss_curves(dataset, arms, float(scale), axes, variable).set(ylabel="")
    for axes in panels[:-columns]:
        axes.set_xlabel("")
    figure.supylabel(variable.replace("_", " "), fontsize="medium")
    _legend(figure, dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True)))


def _panels(figure, count, columns) -> list[Axes]:
    """Makes a grid with `count` Axes; the rest of the grid stays empty."""
    panels = figure.subplots(-(-count // columns), columns, squeeze=False).ravel().tolist()
    for axes in panels[count:]:
        axes.set_axis_off()
    return panels[:count]


def _pairs(dataset, contrast, figure):
    panels = _panels(figure, len(contrast.arms), min(2, len(contrast.arms)))
    for arm, axes in zip(contrast.arms, panels, strict=True):
        plots.paired(dataset, contrast.baseline, arm, axes)
        axes.set(xlabel="", ylabel=label(arm))
    figure.supxlabel(f"final loss, {label(contrast.baseline)}", fontsize="medium")
    figure.supylabel("final loss", fontsize="medium")


def _typical_pair(dataset, kind):
    """The rescued (or lost) pair with the median final loss: baseline name, its run, arm's run."""
    ends = final(dataset)
    main = main_contrast(dataset)
    for contrast in [main, *contrasts(dataset)] if main else []:
        found = []
        for arm in contrast.arms if contrast.kind != "tuned" else ():
            before, after = ends.solved.sel(arm=contrast.baseline), ends.solved.sel(arm=arm)
            happened = (~before & after) if kind == "rescued" else (before & ~after)
            both = dataset.sel(arm=[arm, contrast.baseline])
            happened &= np.isfinite(both.kinetic_energy + both.loss).all(["step", "arm"])
            for place in map(tuple, np.argwhere(happened.values)):
                at = dict(zip(happened.dims, place, strict=True))
                found.append((float(ends.loss.sel(arm=arm)[at]), arm, place, at))
        if found:
            _, arm, _, at = quantiles.median_low(sorted(found, key=lambda each: each[:3]))
            runs = dataset.isel(at)
            return contrast.baseline, runs.sel(arm=contrast.baseline), runs.sel(arm=arm)
    return None


def _energy(typical, figure):
    baseline, other, run = typical
    kinetic, potential = run.kinetic_energy.values, run.loss.values
    nothing = np.full_like(kinetic, np.nan)
    measured = Measurement(kinetic, potential, kinetic + potential, *[nothing] * 5)
    axes = plots.energies(measured, figure.subplots(), _steps(run))
    axes.plot(_steps(other), other.loss, color="0.6", ls=":", label=f"loss of {label(baseline)}")
    axes.set_title(_where(run), fontsize="small")
    axes.legend(fontsize="small")


def _steps(run):
    return run.steps_taken.values if "steps_taken" in run.coords else run.step.values


def _where(run):
    seeds = "".join(
        f", {name.replace('_', ' ')} {int(run[name])}"
        for name in ("seed", "order_seed")
        if name in run.coords
    )
    return f"{label(str(run.arm.values))}, initial scale x{float(run.init_scale):g}{seeds}"


def _path(dataset, typical, figure):
    baseline, other, run = typical
    paths = {baseline: other.params.values, str(run.arm.values): run.params.values}
    x, y = (jnp.asarray(dataset[name].values) for name in dataset.landscape.dims)
    heights = jnp.asarray(dataset.landscape.values)

    def loss(w):
        """Interpolates between the points of the grid; constant outside the grid."""
        grid = jax.scipy.interpolate.RegularGridInterpolator((x, y), heights)
        low, high = jnp.stack([x[0], y[0]]), jnp.stack([x[-1], y[-1]])
        return grid(jnp.clip(w, low, high)[None])[0]

    axes = plots.path(loss, paths, figure.subplots())
    axes.set_title(_where(run), fontsize="small")
    axes.legend(fontsize="small")
