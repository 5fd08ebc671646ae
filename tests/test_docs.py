"""The documentation says what is there: its programs run, the tests that it names exist."""

import ast
import json
import re
import runpy
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import momentum_jax as mj

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def programs(page):
    """The Python blocks of a page, wherever they are indented."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def run(code):
    names = {}
    exec(code, names)
    return names


def said(program):
    """What comments say is printed: behind the print, or in the lines below it."""
    return re.findall(r"^(?:print\(.*\)\s+)?# (.+)$", program, re.MULTILINE)


def test_the_programs_of_each_page_are_run():
    """Here, in test_readme.py (docs/devices.md), test_recipes.py and test_works_with.py."""
    pages = {path.stem for path in DOCS.glob("*.md") if programs(path.name)}
    assert pages == {"index", "from_others", *PRINTED} | {"devices", "recipes", "works_with"}


def test_the_first_program(capsys):
    (program,) = programs("index.md")
    run(program)
    assert capsys.readouterr().out.splitlines() == said(program) == ["True"]


PRINTED = {"conventions": 3, "low_precision": 12, "changed_models": 11, "edge_of_stability": 8}


@pytest.mark.slow
@pytest.mark.parametrize("page", PRINTED)
def test_a_page_prints_what_its_comments_say(page, capsys):
    program = "\n".join(programs(f"{page}.md"))
    run(program)
    assert capsys.readouterr().out.splitlines() == said(program)
    assert len(said(program)) == PRINTED[page]


def test_the_page_on_the_edge_says_what_the_notebook_found():
    notebook = (ROOT / "notebooks" / "09_the_edge_of_stability.ipynb").read_text()
    page = (DOCS / "edge_of_stability.md").read_text()
    rows = re.findall(r"^\| (.*mu.*) \| (\S+ \+- \S+) \|$", page, re.MULTILINE)
    assert len(rows) == 3
    for name, value in rows:
        assert f"{name:16s} {value}\\n" in notebook


def test_the_picture_of_the_readme_shows_what_is_found_today():
    """Drawn anew by `python docs/picture.py`; the picture holds what it was drawn from."""
    picture = runpy.run_path(str(DOCS / "picture.py"))
    with Image.open(picture["PICTURE"]) as image:
        shown = json.loads(image.info["Description"])
    today = picture["numbers"]()
    for name in ("spreads", "edge"):
        assert shown[name] == today[name]
    assert shown["paths"].keys() == today["paths"].keys()
    for name, path in shown["paths"].items():
        np.testing.assert_allclose(path, today["paths"][name], rtol=1e-4, atol=1e-4)
    # What the README says of it.
    left = {name: np.linalg.norm(path[-1]) / 4 for name, path in shown["paths"].items()}
    assert left["mu 0"] == pytest.approx(0.3, abs=0.01)
    assert left["mu 0.9"] < 0.02
    # The sharpness rises to the limit, and stays.
    for steps, shares in shown["shares"].values():
        assert steps[-1] == 3000
        assert shares[0] < 0.5
        assert np.mean(shares[-20:]) == pytest.approx(1, abs=0.02)
    # The curves agree below the edge: each interval of one holds the value of the other.
    without, with_momentum = shown["spreads"].values()
    assert 1 < shown["edge"] < 2
    for rate in (rate for rate in without if float(rate) < 1):
        assert without[rate][0] < with_momentum[rate][1] < without[rate][2]
        assert with_momentum[rate][0] < without[rate][1] < with_momentum[rate][2]


@pytest.fixture(scope="module")
def study_page():
    return runpy.run_path(str(DOCS / "study" / "page.py"))


def test_the_page_of_the_study_is_what_its_numbers_say(study_page):
    """Written anew by `python docs/study/page.py`."""
    assert (DOCS / "study" / "index.md").read_text() == study_page["render"]()


def test_what_the_page_of_the_study_claims_holds_in_its_numbers(study_page):
    of = {name: study_page["Numbers"](name) for name in study_page["NETWORKS"]}
    assert len(of) >= 5
    for numbers in of.values():
        # The spread due to the weights is not clearly smaller with momentum ...
        primary = numbers.compared(numbers.primary["arm"], numbers.primary["baseline"])
        assert primary["high"] > 1
        # ... nor is it where each is tuned.
        tuned = numbers.compared("mu 0.9", "mu 0", contrast="tuned")
        assert tuned["value"] is None or tuned["low"] < 1 < tuned["high"]
        assert numbers.all["design"] == "crossed"
        # Over the scales no rate has a clearly smaller one; at small rates the ratio is near 1.
        for row in numbers.ratios("mu 0.9"):
            assert row["adjusted_high"] is None or row["adjusted_high"] > 1
            if row["effective_rate"] <= 0.0356:
                assert 0.9 < row["value"] < 1.12
    assert of["digits"].verdict["word"] == "equivalent"
    assert of["digits"].clearest() is None
    assert of["mnist1d"].verdict["word"] == of["sequence"].verdict["word"] == "wider"
    # What is smaller on MNIST-1D is the spread of all runs, as the weights' share grows.
    mnist1d = of["mnist1d"]
    for rate in ("0.112", "0.2", "0.356", "0.632"):
        arm, baseline = f"mu 0.9 at {float(rate) / 10:g}", f"mu 0 at {rate}"
        assert mnist1d.compared(arm, baseline, question="total std")["adjusted_high"] < 1
        shares = [
            mnist1d.row("components", arm=name, scale=1.0, source="weights")["proportion"]
            for name in (arm, baseline)
        ]
        assert shares[0] > shares[1]
    # In three of five networks the spread of all runs is clearly smaller at some rate where runs
    # have learned; on the sequences, runs are lost at a large rate.
    assert {name for name, numbers in of.items() if numbers.clearest()} == {
        "deep-mlp", "mnist1d", "mnist-conv", "sequence"
    }  # fmt: skip
    lost = of["sequence"].compared("mu 0.9 at 0.0632", "mu 0 at 0.632", 1.0, question="failures")
    assert lost["adjusted_low"] > 0
    deep = of["deep-mlp"]
    for row in deep.ratios("mu 0.9"):
        assert deep.row("arms", arm=row["arm"], scale=0.5, measure="failed")["value"] == 1
        assert deep.row("arms", arm=row["baseline"], scale=0.5, measure="failed")["value"] == 1
    late = study_page["Numbers"]("start-up")
    assert late.compared("mu 0.99 at 0.002", "mu 0, 114 steps at 0.2")["low"] > 1


PAIRS = {"optax": (0, 1), "torch": (2, 3), "keras": (4, 5)}


@pytest.mark.slow
@pytest.mark.parametrize("framework", PAIRS)
def test_both_sides_end_at_the_same_weights(framework, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    theirs, ours = PAIRS[framework]
    found = programs("from_others.md")
    w = run(found[ours])["w"]
    assert not np.array_equal(w, [1.0, -2.0])
    if framework != "optax":
        pytest.importorskip(framework)
    other = run(found[theirs])["w"]
    other = other.detach().numpy() if framework == "torch" else np.asarray(other)
    np.testing.assert_allclose(w, other, rtol=1e-5)


def test_a_job_is_carried_over(capsys):
    program = programs("from_others.md")[6]
    names = run(program)
    np.testing.assert_array_equal(names["state"][0].trace["kernel"], np.ones((2, 3)))
    assert capsys.readouterr().out == "(2, 3)\n"


def existing_tests():
    """The names of all tests."""
    return {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_each_promise_names_tests_of_its_own_that_exist():
    text = (DOCS / "contract.md").read_text()
    promises = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [promise.split(".")[0] for promise in promises] == [f"C{i}" for i in range(1, 13)]
    there = existing_tests()
    for promise in promises:
        number = promise.split(".")[0].lower()
        named = re.findall(r"^- \[`(\w+)`\]\(#(\w+)\)$", promise, re.MULTILINE)
        assert named
        for name, target in named:
            assert name == target
            assert name in there
            assert f"_{number}_" in name


def documented(page, module):
    text = (DOCS / "api" / f"{page}.md").read_text()
    return set(re.findall(rf"^\.\. auto\w+:: {re.escape(module)}\.(\w+)$", text, re.MULTILINE))


def test_the_reference_has_every_public_name():
    modules = {name for name in mj.__all__ if isinstance(getattr(mj, name), types.ModuleType)}
    assert documented("optimizer", "momentum_jax") == set(mj.__all__) - modules
    assert {name for name in modules if documented(name, "momentum_jax") == {name}} == modules


@pytest.mark.parametrize("name", ["theory", "diagnostics", "sharding"])
def test_the_reference_has_every_public_name_of_a_package(name):
    code = (ROOT / "momentum_jax" / name / "__init__.py").read_text()
    names = re.findall(r"^from .* as (\w+)$", code, re.MULTILINE)
    page = (DOCS / "api" / f"{name}.md").read_text()
    listed = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page, re.MULTILINE)
    assert names
    assert sorted(listed) == sorted(names)


def test_the_reference_has_every_public_name_of_the_study():
    code = (ROOT / "momentum_jax" / "study" / "__init__.py").read_text()
    names = set(re.findall(r"^from .* as (\w+)$", code, re.MULTILINE))
    assert names
    assert documented("study", "momentum_jax.study") == names


def test_the_map_of_the_code_has_every_file():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    mapped = re.findall(r"^\| `([\w/]+\.py)` \| .+ \|$", text, re.MULTILINE)
    package = ROOT / "momentum_jax"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert set(mapped) == {name for name in files if not name.endswith("__init__.py")}
    assert len(mapped) == len(set(mapped))


def test_imports_point_one_way():
    """As the map says: a file imports from those above it, a package's face from all its files."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    order = re.findall(r"^\| `((?:\w+/)?\w+)\.py` \|", text, re.MULTILINE)
    for i, name in enumerate(order):
        above = set(order[:i])
        for imported in imports_of(ROOT / "momentum_jax" / f"{name}.py"):
            if (ROOT / "momentum_jax" / imported).is_dir():
                of_package = {each for each in order if each.startswith(f"{imported}/")}
                assert of_package - {f"{imported}/__main__"} <= above, (name, imported)
            else:
                assert imported in above, (name, imported)


def imports_of(path):
    """The files and packages of ours that a file imports, as the map names them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("momentum_jax"):
            parts = (node.module or "").split(".")[1:]
            for alias in node.names:
                # From a package: a module, or a name that its __init__ offers.
                inner = Path(*parts, alias.name)
                is_module = (ROOT / "momentum_jax" / inner.with_suffix(".py")).exists()
                found = inner if is_module or not parts else Path(*parts)
                if (ROOT / "momentum_jax" / found).is_dir() or (
                    ROOT / "momentum_jax" / found.with_suffix(".py")
                ).exists():
                    yield str(found)
