"""Momentum's state on disk: it comes back to the bit, and training goes on as if never stopped.

Run as a program, with a folder, this file resumes the training that a test stopped.
"""

import pathlib
import subprocess
import sys
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax as mj

SHAPES = {"bias": (4,), "head": (8, 16), "kernel": (16, 4)}
STOP, END = 4, 9


def decay(count):
    return 0.1 * 0.8**count


def make_transformation(velocity_dtype=None) -> Any:
    """Clipping, then two kinds of momentum in groups of their own; the state is a chain's."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {
                "plain": mj.momentum(decay, 0.9, velocity_dtype=velocity_dtype),
                "nesterov": mj.momentum(0.05, 0.99, nesterov=True, velocity_dtype=velocity_dtype),
            },
            {"bias": "plain", "head": "nesterov", "kernel": "plain"},
        ),
    )


def shard(tree: Any) -> Any:
    """The tree, of arrays or abstract, with the rows of its matrices over eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def leaf(x):
        sharding = NamedSharding(mesh, P("data") if x.ndim == 2 else P())
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return jax.tree.map(leaf, tree)


def make_params():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}
    return params | {"bias": params["bias"].astype(jnp.bfloat16)}


def train(tx, params, state, first, last):
    """Steps first to last - 1 of a regression whose data depends on the step alone."""

    @jax.jit
    def step(params, state, x):
        def loss(params):
            hidden = jnp.tanh(x @ params["head"])
            return jnp.mean((hidden @ params["kernel"] + params["bias"].astype(x.dtype)) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return mj.apply_updates(params, updates), state

    for index in range(first, last):
        x = np.random.default_rng(index).normal(size=(32, 8)).astype(np.float32)
        params, state = step(params, state, x)
    return params, state


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()


def restore(path, target=None) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (np.shape(a), a.dtype) == (np.shape(b), b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def stopped(sharded, velocity_dtype=None):
    """The transformation, and what a training holds when it is stopped."""
    tx = make_transformation(velocity_dtype)
    params = shard(make_params()) if sharded else make_params()
    return tx, *train(tx, params, tx.init(params), 0, STOP)


@pytest.mark.parametrize("velocity_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "eight devices"])
def test_c2_orbax_restores_the_state_to_the_bit(sharded, velocity_dtype, tmp_path):
    """Type, structure, dtype, weak type and sharding too, from an abstract target."""
    tx, params, state = stopped(sharded, velocity_dtype)
    save(tmp_path / "state", state)
    target = jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
        jax.eval_shape(tx.init, params),
        state,
    )
    restored = restore(tmp_path / "state", target)
    assert_same_bits(restored, state)
    assert type(restored[1].inner_states["plain"].inner_state) is mj.MomentumState
    for leaf, original in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert jax.typeof(leaf) == jax.typeof(original)
        assert leaf.sharding == original.sharding
    velocity = restored[1].inner_states["nesterov"].inner_state.velocity["head"]
    assert velocity.dtype == (velocity_dtype or jnp.float32)
    assert len(velocity.sharding.device_set) == (8 if sharded else 1)


@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "eight devices"])
def test_c2_orbax_restores_8_bits_and_compensations(sharded, tmp_path):
    """Codes and scales; training goes on as if never stopped."""
    tx: Any = mj.kahan(mj.momentum(0.1, 0.9, velocity_dtype="int8"))
    params = {"table": jnp.linspace(-1, 1, 8192).reshape(64, 128).astype(jnp.bfloat16)}
    params = shard(params) if sharded else params
    _, state = tx.update(params, tx.init(params), params)
    save(tmp_path / "state", state)
    restored = restore(tmp_path / "state", state)
    assert_same_bits(restored, state)
    assert restored.inner_state.velocity["table"].dtype == jnp.int8
    assert restored.inner_state.scales["table"].dtype == jnp.bfloat16
    for leaf, original in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert leaf.sharding == original.sharding
    assert_same_bits(tx.update(params, restored, params), tx.update(params, state, params))


@pytest.mark.parametrize("velocity_dtype", [None, jnp.bfloat16])
def test_c2_flax_serialization_restores_the_state_to_the_bit(velocity_dtype):
    """Its arrays are NumPy's; the next step from them is the same, and not traced again."""
    tx, params, state = stopped(False, velocity_dtype)
    restored = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
    assert_same_bits(restored, state)
    traces = []

    @jax.jit
    def update(grads, state):
        traces.append(1)
        return tx.update(grads, state)

    assert_same_bits(update(params, restored), update(params, state))
    assert len(traces) == 1


def test_nnx_optimizer_continues_from_orbax_to_the_same_bits(tmp_path):
    def make(seed):
        model = nnx.Linear(4, 2, rngs=nnx.Rngs(seed))
        tx = optax.chain(optax.clip(0.5), mj.momentum(decay, 0.9, velocity_dtype=jnp.bfloat16))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)

    def steps(pair, first, last):
        for index in range(first, last):
            x = np.random.default_rng(index).normal(size=(32, 4)).astype(np.float32)
            step(pair[0], pair[1], x)

    unbroken: Any = make(0)
    resumed: Any = make(1)
    steps(unbroken, 0, STOP)
    saved = nnx.state(unbroken)
    save(tmp_path / "training", saved)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        nnx.state(resumed),
    )
    nnx.update(resumed, restore(tmp_path / "training", target))
    steps(unbroken, STOP, END)
    steps(resumed, STOP, END)
    assert_same_bits(nnx.state(resumed), nnx.state(unbroken))


@pytest.mark.parametrize("library", ["orbax", "flax"])
def test_a_state_restored_without_its_types_is_refused_with_the_way_out(library, tmp_path):
    tx = optax.chain(optax.clip(1.0), mj.momentum(0.1))
    params = make_params()
    state: Any = tx.init(params)
    if library == "orbax":
        save(tmp_path / "state", state)
        untyped = restore(tmp_path / "state")
    else:
        untyped = flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))
        untyped = [untyped[key] for key in sorted(untyped)]
    message = "the state is dict, .* give the restoring function tx.init"
    with pytest.raises(TypeError, match=message):
        tx.update(params, untyped, params)


def resume(folder):
    """In a process of its own: from `stopped` on disk to `finished` on disk."""
    tx = make_transformation()
    abstract = jax.eval_shape(make_params)
    target = shard((abstract, jax.eval_shape(tx.init, abstract)))
    params, state = restore(folder / "stopped", target)
    save(folder / "finished", train(tx, params, state, STOP, END))


@pytest.mark.slow
def test_a_run_stopped_and_resumed_in_a_new_process_ends_with_the_same_bits(tmp_path):
    """Params, velocities and counts, on eight devices, under a schedule of the count."""
    tx, params, state = stopped(sharded=True)
    save(tmp_path / "stopped", (params, state))
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True)
    expected = train(tx, params, state, STOP, END)
    finished = restore(tmp_path / "finished", expected)
    assert_same_bits(finished, expected)
    assert finished[1][1].inner_states["plain"].inner_state.count == END


if __name__ == "__main__":
    resume(pathlib.Path(sys.argv[1]))
