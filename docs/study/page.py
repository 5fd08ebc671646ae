"""`python docs/study/page.py` writes index.md and ratios.png from the committed numbers.

The template is index.md.j2. Every number on the page comes from `docs/study/*/numbers.json`,
through the functions below. A test checks that the committed page is what this script writes.
"""

import json
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from momentum_jax.study import plots
from momentum_jax.study._answers import is_ratio

HERE = Path(__file__).parent
PAGE = HERE / "index.md"

# The problems with networks, and their names on the page.
NETWORKS = {
    "digits": "Digits, MLP with one hidden layer",
    "deep-mlp": "Digits, MLP with eight hidden layers",
    "mnist1d": "MNIST-1D, convolutional network",
    "mnist-conv": "MNIST, convolutional network with BatchNorm",
    "sequence": "Generated sequences, transformer",
}


class Numbers:
    """The numbers of one study."""

    def __init__(self, name: str) -> None:
        """Reads the numbers.json of a study."""
        self.all = json.loads((HERE / name / "numbers.json").read_text())
        self.verdict = self.all["verdict"]
        self.primary = self.all["primary"]
        self.sizes = self.all["sizes"]
        self.steps = self.all["steps"]

    def rows(self, table, **chosen):
        """Yields the rows of a table that have these values."""
        columns = self.all[table]
        for row in zip(*columns.values(), strict=True):
            fields = dict(zip(columns, row, strict=True))
            if all(fields[name] == value for name, value in chosen.items()):
                yield fields

    def row(self, table, **chosen):
        """Returns the only row that has these values."""
        found = list(self.rows(table, **chosen))
        assert len(found) == 1, (chosen, len(found))
        return found[0]

    def compared(self, arm, baseline, scale=None, question="std", contrast=None):
        """Returns one comparison; if no contrast is given, from the first one that has it."""
        chosen = dict(arm=arm, baseline=baseline, scale=scale, question=question)
        if contrast is not None:
            chosen["contrast"] = contrast
        return next(self.rows("comparisons", **chosen))

    def ratio(self, *which, **how):
        """Formats a value with its adjusted interval; unadjusted for the primary comparison."""
        row = self.compared(*which, **how)
        combined = row["scale"] is None and row["question"] == "std"
        is_primary = combined and (row["arm"], row["baseline"]) == (
            self.primary["arm"],
            self.primary["baseline"],
        )
        names = ("low", "high") if is_primary else ("adjusted_low", "adjusted_high")
        value, low, high = (row[name] for name in ("value", *names))
        if value is None:
            return "undefined"
        if is_ratio(row["question"]) and (not low or not high or high > 1000 * low):
            return f"{three_digits(value)} (interval too wide)"
        return f"{three_digits(value)} [{three_digits(low)}, {three_digits(high)}]"

    def count(self, *which, **how):
        """Returns a count, such as the number of rescued pairs."""
        return int(self.compared(*which, **how)["value"])

    def clearest(self, family="mu 0.9"):
        """Returns the smallest ratio of all runs among those whose adjusted interval is below 1."""
        found = self.ratios(family, question="total std")
        below = [row for row in found if row["adjusted_high"] and row["adjusted_high"] < 1]
        return min(below, key=lambda row: row["value"], default=None)

    def interval(self, *which, **how):
        """Formats the adjusted interval of a comparison."""
        row = self.compared(*which, **how)
        return f"[{three_digits(row['adjusted_low'])}, {three_digits(row['adjusted_high'])}]"

    def solved(self, arm, scale):
        """Says how many of the runs were solved."""
        failed = self.row("arms", arm=arm, scale=scale, measure="failed")["value"]
        runs = self.sizes["seed"] * self.sizes.get("order_seed", 1)
        return f"{round((1 - failed) * runs)} of {runs}"

    def tuned_rate(self, family, scale):
        """Returns the effective learning rate that tuning chose."""
        [rate] = [
            row["rate"]
            for row in self.all["tuned_rates"]
            if (row["family"], row["scale"]) == (family, scale)
        ]
        return rate

    def tuned_arm(self, family, scale):
        """Returns the name of the arm at its tuned rate."""
        rate = self.tuned_rate(family, scale)
        arms = self.rows("arms", family=family, effective_rate=rate, scale=scale, measure="std")
        return next(arms)["arm"]

    def proportion(self, arm, scale, source="weights"):
        """Formats a proportion of the variance with its interval."""
        row = self.row("components", arm=arm, scale=scale, source=source)
        return f"{row['proportion']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"

    def described(self, arm, scale, measure):
        """Formats a measure of one arm."""
        return three_digits(self.row("arms", arm=arm, scale=scale, measure=measure)["value"])

    def ratios(self, family, base="mu 0", contrast="same effective rate", question="std"):
        """Returns the rows that compare two families over all scales, one per effective rate."""
        arms = {row["arm"]: row["family"] for row in self.rows("arms")}
        return [
            row
            for row in self.rows("comparisons", contrast=contrast, scale=None, question=question)
            if arms[row["arm"]] == family and arms[row["baseline"]] == base
        ]


def three_digits(value):
    """Formats a number with three significant digits."""
    if value is None:
        return "undefined"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def draw() -> None:
    """Draws the ratios of all networks against the effective learning rate, as ratios.png."""
    figure = Figure((9, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhspan(1 / 1.1, 1.1, color="0.9", label="equivalent: 0.909 to 1.1")
    axes.axhline(1, color="0.5", linewidth=0.8)
    for place, (name, title) in enumerate(NETWORKS.items()):
        found = Numbers(name).ratios("mu 0.9")
        rows = [row for row in found if row["adjusted_low"] and row["adjusted_high"]]
        value, low, high = (
            [row[c] for row in rows] for c in ("value", "adjusted_low", "adjusted_high")
        )
        bars = [
            [v - x for v, x in zip(value, low, strict=True)],
            [x - v for v, x in zip(value, high, strict=True)],
        ]
        at = [row["effective_rate"] * 1.05 ** (place - 2) for row in rows]
        looks = {"color": plots.COLORS[place], "marker": "os^Dv"[place]}
        axes.errorbar(at, value, bars, ms=5, lw=0.8, capsize=2, label=title, **looks)
    axes.set(xscale="log", yscale="log", ylim=(0.3, 3.3))
    axes.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    axes.set_yticks([0.3, 0.5, 0.7, 1, 1.5, 2, 3])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("effective learning rate, learning_rate / (1 - mu)")
    axes.set_ylabel("standard deviation due to the weights,\nmu 0.9 / mu 0")
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(HERE / "ratios.png", dpi=110)


def render() -> str:
    """Returns the text of the page."""
    names = [path.parent.name for path in HERE.glob("*/numbers.json")]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["three_digits"] = three_digits
    template = environment.get_template("index.md.j2")
    of = {name: Numbers(name) for name in names}
    most_steps = max(of[name].steps for name in NETWORKS)
    return template.render(networks=NETWORKS, of=of, most_steps=most_steps)


if __name__ == "__main__":
    draw()
    PAGE.write_text(render())
