"""Writes the report of a study: one document as Markdown and HTML, with pictures and numbers."""

import base64
import dataclasses
import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
import xarray as xr
from markdown_it import MarkdownIt
from tqdm import tqdm

from momentum_jax.study import _tables, comparisons, statistics
from momentum_jax.study._drawing import three_digits
from momentum_jax.study._tables import FAILURES, LOSSES, RATIOS, Markdown, main_contrast, rows_of
from momentum_jax.study.components import variance_components
from momentum_jax.study.contrasts import HEADINGS, as_json, contrasts, primary
from momentum_jax.study.figures import INK, PAPER, Picture, pictures


class _Analysis(NamedTuple):
    """Everything that is computed from a dataset."""

    table: pd.DataFrame
    described: pd.DataFrame
    components: pd.DataFrame | None
    verdict: comparisons.Verdict
    disagreements: list[str]


def report(dataset: xr.Dataset, folder: str | Path) -> list[Path]:
    """Writes the report of a study: `report.html`, `report.md`, pictures and numbers.

    Args:
      dataset: what `run` returned.
      folder: where to write; it is created if it does not exist.

    Returns:
      The paths of the files: `report.html` (one file that contains its pictures, for light and
      dark themes), `report.md`, `results.nc` (the dataset), `comparisons.csv` (the table of
      `compare`), `summary.json` (all numbers of the report) and the pictures.

    Raises:
      OSError: the folder cannot be written to.

    Example:
      >>> import tempfile
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> arms = [Arm(f"mu {mu}", mj.momentum, learning_rate=0.02, mu=mu) for mu in (0, 0.9)]
      >>> results = run(problems.quadratic(), arms, range(6), steps=10)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     print([path.name for path in report(results, folder)][:3])
      ['report.html', 'report.md', 'results.nc']
    """
    return write(dataset, folder)[0]


def write(
    dataset: xr.Dataset, folder: str | Path, *, progress: bool = False
) -> tuple[list[Path], pd.DataFrame]:
    """Writes the files of `report`, and returns the table of comparisons too.

    Args:
      dataset: what `run` returned.
      folder: where to write; it is created if it does not exist.
      progress: whether to show progress bars.

    Returns:
      The paths of the files, and the table of `compare`.

    Example:
      >>> import tempfile
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> arms = [Arm(f"mu {mu}", mj.momentum, learning_rate=0.02, mu=mu) for mu in (0, 0.9)]
      >>> results = run(problems.quadratic(), arms, range(6), steps=10)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     paths, table = write(results, folder)
      >>> table.question.head(2).tolist()
      ['std', '10-90% range']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = comparisons.compare(dataset, progress="comparisons" if progress else None)
    found = _Analysis(
        table,
        comparisons.describe(dataset),
        variance_components(dataset) if dataset.attrs["design"] == "crossed" else None,
        comparisons.verdict(dataset, table),
        comparisons.disagreements(table, dataset) if len(table) else [],
    )
    drawn = pictures(dataset, table, found.described, found.components)
    bar = tqdm(drawn, desc="pictures", unit="picture", disable=not progress)
    rendered = {picture.name: picture.render() for picture in bar}
    document = _render("report.md.j2", _context(dataset, found, drawn), _tables.escape)
    question = _render("question.j2", _names(dataset), _plain).strip()
    page = _page(document, question, {p.name: (rendered[p.name][1], p.size[0]) for p in drawn})
    numbers = _as_json(_numbers(dataset, found, question))
    texts = {"report.html": page, "report.md": document, "summary.json": numbers}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    dataset.to_netcdf(folder / "results.nc", engine="scipy")
    table.to_csv(folder / "comparisons.csv", index=False, float_format="%.6g")
    for name, (png, _) in rendered.items():
        (folder / f"{name}.png").write_bytes(png)
    names = ["report.html", "report.md", "results.nc", "comparisons.csv", "summary.json"]
    return [folder / name for name in [*names, *(f"{name}.png" for name in rendered)]], table


def terminal_text(dataset: xr.Dataset, table: pd.DataFrame) -> str:
    """Formats the result for the terminal: question, verdict, disagreements, table, warnings.

    Args:
      dataset: what `run` returned.
      table: what `compare` returned.

    Returns:
      Plain text.

    Example:
      >>> import momentum_jax as mj
      >>> from momentum_jax.study import Arm, problems, run
      >>> from momentum_jax.study.comparisons import compare
      >>> arms = [Arm(f"mu {mu}", mj.momentum, learning_rate=0.02, mu=mu) for mu in (0, 0.9)]
      >>> results = run(problems.quadratic(), arms, range(6), steps=10)
      >>> print(terminal_text(results, compare(results)).splitlines()[0])
      Does momentum make the result of training depend less on the random initial weights?
    """
    main = main_contrast(dataset)
    rows = table.iloc[:0] if main is None else rows_of(table, main)
    context = _names(dataset) | _warnings(dataset)
    context |= {
        "verdict": comparisons.verdict(dataset, table),
        "disagreements": comparisons.disagreements(table, dataset) if len(table) else [],
        "table": _tables.lines(_tables.comparison_table(rows, RATIOS | FAILURES), _plain),
    }
    return _render("terminal.txt.j2", context, _plain).strip()


def _plain(text: Any) -> str:
    """Converts a value to plain text, on one line unless it is a table."""
    if isinstance(text, Markdown):
        return Markdown(text.replace("**", ""))
    return re.sub(r"\s+", " ", str(text))


def _render(name: str, context: Mapping[str, Any], shown: Callable[[Any], str]) -> str:
    """Renders a template; `shown` converts each value."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("momentum_jax.study"),
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        autoescape=name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["three_digits"] = three_digits
    # Blocks without output leave blank lines behind.
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(name).render(context)).lstrip()


def _names(dataset):
    """The names in the question of the report, and the comparison that decides."""
    main, decides = main_contrast(dataset), primary(dataset)
    mu = dataset.coords.get("mu")
    with_momentum = mu is not None and bool((mu > 0).any())
    return {
        "with_momentum": with_momentum,
        "rate_name": "effective learning rate" if with_momentum else "learning rate",
        "design": dataset.attrs["design"],
        "unit": statistics.unit_name(dataset),
        "arm": decides.arm if decides else main.arms[0] if main else None,
        "baseline": decides.baseline if decides else main.baseline if main else None,
        "main": main,
        "primary": decides,
    }


def _warnings(dataset):
    """What the warnings at the top of the report need."""
    diverged = statistics.final(dataset).diverged
    return {
        "units": dataset.sizes["order_seed" if dataset.attrs["design"] == "order" else "seed"],
        "fewest": statistics.FEWEST,
        "diverged": int(diverged.sum()),
        "runs": diverged.size,
        "capped": math.isfinite(dataset.attrs["loss_cap"]),
        "found_rates": _tables.tuned_rates(dataset),
        "notes": json.loads(dataset.attrs.get("notes", "[]")),
    }


def _context(dataset, found: _Analysis, drawn: Sequence[Picture]) -> dict[str, Any]:
    """The values for report.md.j2."""
    names, warnings, table = _names(dataset), _warnings(dataset), found.table
    known, main = contrasts(dataset), names["main"]
    metrics = json.loads(dataset.attrs.get("metrics", "[]"))
    losses = LOSSES | {
        question: title
        for name in (metric["name"] for metric in metrics)
        for question, title in (
            (name, f"difference of {name}"),
            (f"{name} std", f"ratio of standard deviations of {name}"),
        )
    }

    def compared(contrast, questions, with_p=None):
        rows = table.iloc[:0] if contrast is None else rows_of(table, contrast)
        return _tables.lines(_tables.comparison_table(rows, questions, with_p))

    parts = found.components
    if parts is not None and main is not None:
        parts = parts.loc[parts.arm.isin([main.baseline, *main.arms])]
    provenance = json.loads(dataset.attrs["provenance"])
    return (
        names
        | warnings
        | found._asdict()
        | {
            "problem": dataset.attrs["problem"],
            "pictures": {each.name: _image(each) for each in drawn},
            "ratios": compared(main, RATIOS, "std"),
            "losses": compared(main, losses),
            "failures": compared(main, FAILURES, "failures"),
            "rates": {
                kind: _tables.lines(_tables.rate_table(table, [c for c in known if c.kind == kind]))
                for kind in ("same effective rate", "same rate")
            },
            "others": [
                (HEADINGS[each.kind], each.baseline, compared(each, RATIOS | FAILURES | losses))
                for each in known
                if each.kind in ("control", "arms") and each != main
            ],
            "proportions": _tables.lines(_tables.proportion_table(parts)),
            "decomposition": _tables.decomposition(table),
            "tuned": _tables.lines(_tables.tuned_table(table)),
            "all_arms": _tables.lines(
                _tables.all_arms_table(found.described, [metric["name"] for metric in metrics])
            ),
            "rates_table": _tables.lines(
                _tables.found_rates_table(warnings["found_rates"], names["rate_name"])
            ),
            "loss_cap": float(dataset.attrs["loss_cap"]),
            "solved": json.loads(dataset.attrs["solved"]),
            "larger": {metric["name"]: metric["larger_is_better"] for metric in metrics},
            "sizes": dict(dataset.sizes),
            "scales": dataset.init_scale.values.tolist(),
            "steps": _steps(dataset),
            "has_data": "batch_size" in dataset.coords,
            "seeds": [int(dataset.seed[0]), int(dataset.seed[-1])],
            "provenance": provenance,
            "command": _code(provenance.get("command")),
            "programs": dataset.attrs["programs"],
        }
    )


def _image(picture: Picture) -> Markdown:
    return Markdown(f"![{_tables.escape(picture.alt)}]({picture.name}.png)")


def _code(command: str | None) -> Markdown:
    """A code block, fenced by more backticks than the command has in a row."""
    if command is None:
        return Markdown()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    return Markdown(f"{fence}bash\n{command}\n{fence}")


def _numbers(dataset, found: _Analysis, question: str) -> dict[str, Any]:
    """All numbers of the report, for summary.json."""
    decides = primary(dataset)
    return {
        "problem": dataset.attrs["problem"],
        "question": question,
        "design": dataset.attrs["design"],
        "primary": None if decides is None else as_json(decides),
        "verdict": dataclasses.asdict(found.verdict),
        "disagreements": found.disagreements,
        "notes": json.loads(dataset.attrs.get("notes", "[]")),
        "contrasts": [as_json(contrast) for contrast in contrasts(dataset)],
        "tuned_rates": _tables.tuned_rates(dataset),
        "comparisons": found.table.to_dict("records"),
        "descriptions": found.described.to_dict("records"),
        "components": None if found.components is None else found.components.to_dict("records"),
        "provenance": json.loads(dataset.attrs["provenance"]),
    }


def _as_json(numbers: Mapping[str, Any]) -> str:
    """Converts to strict JSON, with one table row per line."""

    def text(value):
        return json.dumps(_strict(value), allow_nan=False)

    def lines(value):
        return (
            "[\n" + ",\n".join(map(text, value)) + "\n]" if isinstance(value, list) else text(value)
        )

    parts = [f"{json.dumps(key)}: {lines(value)}" for key, value in numbers.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _strict(value: Any) -> Any:
    """Converts a value for strict JSON: not finite becomes None, floats have six digits."""
    if isinstance(value, Mapping):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _steps(dataset):
    """The number of steps per run: one number, or the smallest and the largest."""
    if "steps_taken" not in dataset.coords:
        return str(int(dataset.step[-1]))
    last = dataset.steps_taken.isel(step=-1).values
    return " to ".join(dict.fromkeys([str(int(last.min())), str(int(last.max()))]))


def _page(document: str, title: str, svgs: Mapping[str, tuple[str, float]]) -> str:
    """Converts the document to one HTML file that contains its pictures.

    `svgs` has the SVG text and the width in inches of each picture, by name.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(renderer, tokens, index, options, env):
        svg, inches = svgs[tokens[index].attrs["src"].removesuffix(".png")]
        encoded = base64.b64encode(svg.encode()).decode()
        alt = html.escape(renderer.renderInlineAsText(tokens[index].children, options, env))
        # On a narrow screen a wide picture scrolls, so that its text stays legible.
        size = f"width: {inches * 88:.0f}px; min-width: {min(inches * 68, 900):.0f}px"
        source = f"data:image/svg+xml;base64,{encoded}"
        return f'<span class="scroll"><img style="{size}" src="{source}" alt="{alt}"></span>'

    markdown.add_render_rule("image", image)
    markdown.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0"><table>')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>")
    body = markdown.render(document)
    context = {"title": title, "body": body, "ink": INK, "paper": PAPER}
    return _render("page.html.j2", context, lambda value: value)
