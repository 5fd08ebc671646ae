"""Compares ways to store a velocity in 8 bits: `python -m benchmarks.quantization`.

Compares schemes by the error of storing once, and by whether a velocity reaches its limit and
decays again. Then compares the package's own formats with float32: the variance of noisy params
around the optimum, and the loss of a network. No times are measured, and the results are
reproducible bit for bit on the same machine. With `--speed`, times the package's steps instead.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import momentum_jax as mj
from benchmarks.__main__ import machine, processor
from benchmarks.timing import interleave, paired_ratio, summary
from momentum_jax import study
from momentum_jax._rounding import seed_of
from momentum_jax._storage import BLOCKS, Stored
from momentum_jax.study import Arm, Contrast, problems

RESULTS = pathlib.Path(__file__).parent / "results"
SHAPE = (64, 4096)
MUS = (0.9, 0.99, 0.999)
DTYPES = ("float32", "bfloat16", "int8")
LARGEST = 127


def package(values: jax.Array, key: jax.Array, *, block: tuple[int, int]) -> jax.Array:
    """Encodes and decodes with the package's codec, with one scale per block of this shape."""
    scales = [size // length for size, length in zip(values.shape, block, strict=True)]
    zeros = Stored(jnp.zeros(values.shape, jnp.int8), jnp.zeros(scales, jnp.bfloat16))
    return BLOCKS.decode(BLOCKS.encode(values, zeros, seed_of(jax.random.bits(key))))


def other(
    values: jax.Array,
    key: jax.Array,
    *,
    scale: Callable[[jax.Array], jax.Array],
    curve: float | None,
    rounding: str,
    half_precision: bool = False,
) -> jax.Array:
    """Encodes values as codes from -127 to 127, and decodes them.

    A code stands for sign(code) * scale * (c a + (1 - c) a^2), where a = |code| / 127 and c is the
    `curve`.

    Args:
      values: what to store, float32 of any shape.
      key: a random key.
      scale: computes the scales from the magnitudes.
      curve: c above; None is FlashOptim's softsign, a / (2 - a) instead of the polynomial.
      rounding: "nearest", "stochastic", or "dithered": noise is added before rounding to nearest,
        and subtracted when reading.
      half_precision: whether the scales are stored in float16.
    """
    size = jnp.abs(values)
    scales = scale(size)
    share = jnp.minimum(size / jnp.where(scales > 0, scales, 1), 1)
    if half_precision:  # FlashOptim divides by the scale before it is rounded.
        scales = scales.astype(jnp.float16).astype(jnp.float32)
    # Leaves room for the noise below the last code.
    largest = LARGEST - 0.5 if rounding == "dithered" else LARGEST
    code = largest * _compressed(share, curve)
    noise = jax.random.uniform(key, values.shape)
    if rounding == "nearest":
        read = _expanded(jnp.round(code) / largest, curve)
    elif rounding == "stochastic":
        low = jnp.floor(code)
        below, above = (_expanded(code / largest, curve) for code in (low, low + 1))
        read = jnp.where(noise < (share - below) / (above - below), above, below)
    else:
        u = noise - 0.5
        a = (jnp.clip(jnp.round(code + u), -LARGEST, LARGEST) - u) / largest
        # The bias: what the noise adds to the square on average.
        excess = 0 if curve is None else (1 - curve) / (12 * largest**2)
        read = jnp.sign(a) * (_expanded(jnp.abs(a), curve) - excess)
    return jnp.sign(values) * scales * read


def _expanded(a, curve):
    return a / (2 - a) if curve is None else curve * a + (1 - curve) * a**2


def _compressed(x, curve):
    if curve is None:
        return 2 * x / (1 + x)
    if curve == 1:
        return x
    return (jnp.sqrt(curve**2 + 4 * (1 - curve) * x) - curve) / (2 * (1 - curve))


def of_blocks(size: jax.Array, *, axis: int) -> jax.Array:
    """Returns the largest magnitude of each block of 32 along an axis."""
    blocks = jnp.moveaxis(size, axis, -1)
    largest = jnp.repeat(blocks.reshape(*blocks.shape[:-1], -1, 32).max(-1), 32, axis=-1)
    return jnp.moveaxis(largest, -1, axis)


def of_rows(size: jax.Array) -> jax.Array:
    """Returns the largest magnitude of each row."""
    return size.max(1, keepdims=True)


def of_rows_and_columns(size: jax.Array) -> jax.Array:
    """Returns the smaller of the largest magnitudes of the row and of the column."""
    return jnp.minimum(of_rows(size), size.max(0, keepdims=True))


def of_quarters(size: jax.Array) -> jax.Array:
    """Returns scales with one exponent per 64 values of a row, and 6 bits per 16 values."""
    largest = size.reshape(size.shape[0], -1, 4, 16).max(-1)
    _, exponent = jnp.frexp(largest.max(-1, keepdims=True))
    unit = jnp.ldexp(jnp.float32(1), exponent - 6)
    return jnp.repeat((jnp.floor(largest / unit) + 1) * unit, 16, axis=-1).reshape(size.shape)


class Scheme(NamedTuple):
    """Bytes per value, and a function (values, key) -> the values after storing and reading."""

    bytes: float
    store: Callable[[jax.Array, jax.Array], jax.Array]


def _scheme(scale, curve, rounding, nbytes=1 + 2 / 32, **options):
    options |= {"scale": scale, "curve": curve, "rounding": rounding}
    return Scheme(nbytes, jax.jit(functools.partial(other, **options)))


# A block is 32 rows, or for FlashOptim 32 values in a row. For scales of a whole row or column, the
# bytes per value are for float32 scales and a 4096 x 4096 matrix.
down = functools.partial(of_blocks, axis=0)
along = functools.partial(of_blocks, axis=1)
SCHEMES = {
    "momentum_jax": Scheme(1 + 2 / 32, jax.jit(functools.partial(package, block=(32, 1)))),
    "momentum_jax, 128 along a row": Scheme(
        1 + 2 / 128, jax.jit(functools.partial(package, block=(1, 128)))
    ),
    "same codes, nearest": _scheme(down, 0.5, "nearest"),
    "same codes, exact scales": _scheme(down, 0.5, "stochastic", 1 + 4 / 32),
    "linear, stochastic": _scheme(down, 1.0, "stochastic"),
    "linear, nearest": _scheme(down, 1.0, "nearest"),
    "flashoptim": _scheme(along, None, "nearest", half_precision=True),
    "row, squares, stochastic": _scheme(of_rows, 0.0, "stochastic", 1 + 4 / 4096),
    "row and column, squares, stochastic": _scheme(
        of_rows_and_columns, 0.0, "stochastic", 1 + 8 / 4096
    ),
    "earlier format, dithered": _scheme(of_quarters, 0.5, "dithered"),
}
# What the package does if 32 divides an axis before the last.
CHOSEN = "momentum_jax"


def velocities() -> dict[str, np.ndarray]:
    """Returns the velocities to store once, by name."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=SHAPE)

    def sizes(count):
        return 10 ** rng.uniform(-4, 0, count)

    return {
        "normal": normal,
        "uniform": rng.uniform(-1, 1, SHAPE),
        "heavy-tailed": rng.standard_t(3, SHAPE),
        "columns of unequal size": normal * sizes(SHAPE[1]),
        "rows of unequal size": normal * sizes((SHAPE[0], 1)),
        "normal x 1e-8": 1e-8 * normal,
    }


# For rows or columns of unequal size: the median error of a row or column, each divided by its own
# size. The error over all values would be dominated by the largest row or column.
BY_LINE = {"columns of unequal size": 0, "rows of unequal size": 1}


def errors(scheme: Scheme, of: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the RMS error of storing each array once, divided by the RMS velocity."""

    def error(name, values):
        given = jnp.asarray(values, jnp.float32)
        read = np.asarray(scheme.store(given, jax.random.key(0)), np.float64)
        given, axis = np.asarray(given, np.float64), BY_LINE.get(name)
        squares = np.mean((read - given) ** 2, axis) / np.mean(given**2, axis)
        return float(np.sqrt(np.median(squares)))

    return {name: error(name, values) for name, values in of.items()}


def levels(scheme: Scheme, mu: float) -> dict[str, float]:
    """Measures how a stored velocity m <- mu m + g of shape (32, 1024) approaches its limit.

    Each phase takes 9 / (1 - mu) steps: first with other gradients, then with the gradients
    measured, then with zero gradients.

    Returns:
      `reached`, the projection of the velocity on its limit, divided by the limit;
      `scatter`, the RMS distance of single values from the limit, divided by the RMS limit;
      `remaining`, the norm after the third phase, divided by the norm before it.
      Without rounding these are 1, 0.0002 and 0.0001.
    """
    rng = np.random.default_rng(0)
    first, second = (jnp.asarray(rng.normal(size=(32, 1024)), jnp.float32) for _ in "12")
    steps = round(9 / (1 - mu))

    def settle(velocity, grads, key):
        def step(velocity, key):
            return scheme.store(mu * velocity + grads, key), None

        return jax.lax.scan(step, velocity, jax.random.split(key, steps))[0]

    @jax.jit
    def run():
        one, two, three = jax.random.split(jax.random.key(0), 3)
        old = settle(jnp.zeros_like(first), first, one)
        new = settle(old, second, two)
        left = settle(new, jnp.zeros_like(first), three)
        limit = second / (1 - mu)
        return {
            "reached": jnp.sum(new * limit) / jnp.sum(limit**2),
            "scatter": jnp.linalg.norm(new - limit) / jnp.linalg.norm(limit),
            "remaining": jnp.linalg.norm(left) / jnp.linalg.norm(new),
        }

    return {name: float(value) for name, value in run().items()}


# Shapes of 4,096 params, and the smallest magnitude of the noise of a row; the largest is 1.
MODELS = {
    "blocks of 32": ((32, 128), 1.0),
    "blocks of 128 in a row of 4096": ((1, 4096), 1.0),
    "blocks of 32, rows of unequal size": ((32, 128), 0.01),
}


def stationary(shape: tuple[int, int], least: float, mu: float, seeds: int) -> dict[str, Any]:
    """Measures the mean and variance of params w around 0, when their gradients are w plus noise.

    The noise has Student's t distribution with 3 degrees of freedom, and all dtypes get the same
    noise. The magnitude of the noise varies over rows from `least` to 1, and each row is divided by
    its magnitude. The number of steps is 8 / (1 - mu); the first half is not measured.

    Returns:
      By dtype, each with a 95% confidence interval over seeds:
      `variance`, the variance of the params divided by the variance with a float32 velocity
      (geometric mean over seeds);
      `mean`, the mean of the params minus the mean with float32, in standard deviations with
      float32. It is positive on the side where the params started.
    """
    rate, steps = 0.1 * (1 - mu), round(8 / (1 - mu))
    sizes = jnp.asarray(np.geomspace(least, 1, shape[0])[:, None], jnp.float32)
    txs: list[Any] = [mj.momentum(rate, mu, velocity_dtype=dtype) for dtype in DTYPES]

    def run(key):
        def step(carry, i):
            normal = jax.random.normal(jax.random.fold_in(key, i), (4, *shape))
            noise = sizes * normal[0] * jnp.sqrt(3 / jnp.sum(normal[1:] ** 2, axis=0))
            found = []
            for tx, (w, state) in zip(txs, carry, strict=True):
                updates, state = tx.update(w + noise, state, w)
                found.append((mj.apply_updates(w, updates), state))
            w = jnp.stack([w / sizes for w, _ in found])
            return found, (w.mean((1, 2)), w.var((1, 2)))

        w = jnp.broadcast_to(sizes, shape)
        start = [(w, tx.init(w)) for tx in txs]
        mean, variance = jax.lax.scan(step, start, jnp.arange(steps))[1]
        return mean[steps // 2 :].mean(0), variance[steps // 2 :].mean(0)

    keys = jax.random.split(jax.random.key(0), seeds)
    mean, variance = (np.asarray(x, np.float64) for x in jax.jit(jax.vmap(run))(keys))
    further = (mean - mean[:, :1]) / np.sqrt(variance[:, :1])
    ratio = np.log(variance / variance[:, :1])
    return {
        dtype: {
            "variance": {name: float(np.exp(x)) for name, x in _interval(ratio[:, i]).items()},
            "mean": _interval(further[:, i]),
        }
        for i, dtype in enumerate(DTYPES)
        if i
    }


def _interval(samples):
    """Returns the mean and its 95% confidence interval by Student's t."""
    value = float(np.mean(samples))
    half = float(stats.t.ppf(0.975, len(samples) - 1) * stats.sem(samples))
    return {"value": value, "low": value - half, "high": value + half}


def training(seeds: int) -> list[dict[str, Any]]:
    """Compares the final loss on digits between velocity dtypes, paired by seed.

    The problem has enough hidden units that most of its values are in quantized leaves. Each row
    compares a dtype with float32: the difference of interquartile means with its 95% confidence
    interval, and the fraction of pairs with a lower loss.
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
    """Returns the value in a row of the study's tables and its 95% confidence interval."""
    return {name: row[name] for name in ("value", "low", "high")}


def speed(shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Times a jitted, donated step with each velocity dtype, and its ratio to float32."""

    def contestant(dtype):
        params = {"w": jnp.ones(shape)}
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

    seconds = interleave({dtype: contestant(dtype) for dtype in DTYPES}, rounds, 0.05)
    return {
        name: summary(each) | {"ratio": paired_ratio(each, seconds["float32"])}
        for name, each in seconds.items()
    }


def measure(noisy: int, seeds: int) -> Iterator[tuple[str, str, Any]]:
    """Yields section, name and result of each measurement as soon as it is known."""
    for name, scheme in SCHEMES.items():
        result: dict[str, Any] = {"bytes": scheme.bytes, "errors": errors(scheme, velocities())}
        yield "schemes", name, result | {"levels": {str(mu): levels(scheme, mu) for mu in MUS}}
    for name, (shape, least) in MODELS.items() if noisy else ():
        yield "stationary", name, {str(mu): stationary(shape, least, mu, noisy) for mu in MUS}
    for row in training(seeds) if seeds else ():
        yield "training", row["arm"], row


def line(section: str, name: str, result: dict[str, Any]) -> str:
    """Formats a result for the terminal."""
    if section == "schemes":
        once = "".join(f"{100 * error:9.3f}" for error in result["errors"].values())
        of = result["levels"]
        at = "".join(f"{value:8.4f}" for mu in MUS[1:] for value in of[str(mu)].values())
        return f"{name:36}{result['bytes']:6.3f}{once}{at}"
    if section == "stationary":
        return "\n".join(
            f"{name}, mu {mu}, {dtype}: variance / variance with float32 "
            f"{shown(one['variance'], '.4f')}, shift of the mean {shown(one['mean'], '+.5f')}"
            for mu, of in result.items()
            for dtype, one in of.items()
        )
    loss, difference = result["loss"]["value"], shown(result["difference"], "+.6f")
    return f"loss on digits, {name}: {loss:.5f}, difference from float32: {difference}"


def shown(interval: dict[str, float], form: str) -> str:
    """Formats a value with its interval."""
    value, low, high = (format(interval[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def main(arguments: list[str] | None = None) -> None:
    """Runs the comparison, prints the results and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization",
        description="Compares ways to store a velocity in 8 bits: the error of storing once, "
        "whether a velocity reaches its limit and decays, the mean and variance of noisy params, "
        "and the loss of a network. Prints the results and writes JSON.",
    )
    parser.add_argument(
        "--noisy", type=int, default=20, help="number of seeds of noisy params (20); 0 skips them"
    )
    parser.add_argument(
        "--seeds", type=int, default=100, help="number of seeds of the training (100); 0 skips it"
    )
    parser.add_argument(
        "--speed", action="store_true", help="time the package's steps instead of comparing errors"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["1024x1024", "2048x4096"],
        help="with --speed: shapes of the params (1024x1024 2048x4096)",
    )
    parser.add_argument(
        "--rounds", type=int, default=30, help="with --speed: number of rounds (30)"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="JSON file to write (default: quantization.json, with --speed storage-speed.json, in "
        "benchmarks/results)",
    )
    args = parser.parse_args(arguments)
    host = machine()
    results: dict[str, Any] = {"jax": host["jax"], "device": processor(host)}
    if args.speed:
        results["shapes"] = {}
        for name in args.shapes:
            rows, columns = map(int, name.split("x"))
            results["shapes"][name] = speed((rows, columns), args.rounds)
            for dtype, of in results["shapes"][name].items():
                ratio = shown(of["ratio"] | {"value": of["ratio"]["median"]}, ".3f")
                print(f"{name} {dtype:9} {1e3 * of['median']:8.2f} ms, {ratio}", flush=True)
    else:
        results["chosen"] = CHOSEN
        print("scheme | bytes per value | error in % of the velocity:", ", ".join(velocities()))
        print("       | reached, remaining, scatter at mu 0.99, then at mu 0.999")
        for section, name, result in measure(args.noisy, args.seeds):
            results.setdefault(section, {})[name] = result
            print(line(section, name, result), flush=True)
    out = args.out or RESULTS / ("storage-speed.json" if args.speed else "quantization.json")
    out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
