"""Draws the README's picture: `python docs/picture.py`.

Left: the README's example, with and without momentum. Middle: the standard deviation of the final
loss on digits across initial weights, against the effective learning rate, from the committed
`study/digits/numbers.json`. Right: the sharpness of a network during training, divided by the
stability limit. The picture's metadata contains the numbers that it shows, so that a test can
detect an outdated picture.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from sklearn.datasets import load_digits

import momentum_jax as mj
from momentum_jax.study import Problem, plots
from momentum_jax.study.trajectory import trajectory

DOCS = Path(__file__).parent
PICTURE = DOCS / "_static" / "momentum.png"
FAMILIES = ("mu 0", "mu 0.9")
SCALE = 1.0
ROWS = 512
# For each method, the sharpness at which its learning rate is at the stability limit.
LIMITS = {"mu 0": 9.0, "mu 0.9": 12.5, "nesterov, mu 0.9": 10.0}


def ravine(w):
    """Returns the loss of the README's example."""
    return w[0] ** 2 / 2 + 10 * w[1] ** 2


def walk(mu, steps=60):
    """Returns the params before the first step and after each step."""
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
    """Returns the spread across initial weights by effective learning rate: [low, value, high]."""
    table = found["arms"]
    rows = zip(*(table[name] for name in table), strict=True)
    chosen = (dict(zip(table, row, strict=True)) for row in rows)
    return {
        f"{row['effective_rate']:g}": [row["low"], row["value"], row["high"]]
        for row in chosen
        if (row["family"], row["scale"], row["measure"]) == (family, SCALE, "std")
    }


def numbers():
    """Returns the paths, the spreads, and the edge of stability without momentum."""
    found = json.loads((DOCS / "study" / "digits" / "numbers.json").read_text())
    return {
        "paths": {f"mu {mu}": walk(mu).tolist() for mu in (0, 0.9)},
        "spreads": {family: spreads(found, family) for family in FAMILIES},
        "edge": mj.theory.stability_limit(0.0) / found["initial_sharpness"][f"{SCALE:g}"],
    }


def tanh_network():
    """Returns a problem: a network with two hidden layers and squared loss on ROWS digits."""
    digits = load_digits()
    inputs = jnp.asarray(digits.data[:ROWS] / 16, jnp.float32)
    data = inputs - inputs.mean(axis=0), jax.nn.one_hot(digits.target[:ROWS], 10)
    sizes = (64, 64, 64, 10)

    def init(key):
        shapes = zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True)
        return [
            {"w": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros(n)}
            for key, m, n in shapes
        ]

    def loss(params, batch):
        x, targets = batch
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        errors = x @ params[-1]["w"] + params[-1]["b"] - targets
        return jnp.mean(jnp.sum(errors**2, axis=1)) / 2

    return Problem(init, loss, data=data)


def shares(steps=3000, points=60):
    """Returns the sharpness divided by the stability limit, by method: [steps, shares]."""
    found = {}
    for name, limit in LIMITS.items():
        mu, nesterov = 0.9 * ("0.9" in name), "nesterov" in name
        rate = mj.theory.stability_limit(mu, nesterov=nesterov) / limit
        options = {"steps": steps, "points": points, "batch_size": ROWS}
        way = trajectory(tanh_network(), rate, mu, nesterov=nesterov, **options)
        rows = [(point.step, round(point.fraction, 4)) for point in way]
        found[name] = [list(column) for column in zip(*rows, strict=True)]
    return found


def main():
    """Draws and saves all panels."""
    figure, (left, right, third) = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
    drawn = numbers() | {"shares": shares()}
    plots.path(ravine, {k: jnp.array(v) for k, v in drawn["paths"].items()}, left).legend()
    left.set_title("A ravine, 60 steps at learning rate 0.02", fontsize=10)

    for family, found, marker, color in zip(
        FAMILIES, drawn["spreads"].values(), "os", plots.COLORS, strict=False
    ):
        # Beyond the edge of stability, nearly all runs end at the loss cap.
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
    right.set_ylabel("standard deviation of the final loss")
    right.set_title("Digits: standard deviation across initial weights, 95% intervals", fontsize=10)
    right.legend(loc="upper left", fontsize=9)

    for (name, (steps, values)), color in zip(drawn["shares"].items(), plots.COLORS, strict=False):
        third.plot(steps, values, color=color, marker=".", label=name)
    third.axhline(1, color="0.4", linestyle=":", label="edge of stability")
    third.set(xlabel="step", ylabel="sharpness / stability limit", ylim=(0, 1.2))
    third.set_title(f"A network, all of {ROWS} digits in each step", fontsize=10)
    third.legend(loc="lower right", fontsize=9)
    figure.savefig(PICTURE, dpi=110, metadata={"Description": json.dumps(drawn)})


if __name__ == "__main__":
    main()
