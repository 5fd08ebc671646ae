"""C8: params on several devices or meshes, with one dispatch per group of devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compiles import count_compiles, new_size
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax
from momentum_jax import frameworks

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.

# Nothing is said of how large the groups are: one leaf in one, two in the other, 8-bit ones too.
SHAPES = {"a": (8, 2), "b": {"c": (8,), "d": (64, 128)}}
IN_FIRST = {"a": True, "b": {"c": False, "d": False}}


def on(devices, axis_type, *shape):
    names = ("x", "y")[: len(shape)]
    mesh = Mesh(np.array(devices).reshape(shape), names, axis_types=(axis_type,) * len(shape))
    return NamedSharding(mesh, P("x"))


# The two shardings of the params; in how many groups of devices they are.
PLACES = {
    "two devices": (lambda _: jax.devices()[:2], 2),
    "two meshes": (
        lambda kind: (on(jax.devices()[:4], kind, 4), on(jax.devices()[4:], kind, 4)),
        2,
    ),
    "a device and a mesh": (lambda kind: (jax.devices()[6], on(jax.devices(), kind, 8)), 2),
    "devices in another order": (
        lambda kind: (on(jax.devices(), kind, 8), on(jax.devices()[::-1], kind, 8)),
        2,
    ),
    "devices on other axes": (
        lambda kind: (on(jax.devices(), kind, 8), on(jax.devices(), kind, 4, 2)),
        1,
    ),
}
CASES = [
    pytest.param(place, axis_type, id=f"{place}, {axis_type.name}")
    for place in PLACES
    for axis_type in (AxisType.Auto, AxisType.Explicit)
    if place != "two devices" or axis_type == AxisType.Auto
]
every_case = pytest.mark.parametrize(("place", "axis_type"), CASES)
OWN = {f"jit({name})" for name in ("start", "advance", "_add")}
# Those with the most in which several groups can differ.
HARDEST = [("two meshes", AxisType.Explicit), ("devices on other axes", AxisType.Explicit)]

TRANSFORMATIONS = {
    "momentum": lambda: mj.momentum(0.25, 0.5),
    "momentum, a schedule": lambda: mj.momentum(lambda count: 0.5 / (1 + count), 0.5),
    "momentum, int8": lambda: mj.momentum(0.25, 0.5, velocity_dtype="int8"),
    "momentum, bfloat16": lambda: mj.momentum(0.25, 0.5, velocity_dtype="bfloat16"),
    "trace": lambda: mj.trace(0.5, nesterov=True),
    "qhm": lambda: mj.qhm(0.25, 0.5, 0.5),
    "aggmo": lambda: mj.aggmo(0.25, (0.0, 0.5)),
    "aggmo, int8": lambda: mj.aggmo(0.25, (0.25, 0.5), velocity_dtype="int8"),
    "kahan": lambda: mj.kahan(mj.momentum(0.25, 0.5)),
    "recurrence, int8": lambda: mj.recurrence(
        reference.heavy_ball, learning_rate=0.25, mu=0.5, velocity_dtype="int8"
    ),
    "adaptive_restart": lambda: mj.adaptive_restart(mj.momentum(0.25, 0.5)),
    "torch_sgd": lambda: frameworks.torch_sgd(0.25, 0.5, dampening=0.5, weight_decay=0.5),
    "keras_sgd": lambda: frameworks.keras_sgd(lambda count: 0.25, 0.5, True, weight_decay=0.5),
    "caffe_sgd": lambda: frameworks.caffe_sgd(0.25, 0.5, weight_decay=0.5),
    "optax_sgd": lambda: frameworks.optax_sgd(0.25, 0.5),
}


def exact(seed, dtype=jnp.float32):
    """Whole numbers, of which every sum and every step here is exact."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.asarray(rng.integers(-8, 9, shape), dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def put(tree, places):
    return jax.tree.map(
        lambda x, first: jax.device_put(x, places[0] if first else places[1]), tree, IN_FIRST
    )


def bits(tree):
    return [(x.shape, x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def placed(tree):
    return [x.sharding.devices_indices_map(x.shape) for x in jax.tree.leaves(tree)]


def train(tx, params, gradients):
    state = tx.init(params)
    trajectory = [(params, state)]
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = mj.apply_updates(params, updates)
        trajectory.append((params, state))
    return trajectory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place", "axis_type"),
    [(name, *case) for name in TRANSFORMATIONS for case in HARDEST]
    + [
        (name, *case.values)
        for name in ("momentum, a schedule", "adaptive_restart")
        for case in CASES
        if case.values not in HARDEST
    ],
)
def test_c8_params_on_several_devices(name, place, axis_type):
    """The bits of one device, and every array stays where it is."""
    places = PLACES[place][0](axis_type)
    dtype = jnp.bfloat16 if name == "kahan" else jnp.float32
    gradients = [exact(1), exact(2), jax.tree.map(np.negative, exact(1))]
    tx = TRANSFORMATIONS[name]()
    expected = train(tx, exact(0, dtype), gradients)
    params = put(exact(0, dtype), places)
    found = train(tx, params, [put(grads, places) for grads in gradients])
    for one, other in zip(found, expected, strict=True):
        assert bits(one) == bits(jax.tree.map(jnp.asarray, other))
        assert placed(one) == placed(found[0])
        assert placed(one[0]) == placed(params)


@every_case
def test_c8_one_program_per_group_of_devices(place, axis_type):
    place, groups = PLACES[place]
    places = place(axis_type)
    params = put(exact(0), places)
    params["b"]["d"] = jax.device_put(jnp.ones(8 * new_size()), places[1])
    params["a"] = jax.device_put(jnp.ones(8 * new_size()), places[0])
    tx = mj.momentum(0.25, 0.5)
    with count_compiles() as compiles:
        state = tx.init(params)
        updates, state = tx.update(params, state)
        mj.apply_updates(params, updates)
    own = [name for name in compiles.names if name in OWN]
    assert len(own) == 3 * groups
    with count_compiles() as compiles:
        for _ in range(3):
            updates, state = tx.update(params, state, learning_rate=0.5, mu=0.25)
            params = mj.apply_updates(params, updates)
    assert compiles.count == 0


@pytest.mark.slow
def test_c8_the_least_of_dispatches():
    """With 40 params on two devices a call runs two programs, not one per param."""
    params = {
        # No two are alike: what is compiled for one of them is compiled for each.
        f"{device}-{i}": jax.device_put(np.ones(new_size(), np.float32), jax.devices()[device])
        for i in range(20)
        for device in range(2)
    }
    tx = mj.momentum(0.25, 0.5)
    state = tx.init(params)
    for call in (
        lambda: tx.update(params, state),
        lambda: mj.read_velocity(state),
        lambda: mj.reset_velocity(state),
        lambda: mj.apply_updates(params, params),
    ):
        with count_compiles() as compiles:
            call()
        assert len(compiles.names) == 2


def test_c8_a_step_on_several_devices_is_traced_once():
    """The check of all groups together too, which would else be traced in each step."""
    calls = []

    def counted(v, g):
        calls.append(v.shape)
        return v - g, v - g

    params = put(exact(0), PLACES["two devices"][0](None))
    tx = mj.recurrence(counted)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state)
    assert len(calls) <= 2 * len(jax.tree.leaves(params))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_c8_gradients_that_are_bound_to_no_device_follow(axis_type):
    places = PLACES["two meshes"][0](axis_type)
    tx = mj.momentum(0.25, 0.5)
    params = put(exact(0), places)
    bound = train(tx, params, [put(exact(1), places)])
    free = train(tx, params, [exact(1)])
    assert bits(bound) == bits(free)
    assert placed(bound) == placed(free)


@pytest.mark.parametrize("absent", [None, optax.MaskedNode(), np.zeros((), jax.dtypes.float0)])
@pytest.mark.parametrize("which", ["a", "b"])
def test_c5_absent_gradients_of_a_whole_group(absent, which):
    places = PLACES["two devices"][0](None)
    params = put(exact(0), places)
    tx = mj.momentum(0.25, 0.5, velocity_dtype="int8")
    before = train(tx, params, [put(exact(1), places)])[-1]
    grads = put(exact(2), places) | {which: absent}
    updates, state = tx.update(grads, before[1])
    moved = mj.apply_updates(before[0], updates)
    other = {"a": "b", "b": "a"}[which]
    assert jax.tree.leaves(updates[which]) == [] or updates[which].dtype == jax.dtypes.float0
    assert bits(moved[which]) == bits(before[0][which])
    assert bits(mj.read_velocity(state)[which]) == bits(mj.read_velocity(before[1])[which])
    assert bits(moved[other]) != bits(before[0][other])
    assert placed((moved, state)) == placed(before)
    updates, state = tx.update({"a": absent, "b": None}, state)
    assert state.count == 3
    assert placed((moved, state)) == placed(before)


@pytest.mark.slow
def test_c8_read_reset_and_measure_on_several_devices():
    places = PLACES["two meshes"][0](AxisType.Explicit)
    loss = jax.device_put(2.0, places[1].mesh.devices.flat[0])
    for velocity_dtype in (None, "int8"):
        tx = mj.adaptive_restart(mj.momentum(0.25, 0.5, velocity_dtype=velocity_dtype))
        grads = exact(1)
        one = train(tx, exact(0), [grads])[-1][1]
        several = train(tx, put(exact(0), places), [put(grads, places)])[-1][1]
        assert bits(mj.read_velocity(several)) == bits(mj.read_velocity(one))
        where = {"a": np.arange(16).reshape(8, 2) % 2 == 0, "b": True}
        for options in ({}, {"where": where}, {"where": where, "scale": 0.5}):
            reset = mj.reset_velocity(several, **options)
            assert bits(reset) == bits(mj.reset_velocity(one, **options))
            assert placed(reset) == placed(several)
        found, expected = (
            mj.diagnostics.measure(
                given, mj.read_velocity(state), learning_rate=0.25, mu=0.5, loss=loss
            )
            for given, state in ((put(grads, places), several), (grads, one))
        )
        np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=1e-5)
        found, expected = (
            mj.diagnostics.measure_by_leaf(
                given, mj.read_velocity(state), learning_rate=0.25, mu=0.5
            )
            for given, state in ((put(grads, places), several), (grads, one))
        )
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=1e-5)


def test_c8_hyperparameters_in_arrays_on_another_device():
    places = PLACES["two devices"][0](None)
    params = put(exact(0), places)
    elsewhere = jax.device_put(jnp.float32(0.25), jax.devices()[5])
    tx = mj.momentum(elsewhere, 0.5)
    expected = train(mj.momentum(0.25, 0.5), params, [params])
    results = train(tx, params, [params])
    assert bits(results) == bits(expected)
    # The count stays where it was, whatever is first in a set.
    for number in range(8):
        learning_rate = jax.device_put(jnp.float32(0.25), jax.devices()[number])
        _, state = mj.momentum(learning_rate, 0.5).update(params, expected[-1][1])
        assert state.count.devices() == expected[-1][1].count.devices()


def test_c9_errors_on_several_devices():
    places = PLACES["two devices"][0](None)
    params = put(exact(0), places)
    tx = mj.momentum(0.25, 0.5)
    state = tx.init(params)
    before = bits((params, state))
    exchanged = put(exact(0), places[::-1])
    with pytest.raises(ValueError, match=r"\['a'\] are on different devices, .*device_put"):
        tx.update(exchanged, state)
    with pytest.raises(ValueError, match=r"\['a'\] are on different devices"):
        mj.apply_updates(params, exchanged)
    with pytest.raises(ValueError, match=r"\['b'\]\['c'\] has shape"):
        tx.update({"a": params["a"], "b": {"c": jnp.ones(3), "d": params["b"]["d"]}}, state)
    with pytest.raises(TypeError, match=r"\['b'\]\['c'\] is int32"):
        tx.update({"a": None, "b": {"c": jnp.arange(8), "d": None}}, state)
    with pytest.raises(ValueError, match=r"one structure"):
        tx.update({"a": params["a"]}, state)
    assert bits((params, state)) == before


def test_c9_hyperparameters_on_different_devices_need_a_param_on_one():
    one, other = (jax.device_put(0.5, device) for device in jax.devices()[:2])
    tx = mj.momentum(one, other)
    grads = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"hyperparameters are on different devices.*as floats"):
        tx.update(grads, mj.momentum(0.5).init(grads))
