"""Compiles a training step for 256 TPUs, which need not be present.

Used by `python -m benchmarks.compiled --scale`. The model has scanned layers with 0.8e9 float32
params. The mesh is 16 x 16: the batch is sharded over the axis "data", the params over the axis
"model". Each device holds 1/16 of the params; with zero1 it holds 1/256 of the state.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax as mj
from benchmarks.step import LEARNING_RATE, MU, PyTree, whole_step
from benchmarks.timing import timed

TOPOLOGY, MESH = "v5e:16x16", (16, 16)
LAYERS, WIDTH, HIDDEN, BATCH, LENGTH = 24, 2048, 8192, 512, 1024
SHAPES = {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)}
OWN = {"up": P(None, None, "model"), "down": P(None, "model")}
# The same, also sharded over the data axis.
SPLIT = {"up": P(None, "data", "model"), "down": P(None, ("model", "data"))}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

Step = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


def loss(params: PyTree, x: jax.Array) -> jax.Array:
    """Returns the loss of residual layers in bfloat16, which the backward pass recomputes."""

    def layer(h, w):
        inner = jnp.tanh(h @ w["up"].astype(jnp.bfloat16))
        return h + inner @ w["down"].astype(jnp.bfloat16), None

    h, _ = jax.lax.scan(jax.checkpoint(layer), x, params)
    return jnp.mean(h.astype(jnp.float32) ** 2)


def abstract(mesh: Mesh, specs: dict[str, P]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns abstract params with these shardings."""
    return {
        name: jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, specs[name]))
        for name, shape in SHAPES.items()
    }


def by_hand(mesh: Mesh) -> Step:
    """Returns a momentum step with explicit shardings; the velocity is sharded over all devices."""

    def place(tree, specs):
        return {
            name: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, specs[name]))
            for name, x in tree.items()
        }

    def step(params, velocity, grads):
        grads = place(grads, SPLIT)
        velocity = jax.tree.map(lambda v, g: MU * v - LEARNING_RATE * g, velocity, grads)
        velocity = place(velocity, SPLIT)
        return jax.tree.map(jnp.add, params, place(velocity, OWN)), velocity

    return step


def place_state(
    state: PyTree, params: dict[str, jax.ShapeDtypeStruct], rest: NamedSharding
) -> PyTree:
    """Returns the abstract state: arrays of a param have the param's sharding, others `rest`."""

    def place(path, x):
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        sharding = params[keys[-1]].sharding if keys else rest
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def measure(topology: topologies.TopologyDescription) -> dict[str, Any]:
    """Returns the collectives and the memory per device of the compiled step, by transformation."""
    mesh = topologies.make_mesh(topology, MESH, ("data", "model"))
    params, split = abstract(mesh, OWN), abstract(mesh, SPLIT)
    x = jax.ShapeDtypeStruct(
        (BATCH, LENGTH, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P("data"))
    )
    momentum = mj.momentum(LEARNING_RATE, MU)
    found: dict[str, Any] = {}
    transformations = {
        "momentum": (momentum, params),
        "zero1(momentum)": (mj.sharding.zero1(momentum, mesh), split),
        "zero1(optax.adamw)": (mj.sharding.zero1(optax.adamw(LEARNING_RATE), mesh), split),
    }
    steps: dict[str, tuple[Step, PyTree]] = {
        name: (
            whole_step((tx, optax.apply_updates)),
            place_state(jax.eval_shape(tx.init, params), like, NamedSharding(mesh, P())),
        )
        for name, (tx, like) in transformations.items()
    }
    steps["momentum, sharded by hand"] = by_hand(mesh), split
    for name, (step, state) in steps.items():

        def train(params, state, x, step=step):
            return step(params, state, jax.grad(loss)(params, x))

        traced = jax.jit(train, donate_argnums=(0, 1)).trace(params, state, x)
        seconds, compiled = timed(traced.lower().compile)
        found[name] = read(compiled) | {"compile_seconds": round(seconds, 2)}
        print(line(name, found[name]), flush=True)
    return {"topology": TOPOLOGY, "mesh": dict(mesh.shape), "params": count(), "rows": found}


def count() -> int:
    """Returns the number of params."""
    return sum(int(np.prod(shape)) for shape in SHAPES.values())


def collectives(text: str) -> dict[str, int]:
    """Counts each kind of collective in a program. A collective inside a loop counts once.

    On TPUs, a reduce-scatter may be a fusion named after the all-reduce inside it.
    """
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    fused = text.count("calls=%all-reduce-scatter")
    return {name: n for name, n in counts.items() if n} | {"fused reduce-scatter": fused}


def read(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Returns the memory per device, in bytes, and the collectives of one program."""
    memory: Any = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "copied_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "collectives": collectives(str(compiled.as_text())),
    }


def line(name: str, of: dict[str, Any]) -> str:
    """Formats one line for the terminal."""
    found = ", ".join(f"{n} {kind}" for kind, n in of["collectives"].items())
    return (
        f"{name:<26} per device: {of['argument_bytes'] / 2**20:8.0f} MiB arguments, "
        f"{of['temp_bytes'] / 2**20:8.0f} MiB temporaries; {found}"
    )
