"""`python -m benchmarks.on_device`: how long the steps of `benchmarks.compiled` take, here.

The step of the optimizer alone and a step of training, with each kind of velocity and with what is
measured on the way, beside those of `optax.sgd`: all in each round, in random order. Then the same
numbers as bytes a second, by what the compiled program of this device moves.
"""

import argparse
import datetime
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import hlo
from benchmarks.compiled import ROWS, Row, train_step
from benchmarks.step import whole_step
from benchmarks.timing import interleave, paired_ratio, summary
from momentum_jax import apply_updates

RESULT = pathlib.Path(__file__).parent / "results" / "on-device.json"
ALONE = (
    *("optax.sgd", "momentum", "velocity bfloat16", "velocity float16", "velocity int8", "record"),
    *("params bfloat16", "kahan", "kahan, velocity int8", "adaptive_restart"),
)
TRAINING = (
    *("training, optax.sgd", "training, momentum", "training, velocity bfloat16"),
    *("training, velocity int8", "training, record"),
)


class Timed:
    """The donated step of a row with arrays of its own, and what its program moves."""

    def __init__(self, row: Row, scale: int) -> None:
        """Compiles it for arrays whose axes are so many times shorter."""
        self.row = row
        key = jax.random.key(0)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct([n // scale for n in x.shape], x.dtype), row.params
        )
        normal = functools.partial(jax.tree.map, lambda x: jax.random.normal(key, x.shape, x.dtype))
        self.params = jax.tree.map(lambda x: x / 100, normal(shapes))
        tx = row.make()
        self.state = jax.jit(tx.init)(self.params)
        self.size = sum(x.size for x in jax.tree.leaves(self.params))
        step = whole_step((tx, apply_updates))
        self.given: Any
        if row.batch is None:
            self.given = normal(shapes)
        else:
            step = train_step(tx)
            first, *_, last = jax.tree.leaves(self.params)
            widths = first.shape[0], last.shape[-1]
            self.given = tuple(jnp.ones((row.batch // scale, width)) for width in widths)
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.step = jitted.lower(self.params, self.state, self.given).compile()
        self.bytes = hlo.traffic(str(self.step.as_text())).bytes

    def run(self, calls: int) -> None:
        """So many steps, and one wait."""
        for _ in range(calls):
            self.params, self.state = self.step(self.params, self.state, self.given)
        jax.block_until_ready((self.params, self.state))


def measure(names: Sequence[str], rounds: int, scale: int) -> dict[str, Any]:
    """Seconds, ratios to the first row, and bytes a second of each."""
    rows = {row.name: row for row in ROWS}
    timed = {name: Timed(rows[name], scale) for name in names}
    seconds = interleave({name: one.run for name, one in timed.items()}, rounds, 0.05)
    found = {}
    for name, one in timed.items():
        found[name] = summary(seconds[name]) | {
            "ratio": paired_ratio(seconds[name], seconds[names[0]]),
            "params": one.size,
            "bytes_per_param": one.bytes / one.size,
            "bytes_per_second": one.bytes / summary(seconds[name])["median"],
        }
        print(line(name, found[name]), flush=True)
    return found


def line(name: str, of: dict[str, Any]) -> str:
    """One line of the table in the terminal."""
    ratio = of["ratio"]
    return (
        f"{name:<34}{1e3 * of['median']:10.3f} ms{ratio['median']:8.3f} "
        f"[{ratio['low']:.3f}, {ratio['high']:.3f}]{of['bytes_per_param']:8.2f} B/param"
        f"{of['bytes_per_second'] / 1e9:9.0f} GB/s"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_device", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="of the timing (30)")
    parser.add_argument(
        "--scale", type=int, default=1, help="divides each axis, for small devices (1)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="where the JSON goes")
    args = parser.parse_args(arguments)
    device = jax.devices()[0]
    kind = device.device_kind
    print(f"{kind}, JAX {jax.__version__}: a step, over that of the first row, what it moves")
    results = {
        "date": datetime.date.today().isoformat(),
        "device": kind,
        "jax": jax.__version__,
        "rounds": args.rounds,
        "alone": measure(ALONE, args.rounds, args.scale),
        "training": measure(TRAINING, args.rounds, args.scale),
    }
    # A try is not to replace what was measured.
    out = args.out or (RESULT if args.scale == 1 and args.rounds >= 20 else None)
    if out is not None:
        out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
