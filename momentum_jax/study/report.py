"""What a person reads: one document, as Markdown and as a page, with its pictures and numbers."""

import base64
import dataclasses
import functools
import html
import io
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from markdown_it import MarkdownIt
from matplotlib import rc_context
from matplotlib.figure import Figure
from tqdm import tqdm

from momentum_jax.diagnostics import Measurement
from momentum_jax.study import plots
from momentum_jax.study.statistics import FEWEST, Comparison, Summary, final, summarize

QUESTION = "Does momentum take the luck out of the initial weights?"
SIGNIFICANT = 0.05
# Less is no difference that anyone would see, however certain it is.
NOTABLE = 1.05
# From the least fair to the fairest. What is asked of the last that a study has is its answer.
KINDS = {
    "same rate": "At the same learning rate",
    "same effective rate": "At the same effective learning rate, learning_rate / (1 - mu)",
    "tuned": "With the learning rate of each arm tuned on an equal budget",
}


class Contrast(NamedTuple):
    """Arms that are compared with a plain one.

    Attributes:
      name: its name; what is before a comma says which kind it is.
      plain: the arm that the others are compared with.
      arms: the others.
      with_momentum: those of them whose mu is above 0, or all if there are none.
    """

    name: str
    plain: str
    arms: list[str]
    with_momentum: list[str]


def report(dataset: xr.Dataset, folder: str | Path) -> list[Path]:
    """Writes the report of a study: `report.html`, `report.md`, pictures and numbers.

    Args:
      dataset: what `run` returned.
      folder: where to write; made if it is not there.

    Returns:
      The paths of what was written: `report.html` (one file that holds its pictures, light and
      dark), `report.md`, `results.nc` (the dataset), `summary.json` and the pictures.

    Raises:
      OSError: a folder that cannot be written to.

    Example:
      >>> import tempfile
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> arms = [Arm(f"mu {mu}", mj.momentum, learning_rate=0.02, mu=mu) for mu in (0, 0.9)]
      >>> results = run(problems.digits(), arms, range(3), steps=20)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     print([path.name for path in report(results, Path(folder))][:4])
      ['report.html', 'report.md', 'results.nc', 'summary.json']
    """
    return write(dataset, summarize(dataset), Path(folder))


def write(
    dataset: xr.Dataset, summary: Summary, folder: Path, progress: str | None = None
) -> list[Path]:
    """Writes what `report` does, with a summary that is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(dataset)
    document = _document(dataset, summary, pictures)
    pngs, svgs = {}, {}
    bar = tqdm(pictures.items(), desc=progress, unit="picture", disable=progress is None)
    with rc_context(STYLE):
        for name, picture in bar:
            figure = _figure(picture)
            pngs[name], svgs[name] = _png(figure), _svg(figure)
    paths = {name: folder / name for name in ("report.html", "report.md", "results.nc")}
    paths["report.md"].write_text(document)
    paths["report.html"].write_text(_page(document, svgs))
    dataset.to_netcdf(paths["results.nc"], engine="scipy")
    numbers = {
        "problem": dataset.attrs["problem"],
        "answer": answer(dataset, summary),
        "contrasts": [contrast._asdict() for contrast in _contrasts(dataset)],
        "tuning": json.loads(dataset.attrs.get("tuning", "[]")),
        **dataclasses.asdict(summary),
        "provenance": json.loads(dataset.attrs["provenance"]),
    }
    paths["summary.json"] = folder / "summary.json"
    paths["summary.json"].write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    for name, png in pngs.items():
        paths[name] = folder / f"{name}.png"
        paths[name].write_bytes(png)
    return list(paths.values())


def answer(dataset: xr.Dataset, summary: Summary) -> str:
    """The answer, as Markdown: a verdict, and a line of numbers for each contrast.

    The verdict is that of all contrasts of the fairest kind. A spread is called clearly narrower
    or wider where it is so by 5% or more, and its p, adjusted by Holm's method, is below 0.05.
    """
    contrasts = _contrasts(dataset)
    if not contrasts:
        return "**There is one arm, and nothing to compare it with.**"
    fairest = contrasts[-1].name.split(", ")[0]
    better = worse = 0
    spoken: list[str] = []
    lines = []
    for contrast in reversed(contrasts):
        rows, pooled = (
            [
                row
                for row in rows
                if row.contrast == contrast.name and row.arm in contrast.with_momentum
            ]
            for rows in (summary.comparisons, summary.pooled_comparisons)
        )
        narrower, wider = _clear(rows)
        whole = "; ".join(
            f"{row.arm}: **{row.spread.ratio}**, lower loss in "
            f"{row.improvement.probability.value:.0%} of pairs"
            for row in pooled
        )
        lines.append(
            f"- {_kind(contrast.name)}: {whole}. At one initial scale clearly narrower in "
            f"{narrower} and clearly wider in {wider} of {len(rows)} comparisons."
        )
        if contrast.name.split(", ")[0] == fairest:
            pooled_narrower, pooled_wider = _clear(pooled)
            better += narrower + pooled_narrower
            worse += wider + pooled_wider
            spoken += [
                f"{_kind(contrast.name)}, the final loss spreads {row.spread.ratio} times as much "
                f"over the initial weights with {row.arm} as with {row.plain}."
                for row in pooled[:1]
                if row.spread.ratio.value is not None
            ]
    verdict = {
        (False, False): "It cannot be told from these runs.",
        (True, False): "It did: where the spread clearly differs, momentum narrowed it.",
        (False, True): "No: where the spread clearly differs, momentum widened it.",
        (True, True): "It depends: momentum narrowed the spread in some comparisons "
        "and widened it in others.",
    }[better > 0, worse > 0]
    meaning = (
        "The spread of the final loss over all initial weights, as a multiple of the plain "
        "arm's with its 95% interval; below 1, it is narrower:"
    )
    # Of several contrasts of a kind none can speak for the others.
    number = spoken[0] if len(spoken) == 1 else f"({_kind(fairest)}.)"
    return "\n".join([f"**{verdict}** {number}", "", meaning, "", *lines])


def _clear(rows):
    """In how many the spread was clearly narrower, and clearly wider."""
    ratios = [
        row.spread.ratio.value
        for row in rows
        if row.spread.p_holm is not None and row.spread.p_holm < SIGNIFICANT
    ]
    return sum(ratio <= 1 / NOTABLE for ratio in ratios), sum(ratio >= NOTABLE for ratio in ratios)


def text(dataset: xr.Dataset, summary: Summary) -> str:
    """What the terminal shows: the answer, and what each contrast says of all runs together."""
    parts: list[str] = [answer(dataset, summary).replace("**", "")]
    for contrast in _contrasts(dataset):
        parts += [f"{_kind(contrast.name)}:", _table(_rows(summary.pooled_comparisons, contrast))]
    return "\n\n".join([*parts, *_warnings(dataset)])


def _kind(name: str) -> str:
    kind, *rest = name.split(", ")
    return ", ".join([KINDS.get(kind, kind[:1].upper() + kind[1:]), *rest])


def _contrasts(dataset):
    """Those of the study, the fairest last."""
    mu = dataset.coords.get("mu")

    def moves(arm):
        return mu is not None and bool((mu.sel(arm=arm) > 0).any())

    found = [
        Contrast(
            each["name"],
            each["plain"],
            each["arms"],
            [arm for arm in each["arms"] if moves(arm)] or each["arms"],
        )
        for each in json.loads(dataset.attrs["contrasts"])
    ]
    order = list(KINDS)

    def fairness(contrast):
        kind = contrast.name.split(", ")[0]
        return order.index(kind) if kind in order else -1

    return sorted(found, key=fairness)


# The document.


def _document(dataset, summary, pictures):
    def shown(prefix):
        # Side by side on a page that is wide enough.
        return "\n".join(
            f"![{picture.says}]({name}.png)"
            for name, picture in pictures.items()
            if name.startswith(prefix)
        )

    contrasts = _contrasts(dataset)
    metric = dataset.attrs["metric_name"]
    parts = [
        f"# {QUESTION}",
        f"Problem: {dataset.attrs['problem']}. {_runs(dataset)}",
        "## The answer",
        answer(dataset, summary),
        _limits(dataset),
        *(f"**{warning}**" for warning in _warnings(dataset)),
        "## Final loss against initial scale",
        "Median over the initial weights, and the middle 80% of them as bars.",
        shown("final-loss"),
        *(_pairs_section(dataset, summary, shown("paired")) if contrasts else []),
        "## Loss over the steps",
        "Median over the initial weights, with a band for the middle 80%.",
        shown("curves"),
        *_energy_section(dataset, shown("energy"), shown("path")),
        "## All arms",
        "Over the initial weights, with 95% intervals. A narrow spread is good news only beside "
        "a low mean: runs that have not left their start are alike too.",
        "### Final loss",
        _cells_table(summary, "loss"),
        *([f"### Final {metric}", _cells_table(summary, "metric")] if "metric" in dataset else []),
        *_tuning_section(dataset),
        "## How it was done",
        _protocol(dataset),
        "## To reproduce",
        _provenance(dataset),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _runs(dataset):
    sizes = dataset.sizes
    scales = ", ".join(f"x{scale:g}" for scale in dataset.init_scale.values)
    each = "each " if sizes["arm"] > 1 else ""
    return (
        f"{_number(sizes['arm'], 'arm')}, {each}from "
        f"{_number(sizes['seed'], 'initial weight')} at "
        f"{_number(sizes['init_scale'], 'initial scale')} ({scales}): "
        f"{_number(sizes['arm'] * sizes['seed'] * sizes['init_scale'], 'run')} of "
        f"{int(dataset.step[-1])} steps."
    )


def _number(count, what):
    return f"{count} {what}{'' if count == 1 else 's'}"


def _limits(dataset):
    return (
        f"This holds for {dataset.attrs['problem']} with the settings below, and says nothing of "
        "other models and data. The spread is the standard deviation of the final loss over "
        f"the initial weights{_charge(dataset)} A difference is called clear where it is 5% or "
        "more, and p, adjusted for all comparisons, is below 0.05."
    )


def _charge(dataset):
    worst = dataset.attrs["worst"]
    most = f"{worst:.3g}" if np.isfinite(worst) else "the run's own loss at the start"
    return f"; a final loss above {most}, or not finite, counts as that."


def _solved(dataset):
    loss, metric = dataset.attrs["solved_loss"], dataset.attrs["solved_metric"]
    rules = [
        f"a final loss of at most {loss:.3g}" if np.isfinite(loss) else "",
        f"a final {dataset.attrs['metric_name']} of at least {metric:g}"
        if np.isfinite(metric)
        else "",
    ]
    rule = " and ".join(rule for rule in rules if rule) or "a final loss that is finite"
    return f"A run has solved the problem with {rule}; else it has failed."


def _warnings(dataset: xr.Dataset) -> list[str]:
    diverged = int(final(dataset).diverged.sum())
    seeds = dataset.sizes["seed"]
    few = f"{seeds} initial weights are too few to tell any difference: take {FEWEST} or more."
    many = f"{diverged} of {final(dataset).diverged.size} runs diverged: they count as failed."
    return [
        *([few] if seeds < FEWEST else []),
        *([many] if diverged else []),
        *(
            f"The best learning rate of {row['arm']} at initial scale x{row['init_scale']:g} is "
            f"the {row['edge']} of those that were tried: a better one may lie beyond it."
            for row in json.loads(dataset.attrs.get("tuning", "[]"))
            if row["edge"]
        ),
    ]


def _comparisons_table(summary: Summary, contrast: Contrast) -> str:
    rows = _rows([*summary.comparisons, *summary.pooled_comparisons], contrast)
    return _table(sorted(rows, key=lambda row: contrast.arms.index(row["arm"])))


def _rows(comparisons: Sequence[Comparison], contrast: Contrast) -> list[dict[str, str]]:
    def p(of):
        return "" if of.p_holm is None else f"{of.p_holm:.2g}"

    return [
        {
            "arm": row.arm,
            "init": "all" if row.init_scale is None else f"x{row.init_scale:g}",
            "spread": str(row.spread.ratio),
            "p(spread)": p(row.spread),
            "P(lower)": str(row.improvement.probability),
            "p(lower)": p(row.improvement),
            "rescued": str(row.escape.rescued),
            "lost": str(row.escape.lost),
            "p(rescued)": p(row.escape),
        }
        for row in comparisons
        if row.contrast == contrast.name
    ]


def _cells_table(summary, name):
    rows = [
        {
            "arm": cell.arm,
            "init": f"x{cell.init_scale:g}",
            "mean": str(getattr(cell, name).mean),
            "interquartile mean": str(getattr(cell, name).interquartile_mean),
            "spread": str(getattr(cell, name).spread),
            "failed": str(cell.failed),
            "diverged": str(cell.diverged),
        }
        for cell in summary.cells
    ]
    return _table(rows)


def _pairs_section(dataset, summary, pictures):
    return [
        "## Pairs of runs",
        "Each point is a pair of runs from the same initial weights on the same batches; below "
        "the diagonal the arm ended lower than the plain one. "
        f"{_solved(dataset)} A pair is *rescued* where the plain run failed and the other did "
        "not, and *lost* in the reverse.",
        pictures,
        *(
            part
            for contrast in _contrasts(dataset)
            for part in (f"### {_kind(contrast.name)}", _comparisons_table(summary, contrast))
        ),
        "The spread is that of the final loss, as a multiple of the plain arm's, with its 95% "
        "interval; P(lower) is the share of pairs in which the arm ends lower. Each p is adjusted "
        "by Holm's method for all comparisons that ask the same question.",
    ]


def _tuning_section(dataset):
    rows = json.loads(dataset.attrs.get("tuning", "[]"))
    if not rows:
        return []
    table = [
        {
            "arm": row["arm"],
            "init": f"x{row['init_scale']:g}",
            "best learning rate": f"{row['learning_rate']:.3g}",
            "at the edge of the grid": row["edge"] or "no",
        }
        for row in rows
    ]
    return ["### Learning rates found", _table(table)]


def _energy_section(dataset, energies, paths):
    if "kinetic_energy" not in dataset or not energies:
        return []
    return [
        "## Energy of a typical run",
        "The kinetic energy is |w' - w|^2 / (2 learning_rate) of the last step, the potential "
        "energy the loss. Typical is the run in the middle of those that were rescued, and "
        "of those that were lost, in the order of their final loss, under the fairest contrast "
        "that has any.",
        energies,
        *(["The same runs on the map of the loss.", paths] if paths else []),
    ]


def _protocol(dataset):
    sizes = dataset.sizes
    lines = [
        "Runs that differ in the arm alone start from the same weights and see the same batches "
        "in the same order; what is compared is pairs of them.",
        f"Initial weights are drawn anew for each of {sizes['seed']} seeds, and multiplied by the "
        "initial scale.",
        "The same learning rate shows what happens on switching momentum on; the same effective "
        "learning rate, learning_rate / (1 - mu), what is left when its longer strides are taken "
        "away; tuned arms are each at their best on an equal budget, with seeds that the study "
        "itself does not use.",
        "A run that diverged has failed; no run is left out.",
        "Intervals are at 95%: Wilson's for shares, BCa bootstrap for means and spreads, of a "
        "permutation test within pairs for ratios of spreads; p of rescued against lost is the "
        "exact McNemar test's. Holm's adjustment is over all comparisons that ask the same "
        "question.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _provenance(dataset):
    provenance = json.loads(dataset.attrs["provenance"])
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    command = provenance.get("command")
    return "\n\n".join(
        [
            *([f"```bash\n{command}\n```"] if command else []),
            f"On {provenance['device']}, {provenance['date']}, in {provenance['seconds']:.0f} s, "
            f"{dataset.attrs['programs']} compiled training programs; seeds "
            f"{provenance['seeds']}. {versions}.",
        ]
    )


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """As Markdown, in columns that line up in a terminal too."""
    if not rows:
        return ""
    lines = [{key: key for key in rows[0]}, *rows]
    widths = {key: max(3, *(len(line[key]) for line in lines)) for key in rows[0]}
    drawn = [
        "| " + " | ".join(line[key].ljust(widths[key]) for key in line) + " |" for line in lines
    ]
    return "\n".join(
        [drawn[0], "|" + "|".join("-" * (w + 2) for w in widths.values()) + "|", *drawn[1:]]
    )


# The pictures.


class _Picture(NamedTuple):
    """What it shows, in words; and the function that draws it on a figure of this size."""

    says: str
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (6.4, 4.4)


def _pictures(dataset: xr.Dataset) -> dict[str, _Picture]:
    pictures = {}
    for contrast in _contrasts(dataset):
        slug = re.sub(r"[^a-z0-9.]+", "-", contrast.name.lower())
        title = _kind(contrast.name)
        names = [contrast.plain, *contrast.arms]
        pictures[f"final-loss-{slug}"] = _Picture(
            f"Final loss against initial scale. {title}.",
            functools.partial(_draw_final_loss, dataset, names, title),
            (6.4, 5.0),
        )
        rows = -(-len(contrast.arms) // 2)
        pictures[f"paired-{slug}"] = _Picture(
            f"Final loss of pairs of runs. {title}.",
            functools.partial(_draw_pairs, dataset, contrast, title),
            (6.4, 0.5 + 3.0 * rows),
        )
        rows = -(-(dataset.sizes["init_scale"] + 1) // 2)
        pictures[f"curves-{slug}"] = _Picture(
            f"Loss over the steps. {title}.",
            functools.partial(_draw_curves, dataset, names, title),
            (6.4, 0.5 + 2.6 * rows),
        )
    for kind in ("rescued", "lost"):
        typical = _typical_pair(dataset, kind)
        if typical is None:
            continue
        _, arm, scale, seed = typical
        says = f"A typical {kind} run: {arm}, initial scale x{scale:g}, seed {seed}"
        pictures[f"energy-{kind}"] = _Picture(
            f"{says}: its energies over the steps.",
            functools.partial(_draw_energy, dataset, *typical, says),
        )
        if dataset.sizes.get("param") == 2:
            pictures[f"path-{kind}"] = _Picture(
                f"{says}: its path.", functools.partial(_draw_path, dataset, *typical, says)
            )
    return pictures


def _draw_final_loss(dataset, names, title, figure):
    axes = plots.final_loss(dataset, names, figure.subplots())
    figure.suptitle(title, fontsize="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _draw_pairs(dataset, contrast, title, figure):
    panels = figure.subplots(-(-len(contrast.arms) // 2), 2, squeeze=False).ravel()
    for arm, axes in zip(contrast.arms, panels, strict=False):
        plots.paired(dataset, contrast.plain, arm, axes)
        axes.set(xlabel="plain: " + contrast.plain, ylabel=arm)
    for axes in panels[len(contrast.arms) :]:
        axes.set_axis_off()
    figure.suptitle(f"Final loss. {title}", fontsize="medium")


def _draw_curves(dataset, names, title, figure):
    scales = dataset.init_scale.values
    panels = figure.subplots(-(-(len(scales) + 1) // 2), 2, squeeze=False, sharex=True).ravel()
    for scale, axes in zip(scales, panels, strict=False):
        plots.loss_curves(dataset, names, scale, axes).set(xlabel="", ylabel="")
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("loss", fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    for axes in panels[len(scales) :]:
        axes.set_axis_off()
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", fontsize="small")


def _draw_energy(dataset, plain, arm, scale, seed, title, figure):
    run, other = (dataset.sel(arm=name, init_scale=scale, seed=seed) for name in (arm, plain))
    kinetic, potential = run.kinetic_energy.values, run.loss.values
    nothing = np.full_like(kinetic, np.nan)
    measured = Measurement(kinetic, potential, kinetic + potential, *[nothing] * 5)
    axes = plots.energies(measured, figure.subplots(), run.step.values)
    axes.plot(other.step, other.loss, color="0.6", linestyle="--", label=f"loss of {plain}")
    axes.set_title(title, fontsize="medium")
    axes.legend()


def _draw_path(dataset, plain, arm, scale, seed, title, figure):
    paths = {
        name: dataset.params.sel(arm=name, init_scale=scale, seed=seed).values
        for name in (plain, arm)
    }
    x, y = (jnp.asarray(dataset[name].values) for name in dataset.landscape.dims)
    heights = jnp.asarray(dataset.landscape.values)

    def loss(w):
        """Between the points of the grid, and level beyond them."""
        grid = jax.scipy.interpolate.RegularGridInterpolator((x, y), heights)
        low, high = jnp.stack([x[0], y[0]]), jnp.stack([x[-1], y[-1]])
        return grid(jnp.clip(w, low, high)[None])[0]

    axes = plots.path(loss, paths, figure.subplots())
    axes.set_title(title, fontsize="medium")
    axes.legend()


def _typical_pair(dataset, kind):
    """(plain, arm, init_scale, seed) of the middle one of those rescued, or lost, or None."""
    ends = final(dataset)
    for contrast in reversed(_contrasts(dataset)):
        found = []
        for arm in contrast.with_momentum:
            before, after = ends.solved.sel(arm=contrast.plain), ends.solved.sel(arm=arm)
            happened = (~before & after) if kind == "rescued" else (before & ~after)
            run = dataset.sel(arm=arm)
            finite = np.isfinite(run.kinetic_energy + run.loss).all("step")
            for scale, seed in np.argwhere((happened & finite).values):
                loss = float(ends.loss.sel(arm=arm)[scale, seed])
                place = (float(ends.init_scale[scale]), int(ends.seed[seed]))
                found.append((loss, contrast.plain, arm, *place))
        if found:
            return statistics.median_low(sorted(found))[1:]
    return None


STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # Letters, not their outlines, which are larger than the pictures.
    "svg.hashsalt": "momentum_jax",
    "axes.spines.top": False,
    "axes.spines.right": False,
} | {f"{part}.facecolor": "none" for part in ("axes", "figure", "legend")}


def _figure(picture):
    figure = Figure(figsize=picture.size, layout="constrained")
    picture.draw(figure)
    return figure


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white")
    return buffer.getvalue()


def _svg(figure):
    """Its black is the colour of the text around it, which the reader's theme decides."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    head, root, rest = buffer.getvalue().partition("<svg ")
    attributes, _, rest = rest.replace("#000000", "currentColor").partition(">")
    theme = (
        f"<style>svg {{ color: {INK[0]}; fill: currentColor }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ color: {INK[1]} }} }}</style>"
    )
    return f"{head}{root}{attributes}>{theme}{rest}"


# The page.

INK = ("#1b1f24", "#d7dae0")  # By day and by night.
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink: {ink[0]}; --paper: #ffffff; --faint: #667080; --line: #dfe3e8; --wash: #f5f7f9; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: {ink[1]}; --paper: #15181d; --faint: #98a1ae; --line: #323943; --wash: #1c2128; }}
}}
body {{ margin: 0 auto; max-width: 66rem; padding: 1rem 1.2rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; }}
h2 {{ margin-top: 2.5rem; font-size: 1.25rem; }}
h3 {{ margin-top: 1.6rem; font-size: 1.05rem; }}
h2 + p {{ max-width: 46rem; }}
p, li {{ max-width: 46rem; }}
p:has(img) {{ display: grid; gap: 1rem; max-width: none;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }}
img {{ width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.7rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }}
th {{ color: var(--faint); font-weight: 600; }}
pre {{ overflow-x: auto; padding: 0.8rem; background: var(--wash); border-radius: 6px; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _page(document: str, svgs: Mapping[str, str]) -> str:
    """The document as one HTML file, its pictures in it."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(renderer, tokens, index, options, env):
        name = tokens[index].attrs["src"].removesuffix(".png")
        encoded = base64.b64encode(svgs[name].encode()).decode()
        says = html.escape(tokens[index].content)
        return f'<img src="data:image/svg+xml;base64,{encoded}" alt="{says}">'

    markdown.add_render_rule("image", image)
    markdown.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>")
    title = html.escape(document.splitlines()[0].removeprefix("# "))
    return PAGE.format(title=title, ink=INK, body=markdown.render(document))
