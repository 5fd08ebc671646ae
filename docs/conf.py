"""The documentation's build: `sphinx-build -W --keep-going docs build/docs`, with no network."""

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
from benchmarks.__main__ import LABELS, duration  # noqa: E402
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

# Markdown and notebooks. The tests run the notebooks; what they showed is committed with them.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # From a CDN: sliders show the picture that they were saved with.

# Docstrings: Google's sections, and our own; types are said in words in Args.
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Returns is prose, not a type and a colon.
napoleon_custom_sections = ["Returns", "Source"]
napoleon_use_ivar = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "py:obj"

# Furo has a page for phones and a dark one, and loads nothing from elsewhere.
html_theme = "furo"
html_title = "momentum_jax"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"


def copy_notebooks() -> None:
    """Sphinx reads only what is in its folder, and the notebooks are next to it."""
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
    """Adds to a page what is made from files of the repository."""
    if docname == "index" and not (DOCS / "study" / "index.md").exists():
        # A glob without a match is a warning that cannot be suppressed.
        block = r"```\{toctree\}\n:caption: Does it help\?.*?```\n"
        source[0] = re.sub(block, "", source[0], flags=re.DOTALL)
    if docname in GENERATED:
        text, paths = GENERATED[docname]()
        source[0] += "\n" + text
        for path in paths:
            app.env.note_dependency(str(path))


def contract_tests() -> tuple[str, list[Path]]:
    """Every test of the contract, by its promise, with its source."""
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
    """A section a machine, of each file that has times of steps, and the compiled programs."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    results = [(path, json.loads(path.read_text())) for path in paths]
    machines = [machine(path, of) for path, of in results if "sizes" in of]
    return "\n".join([*machines, on_device_tables(), compiled_tables()]), paths


def on_device_tables() -> str:
    """What `python -m benchmarks.on_device` timed."""
    results = json.loads(on_device.RESULT.read_text())
    lines = [
        f"## Times of the same steps on an {results['device']}",
        "",
        f"{results['date']}, JAX {results['jax']}, medians of {results['rounds']} rounds in which "
        "all take part, by `python -m benchmarks.on_device`; over the first row, with an interval "
        "of at least 95%. Alone, of 33.6e6 params; in training, of two matrices of 67.1e6 each "
        "with 1,024 examples. What is moved is read from the programs compiled there.",
        "",
    ]
    lines += table("step", "time", "over optax.sgd's", "bytes per parameter", "GB a second")
    for of in (results["alone"], results["training"]):
        for name, row in of.items():
            ratio = interval(row["ratio"] | {"value": row["ratio"]["median"]}, ".3f")
            moved = f"{row['bytes_per_param']:.2f} | {row['bytes_per_second'] / 1e9:.0f}"
            lines.append(f"| {name} | {duration(row['median'])} | {ratio} | {moved} |")
    return "\n".join([*lines, ""])


def machine(path: Path, results: dict) -> str:
    """The tables of one file."""
    host = results["machine"]
    processor = host["cpu"] if host["platform"] == "cpu" else host["device"]
    lines = [
        f"## {processor}",
        "",
        f"{results['date']}, {host['cores']} processor cores, Python {host['python']}, JAX "
        f"{host['jax']}, Optax {host['optax']}, PyTorch {results['torch']}; medians of "
        f"{results['rounds']} rounds. From `benchmarks/results/{path.name}`.",
    ]
    sizes = results["sizes"]
    for what, label in LABELS.items():
        pairs = [(name, of[what], "optax") for name, of in sizes.items()]
        lines += comparison(f"{label[0].upper()}{label[1:]}", "Optax", pairs)
    kinds = {kind: None for of in sizes.values() for kind in of.get("torch", {})}
    for kind in kinds:
        pairs = [(name, of["torch"][kind], kind) for name, of in sizes.items() if "torch" in of]
        lines += comparison(f"Jitted step, beside PyTorch's SGD ({kind})", "PyTorch", pairs)
    lines += ["### Compiles for a new learning rate, and for a new mu", ""]
    lines += ["| situation | ours | Optax |", "| --- | --- | --- |"]
    for situation, of in results["compiles"].items():
        counts = [f"{of[who]['learning_rate']}, {of[who]['mu']}" for who in ("ours", "optax")]
        lines.append(f"| {situation} | {' | '.join(counts)} |")
    return "\n".join([*lines, ""])


def comparison(title: str, other: str, pairs: list[tuple[str, dict, str]]) -> list[str]:
    """A table with a line a size."""
    lines = [f"### {title}", "", f"| float32 values | ours | {other} | ours / {other} |"]
    lines.append("| --- | --- | --- | --- |")
    for name, numbers, key in pairs:
        ours, theirs = (duration(numbers[of]["median"]) for of in ("ours", key))
        ratio = numbers["ratio"]
        lines.append(
            f"| {name} | {ours} | {theirs} | "
            f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] |"
        )
    return [*lines, ""]


def compiled_tables() -> str:
    """Bytes of the steps that are compiled for a TPU and a GPU, and the model on many TPUs."""
    results = json.loads(compiled.RESULT.read_text())
    platforms = compiled.in_order(results)
    versions = {name: v for of in platforms for name, v in of["versions"].items()}
    lines = [
        "## Bytes per step on a TPU and a GPU",
        "",
        "Read by `python -m benchmarks.compiled` from the programs that are compiled for these "
        "devices ("
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "). One step is `tx.update` and `optax.apply_updates`, jitted, params and state donated; "
        "training adds the gradient of a network with two layers. *Least*: params, gradients and "
        "state read once, params and state written once; `adaptive_restart` reads gradients and "
        "params again, after the decision that depends on all of them. *Moved*: bytes read and "
        "written in device memory. *Temporary*: memory beside params, gradients and state. All in "
        "bytes per parameter; arrays are (8192, 4096) where no shape is given.",
        "",
        "| step | least | "
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
    lines += ["", "Steps that move over 5% more than the least:", ""]
    lines += [f"- {text}" for of in platforms for text in compiled.shortfalls(of)] or ["- none"]
    lines += [
        "",
        "Seconds to trace, lower and compile a step with 200 arrays, measured once:",
        "",
    ]
    lines += [f"- {text}" for of in platforms for text in compiled.compile_times(of)]
    scale = results["scale"]
    sizes = " x ".join(f"{n} {name}" for name, n in scale["mesh"].items())
    lines += [
        "",
        f"### On {scale['topology']}, {sizes}",
        "",
        f"A step of training of scanned layers with {scale['params'] / 1e9:.1f}e9 float32 params, "
        "which are sharded over the model axis. MiB on each device; a collective within a loop "
        "counts once.",
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
    """Two decimals, or a dash where there is no number."""
    return "-" if value is None else f"{value:.2f}"


def precision_tables() -> tuple[str, list[Path]]:
    """What velocities of low precision cost: bytes moved, times, errors, spread and losses."""
    folder = ROOT / "benchmarks" / "results"
    paths = [compiled.RESULT, folder / "quantization.json"]
    results = json.loads(paths[1].read_text())
    lines = ["### Storing once, and under constant gradients", ""]
    names = next(iter(results["schemes"].values()))["errors"]
    lines += table("format", "bytes", *names, "risen", "scatter")
    for name, of in results["schemes"].items():
        label = f"**{name}**" if name == results["chosen"] else name
        level = of["levels"]["0.999"]
        cells = [f"{100 * error:.2f}%" for error in of["errors"].values()]
        cells += [f"{level['risen']:.1%}", f"{level['scatter']:.1%}"]
        lines.append(f"| {label} | {of['bytes']:.3f} | {' | '.join(cells)} |")
    lines += ["", "### Noisy params", ""]
    lines += table("blocks", "mu", "velocity", "variance / float32's", "mean, less float32's")
    for name, of in results["stationary"].items():
        for mu, dtypes in of.items():
            for dtype, one in dtypes.items():
                cells = [f"{mu}", dtype, interval(one["variance"], ".4f")]
                lines.append(f"| {name} | {' | '.join(cells)} | {interval(one['mean'], '+.4f')} |")
    lines += ["", "### Training on digits", ""]
    lines += table("velocity", "loss", "less float32's, x 1e-4", "runs that end lower")
    for name, of in results["training"].items():
        scaled = {key: 1e4 * value for key, value in of["difference"].items()}
        cells = [f"{of['loss']['value']:.4f}", interval(scaled, "+.2f")]
        lines.append(f"| {name} | {' | '.join(cells)} | {interval(of['ends_lower'], '.2f')} |")
    lines += ["", "### Bytes moved in device memory", "", "In bytes per parameter.", ""]
    platforms = compiled.in_order(json.loads(compiled.RESULT.read_text()))
    lines += table("step", "least", *(of["device"] for of in platforms))
    for name in ("momentum", "velocity bfloat16", "velocity int8", "kahan"):
        rows = [of["rows"].get(name, {}) for of in platforms]
        cells = [fixed(row.get("bytes_per_param")) for row in rows]
        least = fixed(rows[0].get("least_bytes_per_param"))
        lines.append(f"| {name} | {least} | {' | '.join(cells)} |")
    speed = folder / "storage-speed.json"
    if speed.exists():
        paths.append(speed)
        timed = json.loads(speed.read_text())
        lines += ["", f"### Time of a step ({timed['device']})", ""]
        lines += table("params", "velocity", "time", "over float32's")
        for name, dtypes in timed["shapes"].items():
            for dtype, of in dtypes.items():
                ratio = interval(of["ratio"] | {"value": of["ratio"]["median"]}, ".2f")
                lines.append(f"| {name} | {dtype} | {duration(of['median'])} | {ratio} |")
    return "\n".join([*lines, ""]), paths


OPTAX_SUITE = """
## Optax's own tests

With the package's transformations in the place of Optax's `sgd` and `trace`, in every test that
uses one of them, also within another transformation (`python -m benchmarks.optax_suite`).
"""


def clients_tables() -> tuple[str, list[Path]]:
    """What `python -m benchmarks.clients` and `python -m benchmarks.optax_suite` found."""
    by_hand, suite = (json.loads(each.RESULT.read_text()) for each in (clients, optax_suite))
    parts = [clients.table(by_hand), OPTAX_SUITE, optax_suite.table(suite), ""]
    return "\n".join(parts), [clients.RESULT, optax_suite.RESULT]


def recipes_costs() -> tuple[str, list[Path]]:
    """What the programs of the page move."""
    results = json.loads(compiled.RESULT.read_text())
    return compiled.recipes_table(results) + "\n", [compiled.RESULT]


def table(*names: str) -> list[str]:
    """The head of a table."""
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def interval(of: dict[str, float], form: str) -> str:
    """A value with its interval."""
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
    """Before napoleon: an indented equation is literal, an indented table is a table."""
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
            # |v| is a norm here, and would be a substitution of reStructuredText.
            if not (indented or ">>>" in line or "..." in line):
                line = line.replace("|", "\\|")
        written.append(line)
    lines[:] = written


def visit_math(translator, node):
    """A formula as MathML, which browsers show by themselves: no script, font or network."""
    block = isinstance(node, nodes.math_block)
    translator.body.append(to_mathml(node.astext(), block))
    raise nodes.SkipNode


def to_mathml(tex: str, block: bool) -> str:
    """Docutils' own conversion."""
    tree = latex2mathml.tex2mathml(tex, as_block=block)
    return f'<div class="math">{tree}</div>' if block else tree


def setup(app: Sphinx) -> None:
    """What Sphinx calls first."""
    copy_notebooks()
    app.add_html_math_renderer(
        "mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None)
    )
    app.connect("source-read", add_generated)
    app.connect("autodoc-process-docstring", read_as_written, priority=400)
