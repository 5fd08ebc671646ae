"""Regression tests for faults that other implementations of momentum had, one test per fault.

If a current Optax still has the fault, a comment shows it. It is only a comment, so that our tests
do not fail when Optax fixes the fault.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax as mj

# Optax types a state as a tree of arrays, so a type checker would not find its fields.
momentum: Any = mj.momentum
trace: Any = mj.trace
apply_updates: Any = mj.apply_updates

# Learning rate inside and outside, with and without Nesterov; all values are exact in binary.
TRANSFORMS = {
    "momentum": lambda **options: momentum(0.5, 0.75, **options),
    "momentum-nesterov": lambda **options: momentum(0.5, 0.75, nesterov=True, **options),
    "trace": lambda **options: trace(0.75, **options),
    "trace-nesterov": lambda **options: trace(0.75, nesterov=True, **options),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)
# For slow tests that do not depend on Nesterov.
each_place = pytest.mark.parametrize("name", ["momentum", "trace"])


def run(tx, gradients, params=None):
    """Returns the updates of each step from v = 0, and the last state."""
    state = tx.init(gradients[0] if params is None else params)
    updates = []
    for grads in gradients:
        update, state = tx.update(grads, state)
        updates.append(update)
    return updates, state


@every_transform
@pytest.mark.parametrize("velocity_dtype", [None, "bfloat16"])
def test_float32_gradients_turn_a_bfloat16_state_into_float32(name, velocity_dtype):
    """Loss scaling and mixed precision give float32 gradients to low-precision params."""
    # state = optax.trace(0.9).init(jnp.ones(2, jnp.bfloat16))              bfloat16
    # optax.trace(0.9).update(jnp.ones(2), state)[1].trace.dtype            float32
    tx = TRANSFORMS[name](velocity_dtype=velocity_dtype)
    params = jnp.ones(2, jnp.bfloat16)
    state = tx.init(params)
    updates, after = tx.update(jnp.ones(2, jnp.float32), state)
    assert after[1].dtype == state[1].dtype
    assert updates.dtype == jnp.float32
    assert apply_updates(params, updates).dtype == jnp.bfloat16


@pytest.mark.parametrize("make_mu", [np.float32, np.float64, jnp.float32, jnp.asarray])
def test_mu_as_an_array_promotes_a_bfloat16_state(make_mu):
    """Hyperparameters come from NumPy, from JAX, and from a schedule."""
    # tx = optax.trace(jnp.float32(0.9)), or np.float32: tx.init(jnp.ones(2, jnp.bfloat16)) holds
    # a bfloat16 trace, and after one update a float32 one.
    mu = make_mu(0.75)
    tx = momentum(0.5, velocity_dtype="bfloat16")
    grads = jnp.ones(2, jnp.bfloat16)
    scheduled = momentum(0.5, lambda count: mu, velocity_dtype="bfloat16")
    for updates, state in (
        tx.update(grads, tx.init(grads), mu=mu),
        scheduled.update(grads, scheduled.init(grads)),
    ):
        assert state[1].dtype == updates.dtype == jnp.bfloat16


@every_transform
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mu_is_rounded_to_the_dtype_of_the_params(name, dtype):
    """0.999 rounds to 1 in bfloat16: the velocity would never decay."""
    # optax.trace(0.999).update(zero, optax.TraceState(one))[1].trace, with both in bfloat16: 1.0
    tx = TRANSFORMS[name]()
    state = tx.init(jnp.zeros(2, dtype))
    state = type(state)(state.count, jnp.ones(2))
    _, after = tx.update(jnp.zeros(2, dtype), state, mu=0.999)
    np.testing.assert_array_equal(after[1], np.float32(0.999))


MIXED = {
    "wide": jnp.ones(2),
    "narrow": jnp.ones(3, jnp.bfloat16),
    "half": jnp.ones((), jnp.float16),
    "complex": jnp.ones(2, jnp.complex64),
}


@each_place
def test_apply_if_finite_raises_over_mixed_dtypes(name):
    """Its two branches must agree in every dtype of the state."""
    # optax.apply_if_finite(optax.trace(0.9), 2), with MIXED as params and float32 gradients for
    # the bfloat16 params: its lax.cond has a bfloat16 trace in one branch, float32 in the other.
    tx: Any = optax.apply_if_finite(TRANSFORMS[name](), 2)
    grads = {**MIXED, "narrow": jnp.ones(3), "half": jnp.ones(())}
    state = tx.init(MIXED)
    _, after = tx.update(grads, state)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), after, state)
    assert int(after.inner_state.count) == 1


@each_place
def test_momentum_advances_on_a_skipped_step(name):
    """A step that overflowed must change neither the velocity nor the count."""
    tx: Any = optax.apply_if_finite(TRANSFORMS[name](), 2)
    update = jax.jit(tx.update)
    _, state = update(MIXED, tx.init(MIXED))
    straight, _ = update(MIXED, state)
    for bad in (np.nan, np.inf):
        updates, skipped = update({**MIXED, "narrow": jnp.full(3, bad, jnp.bfloat16)}, state)
        jax.tree.map(np.testing.assert_array_equal, skipped.inner_state, state.inner_state)
        assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
        jax.tree.map(np.testing.assert_array_equal, update(MIXED, skipped)[0], straight)


@every_transform
def test_a_missing_gradient_deletes_the_momentum_of_its_leaf(name):
    """A layer that is frozen for a step keeps its velocity."""
    # optax.trace(0.9).update({"a": None, "b": one}, state)[1].trace["a"] is None: the momentum of
    # "a" is gone, and with it the structure of the state.
    tx = TRANSFORMS[name]()
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params))
    _, frozen = tx.update({"a": None, "b": jnp.ones(2)}, state)
    np.testing.assert_array_equal(frozen[1]["a"], state[1]["a"])
    thawed, _ = tx.update(params, frozen)
    straight, _ = tx.update(params, state)
    np.testing.assert_array_equal(thawed["a"], straight["a"])


@every_transform
def test_python_float_params_give_a_weak_state_then_a_strong_one(name):
    """If a weak type appears or disappears, the whole step is traced again."""
    # optax.trace(0.9).init(1.0).trace.weak_type is True; one update with a strong gradient and it
    # is False.
    tx = TRANSFORMS[name]()
    state = tx.init({"w": 1.0, "b": jnp.full((2,), 1.0)})
    for grads in ({"w": 1.0, "b": jnp.full((2,), 1.0)}, {"w": jnp.float32(1), "b": jnp.ones(2)}):
        _, state = tx.update(grads, state)
        assert not any(v.weak_type for v in jax.tree.leaves(state))


@each_place
def test_flattening_upcasts_mixed_dtypes(name):
    """A leaf has the same dtypes and bits alone and among leaves of other dtypes."""
    # optax.flatten(optax.trace(0.9)) holds one float32 trace for a float32 and a bfloat16 param.
    tx = TRANSFORMS[name]()
    together, state = run(tx, [MIXED, MIXED])
    for key, leaf in MIXED.items():
        alone, alone_state = run(tx, [leaf, leaf])
        assert together[1][key].dtype == alone[1].dtype
        assert state[1][key].dtype == alone_state[1].dtype
        np.testing.assert_array_equal(together[1][key], alone[1])
        np.testing.assert_array_equal(state[1][key], alone_state[1])


@pytest.mark.parametrize("param", [jnp.arange(3), np.arange(3, dtype=np.int8), 2])
def test_integer_params_truncate_silently(param):
    """An update of 0.4 of an integer would be lost or wrong, so it is refused."""
    # optax.apply_updates(jnp.arange(3), jnp.full(3, -0.5)) is [0 0 1], an int32 array.
    tx = momentum(0.5)
    with pytest.raises(TypeError, match=r"int.*optax\.masked"):
        tx.update(jnp.ones(np.shape(param)), tx.init(param))
    with pytest.raises(TypeError, match=r"int.*optax\.masked"):
        apply_updates(param, jnp.full(np.shape(param), -0.5))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_schedule_starts_at_1(jitted):
    """The first step uses the value for count 0, and each value is used exactly once."""
    rates = jnp.array([1.0, 2.0, 4.0, 8.0])
    tx = momentum(lambda count: rates[count], 0.0)
    state = tx.init(1.0)
    update = jax.jit(tx.update) if jitted else tx.update
    for step, rate in enumerate([1.0, 2.0, 4.0, 8.0]):
        assert int(state.count) == step
        updates, state = update(jnp.ones(()), state)
        assert float(updates) == -rate


@each_place
def test_one_buffer_is_donated_twice(name):
    """If the update shared the velocity's buffer, donating both would free one buffer twice."""
    # updates, state = optax.trace(0.9).update(one, state), outside jit: updates is state.trace.
    tx = TRANSFORMS[name]()
    donate = jax.jit(lambda u, s: jax.tree.map(lambda x: x + 1, (u, s)), donate_argnums=(0, 1))
    for update in (tx.update, jax.jit(tx.update)):
        updates, state = update(MIXED, tx.init(MIXED))
        host = jax.tree.map(np.array, (updates, state))
        for result, before in zip(
            jax.tree.leaves(donate(updates, state)), jax.tree.leaves(host), strict=True
        ):
            np.testing.assert_array_equal(result, before + np.ones((), before.dtype))


@pytest.mark.parametrize(
    ("factory", "scale"), [(lambda **o: momentum(0.5, 0.75, **o), -0.5), (trace, 1.0)]
)
def test_nesterov_mutates_or_ignores_the_buffer(factory, scale):
    """Nesterov reads the usual velocity once more, without changing it."""
    mu = 0.75
    options = {"mu": mu} if factory is trace else {}
    gradients = [jnp.array(g) for g in (1.0, -2.0, 0.5)]
    plain, state = run(factory(**options), gradients)
    ahead, same_state = run(factory(nesterov=True, **options), gradients)
    np.testing.assert_array_equal(same_state[1], state[1])
    for g, velocity, update in zip(gradients, plain, ahead, strict=True):
        assert float(update) == mu * float(velocity) + scale * float(g)
        assert float(update) != float(velocity)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("factory", [trace, lambda **o: momentum(1.0, **o)])
def test_momentum_acts_only_when_nesterov_is_on(factory, nesterov):
    """A step with a zero gradient still moves the params by the velocity."""
    tx = factory(mu=0.5, nesterov=nesterov)
    updates, _ = run(tx, [jnp.ones(()), jnp.zeros(()), jnp.zeros(())])
    coasting = np.array([0.5, 0.25]) * (0.5 if nesterov else 1.0)
    np.testing.assert_array_equal(np.abs(updates[1:]), coasting)


@every_transform
def test_the_buffer_is_zeroed_at_each_step(name):
    """Three equal gradients add up, each older one multiplied by mu once more."""
    _, state = run(TRANSFORMS[name](), [jnp.ones(())] * 3)
    scale = 0.5 if name.startswith("momentum") else 1.0
    assert abs(float(state[1])) == scale * (1 + 0.75 + 0.75**2)


@every_transform
def test_a_fast_path_differs_from_the_reference(name):
    """Eager, jitted, one leaf at a time, on one device and on eight: the bits are the same.

    Before JAX 0.8, the compiler fuses the products of trace with its sum differently in a single
    step and in a loop. There, the last bits of a sum of numbers near 1 may differ.
    """
    tx = TRANSFORMS[name]()
    rng = np.random.default_rng(0)
    # Numbers of full precision: a separate code path would round differently.
    gradients = [jnp.asarray(rng.normal(size=(8, 3)), jnp.float32) for _ in range(3)]
    updates, state = run(tx, gradients)

    def steps(state, gradients):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, gradients)

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    stacked = jnp.stack(gradients)
    for placed in (stacked, jax.device_put(stacked, NamedSharding(mesh, P(None, "d")))):
        scanned, scanned_updates = jax.jit(steps)(tx.init(placed[0]), placed)
        last_bits = 2**-22 if jax.__version_info__ < (0, 8) and name.startswith("trace") else 0
        for found, expected in (
            (scanned[1], state[1]),
            (scanned_updates, jnp.stack(updates)),
        ):
            np.testing.assert_allclose(found, expected, rtol=0, atol=last_bits)


def test_apply_updates_of_a_python_float_differs_from_that_of_an_array():
    """The code path that keeps a weak type adds like the other one."""
    w, u = 0.1, jnp.float32(1 / 3)
    moved = apply_updates({"weak": w, "strong": jnp.float32(w)}, {"weak": u, "strong": u})
    assert float(moved["weak"]) == float(moved["strong"]) == np.float32(w) + np.float32(1 / 3)
    assert moved["weak"].weak_type
    assert not moved["strong"].weak_type


ARGUMENTS = {
    "learning_rate": (momentum, {"learning_rate": 0.5}, {"learning_rate": 0.25}),
    "mu": (momentum, {"learning_rate": 0.5, "mu": 0.5}, {"learning_rate": 0.5, "mu": -0.5}),
    "nesterov": (momentum, {"learning_rate": 0.5}, {"learning_rate": 0.5, "nesterov": True}),
    "mu of trace": (trace, {"mu": 0.5}, {"mu": 0.25}),
    "nesterov of trace": (trace, {}, {"nesterov": True}),
    "dampening": (trace, {}, {"dampening": 0.5}),
    "velocity_dtype": (trace, {"mu": 0.3}, {"mu": 0.3, "velocity_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_arguments_are_accepted_and_ignored(argument):
    """Each argument changes the result of a run of three steps."""
    factory, options, others = ARGUMENTS[argument]
    gradients = [jnp.array([1.0, 0.3]), jnp.array([-2.0, 0.7]), jnp.array([0.5, 0.1])]
    updates, _ = run(factory(**options), gradients)
    other_updates, _ = run(factory(**others), gradients)
    assert np.any(np.asarray(updates) != np.asarray(other_updates))


@pytest.mark.parametrize(
    ("factory", "name"),
    [(momentum, "momentum"), (momentum, "dampening"), (trace, "decay"), (trace, "lr")],
)
def test_a_misspelt_argument_is_accepted_and_ignored(factory, name):
    """Python refuses it, because no function has **kwargs that would accept it."""
    with pytest.raises(TypeError, match=name):
        factory(0.5, **{name: 0.9})


def torch_sgd(gradients, mu, dampening):
    """Returns torch.optim.SGD's velocities by its documentation: no dampening in the first step."""
    velocity = None
    for g in gradients:
        velocity = g if velocity is None else mu * velocity + (1 - dampening) * g
        yield velocity


def test_the_first_step_of_torch_is_exempt_from_dampening():
    """Ours applies dampening in the first step, as documented; its recipe for PyTorch works."""
    gradients = [1.0, -2.0, 0.5, 4.0]
    mu, dampening = 0.75, 0.25
    always, _ = run(trace(mu, dampening=dampening), [jnp.array(g) for g in gradients])
    assert float(always[0]) == (1 - dampening) * gradients[0]
    exempt = trace(mu, dampening=lambda count: jnp.where(count == 0, 0.0, dampening))
    updates, _ = run(exempt, [jnp.array(g) for g in gradients])
    assert list(map(float, updates)) == list(torch_sgd(gradients, mu, dampening))
    assert list(map(float, always)) != list(torch_sgd(gradients, mu, dampening))


@every_transform
@pytest.mark.parametrize("velocity_dtype", [None, "bfloat16"])
def test_a_dtype_changes_on_resume(name, velocity_dtype):
    """A state that was stored as NumPy arrays continues with the same dtypes and results."""
    tx = TRANSFORMS[name](velocity_dtype=velocity_dtype)
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": 1.0}
    _, state = tx.update(params, tx.init(params))
    leaves, treedef = jax.tree.flatten(state)
    stored = treedef.unflatten([np.array(leaf) for leaf in leaves])
    straight, resumed = (tx.update(params, s)[1] for s in (state, stored))
    for x, y in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        assert (x.dtype, x.weak_type) == (y.dtype, y.weak_type)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("factory", [lambda: momentum(0.5), trace])
def test_jitted_init_puts_a_sharded_models_momentum_on_one_device(factory):
    """If a model needs all devices, its velocity needs them too."""
    # jax.jit(optax.trace(0.9).init)(params).trace.sharding, for params sharded over 8 devices, is
    # a SingleDeviceSharding.
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    params = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("d")))
    velocity = jax.jit(factory().init)(params)[1]
    assert velocity.sharding.is_equivalent_to(params.sharding, 2)
    assert {shard.data.shape for shard in velocity.addressable_shards} == {(2, 4)}
