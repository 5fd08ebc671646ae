"""`python docs/picture.py` draws the README's picture: what momentum does, and to luck.

On the left the README's example, with and without momentum; on the right how wide the final test
loss is spread over the initial weights, from the committed `study/*/summary.json`. The picture
holds the numbers that it was drawn from, by which a test finds one that is out of date.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import momentum_jax as mj
from momentum_jax.study import plots

DOCS = Path(__file__).parent
PICTURE = DOCS / "_static" / "momentum.png"
CONTRASTS = ("same rate", "same effective rate", "tuned")
PROBLEMS = {"digits": "digits", "mnist1d": "MNIST-1D"}


def ravine(w):
    """The loss of the README's example."""
    return w[0] ** 2 / 2 + 10 * w[1] ** 2


def walk(mu, steps=60):
    """The params after each step."""
    tx = mj.momentum(0.02, mu)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(ravine)(w), state)
        w = mj.apply_updates(w, updates)
        return (w, state), w

    start = jnp.array([4.0, 1.0])
    _, path = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return jnp.concatenate([start[None], path])


def spreads(problem):
    """By contrast, the ratio of spreads with mu 0.9 to that without momentum: low, value, high."""
    summary = json.loads((DOCS / "study" / problem / "summary.json").read_text())
    return {
        row["contrast"]: [row["spread"]["ratio"][key] for key in ("low", "value", "high")]
        for row in summary["pooled_comparisons"] or summary["comparisons"]
        if row["arm"].startswith("mu 0.9 at") or row["arm"] == "mu 0.9, tuned"
    }


def numbers():
    """All that the picture shows: the path without momentum and with it, and the spreads."""
    return {
        "paths": {f"mu {mu}": walk(mu).tolist() for mu in (0, 0.9)},
        "spreads": {problem: spreads(problem) for problem in PROBLEMS},
    }


def main():
    """Both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    drawn = numbers()
    plots.path(ravine, {k: jnp.array(v) for k, v in drawn["paths"].items()}, left).legend()
    left.set_title("A ravine, 60 steps at learning rate 0.02", fontsize=10)

    for place, (problem, label) in enumerate(PROBLEMS.items()):
        found = drawn["spreads"][problem]
        low, value, high = zip(*(found[contrast] for contrast in CONTRASTS), strict=True)
        at = [y + 0.12 * (2 * place - 1) for y in range(len(CONTRASTS))]
        right.errorbar(
            value,
            at,
            xerr=[
                [v - x for v, x in zip(value, low, strict=True)],
                [x - v for v, x in zip(value, high, strict=True)],
            ],
            fmt="os"[place],
            capsize=3,
            label=label,
        )
    right.axvline(1, color="0.5", linewidth=1, linestyle="--")
    right.set_xscale("log")
    right.set_xticks([0.25, 0.5, 1, 2, 3], ["0.25", "0.5", "1", "2", "3"])
    right.minorticks_off()
    right.set_ylim(len(CONTRASTS) - 0.5, -0.5)
    right.set_yticks(
        range(len(CONTRASTS)),
        ["same\nlearning rate", "same effective\nlearning rate", "each tuned"],
    )
    right.set_xlabel("spread over 100 initial weights, mu 0.9 / mu 0")
    right.set_title("Does it take the luck out of the initial weights?", fontsize=10)
    right.legend()
    figure.savefig(PICTURE, dpi=110, metadata={"Description": json.dumps(drawn)})


if __name__ == "__main__":
    main()
