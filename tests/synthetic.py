"""Makes datasets of the form that `study.run` returns, without any training.

The distribution is simple and known. The final loss of a run is

    0.3 + exp(-12 * rate) + 0.05 * factor * (weights * a + order * b + interaction * c)

where rate is the effective learning rate, and a, b and c are standard normal draws of the seed, of
the order seed and of the pair of both. `factor` depends on the family. The draws of two arms or
scales have correlation 0.5. The edge of stability of a mu is the effective rate
stability_limit(mu) / (SHARPNESS * scale) / (1 - mu). Above it, half of the runs diverge (nan), and
the others end three times as high.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from momentum_jax import theory

# The largest eigenvalue of the Hessian at initial scale 1; proportional to the scale.
SHARPNESS = 4.0
STEPS = (0, 25, 50, 75, 100)
FAMILIES = {"mu 0": 0.0, "mu 0.9": 0.9, "mu 0.99": 0.99}
RATES = tuple(np.geomspace(0.01, 1.0, 9).tolist())


def arm_name(family: str, mu: float, rate: float) -> str:
    """Names the arm of a family at an effective rate, such as "mu 0.9 at 0.01"."""
    return f"{family} at {rate * (1 - (0 if math.isnan(mu) else mu)):.3g}"


def dataset(
    design: str = "crossed",
    *,
    seeds: int = 20,
    orders: int = 2,
    families: Mapping[str, float] = FAMILIES,
    rates: Sequence[float] = RATES,
    scales: Sequence[float] = (0.5, 1.0, 2.0),
    stds: Mapping[str, float] | None = None,
    proportions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    control: bool = True,
    recorded: bool = False,
    two_params: bool = False,
    diverged: bool = False,
    notes: Sequence[str] = (),
    problem: str = "synthetic",
) -> xr.Dataset:
    """Makes a synthetic study; see the module for its distribution.

    Args:
      design: "crossed", "paired" (no dimension `order_seed`), "weights" (one order seed) or
        "order" (one seed; `seeds` order seeds).
      seeds: number of units.
      orders: number of order seeds of the crossed design.
      families: the mu of each family, the baseline first; nan for an optimizer without mu.
      rates: the effective learning rates of each family; the middle one is the primary rate.
      scales: the initial scales.
      stds: factors on the standard deviation, by family; 1 if not given.
      proportions: the proportions of the variance due to weights, order and interaction.
      control: whether there is a control arm "noise" at the primary rate.
      recorded: whether sharpness and gradient norm are recorded.
      two_params: whether there are paths of two params and a landscape.
      diverged: whether every run diverges.
      notes: sentences that the report must show.
      problem: the name of the problem.

    Returns:
      A dataset with every variable, coordinate and attribute that `study.run` can return.
    """
    sizes = {"crossed": (seeds, orders), "order": (1, seeds)}.get(design, (seeds, 1))
    arms = [(name, mu, rate) for name, mu in families.items() for rate in rates]
    primary_rate = rates[len(rates) // 2]
    if control:
        arms.append(("noise", math.nan, primary_rate))
    names = [arm_name(*arm) for arm in arms]
    if control:
        names[-1] = "noise"
    weights, order, both = np.sqrt(proportions)
    random = np.random.default_rng(0)

    def draw():
        """Draws the random part of each run, with variance 1."""
        return (
            weights * random.normal(size=(sizes[0], 1))
            + order * random.normal(size=(1, sizes[1]))
            + both * random.normal(size=sizes)
        )

    common = draw()
    unstable = random.random(sizes) < 0.5
    loss = np.empty((len(arms), len(scales), *sizes, len(STEPS)))
    fall = np.linspace(0, 1, len(STEPS)) ** 0.3
    for i, (family, mu, rate) in enumerate(arms):
        edge = math.inf if math.isnan(mu) else theory.stability_limit(mu) / SHARPNESS / (1 - mu)
        factor = (stds or {}).get(family, 1.0)
        for j, scale in enumerate(scales):
            luck = math.sqrt(0.5) * (common + draw())
            end = 0.3 + math.exp(-12 * rate) + 0.05 * factor * luck
            if rate > edge / scale:
                end = np.where(unstable, np.nan, 3 * end)
            loss[i, j] = 2.3 + (end[..., None] - 2.3) * fall
            loss[i, j, ..., 0] = 2.3
    if diverged:
        loss[..., 1:] = np.nan
    dims = ("arm", "init_scale", "seed", "order_seed", "step")
    variables: dict[str, Any] = {
        "loss": (dims, loss),
        "accuracy": (dims, 1 - np.nan_to_num(loss, nan=2.3) / 2.5),
        "kinetic_energy": (dims, 0.1 * loss),
    }
    if recorded:
        variables |= {"sharpness": (dims, 10 / loss), "gradient_norm": (dims, loss**2)}
    if two_params:
        angle = np.linspace(0, 3, len(STEPS))
        path = np.stack([np.cos(angle), np.sin(angle)], -1) * loss[..., None] / 2.3
        variables |= {
            "params": ((*dims, "param"), path),
            "landscape": (("landscape_0", "landscape_1"), np.add.outer(*[GRID**2] * 2)),
        }
    if families and len(rates) > 1:
        near = np.minimum(np.nan_to_num(loss[..., 0, :1, -1], nan=2.3), 2.3)
        tuning = near + 0.01 * random.normal(size=(*near.shape[:2], 5))
        if control:
            tuning[-1] = np.nan
        variables["tuning_loss"] = (("arm", "init_scale", "tuning_seed"), tuning)
    sharpness = SHARPNESS * np.outer(scales, [0.9, 1.0, 1.2])
    variables["initial_sharpness"] = (("init_scale", "probe"), sharpness)
    found = xr.Dataset(
        {
            name: (of[0], np.asarray(of[1], np.float64 if name == "tuning_loss" else np.float32))
            for name, of in variables.items()
        },
        coords={
            "arm": names,
            "family": ("arm", [family for family, _, _ in arms]),
            "effective_rate": ("arm", [rate for _, _, rate in arms]),
            "learning_rate": ("arm", [rate * (1 - np.nan_to_num(mu)) for _, mu, rate in arms]),
            "restarts": ("arm", [1] * len(arms)),
            "batch_size": ("arm", [32] * len(arms)),
            "init_scale": list(scales),
            "seed": np.arange(sizes[0]),
            "order_seed": np.arange(sizes[1]),
            "step": list(STEPS),
            "steps_taken": (("arm", "step"), [STEPS] * len(arms)),
        },
        attrs={
            "problem": problem,
            "loss_cap": 2.3,
            "solved": json.dumps({"accuracy": 0.7}),
            "metrics": json.dumps([{"name": "accuracy", "larger_is_better": True}]),
            "contrasts": json.dumps(_contrasts(families, rates, primary_rate, control)),
            "primary": json.dumps(_primary(families, primary_rate)),
            "design": design,
            "provenance": json.dumps(
                {
                    "date": "2026-01-01",
                    "seconds": 12.3,
                    "device": "2 x cpu",
                    "versions": {"jax": "0.10.2"},
                    "command": "python -m momentum_jax.study --seeds 20",
                }
            ),
            "programs": 3,
            "notes": json.dumps(list(notes)),
        },
    )
    if not all(math.isnan(mu) for mu in families.values()):
        found = found.assign_coords(
            mu=("arm", [mu for _, mu, _ in arms]), nesterov=("arm", np.zeros(len(arms), np.int8))
        )
    if two_params:
        found = found.assign_coords(landscape_0=GRID, landscape_1=GRID)
    return found.isel(order_seed=0, drop=True) if design == "paired" else found


GRID = np.linspace(-1.5, 1.5, 7)


def _contrasts(families, rates, primary_rate, control):
    baseline, *others = families

    def record(kind, first, arms, rate):
        return {"kind": kind, "baseline": first, "arms": arms, "rate": rate}

    def name(family, rate):
        return arm_name(family, families[family], rate)

    found = []
    if others:
        for rate in rates:
            arms = [name(family, rate) for family in others]
            kind = "same rate" if math.isnan(families[baseline]) else "same effective rate"
            found.append(record(kind, name(baseline, rate), arms, rate))
        shown = {arm_name(each, mu, rate) for each, mu in families.items() for rate in rates}
        for rate in rates:
            first = name(baseline, rate)
            same = first.rpartition(" at ")[2]
            arms = [f"{each} at {same}" for each in others if f"{each} at {same}" in shown]
            if arms and any(families[each] > 0 for each in others):
                found.append(record("same rate", first, arms, rate))
        if len(rates) > 1:
            found.append(record("tuned", baseline, others, None))
    if control:
        found.append(record("control", name(baseline, primary_rate), ["noise"], primary_rate))
    return found


def _primary(families, rate):
    if len(families) < 2:
        return None
    baseline, arm = ((name, families[name], rate) for name in list(families)[:2])
    return {"arm": arm_name(*arm), "baseline": arm_name(*baseline), "margin": 0.1}
