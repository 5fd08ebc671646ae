"""The register of faults that other implementations of momentum have or had, and its tests.

Each fault has a row in `FAULTS`. The row names the tests of the promise that the fault would break,
and the test in this file that is for this fault alone, if those do not cover it. What a row says of
Optax is so in version 0.2.8. No test here fails when another library mends a fault.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax as mj


class Fault(NamedTuple):
    """A fault of another implementation.

    Attributes:
      what: the fault.
      where: the library, with its version and function as far as known.
      contract: the tests, in any file, that cover the promise in general.
      test: the test of this fault in this file; None if the others cover the same cases or more.
    """

    what: str
    where: str
    contract: tuple[str, ...]
    test: str | None = None


ENGINE = "test_c2_c3_c4_c5_c6_c7_c10_hold_together"
PAPER = "test_c1_pure_jit_gives_the_bits_of_eager_and_of_the_paper"
NOT_RECORDED = "The library was not recorded."

FAULTS = [
    # The types of the state
    Fault(
        "Float32 gradients turn a bfloat16 state into a float32 one after one step.",
        "Optax 0.2.8: optax.trace(0.9), with bfloat16 params.",
        (ENGINE, "test_c2_stable_types", "test_c4_wide_arithmetic_narrowed_once"),
    ),
    Fault(
        "A mu that is a NumPy or JAX scalar turns a bfloat16 state into a float32 one.",
        "Optax 0.2.8: optax.trace(np.float32(0.9)), and with jnp.float32.",
        (ENGINE, "test_c2_stable_hyperparameters_never_reach_the_state"),
        "test_mu_as_an_array_promotes_a_bfloat16_state",
    ),
    Fault(
        "Params that are Python floats give a weakly typed state, and then a strongly typed one.",
        "Optax 0.2.8: optax.trace(0.9).init(1.0).",
        (ENGINE, "test_c2_stable_types"),
        "test_python_float_params_give_a_weak_state_then_a_strong_one",
    ),
    Fault(
        "Leaves of mixed dtypes are flattened into one array, of the widest dtype.",
        "Optax 0.2.8: optax.flatten(optax.trace(0.9)) has one float32 trace for a float32 and a "
        "bfloat16 param.",
        (ENGINE,),
        "test_flattening_upcasts_mixed_dtypes",
    ),
    Fault(
        "A dtype of the state changes when a checkpoint is resumed.",
        "PyTorch 2.13: torch.optim.Optimizer.load_state_dict casts a float32 momentum buffer of a "
        "bfloat16 param to bfloat16.",
        ("test_c2_stable_round_trip_through_the_host",),
        "test_a_dtype_changes_on_resume",
    ),
    # Hyperparameters
    Fault(
        "mu is rounded to the dtype of the params; in bfloat16, 0.999 becomes 1.",
        "Optax 0.2.8: optax.trace(0.999), in which a bfloat16 trace of 1 never decays.",
        (ENGINE, "test_c3_mu_is_applied_as_given"),
        "test_mu_is_rounded_to_the_dtype_of_the_params",
    ),
    Fault(
        "An injected mu is rounded to the dtype of the params.",
        "Optax 0.2.8: optax.inject_hyperparams(optax.trace)(decay=0.999), with bfloat16 params and "
        "no hyperparam_dtype.",
        ("test_injected_mu_is_as_exact_as_hyperparam_dtype",),
    ),
    Fault(
        "A schedule starts at 1: the first step does not use its value for count 0.",
        NOT_RECORDED,
        (
            "test_a_schedule_is_called_once_a_step_with_the_count_from_0",
            "test_schedules_are_followed",
            "test_schedules_are_followed_inside_scan",
        ),
    ),
    Fault(
        "An argument is accepted and has no effect.",
        "Optax and Keras: nesterov=True without momentum, in optax.sgd and keras.optimizers.SGD.",
        (
            "test_c3_every_kind_of_number_means_its_value",
            "test_c9_nesterov_without_momentum_is_refused",
        ),
        "test_arguments_are_accepted_and_ignored",
    ),
    Fault(
        "A misspelt argument is accepted and has no effect.",
        NOT_RECORDED,
        (),
        "test_a_misspelt_argument_is_accepted_and_ignored",
    ),
    # Arithmetic
    Fault(
        "A velocity in bfloat16 is rounded to nearest; at mu 0.999 it stops at a quarter of its "
        "limit.",
        "Optax 0.2.8: optax.trace(0.999, accumulator_dtype=jnp.bfloat16).",
        ("test_velocity_reaches_its_limit",),
    ),
    Fault(
        "Updates of integer params are truncated.",
        "Optax 0.2.8: optax.apply_updates(jnp.arange(3), jnp.full(3, -0.5)) is [0, 0, 1].",
        (
            "test_c5_integer_param_with_a_gradient_is_refused",
            "test_c4_apply_updates_of_every_pair_of_dtypes",
        ),
        "test_integer_params_truncate_silently",
    ),
    Fault(
        "apply_updates adds to a Python float in another way than to an array.",
        NOT_RECORDED,
        (
            "test_apply_updates_is_that_of_optax_to_the_bit",
            "test_c2_apply_updates_keeps_dtype_and_weak_type",
        ),
    ),
    Fault(
        "A fast path differs from the reference.",
        "PyTorch, in 2026: the fused SGD on a CPU skipped blocks of bfloat16.",
        (ENGINE, PAPER, "test_c1_pure_scan_gives_the_bits_of_a_loop"),
        "test_a_fast_path_differs_from_the_reference",
    ),
    # The recurrence
    Fault("Nesterov's update changes the velocity, or ignores it.", NOT_RECORDED, (PAPER,)),
    Fault("Momentum acts only if Nesterov is on.", NOT_RECORDED, (PAPER,)),
    Fault("The velocity is set to 0 in each step.", NOT_RECORDED, (PAPER,)),
    Fault(
        "Code that is converted from PyTorch applies dampening in the first step.",
        "PyTorch: torch.optim.SGD does not, by its documentation.",
        ("test_the_first_step_is_exempt_from_dampening",),
        "test_the_first_step_of_torch_is_exempt_from_dampening",
    ),
    # Gradients that are missing or not finite
    Fault(
        "A gradient that is None deletes the velocity of its leaf.",
        "Optax 0.2.8: optax.trace(0.9), whose trace of that leaf becomes None.",
        (ENGINE, "test_c5_no_gradient_covers_a_subtree"),
    ),
    Fault(
        "apply_if_finite raises a TypeError over mixed dtypes.",
        "Optax 0.2.8: optax.apply_if_finite(optax.trace(0.9), 2), with bfloat16 params and float32 "
        "gradients: the branches of its lax.cond have different dtypes.",
        ("test_a_non_finite_gradient_leaves_no_trace_in_apply_if_finite",),
        "test_apply_if_finite_raises_over_mixed_dtypes",
    ),
    Fault(
        "The velocity changes in a step that is skipped because a gradient has overflowed.",
        NOT_RECORDED,
        ("test_a_non_finite_gradient_leaves_no_trace_in_apply_if_finite",),
        "test_momentum_advances_on_a_skipped_step",
    ),
    # Buffers and devices
    Fault(
        "The updates and the state share a buffer, so that it can be donated twice.",
        "Optax 0.2.8: optax.trace(0.9), outside jit.",
        (
            ENGINE,
            "test_c10_shares_no_buffer_at_the_edges",
            "test_c10_donating_either_or_both_is_safe",
        ),
    ),
    Fault(
        "A jitted init puts the whole velocity of a sharded model on one device.",
        "Optax 0.2.8: jax.jit(optax.trace(0.9).init).",
        ("test_c7_init_takes_the_params_sharding",),
        "test_jitted_init_puts_a_sharded_models_momentum_on_one_device",
    ),
]


def test_the_register_names_all_tests_of_this_file_and_only_tests_that_exist():
    register = "test_the_register_names_all_tests_of_this_file_and_only_tests_that_exist"
    here = {name for name in globals() if name.startswith("test_")} - {register}
    assert sorted(fault.test for fault in FAULTS if fault.test) == sorted(here)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for fault in FAULTS:
        assert fault.contract or fault.test, fault.what
        for name in fault.contract:
            assert f"\ndef {name}(" in tests, name


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


@pytest.mark.parametrize("make_mu", [np.float32, np.float64, jnp.float32, jnp.asarray])
def test_mu_as_an_array_promotes_a_bfloat16_state(make_mu):
    """Hyperparameters come from NumPy, from JAX, and from a schedule."""
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
    tx = TRANSFORMS[name]()
    state = tx.init(jnp.zeros(2, dtype))
    state = type(state)(state.count, jnp.ones(2))
    _, after = tx.update(jnp.zeros(2, dtype), state, mu=0.999)
    np.testing.assert_array_equal(after[1], np.float32(0.999))


MIXED = {
    "wide": jnp.ones(2),
    "bfloat16": jnp.ones(3, jnp.bfloat16),
    "half": jnp.ones((), jnp.float16),
    "complex": jnp.ones(2, jnp.complex64),
}


@each_place
def test_apply_if_finite_raises_over_mixed_dtypes(name):
    """Its two branches must agree in every dtype of the state."""
    tx: Any = optax.apply_if_finite(TRANSFORMS[name](), 2)
    grads = {**MIXED, "bfloat16": jnp.ones(3), "half": jnp.ones(())}
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
        updates, skipped = update({**MIXED, "bfloat16": jnp.full(3, bad, jnp.bfloat16)}, state)
        jax.tree.map(np.testing.assert_array_equal, skipped.inner_state, state.inner_state)
        assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
        jax.tree.map(np.testing.assert_array_equal, update(MIXED, skipped)[0], straight)


@every_transform
def test_python_float_params_give_a_weak_state_then_a_strong_one(name):
    """If a weak type appears or disappears, the whole step is traced again."""
    tx = TRANSFORMS[name]()
    state = tx.init({"w": 1.0, "b": jnp.full((2,), 1.0)})
    for grads in ({"w": 1.0, "b": jnp.full((2,), 1.0)}, {"w": jnp.float32(1), "b": jnp.ones(2)}):
        _, state = tx.update(grads, state)
        assert not any(v.weak_type for v in jax.tree.leaves(state))


@each_place
def test_flattening_upcasts_mixed_dtypes(name):
    """A leaf has the same dtypes and bits alone and among leaves of other dtypes."""
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
    tx = momentum(0.5)
    with pytest.raises(TypeError, match=r"int.*optax\.masked"):
        tx.update(jnp.ones(np.shape(param)), tx.init(param))
    with pytest.raises(TypeError, match=r"int.*optax\.masked"):
        apply_updates(param, jnp.full(np.shape(param), -0.5))


@every_transform
def test_a_fast_path_differs_from_the_reference(name):
    """Eager, and in a jitted scan, on one device and on eight: the bits are the same.

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
    """Ours applies dampening in the first step; a schedule of dampening gives PyTorch's rule."""
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
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    params = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("d")))
    velocity = jax.jit(factory().init)(params)[1]
    assert velocity.sharding.is_equivalent_to(params.sharding, 2)
    assert {shard.data.shape for shard in velocity.addressable_shards} == {(2, 4)}
