"""The report says what the numbers say, in one file that needs no other."""

import base64
import functools
import json
import re
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import xarray as xr

from momentum_jax.study import statistics
from momentum_jax.study.report import answer, report, text

# Enough to tell what differs by a factor of 4, in a tenth of the time.
summarize = functools.partial(statistics.summarize, resamples=499)

SEEDS, STEPS = 40, 5
DIMENSIONS = ("arm", "init_scale", "seed", "step")


def study(spreads, *, failed=(), contrasts=("same effective rate",), tuning=(), params=False):
    """Final losses of known spread: a plain arm, then one with momentum and a control each."""
    arms = ["plain", *(f"mu 0.9, {contrast}" for contrast in contrasts), "noise"]
    random = np.random.default_rng(0)
    loss = np.empty((len(arms), 2, SEEDS, STEPS), np.float32)
    loss[..., 0] = 3.0
    for i, spread in enumerate([1.0, *spreads, 1.0]):
        # The spread to the last digit, so that what is printed is known.
        ends = np.sort(random.normal(size=(2, SEEDS)))
        ends = (ends - ends.mean(1, keepdims=True)) / ends.std(1, keepdims=True)
        ends = random.permuted(ends, axis=1)
        loss[i, ..., 1:] = (1 + 0.1 * spread * ends)[..., None]
    for arm, seed in failed:
        loss[arm, 1, seed, 1:] = np.nan
    variables: dict[str, Any] = {
        "loss": (DIMENSIONS, loss),
        "kinetic_energy": (DIMENSIONS, np.ones_like(loss)),
    }
    if params:
        shape = (*loss.shape, 2)
        variables["params"] = ((*DIMENSIONS, "param"), random.uniform(-1, 1, shape).astype("f4"))
        variables["landscape"] = (("landscape_0", "landscape_1"), np.ones((5, 5), np.float32))
    provenance = {
        "date": "2026-01-01", "seconds": 12.3, "seeds": "0 to 39", "device": "2 x cpu",
        "versions": {"jax": "0.10.2"}, "command": "python -m momentum_jax.study --seeds 40",
    }  # fmt: skip
    dataset = xr.Dataset(
        variables,
        coords={
            "arm": arms,
            "init_scale": [1.0, 4.0],
            "seed": np.arange(SEEDS),
            "step": np.arange(STEPS),
            "mu": ("arm", [0.0, *[0.9] * len(contrasts), np.nan]),
        },
        attrs={
            "problem": "made <up>", "metric_name": "accuracy", "worst": 2.0, "solved_loss": 1.5,
            "solved_metric": np.nan, "programs": 3, "provenance": json.dumps(provenance),
            "tuning": json.dumps(list(tuning)),
            "contrasts": json.dumps(
                [
                    {"name": name, "plain": "plain", "arms": [f"mu 0.9, {name}", "noise"]}
                    for name in contrasts
                ]
            ),
        },
    )  # fmt: skip
    if params:
        axis = np.linspace(-1, 1, 5)
        dataset = dataset.assign_coords(landscape_0=axis, landscape_1=axis)
    return dataset


@pytest.mark.parametrize(
    ("spread", "verdict"),
    [(1.0, "It cannot be told"), (0.25, "It did: where"), (4.0, "No: where the spread clearly")],
)
def test_the_verdict_is_that_of_the_spread(spread, verdict):
    dataset = study([spread])
    said = answer(dataset, summarize(dataset))
    assert said.startswith(f"**{verdict}")
    assert "as a multiple of the plain arm's" in said
    assert re.search(r"lower loss in \d+% of pairs", said)
    assert f"mu 0.9, same effective rate: **{float(f'{spread:.3g}'):#.3g} [" in said
    ratio = f"{float(f'{spread:.3g}'):#.3g}"
    assert re.search(rf"the final loss spreads {re.escape(ratio)} \[.*\] times as much", said)
    clear = (2 if spread < 1 else 0), (2 if spread > 1 else 0)
    assert f"clearly narrower in {clear[0]} and clearly wider in {clear[1]} of 2" in said
    assert "noise" not in said  # A control is no momentum.


def test_all_contrasts_of_the_fairest_kind_have_the_word():
    names = ("same rate", "tuned, batch 8", "tuned, batch 16")
    dataset = study([4.0, 0.25, 1.0], contrasts=names)
    said = answer(dataset, summarize(dataset))
    assert said.startswith("**It did: where the spread clearly differs, momentum narrowed it.**")
    assert "equal budget.)" in said.splitlines()[0]


def test_one_arm_is_compared_with_nothing(tmp_path):
    dataset = study([1.0]).isel(arm=[0])
    dataset.attrs["contrasts"] = "[]"
    report(dataset, str(tmp_path))
    document = (tmp_path / "report.md").read_text()
    assert "**There is one arm, and nothing to compare it with.**" in document
    assert "Pairs of runs" not in document
    assert "1 arm, from 40 initial weights" in document


def test_few_runs_and_runs_that_diverged_are_said():
    dataset = study([1.0], failed=[(0, 0), (1, 3)]).isel(seed=slice(5))
    shown = text(dataset, summarize(dataset))
    assert "5 initial weights are too few to tell any difference: take 6 or more." in shown
    assert "2 of 30 runs diverged: they count as failed." in shown


def test_the_fairest_contrast_has_the_word():
    dataset = study([0.25, 4.0], contrasts=("same rate", "tuned"))
    said = answer(dataset, summarize(dataset))
    assert said.startswith("**No: where the spread clearly differs, momentum widened it.**")
    assert said.index("tuned on an equal budget") < said.index("At the same learning rate")


@pytest.fixture(scope="module", autouse=True)
def fewer_resamples():
    """In what `report` computes too. By its name: the package has a function called report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["momentum_jax.study.report"], "summarize", summarize)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    edge = {"arm": "mu 0.9", "init_scale": 4.0, "learning_rate": 0.1, "edge": "highest"}
    dataset = study(
        [0.5],
        failed=[(0, 0), (0, 1), (0, 2), (1, 3)],
        contrasts=("tuned",),
        tuning=[edge],
        params=True,
    )
    folder = tmp_path_factory.mktemp("report") / "new"
    return dataset, folder, report(dataset, folder)


def test_all_that_is_written_is_there_and_named(written):
    _, folder, paths = written
    assert sorted(path.name for path in paths) == sorted(path.name for path in folder.iterdir())
    assert {path.name for path in paths} == {
        "report.html",
        "report.md",
        "results.nc",
        "summary.json",
        "final-loss-tuned.png",
        "paired-tuned.png",
        "curves-tuned.png",
        "energy-rescued.png",
        "path-rescued.png",
    }  # Not of the lost run: it diverged.


def test_the_document_says_what_was_found_and_how(written):
    dataset, folder, _ = written
    document = (folder / "report.md").read_text()
    summary = summarize(dataset)
    assert answer(dataset, summary) in document
    row = next(line for line in document.splitlines() if line.startswith("| mu 0.9, tuned | x4"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[6:8] == ["3", "1"]  # Rescued and lost.
    for part in (
        "# Does momentum take the luck out of the initial weights?",
        "3 arms, each from 40 initial weights at 2 initial scales (x1, x4): 240 runs of 4 steps",
        "A run has solved the problem with a final loss of at most 1.5; else it has failed.",
        "a final loss above 2, or not finite, counts as that",
        "**The best learning rate of mu 0.9 at initial scale x4 is the highest of those that were",
        "exact McNemar",
        "python -m momentum_jax.study --seeds 40",
        "On 2 x cpu, 2026-01-01, in 12 s, 3 compiled training programs; seeds 0 to 39. jax 0.10.2.",
    ):
        assert part in document
    assert "nan" not in re.sub(r"\(.*?\)", "", document)
    for name in re.findall(r"!\[.*?\]\((.*?)\)", document):
        assert (folder / name).exists()


class Page(HTMLParser):
    """What a browser would look for outside, and what it would show."""

    def __init__(self):
        super().__init__()
        self.outside, self.images, self.tables = [], [], 0

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if value and name in ("src", "href", "srcset"):
                (self.images if value.startswith("data:") else self.outside).append(value)
        self.tables += tag == "table"


def test_the_page_is_one_file_with_its_pictures(written):
    _, folder, paths = written
    page = Page()
    html = (folder / "report.html").read_text()
    page.feed(html)
    assert page.outside == []
    assert len(page.images) == sum(path.suffix == ".png" for path in paths)
    for image in page.images:
        drawn = base64.b64decode(image.partition(",")[2]).decode()
        assert drawn.rstrip().endswith("</svg>")
        assert "prefers-color-scheme: dark" in drawn
        assert "#000000" not in drawn
    assert page.tables == 3
    assert "Problem: made &lt;up&gt;." in html
    assert "prefers-color-scheme: dark" in html


def test_the_numbers_are_strict_json(written):
    dataset, folder, _ = written

    def refuse(constant):
        raise AssertionError(constant)

    numbers = json.loads((folder / "summary.json").read_text(), parse_constant=refuse)
    assert numbers["answer"] == answer(dataset, summarize(dataset))
    assert numbers["comparisons"][1]["escape"]["rescued"] == 3
    assert numbers["provenance"]["device"] == "2 x cpu"
    xr.testing.assert_identical(xr.load_dataset(folder / "results.nc", engine="scipy"), dataset)


def test_a_study_written_twice_is_the_same(written, tmp_path):
    dataset, _, paths = written
    report(dataset, tmp_path)
    for path in paths:
        if path.suffix in (".md", ".html", ".json"):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_terminal_has_the_tables_and_the_warnings(written):
    dataset, _, _ = written
    shown = text(dataset, summarize(dataset))
    assert "**" not in shown
    assert "With the learning rate of each arm tuned on an equal budget:" in shown
    assert shown.endswith("a better one may lie beyond it.")
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1  # The columns line up.
