"""Times contestants in rounds, and compares them by the median ratio within a round.

The speed of a machine drifts (clock rate, other processes, heat), so two libraries that are timed
one after the other are not comparable. Within one round all contestants have the same drift, and it
cancels in the ratio.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

# Performs a number of calls, and returns when the results are ready.
Run = Callable[[int], object]
Result = TypeVar("Result")


def interleave(
    contestants: Mapping[str, Run],
    rounds: int,
    sample_seconds: float,
    before_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Returns seconds per call: one sample per contestant and round, in random order.

    A sample has enough calls to take at least about `sample_seconds`, so that the cost and the
    resolution of the clock do not matter.

    Args:
      contestants: the runs to time, by name.
      rounds: the number of rounds.
      sample_seconds: the duration of a sample in seconds.
      before_round: called before each round, not timed.
    """
    calls = {name: _enough_calls(run, sample_seconds) for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        before_round()
        shuffle(order)
        for name in order:
            # Not timed: fills the caches with this contestant's data; other threads go to sleep.
            contestants[name](calls[name])
            seconds[name].append(timed(contestants[name], calls[name])[0] / calls[name])
    return seconds


def timed(function: Callable[..., Result], *args: Any) -> tuple[float, Result]:
    """Returns the seconds that `function(*args)` takes, and its result."""
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
    """Returns the minimum, the median and the quartiles."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return {"min": min(samples), "lower_quartile": lower, "median": median, "upper_quartile": upper}


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Returns the median of the ratios within a round, with a confidence interval.

    The interval is between two order statistics of the ratios. The number of ratios below the true
    median is binomial for any distribution of the ratios. The interval is the narrowest that covers
    at least 95%. With fewer than 6 rounds it is from the minimum to the maximum, and covers less;
    `coverage` is the coverage.
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
    """Summarizes ours and another contestant, with the paired ratio and a verdict on the target."""
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
