"""`python -m benchmarks.spread_tests`: measures the error rates of the study's tests.

The studies are simulated, so the true answers are known. A test at the 5% level should find a
difference between equal standard deviations in 5% of the studies, and between unequal ones in many.
A 95% interval should cover the truth in 95% of the studies.
"""

import argparse
import datetime
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import stats

from momentum_jax.study import components, spread_tests, statistics

RESULT = pathlib.Path(__file__).parent / "results" / "spread-tests.json"
UNITS, CORRELATIONS, DRAWS = (20, 50, 100), (0.5, 0.9), 999
# The index of the 95% quantile among sorted draws.
PLACE = math.ceil(0.95 * (1 + DRAWS)) - 1
LAWS = ("normal", "t3", "lognormal", "10% failed", "5% capped")
EQUAL = tuple((law, law, 1.0) for law in LAWS)
SHAPES = tuple(("normal", law, 1.0) for law in ("5% capped", "t3", "lognormal"))
POWER = tuple((law, law, ratio) for ratio in (0.7, 0.5) for law in LAWS[:4])
# Scales, replicates, and the proportion of the variance of one run that is due to the weights.
ONE, THREE = (1, 1, 1.0), (3, 1, 1.0)
CROSSED = ((1, 2, 0.5), (1, 2, 0.25), (1, 16, 0.25))
CHOSEN, EXCHANGE = "studentized bootstrap", "permutation about medians"


def of_law(normal: np.ndarray, law: str, random: np.random.Generator) -> np.ndarray:
    """Transforms standard normal values to a distribution with standard deviation 1.

    For "10% failed" and "5% capped", this proportion is 2.3 before scaling, and the others are near
    0.3.
    """
    if law == "normal":
        return normal
    if law == "t3":
        return stats.t.ppf(stats.norm.cdf(normal), 3) / math.sqrt(3)
    if law == "lognormal":
        return np.exp(normal) / math.sqrt(math.e * (math.e - 1))
    proportion = {"10% failed": 0.1, "5% capped": 0.05}[law]
    near = 0.3 + 0.05 * random.normal(size=normal.shape)
    deviation = math.sqrt(proportion * (1 - proportion) * 4 + (1 - proportion) * 0.05**2)
    return np.where(normal > stats.norm.ppf(1 - proportion), 2.3, near) / deviation


def study(random: np.random.Generator, cell: tuple, units: int, shape: tuple, correlation: float):
    """Simulates the final values of two arms, (2, scale, unit, replicate)."""
    scales, replicates, proportion = shape

    def normal(*size: int) -> np.ndarray:
        shared, own = random.normal(size=(1, *size)), random.normal(size=(2, *size))
        return math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own

    of_units = normal(scales, units, 1)
    values = np.stack([of_law(*each, random) for each in zip(of_units, cell[:2], strict=True)])
    if replicates > 1:
        values = values + normal(scales, units, replicates) * math.sqrt(1 / proportion - 1)
    return values * np.array([cell[2], 1]).reshape(2, 1, 1, 1)


def decided(value: float, error: float, law: np.ndarray, truth: float) -> tuple[bool, bool]:
    """Returns whether a difference is found, and whether the interval covers the truth."""
    half = error * np.sort(np.nan_to_num(law, nan=0.0))[PLACE]
    return bool(abs(value) > half), bool(abs(value - truth) <= half)


def chosen_tests(values: np.ndarray, ratio: float) -> dict[str, tuple[bool, bool | None]]:
    """Runs the two tests that the study uses."""
    scales, units = values.shape[1:3]
    swapped = spread_tests.swaps(units, DRAWS)
    p = spread_tests.exchange_p(values[0], values[1], swapped)
    found: dict[str, Any] = {EXCHANGE: (p < 0.05, None)}
    value, influence = statistics.log_std(values)
    value = (value[0] - value[1]).mean()
    if np.isfinite(value):
        error = float((influence[0] - influence[1]).mean(0).std(ddof=1)) / math.sqrt(units)
        law = spread_tests.bootstrap_reference(
            influence.reshape(-1, units),
            np.repeat([1.0, -1.0], scales) / scales,
            spread_tests.resampled(units, DRAWS),
        )
        found[CHOSEN] = decided(value, error, law, math.log(ratio))
    return found


def other_tests(values: np.ndarray, ratio: float) -> dict[str, tuple[bool, bool | None]]:
    """Runs the candidate tests that the study does not use, at one scale with one replicate."""
    arm, baseline = values[:, 0]
    units = len(arm)
    value, influence = statistics.log_std(values[:, 0])
    if not np.isfinite(value).all():
        return {}
    value = value[0] - value[1]
    error = float(np.std(influence[0] - influence[1], ddof=1)) / math.sqrt(units)
    student = spread_tests.t_reference(units - 1.0, DRAWS)
    found: dict[str, Any] = {"log ratio against t": decided(value, error, student, math.log(ratio))}
    # Squared residuals, scaled to equal variance and swapped: means, mean squares and product.
    ours, theirs = 1 + 2 * influence
    swapped = spread_tests.swaps(units, DRAWS)

    def both(power: int) -> np.ndarray:
        moved = swapped @ (theirs**power - ours**power)
        return np.stack([np.sum(ours**power) + moved, np.sum(theirs**power) - moved]) / units

    means, squares, product = both(1), both(2), np.mean(ours * theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        away = (squares / means**2).sum(0) - 2 * product / means.prod(0)
        law = np.abs(np.log(means[0] / means[1])) / np.sqrt(away / (units - 1))
        found["studentized permutation, log ratio"] = decided(value, error, law, math.log(ratio))
        away = squares.sum(0) - 2 * product - (means[0] - means[1]) ** 2
        law = np.abs(means[0] - means[1]) / np.sqrt(away / (units - 1))
    limit = np.sort(np.nan_to_num(law, nan=0.0))[PLACE]

    def distance(ratio: float) -> float:
        parts = statistics.variances(arm) / ratio**2 - statistics.variances(baseline)
        test: Any = stats.ttest_1samp(parts, 0)
        return abs(float(test.statistic))

    found["studentized permutation, difference"] = (distance(1) > limit, distance(ratio) <= limit)
    far = np.abs(values[:, 0, :, 0] - np.median(values, 2)[:, 0])
    brown_forsythe: Any = stats.ttest_rel(*far)
    found["Brown-Forsythe within pairs"] = (bool(brown_forsythe.pvalue < 0.05), None)
    return found


def measure_tests(studies: int, cells: tuple, shape: tuple) -> Iterator[dict[str, Any]]:
    """Measures how often each test finds a difference, and how often its interval covers."""
    for units in UNITS:
        for cell in cells:
            for correlation in CORRELATIONS:
                random = np.random.default_rng([units, round(10 * correlation)])
                counted: dict[str, list] = {}
                for _ in range(studies):
                    values = study(random, cell, units, shape, correlation)
                    found = chosen_tests(values, cell[2])
                    if shape == ONE:
                        found |= other_tests(values, cell[2])
                    for name, answers in found.items():
                        counted.setdefault(name, []).append(answers)
                names = (
                    "arm",
                    "baseline",
                    "ratio",
                    "scales",
                    "replicates",
                    "proportion_of_weights",
                )
                for name, answers in counted.items():
                    finds, covers = zip(*answers, strict=True)
                    yield {
                        **dict(zip(names, (*cell, *shape), strict=True)),
                        "pairs": units,
                        "correlation": correlation,
                        "test": name,
                        # An undefined ratio counts as no difference found.
                        "finds": round(sum(finds) / studies, 4),
                        "covers": None if None in covers else round(float(np.mean(covers)), 4),
                        "undefined": round(1 - len(answers) / studies, 4),
                    }


def measure_intervals(studies: int) -> Iterator[dict[str, Any]]:
    """Measures how often the other intervals of the study cover the truth."""
    normal = stats.norm.ppf((np.arange(1_000_000) + 0.5) / 1_000_000)
    for law in LAWS:
        mean = of_law(normal, law, np.random.default_rng(0)).mean()
        for units in UNITS:
            random = np.random.default_rng(units)
            counts = spread_tests.resampled(units, DRAWS)
            hits: dict[str, list[bool]] = {}
            for _ in range(studies):
                values = study(random, (law, law, 1.0), units, ONE, 0.5)[:, 0]
                for name, (value, influence), degrees in (
                    ("ratio of 10-90% ranges", statistics.log_range(values), units - 1),
                    (
                        "difference of interquartile means",
                        statistics.middle(values),
                        units - 2 * (units // 4) - 1,
                    ),
                ):
                    away = influence[0] - influence[1]
                    half = stats.t.ppf(0.975, degrees) * away.std(ddof=1) / math.sqrt(len(away))
                    hits.setdefault(name, []).append(abs(value[0] - value[1]) <= half)
                low, high = statistics.bootstrap(np.mean, values[0])
                hits.setdefault("mean, BCa", []).append(low <= mean <= high)
                value, influence = statistics.log_std(values[0])
                if np.isfinite(value):
                    law_of_t = spread_tests.bootstrap_reference(influence[None], np.ones(1), counts)
                    error = float(influence.std(ddof=1)) / math.sqrt(units)
                    covers = decided(float(value), error, law_of_t, 0.0)[1]
                    hits.setdefault("standard deviation", []).append(covers)
            for name, each in hits.items():
                covers = round(float(np.mean(each)), 4)
                yield {"law": law, "units": units, "interval": name, "covers": covers}


def measure_components(studies: int) -> Iterator[dict[str, Any]]:
    """Measures how often the intervals of the variance proportions cover the truth."""
    for weights in (16, 50):
        for orders in (2, 4, 16):
            for law in LAWS[:4]:
                for truth in ((0.9, 0.05, 0.05), (0.25, 0.12, 0.63), (0.05, 0.0, 0.95)):
                    random = np.random.default_rng([weights, orders])
                    covers = []
                    for _ in range(studies):
                        sizes = (weights, 1), (1, orders), (weights, orders)
                        effects = (of_law(random.normal(size=size), law, random) for size in sizes)
                        values = np.asarray(
                            sum(
                                math.sqrt(part) * effect
                                for part, effect in zip(truth, effects, strict=True)
                            )
                        )
                        _, low, high = components.proportions(values)
                        if np.isfinite(low).all():
                            covers.append((low <= truth) & (truth <= high))
                    yield {
                        "weights": weights,
                        "orders": orders,
                        "law": law,
                        "proportions": truth,
                        "covers": np.round(np.mean(covers, 0), 4).tolist(),
                    }


def print_tests(rows: list[dict[str, Any]]) -> None:
    """Prints one line per cell: per cent found (covered), for correlations 0.5 and 0.9."""
    names = list(dict.fromkeys(row["test"] for row in rows))
    print("".join(f"\n  {place + 1}: {name}" for place, name in enumerate(names)))
    cells: dict[tuple, dict] = {}
    for row in rows:
        shape = (row["scales"], row["replicates"], row["proportion_of_weights"])
        cell = (row["pairs"], row["arm"], row["baseline"], row["ratio"], shape)
        cells.setdefault(cell, {})[row["test"], row["correlation"]] = row
    for (pairs, arm, baseline, ratio, shape), found in cells.items():
        texts = []
        for name in names:
            both = [found[name, each] for each in CORRELATIONS if (name, each) in found]
            finds = "/".join(f"{100 * row['finds']:.0f}" for row in both)
            covers = "/".join(f"{100 * row['covers']:.0f}" for row in both if row["covers"])
            texts.append(f"{finds}{f' ({covers})' if covers else '':11}".ljust(18))
        print(f"{pairs:4} {arm:>10} | {baseline:<10} {ratio} {shape!s:14}", *texts)


def _range(values: list[float]) -> str:
    low, high = (round(100 * bound) for bound in (min(values), max(values)))
    return f"{low}" if low == high else f"{low}-{high}"


def short_table(rows: list[dict[str, Any]]) -> list[str]:
    """Formats per cent found by the two tests of the study, with 20, 50 and 100 pairs."""
    lines = []
    for cell in (*EQUAL, *SHAPES, *POWER[:4]):
        name = cell[0] if cell[0] == cell[1] else f"{cell[0]} against {cell[1]}"
        if cell[2] != 1:
            name = f"{name}, ratio {cell[2]}"
        texts = []
        for test in (CHOSEN, EXCHANGE):
            for pairs in UNITS:
                wanted = (*cell, *ONE, pairs, test)
                keys = ("arm", "baseline", "ratio", "scales", "replicates", "proportion_of_weights")
                found = [
                    row["finds"]
                    for row in rows
                    if tuple(row[key] for key in (*keys, "pairs", "test")) == wanted
                ]
                texts.append(f"{_range(found):>8}")
        lines.append(f"{name:<26}" + "".join(texts))
    return lines


def short_components(rows: list[dict[str, Any]]) -> list[str]:
    """Formats per cent of covering intervals of the weights' proportion, with 2, 4, 16 orders."""
    lines = []
    for law in LAWS[:4]:
        found = [
            [row["covers"][0] for row in rows if (row["law"], row["orders"]) == (law, orders)]
            for orders in (2, 4, 16)
        ]
        lines.append(f"{law:<12}" + "".join(f"{_range(each):>8}" for each in found))
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the results and writes them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spread_tests", description=__doc__)
    parser.add_argument(
        "--studies", type=int, default=600, metavar="N", help="number of studies (%(default)s)"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULT, metavar="FILE")
    options = parser.parse_args(arguments)
    studies = options.studies
    tests = list(measure_tests(studies, EQUAL + SHAPES + POWER, ONE))
    print_tests(tests)
    several = list(measure_tests(studies, EQUAL + SHAPES + POWER[:2], THREE))
    for shape in CROSSED:
        several += measure_tests(studies, (*EQUAL[:3], SHAPES[2], POWER[0], POWER[4]), shape)
    print_tests(several)
    other = list(measure_intervals(studies))
    parts = list(measure_components(max(studies // 4, 1)))
    for row in (*other, *parts):
        print(*row.values())
    result = {
        "date": str(datetime.date.today()),
        "studies": studies,
        "draws": DRAWS,
        "tests": tests + several,
        "intervals": other,
        "components": parts,
    }
    lines = ",\n".join(
        f"{json.dumps(name)}: "
        + (
            "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
            if isinstance(value, list)
            else json.dumps(value)
        )
        for name, value in result.items()
    )
    options.out.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
