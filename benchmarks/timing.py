"""The method: rounds in which all contestants take part, medians, and ratios within a round.

A machine's speed drifts (clocks, neighbours, heat), so two libraries timed one after the other
are not comparable. Timed in the same round they meet the same drift, and it cancels in the
ratio of that round.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

# Performs so many calls, and returns when their results are there.
Run = Callable[[int], object]
Result = TypeVar("Result")


def interleave(
    contestants: Mapping[str, Run],
    rounds: int,
    sample_seconds: float,
    before_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds a call: for each contestant one sample a round, in a random order each round.

    A sample is as many calls as take about `sample_seconds` or more, so that the clock's own
    cost and grain do not matter.
    """
    calls = {name: _enough_calls(run, sample_seconds) for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        before_round()
        shuffle(order)
        for name in order:
            # Untimed: the caches fill with this one's data, the other's threads go to sleep.
            contestants[name](calls[name])
            seconds[name].append(timed(contestants[name], calls[name])[0] / calls[name])
    return seconds


def timed(function: Callable[..., Result], *args: Any) -> tuple[float, Result]:
    """Seconds that `function(*args)` takes, and its result."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def _enough_calls(run: Run, sample_seconds: float) -> int:
    run(1)  # Compiles.
    calls = 1
    while timed(run, calls)[0] < sample_seconds:
        calls *= 2
    return calls


def summary(samples: Sequence[float]) -> dict[str, float]:
    """The least, the median and the quartiles."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return {"min": min(samples), "lower_quartile": lower, "median": median, "upper_quartile": upper}


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The median of the ratios within each round, with an interval for it.

    The interval is made of order statistics: the number of ratios below the true median is
    binomial, whatever their distribution. It is the narrowest that covers at least 95%, or
    from the least to the greatest where there are fewer than 6 rounds; `coverage` says which.
    """
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    n = len(ratios)

    def coverage(cut: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(cut + 1)) / 2**n

    cut = 0
    while coverage(cut + 1) >= 0.95:
        cut += 1
    return {
        "median": statistics.median(ratios),
        "low": ratios[cut],
        "high": ratios[n - 1 - cut],
        "coverage": coverage(cut),
    }


def compare(
    seconds: Mapping[str, Sequence[float]], other: str, target: float | None = None
) -> dict[str, Any]:
    """Ours and another's summaries and their paired ratio, judged by a target if it has one."""
    ratio = paired_ratio(seconds["ours"], seconds[other])
    result: dict[str, Any] = {
        "ours": summary(seconds["ours"]),
        other: summary(seconds[other]),
        "ratio": ratio,
    }
    if target is not None:
        result["target"] = target
        result["reached"] = ratio["median"] <= target
        result["within_noise"] = ratio["low"] <= target <= ratio["high"]
    return result
