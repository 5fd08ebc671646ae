"""A method of one's own: `recurrence`, and what it takes for elementwise."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compiles import new_size
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax
from momentum_jax import _storage
from momentum_jax._elementwise import elementwise

mj: Any = momentum_jax  # Optax's trees are of too many types to compute with.
SHAPE = (64, 128)


def lion(velocity, gradient, learning_rate, b1=0.9, b2=0.5):
    update = -learning_rate * jnp.sign(b1 * velocity + (1 - b1) * gradient)
    return b2 * velocity + (1 - b2) * gradient, update


def normalized(velocity, gradient, learning_rate, mu):
    """Not elementwise: the norm is that of the whole array."""
    velocity = mu * velocity + gradient
    return velocity, -learning_rate * velocity / jnp.linalg.norm(velocity)


def by_rows(velocity, gradient, learning_rate):
    """Elementwise, but for a factor that the shape decides."""
    return velocity + gradient, -learning_rate * gradient * velocity.shape[0]


def adam(moments, gradient, learning_rate, t, b1=0.9, b2=0.999):
    first, second = moments
    first = b1 * first + (1 - b1) * gradient
    second = b2 * second + (1 - b2) * gradient**2
    mean, square = first / (1 - b1**t), second / (1 - b2**t)
    return (first, second), -learning_rate * mean / (jnp.sqrt(square) + 1e-8)


def numbers(shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-255, 256, shape) / 64, jnp.float32)


def run(tx: Any, params: Any, steps=4) -> Any:
    state, updates = tx.init(params), None
    update = jax.jit(tx.update)
    for i in range(steps):
        updates, state = update(numbers(params.shape, i), state, params)
        params = optax.apply_updates(params, updates)
    return params, updates, state


def bits(tree):
    return [(x.shape, x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


# What it makes. --------------------------------------------------------------------------


@pytest.mark.parametrize("velocity_dtype", [None, "bfloat16", "int8"])
def test_it_is_the_transformation_of_the_package_to_the_bit(velocity_dtype):
    """One that calls the same function."""
    ours = mj.momentum(0.25, 0.5, velocity_dtype=velocity_dtype)
    own = mj.recurrence(
        reference.heavy_ball, learning_rate=0.25, mu=0.5, velocity_dtype=velocity_dtype
    )
    assert bits(run(own, numbers())) == bits(run(ours, numbers()))


def test_lion_is_that_of_optax():
    tx, theirs = mj.recurrence(lion, learning_rate=0.25), optax.lion(0.25, 0.9, 0.5, weight_decay=0)
    (params, _, state), (expected, _, of_optax) = run(tx, numbers()), run(theirs, numbers())
    assert bits(params) == bits(expected)
    np.testing.assert_allclose(state.velocity, of_optax[0].mu, rtol=1e-6)


def test_several_velocities_are_adam_of_optax():
    """The number of the step is a schedule."""
    tx = mj.recurrence(adam, velocities=2, learning_rate=0.01, t=lambda count: count + 1)
    (params, _, state), (expected, _, _) = run(tx, numbers()), run(optax.adam(0.01), numbers())
    np.testing.assert_allclose(params, expected, rtol=1e-6, atol=1e-6)
    assert isinstance(state, mj.SeveralVelocitiesState)
    first, second = mj.read_velocity(state)
    assert first.shape == second.shape == SHAPE
    assert jnp.all(second >= 0)
    cleared = mj.read_velocity(mj.reset_velocity(state))
    assert all(jnp.all(velocity == 0) for velocity in cleared)


def test_several_velocities_in_8_bits():
    tx = mj.recurrence(
        adam, velocities=2, learning_rate=0.01, t=lambda count: count + 1, velocity_dtype="int8"
    )
    _, _, state = run(tx, numbers())
    assert [x.dtype for x in state.velocity] == [jnp.int8] * 2
    _, _, wide = run(
        mj.recurrence(adam, velocities=2, learning_rate=0.01, t=lambda count: count + 1), numbers()
    )
    for read, exact in zip(mj.read_velocity(state), wide.velocity, strict=True):
        np.testing.assert_allclose(read, exact, atol=0.05 * np.max(np.abs(exact)))


def test_defaults_of_the_signature_are_hyperparameters():
    tx = mj.recurrence(lion, learning_rate=0.25)
    grads, state = numbers(), tx.init(numbers())
    _, by_default = tx.update(grads, state)
    _, overridden = tx.update(grads, state, b2=0.0)
    np.testing.assert_array_equal(by_default.velocity, 0.5 * grads)
    np.testing.assert_array_equal(overridden.velocity, grads)


def test_each_hyperparameter_may_be_a_schedule_or_an_override():
    tx = mj.recurrence(reference.heavy_ball, learning_rate=lambda count: 1.0 / (1 + count), mu=0.0)
    state = tx.init(jnp.zeros(1))
    for expected in (-1.0, -0.5):
        updates, state = tx.update(jnp.ones(1), state)
        assert updates == expected
    updates, _ = tx.update(jnp.ones(1), state, learning_rate=4.0, mu=2**-1)
    assert updates == 0.5 * -0.5 - 4.0


def test_equal_ones_are_equal():
    tx = mj.recurrence(lion, learning_rate=0.25)
    assert tx == mj.recurrence(lion, learning_rate=0.25, b1=0.9)
    assert hash(tx) == hash(mj.recurrence(lion, learning_rate=0.25))
    assert tx != mj.recurrence(lion, learning_rate=0.5)
    assert tx != mj.recurrence(reference.heavy_ball, learning_rate=0.25, mu=0.9)


def test_a_function_is_compiled_once_for_all_values():
    """Not one that is made anew: it is another function."""
    traced = []

    def counted(velocity, gradient, learning_rate):
        traced.append(1)
        return velocity, -learning_rate * gradient

    w = jnp.ones(new_size())
    for rate in (0.1, 0.2, jnp.float32(0.3)):
        tx = mj.recurrence(counted, learning_rate=rate)
        tx.update(w, tx.init(w))
    assert len(traced) == 2  # A number and an array are of different types.
    for _ in range(2):
        tx = mj.recurrence(functools.partial(counted), learning_rate=0.1)
        tx.update(w, tx.init(w))
    assert len(traced) == 4


def test_it_is_exported():
    tx = mj.recurrence(lion, learning_rate=0.25)
    w = numbers()
    exported = export.export(jax.jit(tx.update))(w, tx.init(w), w)
    restored = export.deserialize(exported.serialize())
    assert bits(restored.call(w, tx.init(w), w)) == bits(tx.update(w, tx.init(w), w))


def test_wrappers_take_it():
    params = numbers().astype(jnp.bfloat16)
    tx = mj.kahan(mj.recurrence(lion, learning_rate=2**-12))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jnp.ones_like(params), state, params)
        params = mj.apply_updates(params, updates)
    exact = numbers() - 3 * 2**-12
    np.testing.assert_allclose(
        params.astype(jnp.float32) + state.compensation, exact, rtol=0, atol=2**-16
    )


# Functions that are not elementwise. -----------------------------------------------------


def test_a_norm_is_that_of_the_whole_array_in_each_dtype():
    """The update is a unit vector, also where the velocity is stored in blocks."""
    for velocity_dtype in (None, "bfloat16", "int8"):
        tx = mj.recurrence(normalized, learning_rate=1.0, mu=0.5, velocity_dtype=velocity_dtype)
        _, updates, _ = run(tx, numbers())
        np.testing.assert_allclose(np.linalg.norm(np.asarray(updates, np.float64)), 1.0, rtol=1e-5)


@pytest.mark.parametrize("velocity_dtype", [None, "int8"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_norm_is_that_of_the_whole_array_where_it_is_sharded(axis_type, velocity_dtype):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    tx = mj.recurrence(normalized, learning_rate=1.0, mu=0.5, velocity_dtype=velocity_dtype)
    sharded = jax.device_put(numbers(), NamedSharding(mesh, P("data", "model")))
    updates, state = jax.jit(tx.update)(sharded, tx.init(sharded))
    np.testing.assert_allclose(np.linalg.norm(np.asarray(updates, np.float64)), 1.0, rtol=1e-5)
    assert state.velocity.sharding.is_equivalent_to(sharded.sharding, 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("function", [reference.heavy_ball, normalized])
def test_zero1_splits_its_state_and_changes_no_step(function, axis_type):
    """A norm is that of the whole array, whose parts are on 8 devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    make = functools.partial(mj.recurrence, function, learning_rate=0.25, mu=0.5)
    params = jax.device_put(numbers(), NamedSharding(mesh, P()))
    split = mj.sharding.zero1(make(), mesh)
    state, plain = split.init(params), make().init(params)
    for i in range(3):
        grads = jax.device_put(numbers(seed=i), NamedSharding(mesh, P()))
        updates, state = jax.jit(split.update)(grads, state, params)
        expected, plain = make().update(grads, plain, params)
        np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=1e-7)
        assert state.velocity.sharding.shard_shape(SHAPE) == (8, 128)


def test_what_a_function_reads_of_shapes_is_that_of_the_param():
    """Also where 8 bits are computed with an axis that is split in blocks."""
    for velocity_dtype in (None, "int8"):
        tx = mj.recurrence(by_rows, learning_rate=0.25, velocity_dtype=velocity_dtype)
        updates, _ = tx.update(numbers(), tx.init(numbers()))
        np.testing.assert_array_equal(updates, -0.25 * 64 * numbers())


ELEMENTWISE = {
    "heavy ball": lambda v, g: reference.heavy_ball(v, g, 0.1, 0.9),
    "lion": lambda v, g: lion(v, g, 0.1),
    "a choice": lambda v, g: (jnp.where(v * g > 0, v, 0.0), jnp.clip(g, -1, 1)),
    "a constant": lambda v, g: (jnp.zeros_like(v), g * np.float32(2)),
    "a shape": lambda v, g: by_rows(v, g, 0.1),
    "compiled": jax.jit(lambda v, g: reference.heavy_ball(v, g, 0.1, 0.9)),
    "powers": lambda v, g: (v**2 + jnp.abs(g) ** 0.5, jnp.tanh(g) / (1 + v**2)),
}
NOT_ELEMENTWISE = {
    "a norm": lambda v, g: normalized(v, g, 0.1, 0.9),
    "a product": lambda v, g: (v, v @ v.T @ g),
    "a transpose": lambda v, g: (v, v.reshape(v.shape[::-1]).T.reshape(v.shape) + g),
    "a shift": lambda v, g: (jnp.roll(v, 1), g),
    "a cumulative sum": lambda v, g: (jnp.cumsum(v, 0), g),
    "a constant of each place": lambda v, g: (v * np.ones(SHAPE, np.float32), g),
    "a position": lambda v, g: (v * jnp.arange(SHAPE[-1]), g),
    "noise": lambda v, g: (v + jax.random.normal(jax.random.key(0), v.shape), g),
    "a derivative of its own": lambda v, g: (jax.nn.relu(v), g),
    "a loop": lambda v, g: (jax.lax.fori_loop(0, 3, lambda _, x: x / 2, v), g),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_is_elementwise_is_the_same_in_another_arrangement(name):
    v, g = numbers(), numbers(seed=1)
    arranged = elementwise(ELEMENTWISE[name], v, g)
    assert arranged is not None
    shape = (2, 32, 128)
    found = arranged(v.reshape(shape), g.reshape(shape))
    for one, expected in zip(found, ELEMENTWISE[name](v, g), strict=True):
        np.testing.assert_allclose(one.reshape(SHAPE), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NOT_ELEMENTWISE)
def test_what_is_not_elementwise_is_noticed(name):
    assert elementwise(NOT_ELEMENTWISE[name], numbers(), numbers()) is None


@pytest.mark.slow
def test_no_method_of_the_package_is_taken_for_one_that_is_not(monkeypatch):
    """Each is computed in blocks: that is what its traffic is counted for."""
    whole = []
    step = _storage.Cast.step

    def noted(self, *args):
        whole.append(self)
        return step(self, *args)

    monkeypatch.setattr(_storage.Cast, "step", noted)
    w = numbers((32, 128 * new_size()))
    makers = {
        "momentum": lambda: mj.momentum(0.1, velocity_dtype="int8"),
        "nesterov": lambda: mj.momentum(0.1, nesterov=True, velocity_dtype="int8"),
        "trace": lambda: mj.trace(0.9, dampening=0.1, velocity_dtype="int8"),
        "qhm": lambda: mj.qhm(0.1, velocity_dtype="int8"),
        "aggmo": lambda: mj.aggmo(0.1, velocity_dtype="int8"),
        "lion": lambda: mj.recurrence(lion, learning_rate=0.1, velocity_dtype="int8"),
    }
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    for make in makers.values():
        tx = make()
        tx.update(w, tx.init(w))
        jax.jit(
            jax.shard_map(
                lambda g, tx=tx: tx.update(g, tx.init(g))[0],
                mesh=mesh,
                in_specs=P(None, "data"),
                out_specs=P(None, "data"),
            )
        )(w)
    assert whole == []
    tx = mj.recurrence(normalized, learning_rate=0.1, mu=0.5, velocity_dtype="int8")
    tx.update(w, tx.init(w))
    assert whole == [_storage.BLOCKS]


def test_what_a_function_raises_is_raised():
    def of_matrices(velocity, gradient):
        return velocity, jnp.linalg.qr(gradient)[0]

    tx = mj.recurrence(of_matrices)
    with pytest.raises(TypeError, match="rank at least 2"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
