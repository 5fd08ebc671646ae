"""Tests promises C1 to C10 of the contract, over a grid of dtypes, trees and shardings.

Most values are sums of a few powers of two, so that float32 arithmetic on them is exact. Results
can then be compared bit for bit, whether or not the compiler fuses multiply-adds.
"""

import collections
import contextlib
import copy
import dataclasses
import math
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compiles import clear_caches, count_compiles, new_size
from engine import Block, Layer, buffers, is_nothing
from flax.core import FrozenDict
from jax import export
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import momentum_jax as mj

# Optax types a state as a tree of arrays, so a type checker would not find its fields.
momentum: Any = mj.momentum
trace: Any = mj.trace
qhm: Any = mj.qhm
aggmo: Any = mj.aggmo
recurrence: Any = mj.recurrence
MomentumState: Any = mj.MomentumState
apply_updates: Any = mj.apply_updates

# Older JAX versions have it in another module.
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else getattr(jax.sharding, "use_mesh")  # noqa: B009

LEARNING_RATE, MU, DAMPENING, NU = 0.375, 0.75, 0.25, 0.5

# By recurrence: its factory, and the paper's equations in the dtype of v and g.
TRANSFORMS = {
    "momentum": (
        lambda **options: momentum(LEARNING_RATE, MU, **options),
        lambda v, g: (MU * v - LEARNING_RATE * g,) * 2,
    ),
    "momentum-nesterov": (
        lambda **options: momentum(LEARNING_RATE, MU, nesterov=True, **options),
        lambda v, g: (
            MU * v - LEARNING_RATE * g,
            MU * (MU * v - LEARNING_RATE * g) - LEARNING_RATE * g,
        ),
    ),
    "trace": (
        lambda **options: trace(MU, **options),
        lambda v, g: (MU * v + g,) * 2,
    ),
    "trace-nesterov": (
        lambda **options: trace(MU, nesterov=True, dampening=DAMPENING, **options),
        lambda v, g: (
            MU * v + (1 - DAMPENING) * g,
            MU * (MU * v + (1 - DAMPENING) * g) + g,
        ),
    ),
    "qhm": (
        lambda **options: qhm(LEARNING_RATE, MU, NU, **options),
        lambda v, g: (
            MU * v + (1 - MU) * g,
            -LEARNING_RATE * ((1 - NU) * g + NU * (MU * v + (1 - MU) * g)),
        ),
    ),
    "aggmo": (
        lambda **options: aggmo(LEARNING_RATE, (MU,), **options),
        lambda v, g: (MU * v - LEARNING_RATE * g,) * 2,
    ),
    "recurrence": (
        lambda **options: recurrence(
            reference.heavy_ball, learning_rate=LEARNING_RATE, mu=MU, **options
        ),
        lambda v, g: (MU * v - LEARNING_RATE * g,) * 2,
    ),
}

# One value in each type that a hyperparameter may have.
HYPERPARAMETERS = {
    "python": float,
    "numpy float32": np.float32,
    "numpy float64": np.float64,
    "weak array": jnp.asarray,
    "float32 array": jnp.float32,
    "bfloat16 array": jnp.bfloat16,
}

every_transform = pytest.mark.parametrize("name", TRANSFORMS)
# Learning rate inside and outside; without Nesterov, for tests that do not depend on it.
NESTEROV = ["momentum-nesterov", "trace-nesterov"]
each_place = pytest.mark.parametrize("name", NESTEROV)


@pytest.fixture(params=["32-bit", "64-bit"])
def width(request):
    """Runs a test in JAX's default mode and in 64-bit mode; the latter also has 64-bit params."""
    if request.param == "64-bit":
        request.getfixturevalue("x64")
    return request.param


def numbers(shape, kind="float32", seed=0):
    """Returns multiples of 1/64 with up to 8 significant bits: exact in every dtype of the grid."""
    rng = np.random.default_rng(seed)
    draw = rng.integers(-255, 256, shape) / 64
    if kind.startswith("complex"):
        draw = draw + 1j * rng.integers(-255, 256, shape) / 64
    return draw


# Kinds of params and their shapes; 64-bit kinds exist only in 64-bit mode.
WIDE = ["float64", "complex128"]
SHAPES = {
    "float32": (3, 2),
    "bfloat16": (5,),
    "float16": (2, 1, 3),
    "python": (),
    "numpy": (),
    "weak": (3,),
    "float64": (2, 2),
    "complex64": (2,),
    "complex128": (),
}


def make(seed=0, *, only_real=False):
    """Returns a tree of params (or gradients): every kind, with odd and even shapes."""
    wide = jax.config.read("jax_enable_x64")

    def leaf(kind, shape):
        values = numbers(shape, kind, seed + len(kind))
        if kind == "python":
            return float(values)
        if kind == "weak":
            return jnp.full(shape, float(values.flat[0]))
        return np.asarray(values, np.float32) if kind == "numpy" else jnp.asarray(values, kind)

    tree = {
        kind: leaf(kind, shape)
        for kind, shape in SHAPES.items()
        if (wide or kind not in WIDE) and not (only_real and kind.startswith("complex"))
    }
    return tree | {"odd": [leaf("bfloat16", (0, 3)), None]}


def cast(grads, dtype):
    """Casts gradients to a dtype that differs from the params'; complex gradients stay complex."""
    return jax.tree.map(
        lambda g: g if dtype is None or np.iscomplexobj(g) else jnp.asarray(g, dtype), grads
    )


def types(tree):
    """Returns the types that must never change from step to step, without the sharding."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def bits(tree):
    """Returns the bytes of every leaf, and the tree structure."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    return treedef, [(x.shape, x.dtype, x.tobytes()) for x in arrays]


def sharded_otherwise(tree, like):
    """Returns the leaves of `tree` whose sharding differs from `like`."""
    pairs = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(like), strict=True)
    return {
        jax.tree_util.keystr(path): (x.sharding, y.sharding)
        for (path, x), y in pairs
        if not x.sharding.is_equivalent_to(y.sharding, x.ndim)
    }


def moving(tx, **options):
    """Returns a state with a nonzero velocity, after one step."""
    return tx.update(make(1, **options), tx.init(make(**options)))[1]


def two_steps(tx):
    """Returns a program for tests of JAX's transformations: init, two steps, updated params."""

    def run(params, first, second):
        state = tx.init(params)
        updates, state = tx.update(first, state, params)
        params = apply_updates(params, updates)
        updates, state = tx.update(second, state, params)
        return apply_updates(params, updates), updates, state

    return run


# C1: pure. -------------------------------------------------------------------------------


@pytest.mark.usefixtures("width")
def test_c1_pure_inputs_stay_and_a_call_repeats():
    """No call changes its inputs, and the same call gives the same bits."""
    tx = momentum(LEARNING_RATE, MU, nesterov=True)
    params, grads = make(), make(1)
    state = moving(tx)
    before = copy.deepcopy(bits((params, grads, state)))
    first = [tx.init(params), tx.update(grads, state, params), apply_updates(params, grads)]
    again = [tx.init(params), tx.update(grads, state, params), apply_updates(params, grads)]
    assert bits(first) == bits(again)
    assert bits((params, grads, state)) == before


def check_against_the_paper(name):
    make_tx, equations = TRANSFORMS[name]
    params, first, second = make(), make(1), make(2)
    run = two_steps(make_tx())
    eager = run(params, first, second)
    assert bits(jax.jit(run)(params, first, second)) == bits(eager)

    moved, updates, state = eager
    for w, w2, g1, g2, v, u in zip(
        *map(jax.tree.leaves, (params, moved, first, second, state[1], updates)), strict=True
    ):
        wide = np.complex128 if np.iscomplexobj(w) else np.float64
        w, g1, g2 = (np.asarray(x, wide) for x in (w, g1, g2))
        v1, u1 = equations(np.zeros_like(g1), g1)
        v2, u2 = equations(v1, g2)
        np.testing.assert_array_equal(v, v2)
        np.testing.assert_array_equal(u, u2.astype(u.dtype))
        halfway = (w + u1.astype(u.dtype)).astype(w2.dtype)
        np.testing.assert_array_equal(
            w2, (halfway.astype(wide) + u2.astype(u.dtype)).astype(w2.dtype)
        )
    assert int(state.count) == 2


@every_transform
def test_c1_pure_jit_gives_the_bits_of_eager_and_of_the_paper(name):
    """Eager calls, a caller's jit and the float64 equations agree, on exact numbers."""
    check_against_the_paper(name)


@each_place
@pytest.mark.usefixtures("x64")
def test_c1_pure_jit_gives_the_bits_of_the_paper_in_64_bit_mode(name):
    """The same holds in 64-bit mode, with 64-bit params in the tree."""
    check_against_the_paper(name)


@each_place
def test_c1_pure_vmap_over_params_grads_and_state(name):
    """A batch of models gives the same steps as each model alone."""
    run = two_steps(TRANSFORMS[name][0]())
    models = [[make(3 * i + j) for j in range(3)] for i in range(3)]
    alone = [run(*model) for model in models]

    def stack(*leaves):
        return jnp.stack(leaves)

    batch = [jax.tree.map(stack, *inputs) for inputs in zip(*models, strict=True)]
    assert bits(jax.vmap(run)(*batch)) == bits(jax.tree.map(stack, *alone))


@pytest.mark.parametrize("how", ["factory", "override"])
def test_c1_pure_vmap_over_learning_rate_and_mu(how):
    """One program runs a sweep: hyperparameters may be traced, in the factory or in update."""
    old, grad = numbers((5,), seed=1), numbers((5,), seed=2)
    state = MomentumState(jnp.int32(7), jnp.asarray(old, "float32"))

    def step(learning_rate, mu):
        if how == "factory":
            return momentum(learning_rate, mu, nesterov=True).update(jnp.asarray(grad), state)
        tx = momentum(1.0, 0.125, nesterov=True)
        return tx.update(jnp.asarray(grad), state, learning_rate=learning_rate, mu=mu)

    learning_rates, mus = np.array([[0.0, 0.25, 0.5], [0.0, 0.5, 0.75]])[..., None]
    updates, after = jax.vmap(step)(jnp.array(learning_rates[:, 0]), jnp.array(mus[:, 0]))
    expected = mus * old - learning_rates * grad
    np.testing.assert_array_equal(after.velocity, expected)
    np.testing.assert_array_equal(updates, mus * expected - learning_rates * grad)
    np.testing.assert_array_equal(after.count, 8)


@pytest.mark.parametrize("how", ["factory", "override"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.usefixtures("x64")
def test_c1_pure_grad_through_momentum_hyperparameters(how, nesterov):
    """d(second update)/d(learning_rate, mu) equals the derivative worked out by hand."""
    g1, g2 = 1.75, -0.625

    def second_update(learning_rate, mu):
        if how == "factory":
            tx, given = momentum(learning_rate, mu, nesterov=nesterov), {}
        else:
            tx = momentum(1.0, 0.125, nesterov=nesterov)
            given = {"learning_rate": learning_rate, "mu": mu}
        state = tx.update(g1, tx.init(0.0), **given)[1]
        return tx.update(g2, state, **given)[0]

    lr, mu = 0.375, 0.75
    by_hand = (-(mu * g1 + g2), -lr * g1)
    if nesterov:
        by_hand = (-(mu * mu * g1 + mu * g2 + g2), -lr * (2 * mu * g1 + g2))
    assert jax.grad(second_update, argnums=(0, 1))(lr, mu) == by_hand
    forward = jax.jit(jax.jacfwd(jax.checkpoint(second_update), argnums=(0, 1)))
    assert forward(lr, mu) == by_hand


@pytest.mark.parametrize("how", ["factory", "override"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.usefixtures("x64")
def test_c1_pure_grad_through_trace_hyperparameters(how, nesterov):
    """d(second update)/d(mu, dampening) equals the derivative worked out by hand."""
    g1, g2 = 1.75, -0.625

    def second_update(mu, dampening):
        if how == "factory":
            tx, given = trace(mu, dampening=dampening, nesterov=nesterov), {}
        else:
            tx, given = trace(0.125, nesterov=nesterov), {"mu": mu, "dampening": dampening}
        state = tx.update(g1, tx.init(0.0), **given)[1]
        return tx.update(g2, state, **given)[0]

    mu, dampening = 0.75, 0.25
    by_hand = ((1 - dampening) * g1, -(mu * g1 + g2))
    if nesterov:
        by_hand = ((1 - dampening) * (2 * mu * g1 + g2), -(mu * mu * g1 + mu * g2))
    assert jax.grad(second_update, argnums=(0, 1))(mu, dampening) == by_hand


def test_c1_pure_grad_through_the_steps_of_a_run():
    """On a parabola, d(end)/d(start) of a run equals a run of the homogeneous recurrence."""
    tx = momentum(0.25, 0.5)

    def run(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(lambda w: w**2 / 2)(w), state, w)
            return (apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), None, length=4)[0][0]

    w, v = 1.0, 0.0
    for _ in range(4):
        v = 0.5 * v - 0.25 * w
        w = w + v
    assert jax.grad(run)(jnp.float32(3.0)) == w


@pytest.mark.usefixtures("width")
def test_c1_pure_scan_gives_the_bits_of_a_loop():
    """The state can be a scan carry, which would refuse changing types."""
    tx = momentum(LEARNING_RATE, MU, nesterov=True)
    params = make()
    steps = [make(i) for i in (1, 2)]

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (apply_updates(params, updates), state), updates

    looped, updates = (params, tx.init(params)), []
    for grads in steps:
        looped, update = step(looped, grads)
        updates.append(update)
    scanned, scanned_updates = jax.lax.scan(
        step, (params, tx.init(params)), jax.tree.map(lambda *g: jnp.stack(g), *steps)
    )
    assert types(scanned) == types(looped)
    assert bits(scanned) == bits(looped)
    assert bits(scanned_updates) == bits(jax.tree.map(lambda *u: jnp.stack(u), *updates))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("where", ["sharded", "replicated"])
def test_c1_pure_shard_map(where, axis_type):
    """On 8 devices, sharded or replicated, the bits are the same as on one device."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    run = two_steps(momentum(LEARNING_RATE, MU, nesterov=True))
    params, first, second = (jnp.asarray(numbers((8, 4), seed=i), "float32") for i in (0, 1, 2))

    def on_each_device(params, first, second):
        if where == "replicated":
            # Gradients that vary over the devices are averaged before they update replicas.
            first, second = (jax.lax.pmean(g[0], "d") for g in (first, second))
        return run(params, first, second)

    if where == "replicated":
        params = params[0]
        expected = run(params, first.mean(0), second.mean(0))
    else:
        expected = run(params, first, second)
    spec = P("d") if where == "sharded" else P()
    mapped = jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(spec, P("d"), P("d")),
        out_specs=(spec, spec, MomentumState(P(), spec)),
    )
    args = [
        jax.device_put(x, NamedSharding(mesh, s))
        for x, s in ((params, spec), (first, P("d")), (second, P("d")))
    ]
    assert bits(jax.jit(mapped)(*args)) == bits(expected)


def test_c1_pure_shard_map_over_some_axes_of_a_mesh():
    """The partitioner handles the other axes; the bits are the same as on one device."""
    mesh, params, grads = on_mesh(AxisType.Auto, "2-D", [(P("d", "m"), P("d", "m"))])
    run = two_steps(momentum(LEARNING_RATE, MU))
    expected = jax.tree.map(np.asarray, run(params, grads, grads))
    spec = P("d")
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=spec,
        out_specs=(spec, spec, MomentumState(P(), spec)),
        axis_names={"d"},
    )
    assert bits(jax.jit(mapped)(params, grads, grads)) == bits(expected)


def test_c1_pure_shard_map_with_a_learning_rate_that_varies():
    """Each device may have a different learning rate."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    tx = momentum(1.0)

    def step(params, learning_rate):
        updates, state = tx.update(params, tx.init(params), learning_rate=learning_rate[0])
        return apply_updates(params, updates), state

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=P("d"), out_specs=(P("d"), MomentumState(P(), P("d")))
    )
    rates = np.arange(8, dtype=np.float32) / 8
    params, state = jax.jit(mapped)(jnp.ones(8), jnp.asarray(rates))
    np.testing.assert_array_equal(params, 1 - rates)
    np.testing.assert_array_equal(state.velocity, -rates)


@every_transform
@pytest.mark.usefixtures("width")
def test_c1_pure_eval_shape_tells_the_truth(name):
    """Abstract init, update and apply_updates have the same types as the real ones."""
    tx = TRANSFORMS[name][0]()
    params = make()
    state = tx.init(params)
    assert types(jax.eval_shape(tx.init, params)) == types(state)
    assert types(jax.eval_shape(tx.update, params, state)) == types(tx.update(params, state))
    assert types(jax.eval_shape(apply_updates, params, params)) == types(
        apply_updates(params, params)
    )


@contextlib.contextmanager
def strictly():
    """Makes leaked tracers and implicit promotions of dtype or rank errors."""
    with (
        jax.checking_leaks(),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


def strict_run(hyperparameter):
    lr, mu, dampening = map(HYPERPARAMETERS[hyperparameter], (LEARNING_RATE, MU, DAMPENING))
    inside = two_steps(momentum(lr, mu, nesterov=True))
    outside = two_steps(trace(mu, nesterov=True, dampening=dampening))
    return lambda *args: (inside(*args), outside(*args))


@pytest.mark.parametrize(
    ("hyperparameter", "grad_dtype"),
    [(name, None) for name in HYPERPARAMETERS]
    + [("python", "bfloat16"), ("float32 array", "float32"), ("bfloat16 array", "float16")],
)
@pytest.mark.usefixtures("width")
def test_c1_pure_under_strict_modes(hyperparameter, grad_dtype):
    """Every kind of param, gradient and hyperparameter traces, to its usual types."""
    args = make(), cast(make(1), grad_dtype), cast(make(2), grad_dtype)
    expected = types(jax.eval_shape(strict_run(hyperparameter), *args))
    with strictly():
        assert types(jax.eval_shape(strict_run(hyperparameter), *args)) == expected


def test_c1_pure_under_strict_modes_eager():
    """Eager calls give the same bits in strict modes."""
    args = make(), make(1), make(2)
    expected = bits(strict_run("float32 array")(*args))
    with strictly():
        assert bits(strict_run("float32 array")(*args)) == expected


def test_c1_pure_transformed_under_strict_modes():
    """No tracer leaks from a transformation, whichever argument is traced."""
    tx = momentum(optax.linear_schedule(1.0, 0.0, 4), lambda count: 0.5 * jnp.ones(()))

    def loss_after(params, learning_rate, mu):
        chain = optax.chain(trace(mu), tx, momentum(learning_rate, mu, nesterov=True))
        state = chain.init(params)
        updates, _ = chain.update(params, state, params, learning_rate=learning_rate)
        return apply_updates(params, updates).astype(jnp.float32).sum()

    params = jnp.ones((4, 3), jnp.bfloat16)
    with strictly():
        slope = jax.jit(jax.vmap(jax.grad(loss_after, argnums=1)))
        slopes = slope(params, jnp.ones(4), jnp.zeros(4))
    # At mu=0, each of 3 gradients of 1 gives d(learning_rate**2)/d(learning_rate) = 2 at 1.
    np.testing.assert_array_equal(slopes, 3 * 2.0)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@each_place
def test_c1_pure_lowers_for_every_platform(name, platform):
    """The step lowers for CPU, CUDA, ROCm and TPU on any machine."""
    tx = TRANSFORMS[name][0]()
    params = make()
    state = tx.init(params)
    for f, args in (
        (tx.init, (params,)),
        (tx.update, (params, state)),
        (apply_updates, (params, params)),
    ):
        exported = export.export(jax.jit(f), platforms=[platform])(*args)
        assert exported.platforms == (platform,)
        assert [(x.shape, x.dtype) for x in exported.out_avals] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(f(*args))
        ]


@each_place
def test_c1_pure_exported_program_gives_the_same_bits(name):
    """A program exported for all platforms, saved and loaded, runs here with the same bits."""
    tx = TRANSFORMS[name][0]()
    params, grads = make(), make(1)
    state = moving(tx)
    for f, args in (
        (tx.init, (params,)),
        (tx.update, (grads, state)),
        (apply_updates, (params, grads)),
    ):
        leaves, treedef = jax.tree.flatten(args)

        # Other containers would need a registration of each type before serialization.
        def flat(*leaves, f=f, treedef=treedef):
            return jax.tree.leaves(f(*treedef.unflatten(leaves)))

        exported = export.export(jax.jit(flat), platforms=["cpu", "cuda", "rocm", "tpu"])(*leaves)
        read = export.deserialize(exported.serialize())
        assert bits(read.call(*leaves)) == bits(jax.tree.leaves(f(*args)))


# C2: stable. -----------------------------------------------------------------------------


@pytest.mark.parametrize("velocity_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("grad_dtype", [None, "float32", "bfloat16"])
@each_place
@pytest.mark.usefixtures("width")
def test_c2_stable_types(name, grad_dtype, velocity_dtype):
    """Shapes, dtypes, weak types and structure never change after init.

    A compiled program returns the types that it was traced with, so tracing it is enough.
    """
    tx = TRANSFORMS[name][0](velocity_dtype=velocity_dtype)
    params = make(only_real=velocity_dtype is not None)
    grads = cast(make(1, only_real=velocity_dtype is not None), grad_dtype)
    state = tx.init(params)
    expected = types(state)
    assert types(jax.eval_shape(tx.init, params)) == expected
    # Two steps: a type that changes only once, as a weak type does, would then be stable.
    once = jax.eval_shape(tx.update, grads, state)[1]
    assert types(once) == expected
    assert types(jax.eval_shape(tx.update, grads, once)[1]) == expected

    def scan(state):
        return jax.lax.scan(lambda s, _: (tx.update(grads, s)[1], None), state, None, 2)[0]

    assert types(jax.eval_shape(scan, state)) == expected


@pytest.mark.usefixtures("width")
def test_c2_stable_hyperparameters_never_reach_the_state():
    """The type of a hyperparameter, given anywhere, never changes a type of the state."""
    params = make()
    tx = momentum(LEARNING_RATE, MU)
    state = tx.init(params)

    traced_state = trace().init(params)

    def after(tx, state=state, **override):
        return types(jax.eval_shape(lambda g, s: tx.update(g, s, **override)[1], params, state))

    for given in HYPERPARAMETERS.values():
        lr, mu = given(LEARNING_RATE), given(MU)
        assert after(momentum(lr, mu)) == types(state)
        assert after(momentum(lambda count, lr=lr: lr, lambda count, mu=mu: mu)) == types(state)
        assert after(trace(mu, dampening=lr), traced_state) == types(traced_state)
        assert after(tx, learning_rate=lr, mu=mu) == types(state)


ONE_AXIS = [P(), P("d")]
TWO_AXES = [P(), P("d"), P(None, "m"), P("d", "m"), P(("d", "m"))]
MESHES = {"1-D": ((8,), ("d",), ONE_AXIS), "2-D": ((4, 2), ("d", "m"), TWO_AXES)}


def on_mesh(axis_type, mesh_kind, pairs):
    """Returns params and gradients on 8 devices, with one leaf per pair of shardings."""
    shape, names, _ = MESHES[mesh_kind]
    mesh = jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))

    def put(kind, i, spec):
        x = jnp.asarray(numbers((8, 16), seed=i), kind)
        return jax.device_put(x, NamedSharding(mesh, spec))

    params = {f"{p} {g}": put("float32", i, p) for i, (p, g) in enumerate(pairs)}
    grads = {f"{p} {g}": put("float32", i + 99, g) for i, (p, g) in enumerate(pairs)}
    return mesh, params, grads


def check_steps_keep_sharding(params, grads):
    tx = momentum(LEARNING_RATE, MU)

    def expected(w, g):
        first = -LEARNING_RATE * np.asarray(g)
        second = MU * first + first
        return np.asarray(w) + first + second, second

    moved_to = jax.tree.map(expected, params, grads)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    like, state = params, tx.init(params)
    assert sharded_otherwise(state.velocity, like) == {}
    count = state.count.sharding
    for _ in range(2):
        params, state = step(params, state, grads)
        assert sharded_otherwise(state.velocity, like) == {}
        assert sharded_otherwise(params, like) == {}
        assert state.count.sharding.is_equivalent_to(count, 0)
    for name, (w, v) in moved_to.items():
        np.testing.assert_array_equal(params[name], w)
        np.testing.assert_array_equal(state.velocity[name], v)


# Of the params and of the gradients: sharded more, less, along another axis, and in conflict.
EVERY_WAY = [
    *((P(), P("d")), (P(), P("d", "m")), (P("d"), P("d", "m"))),
    *((P("d"), P()), (P("d", "m"), P()), (P("d", "m"), P(None, "m"))),
    *((P("d"), P(None, "m")), (P(None, "m"), P("d"))),
    *((P("d", "m"), P("m", "d")), (P("d"), P(("d", "m")))),
]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_c2_stable_sharding_when_gradients_come_from_the_host(axis_type):
    """Gradients may be NumPy arrays, as from a test or a parameter server."""
    _, params, grads = on_mesh(axis_type, "2-D", [(spec, spec) for spec in TWO_AXES])
    check_steps_keep_sharding(params, jax.tree.map(np.asarray, grads))


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_c2_stable_sharding_when_updates_are_sharded_otherwise(how):
    """The params keep their sharding, even if updates change theirs before apply_updates."""
    _, params, updates = on_mesh(AxisType.Auto, "2-D", EVERY_WAY)
    assert sharded_otherwise(how(apply_updates)(params, updates), params) == {}


@pytest.mark.parametrize("spec", [P(), P("d"), P("d", "m")], ids=str)
def test_c2_stable_sharding_under_vmap_along_unlike_axes(spec):
    """Gradients may be batched and sharded along a different axis than the params."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    velocity = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(mesh, spec))
    grads = jax.device_put(np.ones((16, 8), np.float32), NamedSharding(mesh, P("d", "m")))
    axes = MomentumState(None, 1)
    update = jax.vmap(momentum(0.5, 0.5).update, in_axes=(0, axes), out_axes=(0, axes))
    _, state = jax.jit(update)(grads, MomentumState(jnp.zeros((), jnp.int32), velocity))
    np.testing.assert_array_equal(state.velocity, np.zeros((8, 16)))
    assert sharded_otherwise(state.velocity, velocity) == {}


def test_c2_stable_sharding_beside_leaves_that_are_on_no_mesh():
    """On a mesh with explicit axes, a number and a NumPy array can be params too."""
    mesh, params, _ = on_mesh(AxisType.Explicit, "2-D", [(P("d", "m"), P())])
    (on_the_mesh,) = params
    params |= {"number": 2.0, "host": np.ones(3, np.float32)}
    tx = momentum(0.5, 0.5)

    def step(params, state):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    with set_mesh(mesh):
        eager, jitted = (run(params, tx.init(params)) for run in (step, jax.jit(step)))
    assert bits(eager) == bits(jitted)
    moved, _ = eager
    np.testing.assert_array_equal(moved["number"], 1.5)
    np.testing.assert_array_equal(moved["host"], np.full(3, 0.5))
    assert sharded_otherwise(moved[on_the_mesh], params[on_the_mesh]) == {}


def test_c8_the_program_is_the_same_at_each_lowering():
    """Its text, the key of a compilation cache on disk, is the same each time."""
    _, params, grads = on_mesh(AxisType.Auto, "2-D", EVERY_WAY)
    tx = momentum(0.5, 0.5)
    texts = [jax.jit(tx.update).lower(grads, tx.init(params)).as_text() for _ in range(2)]
    assert texts[0] == texts[1]


def test_c1_pure_exported_programs_meet_in_one():
    """Two steps that were exported separately, with different shapes, run in one program."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    tx = momentum(0.5, 0.5)

    def exported(shape, spec):
        grads = jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, spec))
        state = tx.init(grads)
        return jax.export.export(jax.jit(tx.update))(grads, state), (grads, state)

    (one, args), (other, more) = exported((8, 4), P("d")), exported((16,), P("m"))
    both = jax.jit(lambda args, more: (one.call(*args), other.call(*more)))(args, more)
    assert bits(both) == bits((tx.update(*args), tx.update(*more)))


@pytest.mark.parametrize("device", [0, 3])
@pytest.mark.parametrize("committed", [False, True])
def test_c2_stable_device(device, committed):
    """State and params stay on the device of the params, and committed only if these were."""
    place = jax.devices()[device]
    with contextlib.nullcontext() if committed else jax.default_device(place):
        params = {"w": jnp.ones((2, 3)), "b": jnp.asarray(1.0)}
        if committed:
            params = jax.device_put(params, place)
        tx = momentum(LEARNING_RATE, MU)
        state = tx.init(params)
        updates, after = tx.update(params, state)
        moved = apply_updates(params, updates)
        for leaf in jax.tree.leaves((state, updates, after, moved)):
            assert leaf.devices() == {place}
            assert leaf.committed == committed


def count_traces(params, tx, init):
    """Trains with a user's own jitted step; returns (traces, compiles after the first step)."""
    traces = 0

    @jax.jit
    def step(params, state, x):
        nonlocal traces
        traces += 1

        def loss(params):
            return sum(jnp.sum(jnp.abs(w) ** 2) * x for w in jax.tree.leaves(params))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return apply_updates(params, updates), state

    state = init(params)
    params, state = step(params, state, 1.0)
    with count_compiles() as compiles:
        for _ in range(3):
            params, state = step(params, state, 1.0)
    assert int(state.count) == 4
    return traces, compiles.count


@pytest.mark.parametrize(("velocity_dtype", "jitted"), [(None, True), ("bfloat16", False)])
@pytest.mark.usefixtures("width")
def test_c2_stable_training_loop_traces_once(velocity_dtype, jitted):
    """The step is traced once, because no type in the loop changes."""
    tx = momentum(0.125, 0.5, velocity_dtype=velocity_dtype)
    params = make(only_real=velocity_dtype is not None)
    traces, _ = count_traces(params, tx, jax.jit(tx.init) if jitted else tx.init)
    assert traces == 1


@pytest.mark.parametrize("how", ["init", "jit(init)", "ShapeDtypeStruct"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_c2_stable_training_loop_on_a_mesh_traces_and_compiles_once(axis_type, how):
    """Neither types nor shardings change, for each way to create the state."""
    _, params, _ = on_mesh(axis_type, "2-D", [(P(), P()), (P("d"), P("d")), (P("d", "m"), P())])
    tx = momentum(0.125, 0.5)
    init = {
        "init": tx.init,
        "jit(init)": jax.jit(tx.init),
        "ShapeDtypeStruct": lambda params: tx.init(abstract(params)),
    }[how]
    assert count_traces(params, tx, init) == (1, 0)


def test_c2_stable_round_trip_through_the_host():
    """A state converted to NumPy and back continues with the same types and bits."""
    tx = momentum(LEARNING_RATE, MU)
    state = moving(tx)
    stored = jax.tree.map(np.asarray, state)
    grads = make(2)
    straight, resumed = tx.update(grads, state), tx.update(grads, stored)
    assert types(resumed) == types(straight)
    assert bits(resumed) == bits(straight)


# C3: hyperparameters keep their value. ---------------------------------------------------


def given_as(how, name, value):
    """Returns a momentum that gets one hyperparameter as a value, a schedule or an override."""
    others = {"learning_rate": 0.5, "mu": 0.25} | {name: value}
    if how == "factory":
        return momentum(**others), {}
    if how == "schedule":
        return momentum(**others | {name: lambda count: value}), {}
    return momentum(0.5, 0.25), {name: value}


def check_mu(hyperparameter, how):
    mu = HYPERPARAMETERS[hyperparameter](0.999)
    tx, override = given_as(how, "mu", mu)
    params = make()
    at_rest = tx.init(params)
    state = at_rest._replace(velocity=jax.tree.map(jnp.ones_like, at_rest.velocity))
    coasting = jax.tree.map(jnp.zeros_like, params)
    _, after = tx.update(coasting, state, **override)
    assert types(after) == types(at_rest)
    for velocity in jax.tree.leaves(after.velocity):
        # The value is rounded once, to the dtype of the arithmetic, not to the params' dtype.
        real = np.float64 if velocity.dtype in (np.float64, np.complex128) else np.float32
        np.testing.assert_array_equal(np.asarray(velocity), real(np.float64(mu)))


def check_learning_rate(hyperparameter, how):
    learning_rate = HYPERPARAMETERS[hyperparameter](0.0123)
    tx, override = given_as(how, "learning_rate", learning_rate)
    params = make()
    grads = jax.tree.map(jnp.ones_like, params)
    updates, after = tx.update(grads, tx.init(params), **override)
    assert types(after) == types(tx.init(params))
    for velocity, update in zip(*map(jax.tree.leaves, (after.velocity, updates)), strict=True):
        real = np.float64 if velocity.dtype in (np.float64, np.complex128) else np.float32
        expected = -real(np.float64(learning_rate))
        np.testing.assert_array_equal(np.asarray(velocity), expected)
        np.testing.assert_array_equal(np.asarray(update), expected.astype(update.dtype))


@pytest.mark.parametrize("how", ["factory", "schedule", "override"])
@pytest.mark.parametrize("hyperparameter", HYPERPARAMETERS)
def test_c3_mu_is_applied_as_given(hyperparameter, how):
    """mu=0.999 stays 0.999 with bfloat16 params: a velocity of 1 becomes exactly 0.999."""
    check_mu(hyperparameter, how)


@pytest.mark.parametrize("how", ["factory", "schedule", "override"])
@pytest.mark.parametrize("hyperparameter", HYPERPARAMETERS)
def test_c3_learning_rate_is_applied_as_given(hyperparameter, how):
    """A gradient of 1 gives a velocity of exactly -learning_rate."""
    check_learning_rate(hyperparameter, how)


@pytest.mark.parametrize("hyperparameter", HYPERPARAMETERS)
@pytest.mark.usefixtures("x64")
def test_c3_applied_as_given_in_64_bit_mode(hyperparameter):
    """With 64-bit params all 53 bits count; with others the result is as in 32-bit mode."""
    check_mu(hyperparameter, "factory")
    check_learning_rate(hyperparameter, "factory")


@pytest.mark.parametrize("hyperparameter", HYPERPARAMETERS)
@pytest.mark.usefixtures("width")
def test_c3_dampening_is_applied_as_given(hyperparameter):
    """A gradient of 1 gives a velocity of 1 - dampening."""
    dampening = HYPERPARAMETERS[hyperparameter](0.999)
    params = make()
    grads = jax.tree.map(jnp.ones_like, params)
    tx = trace(0.5, dampening=dampening)
    for velocity in jax.tree.leaves(tx.update(grads, tx.init(params))[1].trace):
        real = np.float64 if velocity.dtype in (np.float64, np.complex128) else np.float32
        np.testing.assert_array_equal(np.asarray(velocity), 1 - real(np.float64(dampening)))


@pytest.mark.parametrize("hyperparameter", ["python", "numpy float64", "float32 array"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float16", "float32"])
def test_c3_long_memory_with_narrow_params(param_dtype, hyperparameter):
    """1000 steps at mu=0.999 reach the closed form; mu rounded to bfloat16 would be 1."""
    steps, mu = 1000, 0.999
    tx = momentum(1.0, HYPERPARAMETERS[hyperparameter](mu))
    grads = jnp.ones(2, param_dtype)
    state = tx.init(grads)
    state = jax.lax.scan(lambda s, _: (tx.update(grads, s)[1], None), state, None, length=steps)[0]
    # Each step rounds mu, a product and a sum to float32: an error of half an ulp each.
    np.testing.assert_allclose(
        np.asarray(state.velocity, np.float64),
        -(1 - mu**steps) / (1 - mu),
        rtol=3 * steps * 2.0**-24,
    )


# C4: compute in high precision, round once. ----------------------------------------------


@pytest.mark.parametrize("velocity_dtype", [None, "bfloat16", "float16"])
@every_transform
def test_c4_wide_arithmetic_narrowed_once(name, velocity_dtype):
    """Results equal the exact result, rounded once to each dtype in which it is stored.

    16-bit velocities use stochastic rounding; the reference computes the same random bits.
    """
    make_tx, equations = TRANSFORMS[name]
    tx = make_tx(velocity_dtype=velocity_dtype)
    storage_dtype = np.dtype(velocity_dtype or "float32")
    dtypes = ["bfloat16", "float16", "float32"]
    state = tx.init({dtype: jnp.zeros(512, dtype) for dtype in dtypes})
    velocity = {dtype: np.zeros(512, storage_dtype) for dtype in dtypes}
    in_storage_dtype = np.zeros(512, storage_dtype)
    for seed in range(4):
        grads = {dtype: numbers((512,), seed=seed).astype(np.dtype(dtype)) for dtype in dtypes}
        updates, state = tx.update(grads, state)
        for dtype in dtypes:
            # These numbers are exact in float32, so the float64 reference rounds only at the end.
            wide_velocity, wide_update = equations(
                velocity[dtype].astype(np.float64), grads[dtype].astype(np.float64)
            )
            if velocity_dtype:
                bits_of_step = reference.hash_bits(wide_velocity, seed)
                wide_velocity = reference.stochastic_round(
                    wide_velocity, velocity_dtype, bits_of_step
                )
            velocity[dtype] = wide_velocity.astype(storage_dtype)
            stored_velocity = state[1][0] if name == "aggmo" else state[1]
            assert bits(stored_velocity[dtype]) == bits(velocity[dtype])
            assert bits(updates[dtype]) == bits(wide_update.astype(np.dtype(dtype)))
        in_storage_dtype = equations(in_storage_dtype, grads["float32"].astype(storage_dtype))[0]
    if storage_dtype.itemsize == 2:
        assert np.any(in_storage_dtype != velocity["float32"]), (
            "narrow arithmetic would go unnoticed"
        )


@pytest.mark.parametrize("update_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.usefixtures("x64")
def test_c4_apply_updates_adds_wide(update_dtype):
    """The sum is rounded once: the update is not first rounded to the param's dtype."""
    dtypes = ["bfloat16", "float16", "float32", "float64", "complex64"]
    params = {dtype: numbers((512,), dtype).astype(np.dtype(dtype)) for dtype in dtypes}
    # Seven bits below the last bit of a bfloat16 param: lost if rounded too early.
    update = (numbers((512,), seed=1) / 128 + 1).astype(np.dtype(update_dtype))
    params, updates = jax.tree.map(jnp.asarray, (params, dict.fromkeys(dtypes, update)))
    moved = apply_updates(params, updates)
    for dtype in dtypes:
        wide = np.asarray(params[dtype], np.result_type(np.dtype(dtype), np.float64)) + update
        assert bits(moved[dtype]) == bits(wide.astype(np.dtype(dtype)))
    assert bits(moved) == bits(optax.apply_updates(params, updates))


@pytest.mark.usefixtures("width")
def test_c4_default_velocity_dtype():
    """The default is the param's dtype, at least float32: zeros, never weakly typed."""
    for param, velocity in zip(
        *map(jax.tree.leaves, (make(), momentum(0.1).init(make()).velocity)), strict=True
    ):
        expected = np.result_type(jnp.asarray(param).dtype, np.float32)
        assert velocity.dtype == expected
        assert not velocity.weak_type
        assert not np.any(np.asarray(velocity))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("param", "dtype"),
    [(1.0, "float64"), (1j, "complex128"), (np.float32(1), "float32"), (np.ones(2), "float64")],
)
def test_c4_default_velocity_dtype_in_64_bit_mode(param, dtype):
    """In 64-bit mode the velocity of a Python number has 64 bits."""
    assert momentum(0.1).init(param).velocity.dtype == dtype


@pytest.mark.parametrize("spelling", [np.dtype, str, lambda name: getattr(jnp, name)])
@pytest.mark.parametrize("velocity_dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.usefixtures("x64")
def test_c4_chosen_velocity_dtype(velocity_dtype, spelling):
    """A velocity_dtype may be written in any way, for params of any dtype."""
    tx = momentum(0.5, velocity_dtype=spelling(velocity_dtype))
    state = tx.init(make(only_real=True))
    assert {v.dtype for v in jax.tree.leaves(state.velocity)} == {np.dtype(velocity_dtype)}


# C5: no gradient. ------------------------------------------------------------------------

ABSENT = {"None": None, "MaskedNode": optax.MaskedNode()}


# JAX does not accept float0 as an argument of jit. Inside jit, see the test below.


@pytest.mark.parametrize("absent", ["None", "MaskedNode"])
@pytest.mark.parametrize("where", ["subtree", "root"])
def test_c5_no_gradient_covers_a_subtree(where, absent):
    """A whole layer or a whole model can have no gradient."""
    nothing = ABSENT[absent]
    params = {
        "frozen": {"w": jnp.arange(3.0), "b": [jnp.ones(2), jnp.ones(())]},
        "head": jnp.ones(2),
    }
    tx = momentum(0.5)
    state = tx.update(params, tx.init(params))[1]
    grads = {"frozen": nothing, "head": jnp.ones(2)} if where == "subtree" else nothing
    updates, after = tx.update(grads, state)
    assert jax.tree.structure(updates, is_leaf=is_nothing) == jax.tree.structure(
        grads, is_leaf=is_nothing
    )
    assert types(after) == types(state)
    assert bits(after.velocity["frozen"]) == bits(state.velocity["frozen"])
    assert int(after.count) == 2
    moved = apply_updates(params, updates)
    assert bits(moved["frozen"]) == bits(params["frozen"])
    assert (bits(moved["head"]) == bits(params["head"])) == (where == "root")


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_c5_float0_from_jax_grad(jitted):
    """jax.grad(allow_int=True) works with an integer param in the tree."""
    tx = momentum(0.5)

    def step(params, state):
        grads = jax.grad(lambda p: (p["w"] * p["steps"]).sum(), allow_int=True)(params)
        assert grads["steps"].dtype == jax.dtypes.float0
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    params = {"w": jnp.ones(3), "steps": jnp.arange(3), "flag": jnp.array(True), "n": 3}
    state = tx.init(params)
    moved, after = (jax.jit(step) if jitted else step)(params, state)
    np.testing.assert_array_equal(moved["w"], [1.0, 0.5, 0.0])
    for still in ("steps", "flag", "n"):
        np.testing.assert_array_equal(moved[still], params[still])
        assert moved[still].dtype == jnp.asarray(params[still]).dtype
    assert types(after) == types(state)
    assert int(after.count) == 1


def test_c5_count_advances_without_any_gradient():
    """A schedule advances even if no param has a gradient, or there are no params."""
    tx = momentum(optax.linear_schedule(1.0, 0.0, 2))
    state = tx.init({"w": jnp.ones(2)})
    for _ in range(3):
        _, state = tx.update({"w": None}, state)
    assert int(state.count) == 3
    for empty in ({}, (), None):
        updates, after = tx.update(empty, tx.init(empty))
        assert jax.tree.leaves(updates) == []
        assert int(after.count) == 1
        assert apply_updates(empty, updates) == empty


def test_c5_no_gradient_inside_scan():
    """None is part of the structure in scan, and the carry keeps its types."""
    tx = trace(0.5)
    params = {"still": jnp.ones(2), "moved": jnp.ones(2)}
    state = tx.update(params, tx.init(params))[1]

    def step(state, grad):
        return tx.update({"still": None, "moved": grad}, state)[1], None

    after = jax.lax.scan(step, state, jnp.ones((3, 2)))[0]
    np.testing.assert_array_equal(after[1]["still"], 1.0)
    np.testing.assert_array_equal(after[1]["moved"], 1 / 8 + 1 / 4 + 1 / 2 + 1)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("param", [jnp.arange(3), jnp.array([True, False]), 3, False])
def test_c5_integer_param_with_a_gradient_is_refused(param, jitted):
    """The error names the path and a remedy."""
    tx = momentum(0.1)
    state = tx.init({"table": {"ids": param}})
    grads = {"table": {"ids": jnp.ones(np.shape(param))}}
    with pytest.raises(TypeError, match=r"\['table'\]\['ids'\].*(int32|bool).*optax\.masked"):
        (jax.jit(tx.update) if jitted else tx.update)(grads, state)


# C6: the velocity mirrors the params. ----------------------------------------------------


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Leafless:
    """A node without leaves."""

    name: str = "config"


W = np.ones((2, 3), np.float32)
TREES = {
    "root": W,
    "python float": 1.0,
    "dict": {"b": W, "a": {"c": W}},
    "list": [W, [W, []]],
    "tuple": (W, (), (W,)),
    "namedtuple": Layer(W, None),
    "dataclass": Block(Layer(W, [W]), W, "tanh"),
    "frozen dict": FrozenDict({"params": {"kernel": W}}),
    "ordered dict": collections.OrderedDict(z=W, a=W),
    "defaultdict": collections.defaultdict(list, z=W, a=W),
    "equinox": eqx.nn.Linear(2, 3, key=jax.random.key(0)),
    "equinox filtered": eqx.filter(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)), eqx.is_array),
    "none": {"a": None, "b": W},
    "masked": {"a": optax.MaskedNode(), "b": W},
    "leafless": {"config": Leafless(), "w": W},
    "only leafless": Leafless(),
    "empty": {},
}


def mirrors(params, init, update, add):
    """Asserts that state and updates have the structure of the params."""
    state = init(params)
    updates, after = update(params, state)
    return state[1], updates, after[1], add(params, updates)


@pytest.mark.parametrize("tree", TREES)
def test_c6_velocity_mirrors_the_params(tree):
    """State and updates have the params' structure and shapes, inside a caller's jit."""
    tx = momentum(0.5)
    params = TREES[tree]
    structure, shapes = jax.tree.structure(params), list(map(np.shape, jax.tree.leaves(params)))
    for mirror in jax.eval_shape(lambda p: mirrors(p, tx.init, tx.update, apply_updates), params):
        assert jax.tree.structure(mirror) == structure
        assert [x.shape for x in jax.tree.leaves(mirror)] == shapes


def test_c6_velocity_mirrors_the_params_eager():
    """The same holds for all those trees at once, outside jit."""
    tx = trace(nesterov=True)
    for mirror in mirrors(TREES, tx.init, tx.update, apply_updates):
        assert jax.tree.structure(mirror) == jax.tree.structure(TREES)
        jax.tree.map(lambda x, w: np.testing.assert_equal(x.shape, np.shape(w)), mirror, TREES)


def test_c6_optax_maps_over_the_params_in_the_state():
    """Optax's search for params-like leaves finds our velocity and nothing else."""
    map_params: Any = optax.tree_utils.tree_map_params
    params = {"w": W, "layer": Layer(W, None)}
    labels = {"w": "rows", "layer": Layer("columns", None)}
    for tx in (momentum(0.1), trace(), momentum(0.1, velocity_dtype="bfloat16")):
        state = tx.init(params)
        doubled = map_params(tx, lambda v: v + 2, state)
        assert jax.tree.structure(doubled) == jax.tree.structure(state)
        np.testing.assert_array_equal(doubled[1]["w"], 2.0)
        assert int(doubled.count) == 0
        labelled = map_params(
            tx, lambda _, label: label, state, labels, transform_non_params=lambda _: "whole"
        )
        assert labelled == MomentumState("whole", labels)
    chain: Any = optax.chain(optax.clip(1.0), momentum(0.1))
    labelled = map_params(chain, lambda _, label: label, chain.init(params), labels)
    assert labelled[1][1] == labels


# C7: the velocity takes its param's sharding. --------------------------------------------


def abstract(params):
    """Returns the params as shapes, dtypes and shardings."""
    return jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), params
    )


@pytest.fixture(params=["set_mesh", "no mesh set"])
def mesh_context(request):
    """Sets the mesh, as a user of Explicit axes does, or does not set it."""
    return contextlib.nullcontext if request.param == "no mesh set" else set_mesh


@pytest.mark.parametrize("mesh_kind", MESHES)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_c7_init_takes_the_params_sharding(axis_type, mesh_kind, mesh_context):
    """Holds eager and jitted, for sharded, replicated and weakly typed leaves in one tree."""
    pairs = [(spec, spec) for spec in MESHES[mesh_kind][2]]
    mesh, params, _ = on_mesh(axis_type, mesh_kind, pairs)
    params["weak"] = jax.device_put(jnp.full((8, 2), 1.0), NamedSharding(mesh, P("d")))
    params["scalar"] = jax.device_put(jnp.ones(()), NamedSharding(mesh, P()))
    params["empty"] = jax.device_put(jnp.ones((0, 3)), NamedSharding(mesh, P()))
    for dtype in ("int32", "bool"):  # Never updated, but as large as others.
        params[dtype] = jax.device_put(jnp.ones((8, 2), dtype), NamedSharding(mesh, P("d")))
    tx = momentum(0.1)
    with mesh_context(mesh):
        states = tx.init(params), jax.jit(tx.init)(params)
    for state in states:
        assert sharded_otherwise(state.velocity, params) == {}
        assert len(state.count.sharding.device_set) == 8
        assert not any(np.any(np.asarray(v)) for v in jax.tree.leaves(state.velocity))


@pytest.mark.parametrize("mesh_kind", MESHES)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_c7_init_from_abstract_params(axis_type, mesh_kind, mesh_context):
    """A ShapeDtypeStruct with a sharding gives real zeros in that sharding."""
    pairs = [(spec, spec) for spec in MESHES[mesh_kind][2]]
    mesh, params, _ = on_mesh(axis_type, mesh_kind, pairs)
    tx = momentum(0.1)
    with mesh_context(mesh):
        state = tx.init(abstract(params))
        from_arrays = tx.init(params)
    assert types(state) == types(from_arrays)
    assert bits(state) == bits(from_arrays)
    assert sharded_otherwise(state, from_arrays) == {}


@pytest.mark.parametrize("mesh_kind", MESHES)
@pytest.mark.parametrize(
    ("axis_type", "mesh_context"),
    # JAX itself cannot compile for an explicit mesh that is not set.
    [
        (AxisType.Auto, "no mesh set"),
        (AxisType.Auto, "set_mesh"),
        (AxisType.Explicit, "set_mesh"),
    ],
    indirect=["mesh_context"],
)
def test_c7_init_from_abstract_params_inside_jit(axis_type, mesh_kind, mesh_context):
    """The jitted function closes over the params and has no argument with a sharding."""
    pairs = [(spec, spec) for spec in MESHES[mesh_kind][2]]
    mesh, params, _ = on_mesh(axis_type, mesh_kind, pairs)
    tx = momentum(0.1)
    with mesh_context(mesh):
        state = jax.jit(lambda: tx.init(abstract(params)))()
    assert types(state) == types(tx.init(params))
    assert sharded_otherwise(state.velocity, params) == {}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_c7_init_from_abstract_params_of_which_some_are_bound_to_no_device(wrap):
    """A new scalar among arrays on a mesh: its sharding names the default device."""
    _, params, _ = on_mesh(AxisType.Auto, "2-D", [(P("d", "m"), P())])
    params["fresh"] = jnp.float32(1)
    tx = momentum(0.1)
    state = wrap(lambda: tx.init(abstract(params)))()
    assert types(state) == types(tx.init(params))
    del params["fresh"], state.velocity["fresh"]
    assert sharded_otherwise(state.velocity, params) == {}


def whereabouts(tree):
    """Returns each array's devices, whether it is committed to them, and its memory kind."""
    return [(x.devices(), x.committed, x.sharding.memory_kind) for x in jax.tree.leaves(tree)]


@contextlib.contextmanager
def configured(device):
    """Sets the default device as an option of the whole program."""
    jax.config.update("jax_default_device", device)
    try:
        yield
    finally:
        jax.config.update("jax_default_device", None)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "context",
    [
        contextlib.nullcontext,
        lambda: jax.default_device(jax.devices()[2]),
        lambda: jax.default_device("cpu"),
        lambda: configured(jax.devices()[2]),
    ],
    ids=["none", "device", "platform", "option"],
)
def test_c7_init_from_abstract_params_knows_the_default_device(context, wrap):
    """Uncommitted arrays stay so; an array on another device than the default stays there."""
    tx = momentum(0.1)
    with context():
        free = jnp.ones(4)
        elsewhere = [jax.device_put(free, d) for d in jax.devices() if d not in free.devices()]
        for params in (free, *elsewhere[:3]):
            state = wrap(lambda params=params: tx.init(abstract(params)))()
            assert whereabouts(state) == whereabouts(tx.init(params))
        state = tx.init(abstract(free))
        # It moves to the gradient's device, as the param would.
        moved = tx.update(jax.device_put(free, jax.devices()[5]), state)[1]
        assert moved.velocity.devices() == {jax.devices()[5]}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("axis_type", [None, AxisType.Auto, AxisType.Explicit])
def test_c7_init_from_abstract_params_knows_the_memory(axis_type, wrap):
    kinds = [m.kind for m in jax.devices()[0].addressable_memories()]
    if "pinned_host" not in kinds:
        pytest.skip("one memory")
    mesh = jax.make_mesh((8,), ("d",), (axis_type or AxisType.Auto,))
    for kind in kinds:
        sharding = (
            SingleDeviceSharding(jax.devices()[1], memory_kind=kind)
            if axis_type is None
            else NamedSharding(mesh, P("d"), memory_kind=kind)
        )
        for tx in (momentum(0.1), mj.adaptive_restart(momentum(0.1))):
            with set_mesh(mesh) if axis_type else contextlib.nullcontext():
                params = jax.device_put(jnp.ones((8, 2)), sharding)
                expected = wrap(tx.init)(params)
                state = wrap(lambda tx=tx, params=params: tx.init(abstract(params)))()
            assert whereabouts(state) == whereabouts(expected)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_c7_init_from_what_eval_shape_returns(wrap):
    """On Explicit axes it has shardings over a mesh without devices."""
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Explicit,))
    tx = momentum(0.1)
    with set_mesh(mesh):
        params = jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("d")))
        shapes = jax.eval_shape(lambda w: 2 * w, params)
        state = wrap(lambda: tx.init(shapes))()
        assert sharded_otherwise(state.velocity, params) == {}


@pytest.mark.usefixtures("width")
def test_c7_init_from_abstract_params_without_sharding():
    """Shapes and dtypes suffice: eager, inside jit, and through eval_shape."""
    params = jax.tree.map(jnp.asarray, make())
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    tx = momentum(0.1)
    expected = tx.init(params)
    for state in (tx.init(shapes), jax.jit(lambda: tx.init(shapes))()):
        assert types(state) == types(expected)
        assert bits(state) == bits(expected)
    assert types(jax.eval_shape(tx.init, shapes)) == types(expected)
    assert types(jax.eval_shape(lambda: tx.init(shapes))) == types(expected)


@pytest.mark.parametrize("velocity_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_c7_jitted_init_never_holds_a_whole_velocity(axis_type, velocity_dtype):
    """In the compiled program, no array is larger than one device's shard."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)
    params = {
        "both": jax.device_put(jnp.ones((64, 24)), NamedSharding(mesh, P("d", "m"))),
        "rows": jax.device_put(jnp.ones((40, 36)), NamedSharding(mesh, P("d"))),
    }
    tx = momentum(0.1, velocity_dtype=velocity_dtype)
    compiled = jax.jit(tx.init).lower(params).compile()
    slices = {name: w.sharding.shard_shape(w.shape) for name, w in params.items()}
    for name, sharding in compiled.output_shardings.velocity.items():
        assert sharding.shard_shape(params[name].shape) == slices[name]
    sizes = [
        math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", str(compiled.as_text()))
    ]
    assert max(sizes) == max(map(math.prod, slices.values()))


# C8: compiled once. ----------------------------------------------------------------------


def of_all_shapes():
    """Returns NumPy leaves of different shapes, so that each eager operation would compile."""
    shapes = [(), (1,), (2, 3), (4,), (0, 5), (6, 1), (7,)]
    shapes.append((new_size(),))
    return {f"w{i}": np.ones(shape, np.float32) for i, shape in enumerate(shapes)}


@each_place
def test_c8_each_eager_call_is_one_program(name):
    """With a cold cache, init, update and apply_updates each compile one program, once."""
    params = of_all_shapes()
    clear_caches()
    tx = TRANSFORMS[name][0]()
    with count_compiles() as compiles:
        state = tx.init(params)
    assert compiles.count == 1
    with count_compiles() as compiles:
        updates, state = tx.update(params, state)
    assert compiles.count == 1
    with count_compiles() as compiles:
        apply_updates(params, updates)
    assert compiles.count == 1
    with count_compiles() as compiles:
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            apply_updates(params, updates)
            tx.init(params)
    assert compiles.count == 0


def test_c8_instances_share_their_programs():
    """New values of hyperparameters, in any number and given anywhere, compile nothing."""
    params = of_all_shapes()
    first = momentum(0.1, 0.9)
    state = first.update(params, first.init(params))[1]
    traced = trace(0.9)
    traced_state = traced.update(params, traced.init(params))[1]
    with count_compiles() as compiles:
        for make_number in (float, np.float32, np.float64, np.float16):
            lr, mu = make_number(0.5), make_number(0.25)
            tx = momentum(lr, mu)
            tx.update(params, tx.init(params))
            first.update(params, state, learning_rate=lr, mu=mu)
            other = trace(mu, dampening=lr)
            other.update(params, other.init(params))
            traced.update(params, traced_state, mu=mu, dampening=lr)
        first.update(params, state, learning_rate=1, mu=0)
        first.update(params, state, learning_rate=np.int32(1), mu=np.int8(0))
    assert compiles.count == 0


@pytest.mark.parametrize("hyperparameter", ["weak array", "float32 array", "bfloat16 array"])
def test_c8_new_values_in_arrays_never_recompile(hyperparameter):
    """A new type of array may compile one program; a new value compiles nothing."""
    given = HYPERPARAMETERS[hyperparameter]
    params = of_all_shapes()
    tx = momentum(given(0.5), given(0.25))
    state = tx.update(params, tx.init(params))[1]
    values = [given(x) for x in (0.125, 0.375, 1.0)]
    with count_compiles() as compiles:
        for value in values:
            momentum(value, value).update(params, state)
            tx.update(params, state, learning_rate=value, mu=value)
    assert compiles.count == 0


def test_c8_a_jitted_schedule_is_one_program_more():
    """The schedule's own program is compiled once; later counts compile nothing."""
    params = of_all_shapes()
    tx = momentum(jax.jit(lambda count: 1.0 / (count + 1)))
    state = tx.init(params)
    clear_caches()
    with count_compiles() as compiles:
        updates, state = tx.update(params, state)
    assert compiles.count == 2
    with count_compiles() as compiles:
        for _ in range(3):
            updates, state = tx.update(params, state)
    assert compiles.count == 0
    np.testing.assert_allclose(updates["w3"], -(0.9**3 + 0.9**2 / 2 + 0.9 / 3 + 1 / 4), rtol=1e-6)


@pytest.mark.parametrize("name", ["learning_rate", "mu"])
def test_c8_new_values_never_recompile_a_callers_jit(name):
    """The hyperparameter is an argument of the user's step, in the factory or in update."""
    params = of_all_shapes()
    tx = momentum(0.5, 0.5)

    @jax.jit
    def step(state, value):
        made = momentum(**{"learning_rate": 0.5, name: value})
        return tx.update(params, made.update(params, state)[1], **{name: value})

    state = tx.init(params)
    step(state, 0.5)
    with count_compiles() as compiles:
        for value in (0.25, 0.75, 1.0):
            step(state, value)
    assert compiles.count == 0


def calls(f, *args):
    """Returns the names of the functions that the program of f calls instead of inlining."""
    equations = jax.make_jaxpr(f)(*args).jaxpr.eqns
    return [eqn.params["name"] for eqn in equations if eqn.primitive.name in ("jit", "pjit")]


@every_transform
def test_c8_inlined_into_a_callers_jit(name):
    """A caller's program inlines our operations: it calls no function but JAX's own `where`."""
    tx = TRANSFORMS[name][0]()
    params = jax.tree.map(jnp.asarray, of_all_shapes())
    state = tx.init(params)
    assert set(calls(tx.init, params)) <= {"_where"}
    assert calls(tx.update, params, state) == calls(optax.safe_increment, state.count)
    assert calls(apply_updates, params, params) == []


# C9: errors are raised at once. ----------------------------------------------------------

BAD_STEPS = {
    "missing leaf": {"a": np.ones(2)},
    "extra leaf": {"a": np.ones(2), "b": np.ones(3), "c": np.ones(1)},
    "other container": [np.ones(2), np.ones(3)],
    "other shape": {"a": np.ones(2), "b": np.ones(4)},
    "broadcastable shape": {"a": np.ones(2), "b": np.ones(())},
    "complex": {"a": np.ones(2), "b": 1j * np.ones(3)},
    "a leaf for a tree": np.ones(2),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@each_place
def test_c9_nothing_is_half_updated(name, wrap):
    """After each refused step, the old state is unchanged and can continue."""
    tx = TRANSFORMS[name][0]()
    update, add = wrap(tx.update), wrap(apply_updates)
    good = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.update(good, tx.init(good))[1]
    before, expected = bits((state, good)), bits(update(good, state))
    for bad in BAD_STEPS.values():
        with pytest.raises((ValueError, TypeError), match=r"gradient"):
            update(bad, state)
        with pytest.raises((ValueError, TypeError), match=r"update"):
            add(good, bad)
        assert bits((state, good)) == before
        assert bits(update(good, state)) == expected


@pytest.mark.parametrize("nesterov", [False, True])
def test_c9_traced_values_are_never_branched_on(nesterov):
    """Values that are refused as numbers are accepted as tracers, whose value is unknown."""
    params = jnp.ones(2)

    def step(learning_rate, mu, dampening):
        inside = momentum(learning_rate, mu, nesterov=nesterov)
        outside = trace(mu, dampening=dampening, nesterov=nesterov)
        fixed = momentum(0.1)
        return (
            inside.update(params, inside.init(params))[0],
            outside.update(params, outside.init(params))[0],
            fixed.update(params, fixed.init(params), learning_rate=learning_rate, mu=mu)[0],
        )

    values = jnp.array([-1.0, 0.0, 2.0])
    nans = jnp.full(3, jnp.nan)
    swept = jax.jit(jax.vmap(step))(values, values, values)
    look = values * nesterov + 1  # From v = 0, the new velocity counts once, or 1 + mu times.
    np.testing.assert_array_equal(swept[0], jnp.stack([-values * look] * 2, 1))
    np.testing.assert_array_equal(swept[2], jnp.stack([-values] * 2, 1))
    assert np.all(np.isnan(jax.vmap(step)(nans, nans, nans)[0]))
    jax.grad(lambda x: step(x, x, x)[0].sum())(-3.0)


# C10: no shared buffer. ------------------------------------------------------------------


def mixed_tree():
    """Returns leaves whose update and velocity have the same type, and leaves where they differ."""
    return {
        "scalar": jnp.ones(()),
        "large": jnp.ones((256, 130)),
        "bfloat16": jnp.ones(5, jnp.bfloat16),
        "complex": jnp.ones(3, jnp.complex64),
        "empty": jnp.ones((0, 3)),
    }


def test_c10_shares_no_buffer_at_the_edges():
    """Covers the cases where the update equals the velocity: mu 1, mu 0, no outer learning rate."""
    for tx in (momentum(1.0, 0.0), momentum(1.0, 1.0), trace(0.0), trace(1.0)):
        params = mixed_tree()
        addresses = buffers(tx.update(params, tx.init(params)))
        assert len(addresses) == len(set(addresses))


def use(updates, state):
    """A later program, which overwrites the buffers donated to it."""
    return jax.tree.map(lambda x: x + 1, updates), jax.tree.map(lambda x: x * 2, state)


USES = {donated: jax.jit(use, donate_argnums=donated) for donated in ((0,), (1,), (0, 1))}


@pytest.mark.parametrize("donated", USES)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@each_place
def test_c10_donating_either_or_both_is_safe(name, wrap, donated):
    """The next program may overwrite donated buffers; all other buffers keep their values."""
    tx = TRANSFORMS[name][0]()
    params = mixed_tree()
    updates, state = wrap(tx.update)(params, tx.init(params))
    host = jax.tree.map(np.array, (updates, state))
    results = USES[donated](updates, state)
    for i, tree in enumerate((updates, state)):
        assert all(x.is_deleted() == (i in donated) for x in jax.tree.leaves(tree))
        if i not in donated:
            assert bits(tree) == bits(host[i])
    assert bits(results) == bits(
        (
            jax.tree.map(lambda x: x + np.ones((), x.dtype), host[0]),
            jax.tree.map(lambda x: x + x, host[1]),
        )
    )


@each_place
def test_c10_donating_the_state_inside_a_step(name):
    """The usual training step reuses all buffers of params and state, with the right numbers."""
    tx = TRANSFORMS[name][0]()

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    params, grads = mixed_tree(), mixed_tree()
    expected = (params, tx.init(params))
    for _ in range(3):
        expected = step(*expected, grads)
    carry = (jax.tree.map(jnp.copy, params), tx.init(params))
    donating = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        given = jax.tree.leaves(carry)
        carry = donating(*carry, grads)
        assert all(leaf.is_deleted() for leaf in given)
    assert bits(carry) == bits(expected)


def test_c10_apply_updates_donates_nothing():
    """The old params and the updates stay valid."""
    params, updates = mixed_tree(), mixed_tree()
    apply_updates(params, updates)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, updates)))


def test_c2_c8_c10_hold_in_a_process_with_one_device():
    """The case of most users. Shardings need no constraints there, so less is compiled."""
    program = """
        import jax, jax.numpy as jnp, numpy as np, optax
        import momentum_jax as mj

        assert jax.device_count() == 1
        for tx in (mj.momentum(.5), mj.trace(nesterov=True)):
            params = {"w": jnp.ones((4, 3)), "b": jnp.full((), 1.), "n": jnp.ones(5, "bfloat16")}
            params["f"] = 1.0
            for update in (tx.update, jax.jit(tx.update)):
                updates, state = update(params, tx.init(params))
                leaves = jax.tree.leaves((updates, state))
                assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)

            traces = 0
            def step(params, state):
                global traces
                traces += 1
                updates, state = tx.update(params, state, params)
                return mj.apply_updates(params, updates), state
            step = jax.jit(step, donate_argnums=1)
            state = tx.init(params)
            for _ in range(3):
                params, state = step(params, state)
            assert traces == 1, traces
            assert int(state.count) == 3
    """
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
