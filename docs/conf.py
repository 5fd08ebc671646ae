"""Configures Sphinx: `sphinx-build -W --keep-going docs build/docs`. The build needs no network."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

from benchmarks import clients, compiled, on_device, optax_suite  # noqa: E402
from benchmarks.__main__ import LABELS, duration, processor  # noqa: E402
from momentum_jax import __version__ as release  # noqa: E402, F401

project = "momentum_jax"
author = "The momentum_jax authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
]
exclude_patterns = ["build"]

# Markdown and notebooks. The tests run the notebooks; the pages show the committed outputs.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # Would come from a CDN. Sliders show the picture they were saved with.

# Docstrings: Google's sections and our own. Args gives types in words.
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Returns is prose, not a type and a colon.
napoleon_custom_sections = ["Returns", "Source"]
napoleon_use_ivar = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "py:obj"

# Furo has a layout for phones and a dark mode, and loads nothing from the network.
html_theme = "furo"
html_title = "momentum_jax"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"


def copy_notebooks() -> None:
    """Copies the notebooks into Sphinx's folder, as Sphinx reads no other."""
    folder = DOCS / "notebooks"
    folder.mkdir(exist_ok=True)
    notebooks = {path.name: path for path in (ROOT / "notebooks").glob("*.ipynb")}
    for path in folder.glob("*.ipynb"):
        if path.name not in notebooks:
            path.unlink()
    for name, path in notebooks.items():
        copy = folder / name
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)


def add_generated(app: Sphinx, docname: str, source: list[str]) -> None:
    """Appends the generated sections to a page."""
    if docname == "index" and not (DOCS / "study" / "index.md").exists():
        # Sphinx warns about a glob without a match, and that warning cannot be suppressed.
        block = r"```\{toctree\}\n:caption: Does it help\?.*?```\n"
        source[0] = re.sub(block, "", source[0], flags=re.DOTALL)
    if docname in GENERATED:
        text, paths = GENERATED[docname]()
        source[0] += "\n" + text
        for path in paths:
            app.env.note_dependency(str(path))


def contract_tests() -> tuple[str, list[Path]]:
    """Returns the source of every test of the contract, by promise, and the files it is in."""
    promises: dict[int, list[str]] = {number: [] for number in range(1, 13)}
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    for path in paths:
        text = path.read_text()
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_c"):
                continue
            kept = [int(number) for number in re.findall(r"_c(\d+)(?=_)", node.name)]
            if not kept:
                continue
            first = min([node.lineno, *(line.lineno for line in node.decorator_list)])
            code = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
            promises[kept[0]].append(
                f"({node.name})=\n### {node.name}\n\nIn `tests/{path.name}`.\n\n"
                f"```python\n{code}\n```\n"
            )
    sections = [f"## C{number}\n\n" + "\n".join(found) for number, found in promises.items()]
    return "\n".join(sections), paths


def benchmark_tables() -> tuple[str, list[Path]]:
    """Returns the sections of the benchmarks page: one per machine, then the accelerators."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    results = [(path, json.loads(path.read_text())) for path in paths]
    machines = [machine(path, of) for path, of in results if "sizes" in of]
    return "\n".join([*machines, on_device_tables(), compiled_tables()]), paths


def on_device_tables() -> str:
    """Returns a section per device with the times from `python -m benchmarks.on_device`."""
    return "\n".join(map(on_device_table, on_device.results()))


def on_device_table(results: dict) -> str:
    """Returns the section of one device."""
    lines = [
        f"## Times per step on an {results['device']}",
        "",
        f"Measured by `python -m benchmarks.on_device` on {results['date']} with JAX "
        f"{results['jax']}: medians of {results['rounds']} rounds in which all steps take part. "
        "The ratios are to the first row, with a confidence interval of at least 95%. Steps of the "
        "optimizer alone have 33.6e6 params. Training steps have two matrices of 67.1e6 params "
        "each and 1,024 examples. The bytes are read from the programs compiled for this device.",
        "",
    ]
    lines += table("step", "time", "ratio to optax.sgd", "bytes per parameter", "GB per second")
    for of in (results["alone"], results["training"]):
        for name, row in of.items():
            ratio = interval(row["ratio"] | {"value": row["ratio"]["median"]}, ".3f")
            moved = f"{row['bytes_per_param']:.2f} | {row['bytes_per_second'] / 1e9:.0f}"
            lines.append(f"| {name} | {duration(row['median'])} | {ratio} | {moved} |")
    return "\n".join([*lines, ""])


def machine(path: Path, results: dict) -> str:
    """Returns the section with the results in one file."""
    host = results["machine"]
    lines = [
        f"## {processor(host)}",
        "",
        f"Measured on {results['date']} with {host['cores']} processor cores, Python "
        f"{host['python']}, JAX {host['jax']}, Optax {host['optax']}, PyTorch {results['torch']}; "
        f"medians of {results['rounds']} rounds. Source: `benchmarks/results/{path.name}`.",
    ]
    sizes = results["sizes"]
    for what, label in LABELS.items():
        pairs = [(name, of[what], "optax") for name, of in sizes.items()]
        lines += comparison(f"{label[0].upper()}{label[1:]}", "Optax", pairs)
    kinds = {kind: None for of in sizes.values() for kind in of.get("torch", {})}
    for kind in kinds:
        pairs = [(name, of["torch"][kind], kind) for name, of in sizes.items() if "torch" in of]
        lines += comparison(f"Jitted step, compared with PyTorch's SGD ({kind})", "PyTorch", pairs)
    measured, stages = results["diagnostics"], dict(results["compile_times"])
    lines += comparison(
        "`measure`, compared with a jitted step", "step", [(measured["size"], measured, "step")]
    )
    size = stages.pop("size")
    lines += [f"### Tracing and compiling a jitted step of {size} values", ""]
    lines += times("stage", "Optax", [(stage, of, "optax") for stage, of in stages.items()])
    lines += ["### Compilations for a new learning rate and for a new mu", ""]
    lines += ["Each cell: compilations for a new learning rate, for a new mu.", ""]
    lines += ["| situation | momentum_jax | Optax |", "| --- | --- | --- |"]
    for situation, of in results["compiles"].items():
        counts = [f"{of[who]['learning_rate']}, {of[who]['mu']}" for who in ("ours", "optax")]
        lines.append(f"| {situation} | {' | '.join(counts)} |")
    return "\n".join([*lines, ""])


def comparison(title: str, other: str, pairs: list[tuple[str, dict, str]]) -> list[str]:
    """Returns a section with a table that has one line per size."""
    return [f"### {title}", "", *times("float32 values", other, pairs)]


def times(first: str, other: str, pairs: list[tuple[str, dict, str]]) -> list[str]:
    """Returns a table of our times, the times of another, and their ratio; `first` is of names."""
    lines = [f"| {first} | momentum_jax | {other} | ratio |", "| --- | --- | --- | --- |"]
    for name, numbers, key in pairs:
        ours, theirs = (duration(numbers[of]["median"]) for of in ("ours", key))
        ratio = numbers["ratio"]
        lines.append(
            f"| {name} | {ours} | {theirs} | "
            f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] |"
        )
    return [*lines, ""]


def compiled_tables() -> str:
    """Returns the sections on programs compiled for a TPU, a GPU, and many TPUs."""
    results = json.loads(compiled.RESULT.read_text())
    platforms = compiled.in_order(results)
    versions = {name: v for of in platforms for name, v in of["versions"].items()}
    lines = [
        "## Bytes per step on a TPU and a GPU",
        "",
        "`python -m benchmarks.compiled` reads these numbers from programs compiled for these "
        "devices ("
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "). One step is `tx.update` and `optax.apply_updates`, jitted, with donated params and "
        "state. Training steps also compute the gradient of a network with two layers. All columns "
        "except *kernels* are in bytes per parameter. *Minimum*: read params, gradients and state "
        "once, write params and state once; `adaptive_restart` must read gradients and params "
        "twice, because its decision depends on all of them. *Moved*: bytes read from and written "
        "to device memory. *Temporary*: memory in addition to params, gradients and state. Arrays "
        "have the shape (8192, 4096) unless the row gives another.",
        "",
        "| step | minimum | "
        + " | ".join(f"{of['device']}: moved | temporary | kernels" for of in platforms)
        + " |",
        "| --- | --- |" + " --- | --- | --- |" * len(platforms),
    ]
    for name in platforms[0]["rows"]:
        rows = [of["rows"].get(name, {}) for of in platforms]
        cells = [fixed(rows[0].get("least_bytes_per_param"))]
        for row in rows:
            cells += [fixed(row.get(key)) for key in ("bytes_per_param", "temp_bytes_per_param")]
            cells.append(str(row.get("kernels", "-")))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Steps that move more than 5% above the minimum:", ""]
    lines += [f"- {text}" for of in platforms for text in compiled.shortfalls(of)] or ["- none"]
    lines += [
        "",
        "Time to trace, lower and compile a step with 200 arrays, measured once:",
        "",
    ]
    lines += [f"- {text}" for of in platforms for text in compiled.compile_times(of)]
    scale = results["scale"]
    sizes = " x ".join(f"{n} {name}" for name, n in scale["mesh"].items())
    lines += [
        "",
        f"### On {scale['topology']}, {sizes}",
        "",
        f"One training step of scanned layers with {scale['params'] / 1e9:.1f}e9 float32 params, "
        "sharded over the model axis. Memory is in MiB per device. A collective inside a loop is "
        "counted once.",
        "",
        "| | arguments | temporary | collectives |",
        "| --- | --- | --- | --- |",
    ]
    for name, of in scale["rows"].items():
        sizes = [f"{of[key] / 2**20:.0f}" for key in ("argument_bytes", "temp_bytes")]
        found = ", ".join(f"{n} {kind}" for kind, n in of["collectives"].items())
        lines.append(f"| {name} | {' | '.join(sizes)} | {found} |")
    return "\n".join([*lines, ""])


def fixed(value: float | None) -> str:
    """Formats a number with two decimals, and None as a dash."""
    return "-" if value is None else f"{value:.2f}"


def precision_tables() -> tuple[str, list[Path]]:
    """Returns the tables of the page on low precision: errors, losses, bytes moved and times."""
    folder = ROOT / "benchmarks" / "results"
    paths = [compiled.RESULT, folder / "quantization.json"]
    results = json.loads(paths[1].read_text())
    lines = ["### Storing once, and under constant gradients", ""]
    names = next(iter(results["schemes"].values()))["errors"]
    lines += table("format", "bytes per value", *names, "reached", "scatter")
    for name, of in results["schemes"].items():
        label = f"**{name}**" if name == results["chosen"] else name
        level = of["levels"]["0.999"]
        cells = [f"{100 * error:.2f}%" for error in of["errors"].values()]
        cells += [f"{level['reached']:.1%}", f"{level['scatter']:.1%}"]
        lines.append(f"| {label} | {of['bytes']:.3f} | {' | '.join(cells)} |")
    lines += ["", "### Noisy params", ""]
    lines += table("blocks", "mu", "velocity", "variance ratio", "shift of the mean")
    for name, of in results["stationary"].items():
        for mu, dtypes in of.items():
            for dtype, one in dtypes.items():
                cells = [f"{mu}", dtype, interval(one["variance"], ".4f")]
                lines.append(f"| {name} | {' | '.join(cells)} | {interval(one['mean'], '+.4f')} |")
    lines += ["", "### Training on digits", ""]
    lines += table("velocity", "loss", "loss minus float32's, x 1e-4", "fraction of lower losses")
    for name, of in results["training"].items():
        scaled = {key: 1e4 * value for key, value in of["difference"].items()}
        cells = [f"{of['loss']['value']:.4f}", interval(scaled, "+.2f")]
        lines.append(f"| {name} | {' | '.join(cells)} | {interval(of['ends_lower'], '.2f')} |")
    lines += ["", "### Bytes moved in device memory", "", "In bytes per parameter.", ""]
    platforms = compiled.in_order(json.loads(compiled.RESULT.read_text()))
    lines += table("step", "minimum", *(of["device"] for of in platforms))
    for name in ("momentum", "velocity bfloat16", "velocity int8", "kahan"):
        rows = [of["rows"].get(name, {}) for of in platforms]
        cells = [fixed(row.get("bytes_per_param")) for row in rows]
        least = fixed(rows[0].get("least_bytes_per_param"))
        lines.append(f"| {name} | {least} | {' | '.join(cells)} |")
    speed = folder / "storage-speed.json"
    if speed.exists():
        paths.append(speed)
        timed = json.loads(speed.read_text())
        lines += ["", f"### Time per step ({timed['device']})", ""]
        lines += table("params", "velocity", "time", "ratio to float32")
        for name, dtypes in timed["shapes"].items():
            for dtype, of in dtypes.items():
                ratio = interval(of["ratio"] | {"value": of["ratio"]["median"]}, ".2f")
                lines.append(f"| {name} | {dtype} | {duration(of['median'])} | {ratio} |")
    return "\n".join([*lines, ""]), paths


OPTAX_SUITE = """
## Optax's own tests

`python -m benchmarks.optax_suite` runs Optax's own tests with Optax's `sgd` and `trace` replaced by
transformations of this package. It runs every test that uses one of the two, directly or inside
another transformation.
"""


def clients_tables() -> tuple[str, list[Path]]:
    """Returns the results of `benchmarks.clients` and `benchmarks.optax_suite`."""
    by_hand, suite = (json.loads(each.RESULT.read_text()) for each in (clients, optax_suite))
    parts = [clients.table(by_hand), OPTAX_SUITE, optax_suite.table(suite), ""]
    return "\n".join(parts), [clients.RESULT, optax_suite.RESULT]


def recipes_costs() -> tuple[str, list[Path]]:
    """Returns the table of the bytes that each recipe moves."""
    results = json.loads(compiled.RESULT.read_text())
    return compiled.recipes_table(results) + "\n", [compiled.RESULT]


def table(*names: str) -> list[str]:
    """Returns the head of a table."""
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def interval(of: dict[str, float], form: str) -> str:
    """Formats a value with its interval."""
    value, low, high = (format(of[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


GENERATED = {
    "benchmarks": benchmark_tables,
    "contract_tests": contract_tests,
    "low_precision": precision_tables,
    "recipes": recipes_costs,
    "works_with": clients_tables,
}

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example|Source):$")


def read_as_written(app, what, name, obj, options, lines):
    """Prepares docstrings for napoleon: makes indented equations literal, dedents tables."""
    del app, what, name, obj, options
    written, at_margin, dedent, section = [], True, 0, False
    for i, line in enumerate(lines):
        section = section or bool(SECTION.match(line))
        if line.strip():
            indented = line.startswith("    ") and not section
            if indented and at_margin and i and not lines[i - 1].strip():
                dedent = 4 if line.strip().startswith("==") else 0
                if not dedent and not next(filter(None, written[::-1])).endswith("::"):
                    written += [".. code-block:: text", ""]
            at_margin = not indented
            line = line[dedent:] if indented else line
            # |v| is a norm; reStructuredText would read it as a substitution.
            if not (indented or ">>>" in line or "..." in line):
                line = line.replace("|", "\\|")
        written.append(line)
    lines[:] = written


def visit_math(translator, node):
    """Writes a formula as MathML, which browsers render without a script, a font or the network."""
    block = isinstance(node, nodes.math_block)
    translator.body.append(to_mathml(node.astext(), block))
    raise nodes.SkipNode


def to_mathml(tex: str, block: bool) -> str:
    """Converts TeX to MathML with Docutils."""
    tree = latex2mathml.tex2mathml(tex, as_block=block)
    return f'<div class="math">{tree}</div>' if block else tree


def setup(app: Sphinx) -> None:
    """Registers the extensions of this file. Sphinx calls it first."""
    copy_notebooks()
    app.add_html_math_renderer(
        "mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None)
    )
    app.connect("source-read", add_generated)
    app.connect("autodoc-process-docstring", read_as_written, priority=400)
