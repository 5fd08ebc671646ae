"""The shardings, devices and memory of states that are carried over."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import count_compiles
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import KINDS, WIDE, assert_same, begun, grads_like, numbers, one_step, params_of
from processes import run_job

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["momentum", "int8", "aggmo", "adam", "adaptive_restart"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_each_array_has_the_sharding_of_the_new_state(kind, axis_type, jitted):
    """From rows to columns, from no mesh to a mesh, with another shape; the values are equal."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)

    def put(params, spec):
        return jax.tree.map(
            lambda w: jax.device_put(w, NamedSharding(mesh, spec if w.ndim == 2 else P())), params
        )

    tx = KINDS[kind]()
    params, state = begun(tx, params_of("enc"))
    wider = {"enc": {"w": numbers((96, 128)), "b": params["enc"]["b"]}}
    for to, resize in ((params, False), (wider, True)):
        carry = functools.partial(mj.transplant, resize=resize)
        expected, _ = carry(state, tx.init(to))
        for old_spec, new_spec in ((None, P("d")), (P("d"), P(None, "m")), (P("d", "m"), P())):
            old = state
            if old_spec is not None:
                old = jax.tree.map(
                    lambda x, like: jax.device_put(x, like.sharding) if like.committed else x,
                    state,
                    tx.init(put(params, old_spec)),
                )
            if jitted and old_spec is None and axis_type == AxisType.Explicit:
                continue  # One program cannot mix arrays on a mesh with arrays on none.
            target = tx.init(put(to, new_spec))
            if jitted:
                carried = jax.jit(lambda old, new, carry=carry: carry(old, new)[0])(old, target)
            else:
                carried, _ = carry(old, target)
            assert_same(carried, expected)
            for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(target), strict=True):
                if y.committed and x.ndim:
                    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)


def test_params_on_several_devices():
    """Each group of devices runs one program."""
    first, second = jax.devices()[:2]
    params = {"a": jax.device_put(numbers(WIDE), first), "b": jax.device_put(numbers(5), second)}
    tx = mj.momentum(0.1, velocity_dtype="int8")
    _, state = tx.update(params, tx.init(params))
    exchanged = {"b": jax.device_put(params["b"], first), "a": jax.device_put(params["a"], second)}
    for target in (tx.init(params), tx.init(exchanged)):
        carried, _ = mj.transplant(state, target, strict=True)
        assert_same(carried, state)
        for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(target), strict=True):
            assert x.devices() == y.devices()


def test_the_trace_of_optax_on_several_devices():
    """All devices are asked whether a velocity is not 0."""
    params = {str(i): jax.device_put(numbers(3), jax.devices()[i]) for i in range(2)}
    tx = optax.trace(0.9)
    _, state = tx.update(params, tx.init(params))
    carried, _ = mj.transplant(state, mj.trace(0.9).init(params), strict=True)
    assert int(carried.count) == 1


def test_an_uncommitted_state_stays_uncommitted():
    """Even if the old state is committed. So it can follow params that are on a mesh."""
    params, tx = params_of("enc"), mj.momentum(0.1)
    _, state = begun(tx, jax.device_put(params, jax.devices()[0]))
    carried, _ = mj.transplant(state, tx.init(params), strict=True)
    assert not any(x.committed for x in jax.tree.leaves(carried))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    on_mesh = jax.device_put(params, NamedSharding(mesh, P()))
    jax.jit(tx.update)(on_mesh, carried, on_mesh)
    with jax.default_device(jax.devices()[5]):
        target = tx.init(params_of("enc"))
    carried, _ = mj.transplant(state, target, strict=True)
    assert {d for x in jax.tree.leaves(carried) for d in x.devices()} == {jax.devices()[5]}


def test_restored_states_of_numpy_and_python():
    params, tx = {"a": numbers(3), "b": jnp.float32(2.0)}, mj.momentum(0.1)
    _, state = begun(tx, params)
    restored = jax.tree.map(lambda x: np.asarray(x) if x.ndim else x.item(), state)
    assert_same(mj.transplant(restored, tx.init(params), strict=True)[0], state)


@pytest.mark.slow
def test_a_model_of_many_arrays_is_one_program():
    tx = mj.momentum(0.1)
    params = {str(i): numbers((i + 1, 7)) for i in range(50)}
    _, state = begun(tx, params, 1)
    new = tx.init(params)
    with count_compiles() as compiles:
        mj.transplant(state, new)
    assert compiles.count <= 1


def test_the_result_reuses_the_memory_of_a_donated_state():
    tx, params = mj.momentum(0.1, velocity_dtype="int8"), params_of("enc", "head")
    state, target = tx.init(params), tx.init({**params, "new": numbers(3)})
    carry = jax.jit(lambda old, new: mj.transplant(old, new)[0], donate_argnums=0)
    memory: Any = carry.lower(state, target).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes <= 1024


@pytest.mark.slow
def test_a_state_of_zero1_stays_sharded():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = mj.sharding.zero1(mj.momentum(0.1, velocity_dtype="int8"), mesh)
    params = jax.device_put(params_of("enc"), NamedSharding(mesh, P()))
    params, state = begun(tx, params)
    larger = {**params, "new": params["enc"]}
    carried, _ = mj.transplant(state, tx.init(larger))
    assert len(carried.velocity["enc"]["w"].sharding.device_set) == 8
    assert carried.velocity["enc"]["w"].addressable_shards[0].data.size == 64 * 128 // 8
    one_step(tx, larger, carried, grads_like(larger, 3))


JOB = """
import sys
import jax
import jax.numpy as jnp
import numpy as np

jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
import momentum_jax as mj
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType[sys.argv[4]],))
gather = multihost_utils.process_allgather
def refused(*args, **kwargs): raise AssertionError("gathered")
multihost_utils.process_allgather = refused


def sharded(x, spec):
    x = np.asarray(x, np.float32)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)


w = np.random.default_rng(0).normal(size=(64, 128))
for dtype, other in ((None, "int8"), ("int8", None), (None, None), ("int8", "int8")):
    old = mj.momentum(0.5, velocity_dtype=dtype)
    params = {"enc": sharded(w, P("d"))}
    _, state = old.update(params, old.init(params))
    new = mj.momentum(0.5, velocity_dtype=other)
    for shape, spec in (((64, 128), P(None, "d")), ((96, 128), P("d"))):
        target = new.init({"encoder": sharded(np.zeros(shape), spec), "new": sharded(w, P())})
        carried, report = mj.transplant(
            state, target, {"['enc']": "['encoder']"}, resize=shape != (64, 128)
        )
        for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(target), strict=True):
            assert x.dtype == y.dtype
            if y.committed:
                assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
        assert report.fresh == ("['new']",), report
        read = gather(mj.read_velocity(carried)["encoder"], tiled=True)
        before = gather(mj.read_velocity(state)["enc"], tiled=True)
        close = 0.05 if "int8" in (dtype, other) else 0
        assert np.max(np.abs(read[:64] - before)) <= close
        assert not np.any(read[64:])
        assert int(carried.count) == 1
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_two_processes_carry_over_without_gathering(axis_type, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    for printed in run_job(tmp_path / "job.py", axis_type, timeout=240):
        assert printed.splitlines()[-1] == "done"
