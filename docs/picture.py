"""`python docs/picture.py` draws the README's picture: what momentum does, and to the spread.

On the left the README's example, with and without momentum; on the right how much the final loss
on digits varies across initial weights, against the effective learning rate, from the committed
`study/digits/numbers.json`. The picture holds the numbers that it was drawn from, by which a test
finds one that is out of date.
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
FAMILIES = ("mu 0", "mu 0.9")
SCALE = 1.0


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


def spreads(found, family):
    """By effective learning rate, the spread over the initial weights: [low, value, high]."""
    table = found["arms"]
    rows = zip(*(table[name] for name in table), strict=True)
    chosen = (dict(zip(table, row, strict=True)) for row in rows)
    return {
        f"{row['effective_rate']:g}": [row["low"], row["value"], row["high"]]
        for row in chosen
        if (row["family"], row["scale"], row["measure"]) == (family, SCALE, "spread")
    }


def numbers():
    """All that the picture shows: the paths, the spreads, and the edge for plain descent."""
    found = json.loads((DOCS / "study" / "digits" / "numbers.json").read_text())
    return {
        "paths": {f"mu {mu}": walk(mu).tolist() for mu in (0, 0.9)},
        "spreads": {family: spreads(found, family) for family in FAMILIES},
        "edge": mj.theory.stability_limit(0.0) / found["initial_sharpness"][f"{SCALE:g}"],
    }


def main():
    """Both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    drawn = numbers()
    plots.path(ravine, {k: jnp.array(v) for k, v in drawn["paths"].items()}, left).legend()
    left.set_title("A ravine, 60 steps at learning rate 0.02", fontsize=10)

    for family, found, marker, color in zip(
        FAMILIES, drawn["spreads"].values(), "os", plots.COLORS, strict=False
    ):
        # Beyond the edge nearly all runs end at the loss cap.
        below = {float(x): y for x, y in found.items() if float(x) < drawn["edge"]}
        low, value, high = zip(*below.values(), strict=True)
        bars = [
            [v - x for v, x in zip(value, low, strict=True)],
            [x - v for v, x in zip(value, high, strict=True)],
        ]
        right.errorbar(
            list(below), value, bars, marker=marker, color=color, capsize=3, ms=5, label=family
        )
    right.axvline(drawn["edge"], color="0.4", linestyle=":", label="edge of stability, mu 0")
    right.set(xscale="log", yscale="log", xlim=(0.016, 2.4), ylim=(0.02, 0.6))
    right.set_xticks(
        [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]
    )
    right.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
    right.minorticks_off()
    right.set_xlabel("effective learning rate, learning_rate / (1 - mu)")
    right.set_ylabel("spread of the final loss")
    right.set_title("Digits: spread across initial weights, with 95% intervals", fontsize=10)
    right.legend(loc="upper left", fontsize=9)
    figure.savefig(PICTURE, dpi=110, metadata={"Description": json.dumps(drawn)})


if __name__ == "__main__":
    main()
