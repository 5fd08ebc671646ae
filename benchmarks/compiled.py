"""Reads the cost of a step from programs for TPUs and GPUs: `python -m benchmarks.compiled`.

The step is compiled ahead of time for a TPU v5e and an H100, which need not be present. The minimum
that a step can move: read params, gradients and state once, write params and state once.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import momentum_jax as mj
from benchmarks import at_scale, hlo, recipes
from benchmarks.step import LEARNING_RATE, MU, PyTree, whole_step
from benchmarks.timing import timed

RESULT = pathlib.Path(__file__).parent / "results" / "compiled.json"
# libtpu reads these variables when it is loaded. Without the first three, it searches the network
# for a TPU and warns. Without the last, it holds a lock file, and a second process would fail.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Platform:
    """A kind of device to compile for. One of `packages` must be installed: it has the compiler."""

    device: str
    packages: tuple[str, ...]
    remedy: str

    def compiler(self) -> str | None:
        """Returns the installed package with the compiler, or None."""
        for name in self.packages:
            try:
                importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            return name
        return None


PLATFORMS = {
    "tpu": Platform("TPU v5e", ("libtpu",), "pip install 'jax[tpu]'"),
    "gpu": Platform(
        "H100", ("jax-cuda12-plugin", "jax-cuda13-plugin"), "pip install 'jax[cuda12]'"
    ),
}

Transformation = Callable[[], optax.GradientTransformation]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A step: its transformation, and the shapes and the dtype of its params.

    With `batch`, the step also computes the gradient: it trains a network of two layers, whose
    matrices are the params. `read_twice` is the number of bytes per parameter that must be read a
    second time, because the first result depends on all gradients and params.
    """

    name: str
    make: Transformation
    shapes: tuple[Shape, ...] = ((8192, 4096),)
    dtype: str = "float32"
    batch: int | None = None
    read_twice: int = 0

    @property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The abstract params."""
        return {
            f"w{i}": jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))
            for i, shape in enumerate(self.shapes)
        }

    @property
    def size(self) -> int:
        """The number of params."""
        return sum(x.size for x in jax.tree.leaves(self.params))

    def least(self) -> float | None:
        """Returns the minimum of bytes per parameter, or None for a training step."""
        if self.batch is not None:
            return None
        params, state = _bytes(self.params), _bytes(jax.eval_shape(self.make().init, self.params))
        return (3 * params + 2 * state) / self.size + self.read_twice


def _bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def trace_scaled() -> optax.GradientTransformation:
    """Returns momentum with the learning rate outside the velocity, as a chain."""
    return optax.chain(mj.trace(MU), optax.scale_by_learning_rate(LEARNING_RATE))


def recorded() -> optax.GradientTransformation:
    """Returns momentum that records a measurement of each step in its state."""
    return mj.diagnostics.record(momentum(), LEARNING_RATE, MU)


# Transformations with the default settings of the benchmarks.
momentum = functools.partial(mj.momentum, LEARNING_RATE, MU)
sgd = functools.partial(optax.sgd, LEARNING_RATE, MU)
bfloat16 = functools.partial(momentum, velocity_dtype="bfloat16")
int8 = functools.partial(momentum, velocity_dtype="int8")

SHAPES: dict[str, tuple[Shape, ...]] = {
    "(50257, 768)": ((50257, 768),),
    "(3, 3, 512, 2048)": ((3, 3, 512, 2048),),
    "(4096, 16, 64)": ((4096, 16, 64),),
    "(33554432,)": ((33554432,),),
    "(3, 3, 517, 2053)": ((3, 3, 517, 2053),),
    "200 x (100, 100)": ((100, 100),) * 200,
    "200 shapes": tuple((100 + i, 100) for i in range(200)),
}
LAYERS = ((4096, 16384), (16384, 4096))
BATCH = 1024

ROWS = (
    Row("optax.sgd", sgd),
    Row("optax.sgd, bfloat16", functools.partial(sgd, accumulator_dtype="bfloat16")),
    Row("momentum", momentum),
    Row("momentum, Nesterov", functools.partial(momentum, nesterov=True)),
    Row("trace, then scale", trace_scaled),
    Row("qhm", functools.partial(mj.qhm, LEARNING_RATE, MU)),
    Row("aggmo", functools.partial(mj.aggmo, LEARNING_RATE)),
    # Whether to restart depends on all gradients and params, so both are read a second time.
    Row("adaptive_restart", lambda: mj.adaptive_restart(momentum()), read_twice=8),
    # A step between two measurements of the curvature: it also sums gradients and updates.
    Row("record", recorded),
    Row("velocity bfloat16", bfloat16),
    Row("velocity float16", functools.partial(momentum, velocity_dtype="float16")),
    Row("velocity int8", int8),
    Row("params bfloat16", momentum, dtype="bfloat16"),
    Row("kahan", lambda: mj.kahan(momentum()), dtype="bfloat16"),
    Row("kahan, velocity int8", lambda: mj.kahan(int8()), dtype="bfloat16"),
    *(Row(f"momentum, {name}", momentum, shapes) for name, shapes in SHAPES.items()),
    *(Row(f"velocity int8, {name}", int8, shapes) for name, shapes in SHAPES.items()),
    *(
        Row(f"velocity bfloat16, {name}", bfloat16, SHAPES[name])
        for name in ("200 x (100, 100)", "200 shapes")
    ),
    *(
        Row(f"training, {name}", make, LAYERS, batch=BATCH)
        for name, make in {
            "optax.sgd": sgd,
            "momentum": momentum,
            "velocity bfloat16": bfloat16,
            "velocity int8": int8,
            "record": recorded,
        }.items()
    ),
    *(
        Row(f"recipe {section}, {dtype}", functools.partial(make, velocity_dtype=dtype))
        for section, make in recipes.makers().items()
        for dtype in ("float32", "bfloat16", "int8")
    ),
)
SGD = "training, optax.sgd"
# The rows in the table of the README, by their label there.
README = {
    "`optax.sgd`": "optax.sgd",
    "`momentum`": "momentum",
    "bfloat16 velocity": "velocity bfloat16",
    "int8 velocity": "velocity int8",
    "bfloat16 params, `kahan`": "kahan",
}


def topology(platform: str, name: str = "") -> topologies.TopologyDescription:
    """Returns devices to compile for.

    The first call for TPUs in a process sets the environment variables that libtpu reads. The GPU
    plugin needs no GPU if JAX_SKIP_CUDA_CONSTRAINTS_CHECK is set.

    Args:
      platform: "gpu" for H100s or "tpu".
      name: the topology. The defaults are "1x1x1" (one H100) and "v5e:2x2".
    """
    if platform == "gpu":
        name = name or "1x1x1"
        return topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology=name, target_config=H100
        )
    name = name or "v5e:2x2"
    for variable, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def train_step(tx: optax.GradientTransformation) -> Callable[..., tuple[PyTree, PyTree]]:
    """Returns the step of a two-layer network: (params, state, (x, y)) -> (params, state)."""
    step = whole_step((tx, optax.apply_updates))

    def loss(params, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["w0"]) @ params["w1"] - y) ** 2)

    return lambda params, state, batch: step(params, state, jax.grad(loss)(params, batch))


def measure(row: Row, sharding: SingleDeviceSharding) -> dict[str, Any]:
    """Compiles the donated step of the row with cold JAX caches, and reads the program."""
    jax.clear_caches()
    params, tx = row.params, row.make()
    state = jax.eval_shape(tx.init, params)
    step, given = whole_step((tx, optax.apply_updates)), params
    if row.batch is not None:
        step = train_step(tx)
        given = tuple(
            jax.ShapeDtypeStruct((row.batch, width), jnp.float32)
            for width in (row.shapes[0][0], row.shapes[-1][-1])
        )
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (params, state, given)
    )
    trace_seconds, traced = timed(jax.jit(step, donate_argnums=(0, 1)).trace, *arguments)
    lower_seconds, lowered = timed(traced.lower)
    compile_seconds, compiled = timed(lowered.compile)
    memory: Any = compiled.memory_analysis()
    traffic = hlo.traffic(str(compiled.as_text()))
    result = {
        "params": row.size,
        "least_bytes_per_param": row.least(),
        "bytes_per_param": traffic.bytes / row.size,
        "temp_bytes_per_param": memory.temp_size_in_bytes / row.size,
        "kernels": traffic.kernels,
        "trace_seconds": trace_seconds,
        "lower_seconds": lower_seconds,
        "compile_seconds": compile_seconds,
    }
    costs = compiled.cost_analysis()
    if costs and "bytes accessed" in costs:
        result["compiler_bytes_per_param"] = costs["bytes accessed"] / row.size
    return {
        key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()
    }


HEADING = (
    f"{'bytes per parameter per step':<34}{'minimum':>8}{'moved':>8}{'temp':>8}{'kernels':>9}"
    f"{'trace s':>9}{'lower s':>9}{'compile s':>11}"
)


def line(name: str, of: dict[str, Any]) -> str:
    """Formats one line of the table in the terminal."""
    if "error" in of:
        return f"{name:<34}{of['error']}"
    least = of["least_bytes_per_param"]
    return (
        f"{name:<34}{'-' if least is None else f'{least:.2f}':>8}{of['bytes_per_param']:8.2f}"
        f"{of['temp_bytes_per_param']:8.2f}{of['kernels']:9d}{of['trace_seconds']:9.2f}"
        f"{of['lower_seconds']:9.2f}{of['compile_seconds']:11.2f}"
    )


def measure_platform(platform: str, rows: Iterable[Row]) -> dict[str, Any]:
    """Measures all rows for one kind of device, and prints each result as soon as it is known."""
    sharding = SingleDeviceSharding(topology(platform).devices[0])
    found: dict[str, Any] = {}
    print(f"{PLATFORMS[platform].device}\n{HEADING}")
    for row in rows:
        try:
            found[row.name] = measure(row, sharding)
        except jax.errors.JaxRuntimeError as error:
            # For example, the device has too little memory for the program.
            found[row.name] = {"error": str(error).splitlines()[0][:200]}
        print(line(row.name, found[row.name]), flush=True)
    return {"device": PLATFORMS[platform].device, **stamp(platform), "rows": found}


def stamp(platform: str) -> dict[str, Any]:
    """Returns the date, and the versions that the numbers depend on."""
    names = ["jax", "jaxlib", "optax", PLATFORMS[platform].compiler()]
    versions = {name: importlib.metadata.version(name) for name in names if name}
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"momentum_jax": mj.__version__} | versions,
    }


def shortfalls(of: dict[str, Any], tolerance: float = 0.05) -> list[str]:
    """Returns a sentence for each row of a platform that moves clearly more than the minimum.

    The minimum of a training step is unknown, so it is compared with training by `optax.sgd`.
    """
    sentences = []
    for name, row in of["rows"].items():
        if "error" in row:
            sentences.append(f"{of['device']}: *{name}* does not compile: {row['error']}")
            continue
        bound, what = row["least_bytes_per_param"], "the minimum"
        if bound is None:
            bound, what = of["rows"][SGD]["bytes_per_param"], "the bytes of `optax.sgd`"
        moved = row["bytes_per_param"]
        if moved > (1 + tolerance) * bound:
            sentences.append(
                f"{of['device']}: *{name}* moves {moved:.1f} bytes per parameter, "
                f"{moved / bound:.2f} times {what} ({bound:.1f})."
            )
    return sentences


def compile_times(of: dict[str, Any]) -> list[str]:
    """Returns a sentence for each low-precision row of 200 arrays: its time compared to float32."""

    def seconds(row):
        return sum(row[f"{stage}_seconds"] for stage in ("trace", "lower", "compile"))

    sentences = []
    for name, row in of["rows"].items():
        what, _, arrays = name.partition(", 200")
        float32 = of["rows"].get(f"momentum, 200{arrays}")
        if arrays and what != "momentum" and "error" not in {**row, **(float32 or {"error": 1})}:
            ratio = seconds(row) / seconds(float32)
            sentences.append(
                f"{of['device']}: *{name}* takes {seconds(row):.1f} s, {ratio:.1f} times as long "
                f"as float32 ({seconds(float32):.1f} s)."
            )
    return sentences


def in_order(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the results of each platform, in the order of `PLATFORMS`."""
    return [results["platforms"][name] for name in PLATFORMS if name in results["platforms"]]


def readme_table(results: dict[str, Any]) -> str:
    """Returns the table of the README."""

    def cells(label, platform, key):
        values = [f"{platform['rows'][name][key]:.1f}" for name in README.values()]
        return f"| {label} | {' | '.join(values)} |"

    lines = [f"| bytes per parameter | {' | '.join(README)} |", "| --- " * (len(README) + 1) + "|"]
    platforms = in_order(results)
    lines.append(cells("minimum", platforms[0], "least_bytes_per_param"))
    lines += [cells(of["device"], of, "bytes_per_param") for of in platforms]
    return "\n".join(lines)


def recipes_table(results: dict[str, Any]) -> str:
    """Returns the table of docs/recipes.md: bytes per parameter that a step moves."""
    dtypes = ("float32", "bfloat16", "int8")
    platforms = in_order(results)
    heads = [f"{of['device']}, {dtype}" for of in platforms for dtype in dtypes]
    lines = [f"| | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for section in recipes.RECURRENCES:
        rows = [of["rows"][f"recipe {section}, {dtype}"] for of in platforms for dtype in dtypes]
        cells = [f"{row['bytes_per_param']:.1f}" for row in rows]
        lines.append(f"| {section} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled",
        description="Compiles the whole donated step for a TPU v5e and an H100, which need not be "
        "present. Reads from the compiled program the bytes that it moves in device memory, its "
        "temporary memory and its number of kernels. Needs the compilers: "
        + ", ".join(f"{of.remedy} ({of.device})" for of in PLATFORMS.values())
        + ". Prints a table and writes JSON.",
    )
    parser.add_argument(
        "platforms",
        nargs="*",
        metavar="tpu|gpu",
        help="kinds of devices (default: both); the JSON keeps the results of the others",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="measure only the row named TEXT or, if there is none, the rows whose names contain "
        "TEXT; can be given several times",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only check that all transformations compile, with small params; writes no JSON "
        "unless --out is given",
    )
    parser.add_argument(
        "--scale",
        action="store_true",
        help="measure only a training step of scanned layers on 256 TPUs: collectives and memory; "
        "a run without arguments includes it",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE",
        help=f"JSON file to update (default: benchmarks/results/{RESULT.name}; "
        "none with --only or --quick)",
    )
    args = parser.parse_args(arguments)
    for name in args.platforms:
        if name not in PLATFORMS:
            parser.error(f"{name!r} must be one of {', '.join(PLATFORMS)}.")
    if args.scale and (args.platforms or args.only or args.quick):
        parser.error(
            "--scale allows no other argument than --out: it has no rows and is only for TPUs."
        )
    everything = not (args.platforms or args.scale or args.only or args.quick)
    if not (args.platforms or args.scale):
        args.platforms = list(PLATFORMS)
    args.scale |= everything
    for text in args.only or ():
        if not matching(text):
            names = "; ".join(row.name for row in ROWS)
            parser.error(f"--only {text!r} must be a part of the name of a row: {names}.")
    if args.out is None and not (args.only or args.quick):
        args.out = RESULT
    return args


def matching(text: str) -> list[Row]:
    """Returns the row of this name or, if there is none, the rows whose names contain it."""
    named = [row for row in ROWS if row.name == text]
    return named or [row for row in ROWS if text in row.name]


def select(args: argparse.Namespace) -> list[Row]:
    """Returns the rows that the command line selects."""
    only = args.only
    rows = ROWS if only is None else [row for text in only for row in matching(text)]
    rows = list(dict.fromkeys(rows))
    if args.quick:
        rows = [
            dataclasses.replace(row, shapes=((512, 256),))
            for row in rows
            if row.shapes == ((8192, 4096),)
        ]
    return rows


def write(path: pathlib.Path | None, **sections: dict[str, Any]) -> None:
    """Writes these sections into the JSON file and keeps all others."""
    if path is None:
        return
    results = json.loads(path.read_text()) if path.exists() else {"platforms": {}}
    for name, section in sections.items():
        results[name] = results.get(name, {}) | section
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Compiles the steps, prints the tables and writes the JSON."""
    args = parse(arguments)
    # No device is needed, and a device of this machine may be busy.
    jax.config.update("jax_platforms", "cpu")
    wanted = {*args.platforms, *(["tpu"] if args.scale else [])}
    missing = [name for name in PLATFORMS if name in wanted and not PLATFORMS[name].compiler()]
    for name in missing:
        of = PLATFORMS[name]
        print(
            f"{name}: no compiler for {of.device}, because {' or '.join(of.packages)} is not "
            f"installed. Install it: {of.remedy}",
            file=sys.stderr,
        )
    for name in args.platforms:
        if name not in missing:
            write(args.out, platforms={name: measure_platform(name, select(args))})
    if args.scale and "tpu" not in missing:
        devices = topology("tpu", at_scale.TOPOLOGY)
        write(args.out, scale=stamp("tpu") | at_scale.measure(devices))
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
