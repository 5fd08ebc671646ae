"""Lists the pairs of arms to compare at each initial scale, tuned arms too."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xarray as xr

from momentum_jax.study import contrasts as plan
from momentum_jax.study import statistics

# Number of bootstrap draws of the tuning seeds.
REDRAWN = 2000
TUNED = ("tuned", "tuned, rate alone", "tuned, method alone")


class Pair(NamedTuple):
    """An arm and the baseline that it is compared with.

    Attributes:
      contrast: the kind of the contrast, as in the table.
      arm: the name of the arm, or of its family if tuned.
      baseline: the name of the baseline, or of its family if tuned.
      arms: the index of the arm at each scale; -1 if there is none.
      baselines: the index of the baseline at each scale; -1 if there is none.
      drawn: the arms and baselines that each draw of the tuning seeds would have chosen, as
        indices (draw, 2, scale); None if the arms were not tuned.
    """

    contrast: str
    arm: str
    baseline: str
    arms: np.ndarray
    baselines: np.ndarray
    drawn: np.ndarray | None = None


def key(pair: Pair) -> tuple[str, str, str]:
    """Returns a key that is equal for equal comparisons."""
    return (pair.contrast if pair.contrast in TUNED else "", pair.arm, pair.baseline)


def is_primary(pair: Pair, primary: plan.Primary | None) -> bool:
    """Says whether a pair is the primary comparison."""
    return primary is not None and key(pair) == ("", primary.arm, primary.baseline)


def coordinate(dataset: xr.Dataset, name: str) -> np.ndarray:
    """Returns a coordinate as one number per arm; nan if the arm has none."""
    if name not in dataset.coords:
        return np.full(dataset.sizes["arm"], math.nan)
    return np.asarray(dataset[name].values, float)


def every_pair(dataset: xr.Dataset) -> Iterator[Pair]:
    """Yields every comparison of every contrast, and the primary one last if no contrast has it."""
    primary = plan.primary(dataset)
    best = _tuned(dataset)
    waiting = primary is not None
    names = [str(arm) for arm in dataset.arm.values]

    def fixed(contrast, arm, baseline):
        places = [
            np.full(dataset.sizes["init_scale"], names.index(name)) for name in (arm, baseline)
        ]
        return Pair(contrast, arm, baseline, *places)

    for contrast in plan.contrasts(dataset):
        for arm in contrast.arms:
            if contrast.kind != "tuned":
                pair = fixed(contrast.kind, arm, contrast.baseline)
                waiting = waiting and not is_primary(pair, primary)
                yield pair
            elif arm in best and contrast.baseline in best:
                yield from _split(dataset, best, arm, contrast.baseline)
    if waiting and primary is not None:
        yield fixed("arms", primary.arm, primary.baseline)


def _tuned(dataset):
    """By family, the index of the arm with the best rate: (1 + draw, scale).

    The first row is the choice of the actual tuning seeds; the others are bootstrap draws.
    """
    if "tuning_loss" not in dataset:
        return {}
    losses = dataset.tuning_loss.transpose("arm", "init_scale", "tuning_seed").values
    seeds = losses.shape[-1]
    drawn = np.random.default_rng(1).integers(0, seeds, (REDRAWN, seeds))
    trials = np.concatenate([np.arange(seeds)[None], drawn])
    tuned = np.isfinite(losses).all((1, 2))
    families = np.array([str(family) for family in dataset.family.values])
    best = {}
    for family in dict.fromkeys(families[tuned]):
        [members] = np.nonzero(tuned & (families == family))
        found = [statistics.interquartile_mean(losses[arm][:, trials]) for arm in members]
        best[str(family)] = members[np.argmin(found, 0)].T
    return best


def _split(dataset, best, arm, baseline):
    """The tuned comparison, and its two factors: rate alone and method alone."""
    rates = coordinate(dataset, "effective_rate")
    [members] = np.nonzero(dataset.family.values.astype(str) == baseline)
    same = np.isclose(rates[:, None], rates[None, members], rtol=1e-3, atol=0)
    control = np.where(same.any(1), members[same.argmax(1)], -1)[best[arm]]
    for contrast, ours, theirs in (
        (TUNED[0], best[arm], best[baseline]),
        (TUNED[1], control, best[baseline]),
        (TUNED[2], best[arm], control),
    ):
        drawn = np.stack([ours[1:], theirs[1:]], 1)
        yield Pair(contrast, arm, baseline, ours[0], theirs[0], drawn)
