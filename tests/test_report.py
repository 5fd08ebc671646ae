"""Tests that the report agrees with its numbers and needs no other file."""

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic
import xarray as xr
from markdown_it import MarkdownIt

from momentum_jax.study import figures, report
from momentum_jax.study.comparisons import disagreements, verdict
from momentum_jax.study.report import terminal_text, write

pytestmark = pytest.mark.slow

FEW: Any = {"rates": (0.02, 0.1, 0.5), "scales": (1.0, 2.0)}
TWO: Any = {"families": {"mu 0": 0.0, "mu 0.9": 0.9}, **FEW}
EVIL = {
    "a|b *c* _d_ `e` <b>f</b> [g](http://h) $x$ # & \\": 0.0,
    "_1. two\nlines ~~s~~ {{ x }} {% y %} ![i](j) $\\frac ```": 0.9,
}


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    dataset = synthetic.dataset(stds={"mu 0.9": 0.3}, recorded=True, **TWO)
    folder = tmp_path_factory.mktemp("crossed") / "new"
    return dataset, folder, *write(dataset, folder)


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    notes = ["init ignores *its* | key", "# no heading"]
    dataset = synthetic.dataset(
        families=EVIL, notes=notes, problem="`p|q` <i>", rates=(0.1, 0.5), scales=(1.0,)
    )
    folder = tmp_path_factory.mktemp("evil")
    return dataset, folder, *write(dataset, folder)


class Page(HTMLParser):
    """Collects the external resources of a page, and its visible text."""

    def __init__(self, text):
        super().__init__()
        self.outside, self.images, self.alts, self.tables = [], [], [], []
        self.tags, self.texts = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if value and name in ("src", "href", "srcset"):
                (self.images if value.startswith("data:") else self.outside).append(value)
            if name == "alt":
                self.alts.append(value)
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data


def rendered(folder):
    """Renders report.md with another Markdown renderer."""
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return Page(markdown.render((folder / "report.md").read_text()))


def test_all_that_is_written_is_there_and_named(crossed):
    _, folder, paths, _ = crossed
    assert sorted(path.name for path in paths) == sorted(path.name for path in folder.iterdir())
    assert {path.name for path in paths} == {
        *("report.html", "report.md", "results.nc", "comparisons.csv", "summary.json"),
        *("std-ratios.png", "rate-curves.png", "variance-proportions.png"),
        *("tuned-std-ratios.png", "final-loss.png", "loss-over-steps.png", "pairs.png"),
        *("sharpness-over-steps.png", "gradient-norm-over-steps.png"),
    }
    document = (folder / "report.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", document)
    assert sorted(shown) == sorted(path.name for path in paths if path.suffix == ".png")


def test_the_document_answers_first_and_in_order(crossed):
    dataset, folder, _, table = crossed
    document = (folder / "report.md").read_text()
    said = verdict(dataset, table)
    assert said.word == "narrower"
    parts = [
        "# Does momentum make the result of training depend less on the random initial weights?",
        f"> **{said.sentence}**",
        "## The comparison that decides",
        "The primary comparison was declared before the runs. It compares mu 0.9 at 0.01 with mu 0 "
        "at 0.1 at the same effective learning rate",
        "an 80% chance to detect a ratio of",
        "(std-ratios.png)",
        "(rate-curves.png)",
        "(variance-proportions.png)",
        "## Failures",
        "## Each at its own tuned learning rate",
        "The factor for the rate alone is",
        "## Controls, against the baseline",
        "## Loss over the steps",
        "## Pairs of runs",
        "## All arms",
        "## Tuned learning rates",
        "## Protocol",
        "## Limitations",
        "## Reproduction",
        "python -m momentum_jax.study --seeds 20",
        "Run on 2 x cpu on 2026-01-01, 12 s of training, with 3 compiled training programs.",
        "jax 0.10.2.",
    ]
    places = [document.index(part) for part in parts]
    assert places == sorted(places)
    assert not re.search(r"\bnan\b|undefined\b.*undefined\b.*None", document)


def test_the_tables_hold_the_numbers_with_adjusted_intervals(crossed):
    _, folder, _, table = crossed
    rows = table[(table.arm == "mu 0.9 at 0.01") & (table.contrast == "same effective rate")]
    rows = rows[rows.scale == 2.0].set_index("question")
    found = next(
        line
        for line in (folder / "report.md").read_text().splitlines()
        if line.startswith("| mu 0.9 at 0.01") and "| x2" in line
    )
    cells = [cell.strip() for cell in found.strip("|").split("|")]
    questions = ("std", "total std", "10-90% range", "std of log loss")
    for cell, question in zip(cells[2:6], questions, strict=True):
        row = rows.loc[question]
        numbers = [float(number) for number in re.findall(r"[\d.e+-]+", cell)]
        expected = [row.value, row.adjusted_low, row.adjusted_high]
        np.testing.assert_allclose(numbers, expected, rtol=6e-3)
        assert cell.startswith("**") == (row.p_adjusted < 0.05)
    assert any(cell.startswith("**") for cell in cells[2:5])


def test_disagreements_are_said(crossed):
    dataset, folder, _, table = crossed
    sentences = disagreements(table, dataset)
    document = (folder / "report.md").read_text()
    assert ("**The measures disagree.**" in document) == bool(sentences)
    one = xr.Dataset(attrs=dataset.attrs)
    rows = table.copy()
    chosen = (rows.arm == "mu 0.9 at 0.01") & (rows.question == "10-90% range")
    rows.loc[chosen, ["value", "low", "high"]] = [2.0, 1.5, 2.5]
    said = disagreements(rows, one)
    assert said
    assert said[0] in terminal_text(dataset, rows)


def test_the_page_is_one_file_with_its_pictures(crossed):
    _, folder, paths, _ = crossed
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert page.outside == []
    assert len(page.images) == len(page.alts) == sum(path.suffix == ".png" for path in paths)
    for image in page.images:
        drawn = base64.b64decode(image.partition(",")[2]).decode()
        assert drawn.rstrip().endswith("</svg>")
        assert "prefers-color-scheme: dark" in drawn
        assert "#000000" not in drawn
    assert len(page.tables) > 8
    assert html.count('<div class="scroll" tabindex="0"><table>') == len(page.tables)
    assert "width=device-width" in html


def test_the_numbers_are_strict_json_and_those_of_the_tables(crossed):
    dataset, folder, _, table = crossed

    def refuse(constant):
        raise AssertionError(constant)

    numbers = json.loads((folder / "summary.json").read_text(), parse_constant=refuse)
    assert numbers["verdict"]["sentence"] == verdict(dataset, table).sentence
    assert numbers["primary"]["arm"] == "mu 0.9 at 0.01"
    assert len(numbers["comparisons"]) == len(table)
    assert numbers["comparisons"][0]["value"] == pytest.approx(table.value[0], rel=1e-5)
    assert {row["source"] for row in numbers["components"]} == {"weights", "order", "interaction"}
    assert {row["measure"] for row in numbers["descriptions"]} >= {"std", "mean accuracy"}
    assert numbers["provenance"]["device"] == "2 x cpu"
    read = pd.read_csv(folder / "comparisons.csv", keep_default_na=True)
    np.testing.assert_allclose(read.value, table.value, rtol=1e-5)
    xr.testing.assert_identical(xr.load_dataset(folder / "results.nc", engine="scipy"), dataset)


def test_a_study_written_twice_is_the_same(evil, tmp_path):
    dataset, _, paths, _ = evil
    write(dataset, tmp_path)
    for path in paths:
        if path.suffix in (".md", ".html", ".json", ".csv"):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("which", ["report.md", "report.html"])
def test_names_cannot_break_the_tables(evil, which):
    dataset, folder, _, _ = evil
    page = rendered(folder) if which == "report.md" else Page((folder / which).read_text())
    assert page.tables
    for table in page.tables:
        assert len({len(row) for row in table}) == 1
    names = {" ".join(name.split()) for name in dataset.arm.values}
    arms = {cell.strip() for table in page.tables for row in table for cell in row}
    assert names <= arms
    assert not page.tags & {"a", "b", "i", "del", "s"}
    assert not any(":" in address for address in page.outside)
    text = " ".join(" ".join(page.texts).split())
    assert "init ignores *its* | key" in text
    assert "# no heading" in text
    assert "Problem: `p|q` <i>." in text


def test_the_terminal_has_the_verdict_and_a_table_whose_columns_line_up(crossed, evil):
    for dataset, _, _, table in (crossed, evil):
        shown = terminal_text(dataset, table)
        assert " ".join(verdict(dataset, table).sentence.split()) in shown
        assert "**" not in shown
        rows = [line for line in shown.splitlines() if line.startswith("| ")]
        assert len(rows) >= 3
        assert len({len(row) for row in rows}) == 1
    assert "init ignores *its* | key" in terminal_text(evil[0], evil[3])


@pytest.fixture
def quick(monkeypatch):
    """Makes reports quickly: empty pictures, and no bootstrap in the description."""
    module = sys.modules["momentum_jax.study.report"]
    monkeypatch.setattr(figures.Picture, "render", lambda _: (b"", "<svg></svg>"))
    described = pd.DataFrame(columns=["arm", "scale", "measure", "value", "low", "high"])
    monkeypatch.setattr(module.comparisons, "describe", lambda _: described)

    def written(folder, **options):
        dataset = synthetic.dataset(**{"control": False, **FEW, "scales": (1.0,), **options})
        _, table = write(dataset, folder)
        return (folder / "report.md").read_text(), terminal_text(dataset, table)

    return written


@pytest.mark.parametrize(
    ("options", "question"),
    [
        (TWO, "Does momentum make the result of training depend less on the random initial"),
        ({**TWO, "design": "order"}, "result of training depend less on the data order?"),
        (
            {**TWO, "families": {"Adam": math.nan, "Lion": math.nan}},
            "Does the result of training depend less on the random initial weights with Lion at "
            "0.1 than with Adam at 0.1?",
        ),
        ({**TWO, "families": {"mu 0": 0.0}}, "How much does the result of training depend on"),
    ],
)
def test_the_question_is_that_of_the_arms_and_of_the_design(quick, tmp_path, options, question):
    document, shown = quick(tmp_path, **options)
    assert question in document.splitlines()[0]
    assert question in shown.splitlines()[0]
    with_mu = "mu 0.9" in str(options["families"])
    assert ("against the effective learning rate" in document) == with_mu
    assert "against the effective learning rate" in document or "effective rate" not in document


@pytest.mark.parametrize(
    ("design", "sentence"),
    [
        ("crossed", "Proportions of the variance of the final loss."),
        ("paired", "This study did not separate initial weights and data order"),
        ("weights", "All runs used one data order"),
        ("order", "All runs started from the same initial weights"),
    ],
)
def test_each_design_says_what_it_separates(quick, tmp_path, design, sentence):
    document, _ = quick(tmp_path, design=design, **TWO)
    assert sentence in document


def test_that_every_run_diverged_is_said_first(tmp_path):
    few = {**TWO, "rates": (0.1, 0.5)}
    dataset = synthetic.dataset(diverged=True, recorded=True, control=False, **few)
    _, table = write(dataset, tmp_path)
    document = (tmp_path / "report.md").read_text()
    first = "Every run diverged, so the comparisons below have no meaning."
    assert document.splitlines()[2].startswith(f"**{first}")
    assert terminal_text(dataset, table).startswith(first)


def test_few_units_diverged_runs_and_edges_of_the_grid_are_said(quick, tmp_path):
    document, shown = quick(tmp_path, seeds=3, notes=["Something odd."], **TWO)
    for text in (document, shown):
        assert "- Too few seeds: 3. Use at least 6;" in text
        assert re.search(r"- \d+ of \d+ runs diverged\. .* the loss cap", text)
        assert "at initial scale x1" in text
        assert "highest of the grid" in text
        assert "- Something odd." in text


def test_one_arm_is_compared_with_nothing(tmp_path):
    dataset = synthetic.dataset(
        families={"mu 0.9": 0.9}, rates=(0.1,), scales=(1.0,), control=False, design="paired"
    )
    names = [path.name for path in report(dataset, str(tmp_path))]
    document = (tmp_path / "report.md").read_text()
    assert "> **No arms are compared" in document
    assert "Pairs of runs" not in document
    assert "1 arm, 1 initial scale (x1), 20 seeds: 20 runs of 100 steps." in document
    assert [name for name in names if name.endswith("png")] == [
        "final-loss.png",
        "loss-over-steps.png",
    ]


def test_two_params_have_a_path(tmp_path):
    dataset = synthetic.dataset(
        "paired", two_params=True, rates=(0.1, 1.0), scales=(1.0,), families=TWO["families"]
    )
    names = [path.name for path in report(dataset, tmp_path)]
    assert {"energy-rescued.png", "path-rescued.png"} <= set(names)
    assert "## A typical rescued and lost run" in (tmp_path / "report.md").read_text()


def test_a_primary_comparison_outside_of_the_contrasts_is_shown(quick, tmp_path):
    dataset = synthetic.dataset(**TWO, control=False)
    dataset.attrs["primary"] = json.dumps(
        {"arm": "mu 0.9 at 0.05", "baseline": "mu 0 at 0.02", "margin": 0.2}
    )
    write(dataset, tmp_path)
    document = (tmp_path / "report.md").read_text()
    assert "It compares mu 0.9 at 0.05 with mu 0 at 0.02. It is the ratio" in document
    assert "within 0.833 to 1.20" in document
    ratios = document.partition("### Measures of spread")[2].partition("## ")[0]
    assert ratios.count("| mu 0.9 at 0.05") == 3
