"""`python -m benchmarks.quantization`: how a velocity in few bits is best held, by measurement.

Schemes are compared by what storing once costs, by whether a velocity reaches its limit and
decays again, and by the loss of a network that trains with them. None of it is a timing, and all
of it repeats to the bit on one machine; `--speed` times the package's own steps instead.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import momentum_jax as mj
from benchmarks.timing import interleave, paired_ratio, summary
from momentum_jax import study
from momentum_jax.study import Arm, Contrast, problems

RESULTS = pathlib.Path(__file__).parent / "results"
VALUES = 2**18
Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Codes from -127 to 127 by block: how dense around 0, how rounded, with what scale.

    `curve` is "linear"; "softsign", 2x / (1 + |x|), as FlashOptim (2026) has it; or a number c:
    a value is c a + (1 - c) a^2 of its block's scale, a being the code over the largest code.
    `scale` is "float16", "float32"; "uint16": a float32's bits 1 to 16, without the sign; or
    "quarters": 32 bits, of which 8 are an exponent and 6 the scale of each quarter of the block.
    `rounding` is "nearest", "stochastic" or "dithered": the noise that decides is added before
    rounding and taken off on reading.
    """

    curve: Any
    block: int
    scale: str
    rounding: str
    exact: bool = False  # Two codes kept for the block's largest value and for 0.

    @property
    def bytes(self) -> float:
        """Bytes a value."""
        return 1 + {"float16": 2, "uint16": 2}.get(self.scale, 4) / self.block


SCHEMES = {
    "flashoptim": Scheme("softsign", 32, "float16", "nearest"),
    "linear, nearest": Scheme("linear", 32, "uint16", "nearest"),
    "linear, stochastic": Scheme("linear", 32, "uint16", "stochastic"),
    "linear, dithered": Scheme("linear", 32, "uint16", "dithered"),
    "softsign, dithered, exact": Scheme("softsign", 32, "uint16", "dithered", exact=True),
    "curve 0.4, nearest": Scheme(0.4, 32, "uint16", "nearest"),
    "curve 0.4, stochastic": Scheme(0.4, 32, "uint16", "stochastic"),
    "curve 0.4, stochastic, float32 64": Scheme(0.4, 64, "float32", "stochastic"),
    "curve 0.4, dithered": Scheme(0.4, 32, "uint16", "dithered"),
    "curve 0.4, dithered, exact": Scheme(0.4, 32, "uint16", "dithered", exact=True),
    "curve 0.5, dithered, exact": Scheme(0.5, 32, "uint16", "dithered", exact=True),
    "curve 0.4, dithered, quarters": Scheme(0.4, 64, "quarters", "dithered"),
    "curve 0.5, dithered, quarters": Scheme(0.5, 64, "quarters", "dithered"),
    "curve 0.6, dithered, quarters": Scheme(0.6, 64, "quarters", "dithered"),
    "softsign, dithered, quarters": Scheme("softsign", 64, "quarters", "dithered"),
}
# What the package does, to be found by its name in the table.
CHOSEN = "curve 0.5, dithered, quarters"


@functools.partial(jax.jit, static_argnums=0)
def store(scheme: Scheme, values: jax.Array, key: jax.Array) -> jax.Array:
    """What reading gives back after storing values of shape (blocks, block)."""
    # Noise must not go beyond the last code.
    largest_code = 126 if scheme.exact else 126.5 if scheme.scale == "quarters" else 127
    expand, compress, excess = _curve(scheme.curve, largest_code)
    size = jnp.abs(values)
    largest = size.max(-1, keepdims=True)
    key, key_of_scale = jax.random.split(key)
    if scheme.scale == "quarters":
        scale = _scales_of_quarters(size)
    else:
        scale = _scale(scheme, largest, key_of_scale)
    # FlashOptim divides by the scale before it is rounded.
    by = largest if scheme.scale == "float16" else scale
    share = jnp.minimum(size / jnp.where(by > 0, by, 1), 1)
    code = largest_code * compress(share)
    noise = jax.random.uniform(key, values.shape)
    if scheme.rounding == "nearest":
        read = expand(jnp.floor(code + 0.5) / largest_code)
    elif scheme.rounding == "stochastic":
        low = jnp.floor(code)
        below, above = expand(low / largest_code), expand((low + 1) / largest_code)
        read = jnp.where(noise < (share - below) / (above - below), above, below)
    else:
        u = noise - 0.5
        last = int(largest_code + 0.5)
        a = (jnp.clip(jnp.floor(code + u + 0.5), -last, last) - u) / largest_code
        read = jnp.sign(a) * (expand(jnp.abs(a)) - excess)
    if scheme.exact:
        read = jnp.where(size == largest, 1.0, jnp.where(size == 0, 0.0, read))
    return jnp.sign(values) * scale * read


def _curve(curve, largest_code) -> tuple[Callable, Callable, float]:
    """From the code's share to the value's and back, and what noise adds to the former's mean."""
    if curve == "linear":
        return lambda a: a, lambda x: x, 0.0
    if curve == "softsign":
        return lambda a: a / (2 - a), lambda x: 2 * x / (1 + x), 0.0
    square = 1 - curve
    return (
        lambda a: curve * a + square * a * a,
        lambda x: (jnp.sqrt(curve**2 + 4 * square * x) - curve) / (2 * square),
        square / (12 * largest_code**2),
    )


def _scale(scheme, largest, key):
    if scheme.scale == "float32":
        return largest
    if scheme.scale == "float16":
        return largest.astype(jnp.float16).astype(jnp.float32)
    # An exact largest value must be right on average; otherwise all must fit below the scale.
    noise = jax.random.bits(key, largest.shape) >> 17 if scheme.exact else jnp.uint32(2**15 - 1)
    bits = jax.lax.bitcast_convert_type(largest, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type(bits >> 15 << 15, jnp.float32)


def _scales_of_quarters(size):
    largest = size.reshape(-1, 4, size.shape[-1] // 4).max(-1)
    _, exponent = jnp.frexp(largest.max(-1, keepdims=True))
    unit = jnp.ldexp(jnp.float32(1), exponent - 6)
    scales = (jnp.floor(largest / unit) + 1) * unit
    return jnp.repeat(scales, size.shape[-1] // 4, axis=-1)


def velocities() -> dict[str, Array]:
    """Velocities to be stored once."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=VALUES)
    return {
        "normal": normal,
        "uniform": rng.uniform(-1, 1, VALUES),
        "heavy-tailed": rng.standard_t(3, VALUES),
        "normal x 1e-8": 1e-8 * normal,
    }


def errors(scheme: Scheme, of: dict[str, Array]) -> dict[str, float]:
    """The root mean square error of storing once, over the root mean square velocity."""

    def error(values):
        blocks = jnp.asarray(values.reshape(-1, scheme.block), jnp.float32)
        read = np.asarray(store(scheme, blocks, jax.random.key(0)), np.float64)
        blocks = np.asarray(blocks, np.float64)
        return float(np.sqrt(np.mean((read - blocks) ** 2) / np.mean(blocks**2)))

    return {name: error(values) for name, values in of.items()}


def stall(scheme: Scheme, mu: float) -> dict[str, float]:
    """Shares of the limit that a velocity m <- mu m + g has reached, all values together.

    `risen`: from the limit of other gradients, after 9 times its memory. `left`: of that, after as
    many steps without gradients. 1 and 0.0001 without rounding.
    """
    rng = np.random.default_rng(0)
    first, second = (jnp.asarray(rng.normal(size=(64, scheme.block)), jnp.float32) for _ in "12")
    steps = round(9 / (1 - mu))

    def settle(velocity, grads, key):
        def step(velocity, key):
            return store(scheme, mu * velocity + grads, key), None

        return jax.lax.scan(step, velocity, jax.random.split(key, steps))[0]

    @jax.jit
    def run():
        one, two, three = jax.random.split(jax.random.key(0), 3)
        old = settle(jnp.zeros_like(first), first, one)
        new = settle(old, second, two)
        left = settle(new, jnp.zeros_like(first), three)
        risen = jnp.sum(new * second) * (1 - mu) / jnp.sum(second**2)
        return risen, jnp.linalg.norm(left) / jnp.linalg.norm(new)

    risen, left = run()
    return {"risen": float(risen), "left": float(left)}


def training(seeds: int) -> list[dict[str, Any]]:
    """The final loss on digits with each of the package's velocities, paired by seed.

    The study's problem with so many hidden units that most of its values are in narrow leaves.
    Each row compares with float32: the difference of interquartile means with its 95% interval,
    and the share of pairs that end lower.
    """
    groups = [
        [
            Arm(
                f"{dtype}, mu {mu}",
                functools.partial(mj.momentum, velocity_dtype=dtype),
                learning_rate=rate,
                mu=mu,
            )
            for dtype in ("float32", "bfloat16", "int8")
        ]
        for mu, rate in ((0.9, 0.02), (0.99, 0.002))
    ]
    dataset = study.run(
        problems.digits(hidden=128),
        [arm for group in groups for arm in group],
        range(seeds),
        contrasts=[
            Contrast("arms", group[0].name, tuple(arm.name for arm in group[1:]))
            for group in groups
        ],
    )

    def records(table, column, chosen):
        rows = table[table[column] == chosen]
        return [dict(zip(rows.columns, row, strict=True)) for row in rows.itertuples(index=False)]

    losses = records(study.describe(dataset), "measure", "interquartile mean loss")
    loss = {row["arm"]: interval(row) for row in losses}
    table = study.compare(dataset)
    table = table[table.scale.notna()]
    lower = {row["arm"]: interval(row) for row in records(table, "question", "lower loss")}
    return [
        {
            "arm": row["arm"],
            "seeds": row["n"],
            "loss": loss[row["arm"]],
            "float32_loss": loss[row["baseline"]],
            "difference": interval(row),
            "ends_lower": lower[row["arm"]],
        }
        for row in records(table, "question", "loss")
    ]


def interval(row: dict[str, Any]) -> dict[str, float]:
    """The value of a row of the study's tables and its 95% interval."""
    return {name: row[name] for name in ("value", "low", "high")}


def speed(values: int, rounds: int) -> dict[str, Any]:
    """Seconds of a jitted, donated step with each velocity, and ratios to float32's."""

    def contestant(dtype):
        params = {"w": jnp.ones((values // 1000, 1000))}
        grads = jax.tree.map(lambda w: 1e-3 * w, params)
        tx: Any = mj.momentum(1e-3, velocity_dtype=dtype)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return mj.apply_updates(params, updates), state

        carry = params, tx.init(params)

        def run(calls):
            nonlocal carry
            for _ in range(calls):
                carry = step(*carry, grads)
            jax.block_until_ready(carry)

        return run

    dtypes = {"float32": None, "bfloat16": "bfloat16", "int8": "int8"}
    runs = {name: contestant(dtype) for name, dtype in dtypes.items()}
    seconds = interleave(runs, rounds, 0.05)
    return {
        name: summary(each) | {"ratio": paired_ratio(each, seconds["float32"])}
        for name, each in seconds.items()
    }


def measure(seeds: int) -> Iterator[tuple[str, Any]]:
    """Each scheme with its errors and stalls as soon as they are known, then the training."""
    for name, scheme in SCHEMES.items():
        result: dict[str, Any] = {"bytes": scheme.bytes, "errors": errors(scheme, velocities())}
        result["stall"] = {str(mu): stall(scheme, mu) for mu in (0.9, 0.99, 0.999)}
        yield name, result
    if seeds:
        yield "training", training(seeds)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization",
        description="Compares ways to hold a velocity in 8 bits: error of storing once, whether "
        "a velocity reaches its limit and decays, loss of a network. Writes JSON.",
    )
    parser.add_argument("--seeds", type=int, default=100, help="of the training (100); 0 for none")
    parser.add_argument("--speed", action="store_true", help="time the package's steps instead")
    parser.add_argument("--values", type=int, default=20_000_000, help="of the step timed")
    parser.add_argument("--rounds", type=int, default=30, help="of the timing")
    parser.add_argument("--out", type=pathlib.Path, help="where the JSON goes")
    args = parser.parse_args(arguments)
    if args.speed:
        results: dict[str, Any] = {
            "device": jax.devices()[0].device_kind,
            "values": args.values,
            "steps": speed(args.values, args.rounds),
        }
        for name, each in results["steps"].items():
            ratio = each["ratio"]
            low, middle, high = ratio["low"], ratio["median"], ratio["high"]
            median = 1e3 * each["median"]
            print(f"{name:10} {median:8.2f} ms   {middle:.3f} [{low:.3f}, {high:.3f}]")
    else:
        results = {"jax": jax.__version__, "chosen": CHOSEN, "schemes": {}}
        print(f"{'':38} bytes   once: normal uniform  heavy   1e-8   risen, left at .99    at .999")
        for name, result in measure(args.seeds):
            if name == "training":
                results[name] = result
                continue
            results["schemes"][name] = result
            once = "".join(f"{1e3 * error:8.3f}" for error in result["errors"].values())
            stalls = "".join(
                f"{result['stall'][mu]['risen']:10.4f}{result['stall'][mu]['left']:8.4f}"
                for mu in ("0.99", "0.999")
            )
            print(f"{name:38}{result['bytes']:6.3f}    {once}{stalls}", flush=True)
        for row in results.get("training", []):
            loss, difference = row["loss"]["value"], row["difference"]
            print(
                f"loss on digits, {row['arm']:18} {loss:.5f}   less float32's: "
                f"{difference['value']:+.6f} [{difference['low']:+.6f}, {difference['high']:+.6f}]"
            )
    out = args.out or RESULTS / ("narrow-speed.json" if args.speed else "quantization.json")
    out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
