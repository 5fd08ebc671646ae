"""Times the steps of `benchmarks.compiled` on this device: `python -m benchmarks.on_device`.

Times the optimizer's step alone and a training step, with each velocity dtype and with recorded
diagnostics, and compares them with the steps of `optax.sgd`. Every round times all steps in random
order. Also reports bytes per second: the bytes that the compiled program moves divided by its time.
"""

import argparse
import datetime
import functools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import hlo
from benchmarks.compiled import ROWS, Row, train_step
from benchmarks.step import whole_step
from benchmarks.timing import interleave, paired_ratio, summary
from momentum_jax import apply_updates

RESULTS = pathlib.Path(__file__).parent / "results"


def result_of(device_kind: str) -> pathlib.Path:
    """The committed file for a kind of device, such as "NVIDIA H100 80GB HBM3".

    Example:
      >>> result_of("NVIDIA H100 80GB HBM3").name
      'on-device-h100.json'
    """
    name = re.search(r"\b[A-Z]+\d+\w*", device_kind)
    return RESULTS / f"on-device-{(name[0] if name else device_kind).lower()}.json"


def results() -> list[dict[str, Any]]:
    """All committed results."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("on-device-*.json"))]


ALONE = (
    *("optax.sgd", "momentum", "velocity bfloat16", "velocity float16", "velocity int8", "record"),
    *("params bfloat16", "kahan", "kahan, velocity int8", "adaptive_restart"),
)
TRAINING = (
    *("training, optax.sgd", "training, momentum", "training, velocity bfloat16"),
    *("training, velocity int8", "training, record"),
)


class Timed:
    """The donated step of a row with its own arrays, and the bytes that its program moves."""

    def __init__(self, row: Row, scale: int) -> None:
        """Compiles the step for arrays whose axes are divided by `scale`."""
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
        """Runs the step `calls` times, then waits for the result once."""
        for _ in range(calls):
            self.params, self.state = self.step(self.params, self.state, self.given)
        jax.block_until_ready((self.params, self.state))


def measure(names: Sequence[str], rounds: int, scale: int) -> dict[str, Any]:
    """Returns for each row the seconds, the ratio to the first row, and the bytes per second."""
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
    """Formats one line of the table in the terminal."""
    ratio = of["ratio"]
    return (
        f"{name:<34}{1e3 * of['median']:10.3f} ms{ratio['median']:8.3f} "
        f"[{ratio['low']:.3f}, {ratio['high']:.3f}]{of['bytes_per_param']:8.2f} B/param"
        f"{of['bytes_per_second'] / 1e9:9.0f} GB/s"
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_device", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="number of rounds (30)")
    parser.add_argument(
        "--scale", type=int, default=1, help="divide each axis by this, for small devices (1)"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="JSON file to write (default: benchmarks/results/on-device-<device>.json; none with "
        "--scale above 1 or fewer than 20 rounds)",
    )
    args = parser.parse_args(arguments)
    device = jax.devices()[0]
    kind = device.device_kind
    print(f"{kind}, JAX {jax.__version__}: time per step, ratio to the first row, bytes moved")
    found = {
        "date": datetime.date.today().isoformat(),
        "device": kind,
        "jax": jax.__version__,
        "rounds": args.rounds,
        "alone": measure(ALONE, args.rounds, args.scale),
        "training": measure(TRAINING, args.rounds, args.scale),
    }
    # A trial run must not replace the measured results.
    out = args.out or (result_of(kind) if args.scale == 1 and args.rounds >= 20 else None)
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
