"""Quasi-hyperbolic and aggregated momentum: the papers' recurrences, and the whole contract.

`test_contract.py` has both in its table; here is what is particular to several velocities.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compiles import count_compiles
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax

mj: Any = momentum_jax  # Optax's trees are of too many types to compute with.

MUS = (0.0, 0.9, 0.99)


def rate(count):
    """Up and down."""
    return 0.1 + 0.05 * jnp.sin(0.7 * count)


def mu(count):
    """Up and down, too."""
    return 0.8 + 0.1 * jnp.cos(0.3 * count)


def gradients(steps, shape=(3, 2), seed=0):
    """Random, in float64."""
    return list(np.random.default_rng(seed).standard_normal((steps, *shape)))


def run(tx, grads):
    """Updates and velocities, step by step."""
    state = tx.init(jnp.zeros_like(grads[0]))
    updates, velocities = [], []
    for g in grads:
        update, state = tx.update(jnp.asarray(g), state)
        updates.append(update)
        velocities.append(state.velocity)
    return updates, velocities


def check_like(got, expected, rtol=1e-12):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "settings",
    [(0.1, 0.9, 0.7), (rate, mu, lambda count: 0.5 + 0.01 * count), (0.1, 0.9, -0.4), (1, 0, 1.5)],
    ids=["constants", "schedules", "nu below 0", "nu above 1"],
)
def test_qhm_is_the_papers(settings):
    """To 1e-12 in float64."""
    grads = gradients(30)
    check_like(run(mj.qhm(*settings), grads), reference.qhm(grads, *settings))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mu", [0.3, 0.9, 0.999])
def test_qhm_at_nu_mu_is_nesterov_and_at_nu_1_momentum(mu):
    """With the learning rate that an average needs, to 1e-12."""
    grads = gradients(40)
    for nu, nesterov in ((mu, True), (1.0, False)):
        updates, _ = run(mj.qhm(0.5, mu, nu), grads)
        expected, _ = run(mj.momentum(0.5 * (1 - mu), mu, nesterov=nesterov), grads)
        check_like(updates, expected)
    plain, _ = run(mj.qhm(0.5, mu, 0.0), grads)
    check_like(plain, [-0.5 * g for g in grads])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("learning_rate", "mus"),
    [(0.1, MUS), (rate, (mu, 0.99, lambda count: 0.0 * count)), (0.1, (0.5,)), (0.1, [0.9, 0.9])],
    ids=["constants", "schedules", "one", "list"],
)
def test_aggmo_is_the_papers(learning_rate, mus):
    """To 1e-12 in float64."""
    grads = gradients(30)
    check_like(run(mj.aggmo(learning_rate, mus), grads), reference.aggmo(grads, learning_rate, mus))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_aggmo_with_one_mu_is_momentum(dtype):
    """To the bit."""
    grads = [jnp.asarray(g, dtype) for g in gradients(20)]
    one, several = run(mj.momentum(rate, mu), grads), run(mj.aggmo(rate, (mu,)), grads)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# Several velocities, and the contract. ----------------------------------------------------


def tree():
    """Leaves of many kinds, one of them frozen."""
    return {
        "f32": jnp.ones((2, 3)),
        "bf16": jnp.ones(4, jnp.bfloat16),
        "complex": jnp.ones(2, jnp.complex64),
        "number": 1.0,
        "frozen": jnp.ones(2),
        "ids": jnp.arange(3),
    }


def grads_of(params):
    """A gradient for each leaf that moves."""
    return {k: None if k in ("frozen", "ids") else jnp.ones_like(w) for k, w in params.items()}


def types(state):
    """All that must not change."""
    leaves, treedef = jax.tree.flatten(state)
    return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def test_c1_c2_c5_c6_state():
    """Of one type through init, update, jit and scan; each velocity like the params."""
    params, tx = tree(), mj.aggmo(0.5, MUS)
    grads, state = grads_of(params), tx.init(params)
    assert [jax.tree.structure(v) for v in state.velocity] == [jax.tree.structure(params)] * 3
    assert types(jax.jit(tx.init)(params)) == types(state)

    def scan(state):
        return jax.lax.scan(lambda s, _: (tx.update(grads, s)[1], None), state, None, 3)[0]

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        eager, jitted = tx.update(grads, state), jax.jit(tx.update)(grads, state)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(a, b)
    for after in (eager[1], jitted[1], jax.jit(scan)(state)):
        assert types(after) == types(state)
        for velocity, before in zip(after.velocity, state.velocity, strict=True):
            np.testing.assert_array_equal(velocity["frozen"], before["frozen"])
    updates = eager[0]
    assert updates["frozen"] is None
    assert {k: u.dtype for k, u in updates.items() if u is not None} == {
        k: g.dtype for k, g in grads.items() if g is not None
    }


def test_c4_the_mean_is_wide_and_rounded_once():
    """Each update alone would be rounded in bfloat16, and their mean again."""
    grads = jnp.asarray(np.random.default_rng(0).standard_normal(512), jnp.bfloat16)
    tx = mj.aggmo(0.3, MUS)
    _, state = tx.update(grads, tx.init(grads))
    updates, state = tx.update(grads, state)
    assert all(v.dtype == jnp.float32 for v in state.velocity)
    mean = (state.velocity[0] + state.velocity[1] + state.velocity[2]) / 3
    np.testing.assert_array_equal(updates, mean.astype(jnp.bfloat16))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_c7_every_velocity_takes_its_params_sharding(axis_type):
    """Eager and jitted, after init and after a step."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)
    specs = [P("d"), P(None, "m"), P("d", "m")]
    params = [jax.device_put(np.ones((8, 16), np.float32), NamedSharding(mesh, s)) for s in specs]
    tx = mj.aggmo(0.5, MUS)
    for wrap in (jax.jit, lambda f: f):
        state = wrap(tx.init)(params)
        after = wrap(tx.update)(params, state)[1]
        for velocity in (*state.velocity, *after.velocity):
            for v, w in zip(velocity, params, strict=True):
                assert v.sharding.is_equivalent_to(w.sharding, 2)


def test_c8_one_program_a_call_and_none_for_new_values():
    """Whatever the mus; overrides too."""
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    tx = mj.aggmo(0.5, MUS)
    state = tx.init(params)
    tx.update(params, state)
    with count_compiles() as compiles:
        mj.aggmo(0.25, (0.1, 0.2, 0.3)).update(params, state)
        tx.update(params, state, learning_rate=0.125, mus=(0.3, 0.2, 0.1))
    assert compiles.count == 0


def test_overrides_are_used():
    """For that call."""
    tx = mj.aggmo(0.5, (0.0, 0.5))
    _, state = tx.update(jnp.float32(1), tx.init(jnp.float32(0)))
    update, _ = tx.update(jnp.float32(1), state, learning_rate=1.0, mus=(1.0, 0.0))
    assert float(update) == (-0.5 - 1 + -1) / 2
    qhm = mj.qhm(0.5, 0.5, 0.5)
    update, _ = qhm.update(jnp.float32(1), qhm.init(jnp.float32(0)), nu=0.0)
    assert float(update) == -0.5


def test_c10_updates_and_state_may_be_donated():
    """No buffer is shared, among the velocities either."""
    params = {"a": jnp.ones(1000)}
    tx = mj.aggmo(0.5, (0.5, 0.5, 0.5))
    step = jax.jit(
        lambda p, s: (lambda u, s: (mj.apply_updates(p, u), s))(*tx.update(p, s)),
        donate_argnums=(0, 1),
    )
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state.velocity))]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("make", [lambda: mj.qhm(0.5), lambda: mj.aggmo(0.5)], ids=["qhm", "aggmo"])
def test_composition(make):
    """In a chain, masked, partitioned and injected, under grad through a hyperparameter."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), make())
    for wrapped in (
        tx,
        optax.masked(tx, {"a": True, "b": False}),
        optax.partition({0: tx, 1: make()}, {"a": 0, "b": 1}),
        optax.apply_if_finite(tx, 3),
    ):
        state = wrapped.init(params)
        updates, after = jax.jit(wrapped.update)(params, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.structure(updates) == jax.tree.structure(params)

    def loss(learning_rate):
        tx = make()
        update, _ = tx.update(params, tx.init(params), learning_rate=learning_rate)
        return update["a"].sum()

    assert float(jax.grad(loss)(0.5)) == pytest.approx(float(loss(0.5)) / 0.5)


def test_lowers_everywhere():
    """For CPU, CUDA, ROCm and TPU, on any machine."""
    params = {"a": jnp.ones((4, 4))}
    for tx in (mj.qhm(0.5), mj.aggmo(0.5)):
        exported = jax.export.export(jax.jit(tx.update), platforms=("cpu", "cuda", "rocm", "tpu"))(
            params, tx.init(params)
        )
        assert set(exported.platforms) == {"cpu", "cuda", "rocm", "tpu"}
