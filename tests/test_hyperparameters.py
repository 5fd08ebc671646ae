"""Tests how hyperparameters are given, which values are refused, and what causes compilations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compiles import count_compiles

import momentum_jax as mj

package: Any = mj  # Gets arguments of wrong types on purpose.
frameworks, schedules, theory = package.frameworks, package.schedules, package.theory

# All numbers here are sums of a few powers of two: float32 holds them exactly.
GRADS = list(np.array([[1.0, -2.0], [0.5, 4.0], [-0.25, 1.0]], np.float32))
DEFAULTS = {
    mj.momentum: {"learning_rate": 0.5, "mu": 0.25},
    mj.trace: {"mu": 0.25, "dampening": 0.5},
}
LOOPS = {mj.momentum: reference.momentum, mj.trace: reference.trace}
each_hyperparameter = pytest.mark.parametrize(
    ("factory", "name"),
    [
        pytest.param(factory, name, id=f"{factory.__name__}, {name}")
        for factory, names in DEFAULTS.items()
        for name in names
    ],
)


def make(factory, name=None, value=None):
    """Returns a transformation with one hyperparameter, chosen by name."""
    given = DEFAULTS[factory] if name is None else {**DEFAULTS[factory], name: value}
    return factory(**given)


def run(tx, overrides=None):
    """Returns the updates for GRADS from v = 0; `overrides` has keywords for some of the steps."""
    state = tx.init(GRADS[0])
    updates = []
    for step, g in enumerate(GRADS):
        update, state = tx.update(g, state, **(overrides or {}).get(step, {}))
        updates.append(update)
    return updates


def given_to_the_factory(factory, name, value):
    """Returns the updates with the value passed to the factory."""
    return run(make(factory, name, value))


def given_by_a_schedule(factory, name, value):
    """Returns the updates with the value returned by a schedule."""
    return run(make(factory, name, lambda count: value))


def given_to_update(factory, name, value):
    """Returns the updates with the value passed to each step."""
    return run(make(factory), always({name: value}))


def always(override):
    """Returns the same override for each step."""
    return dict.fromkeys(range(len(GRADS)), override)


WAYS = [given_to_the_factory, given_by_a_schedule, given_to_update]
each_way = pytest.mark.parametrize("way", WAYS)


def expected(factory, name, value):
    """Returns the updates of the NumPy loop."""
    return LOOPS[factory](GRADS, **{**DEFAULTS[factory], name: value})[0]


# Every kind of value.

KINDS = {
    "float": 0.5,
    "int": 1,
    "np.float16": np.float16(0.5),
    "np.float32": np.float32(0.5),
    "np.float64": np.float64(0.5),
    "np.longdouble": np.longdouble(0.5),
    "np.int8": np.int8(1),
    "np.int64": np.int64(1),
    "np.uint8": np.uint8(1),
    "bfloat16": np.array(0.5, jnp.bfloat16)[()],
    "0-d float32": np.array(0.5, np.float32),
    "0-d float64": np.array(0.5),
    "0-d int64": np.array(1),
    "0-d bfloat16": np.array(0.5, jnp.bfloat16),
    "JAX weak float32": jnp.asarray(0.5),
    "JAX float32": jnp.float32(0.5),
    "JAX float16": jnp.float16(0.5),
    "JAX bfloat16": jnp.bfloat16(0.5),
    "JAX weak int32": jnp.asarray(1),
    "JAX int8": jnp.int8(1),
}
TRACED_KINDS = ["float", "bfloat16", "np.int8"]


@each_hyperparameter
@each_way
@pytest.mark.parametrize("kind", KINDS)
def test_c3_every_kind_of_number_means_its_value(factory, name, way, kind):
    """The updates equal those for the Python float of the same value, and are float32."""
    updates = way(factory, name, KINDS[kind])
    assert {update.dtype for update in updates} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(updates, expected(factory, name, KINDS[kind]))


@each_hyperparameter
@each_way
@pytest.mark.parametrize("kind", TRACED_KINDS)
def test_c3_a_traced_value_means_its_value(factory, name, way, kind):
    """The same holds inside jit, where the value is an argument."""
    updates = jax.jit(lambda value: way(factory, name, value))(KINDS[kind])
    np.testing.assert_array_equal(updates, expected(factory, name, KINDS[kind]))


@each_hyperparameter
@each_way
@pytest.mark.parametrize("kind", [float, jnp.float64, np.array])
def test_c3_a_64_bit_value_keeps_its_digits_for_64_bit_params(x64, factory, name, way, kind):
    """0.1 stays 0.1 and is not rounded to float32."""
    grads = [g.astype(np.float64) for g in GRADS]
    transforms = {
        given_to_the_factory: lambda: (make(factory, name, kind(0.1)), {}),
        given_by_a_schedule: lambda: (make(factory, name, lambda count: kind(0.1)), {}),
        given_to_update: lambda: (make(factory), {name: kind(0.1)}),
    }
    tx, override = transforms[way]()
    state = tx.init(grads[0])
    for g, correct in zip(grads, expected(factory, name, 0.1), strict=True):
        update, state = tx.update(g, state, **override)
        np.testing.assert_allclose(update, correct, rtol=0, atol=1e-14)


# Schedules.

SCHEDULES = {
    "of optax": optax.linear_schedule(1.0, 0.0, 4),
    "a function that uses the count": lambda count: 0.125 * count,
    "one that returns a Python float": lambda count: 0.5,
    "one that returns a Python int": lambda count: 1,
    "one that returns a NumPy scalar": lambda count: np.float16(0.5),
    "one that returns a 16-bit array": lambda count: jnp.asarray(0.5, jnp.bfloat16),
}


@each_hyperparameter
@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_followed(factory, name, kind):
    """Each step equals the NumPy loop."""
    updates = given_to_the_factory(factory, name, SCHEDULES[kind])
    np.testing.assert_array_equal(updates, expected(factory, name, SCHEDULES[kind]))


@each_hyperparameter
@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_followed_inside_scan(factory, name, kind):
    """The same holds if the count is traced."""
    tx = make(factory, name, SCHEDULES[kind])

    def step(state, g):
        update, state = tx.update(g, state)
        return state, update

    _, updates = jax.lax.scan(step, tx.init(GRADS[0]), np.stack(GRADS))
    np.testing.assert_array_equal(updates, expected(factory, name, SCHEDULES[kind]))


@each_hyperparameter
def test_a_schedule_is_called_once_a_step_with_the_count_from_0(factory, name):
    """The count is the number of steps taken before: 0 in the first step, 1 in the second."""
    counts = []

    def schedule(count):
        counts.append(int(count))
        return 0.5

    given_to_the_factory(factory, name, schedule)
    assert counts == [0, 1, 2]


# Overrides.


@each_hyperparameter
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "schedule"])
@pytest.mark.parametrize("value", [0, 0.125, np.float32(0.75), jnp.asarray(1.0)], ids=str)
def test_an_override_holds_for_its_call_only(factory, name, scheduled, value):
    """The next call uses the factory's value again, at its own count."""
    ordinarily = (lambda count: 0.25 * count) if scheduled else (lambda count: 0.5)
    tx = make(factory, name, ordinarily if scheduled else 0.5)
    np.testing.assert_array_equal(
        run(tx, {1: {name: value}}),
        expected(factory, name, lambda count: value if count == 1 else ordinarily(count)),
    )


@pytest.mark.parametrize("factory", DEFAULTS)
def test_all_hyperparameters_can_be_overridden_at_once(factory):
    """Each by its own keyword."""
    overrides = {name: value / 2 for name, value in DEFAULTS[factory].items()}
    correct, _ = LOOPS[factory](GRADS, **overrides)
    np.testing.assert_array_equal(run(make(factory), always(overrides)), correct)


@each_hyperparameter
def test_an_override_of_none_is_no_override(factory, name):
    """So a caller can pass on an optional argument."""
    np.testing.assert_array_equal(given_to_update(factory, name, None), run(make(factory)))


def test_overrides_reach_a_transform_inside_a_chain():
    """Optax passes extra arguments on."""
    tx = optax.chain(optax.identity(), make(mj.momentum))
    correct = expected(mj.momentum, "learning_rate", 0.125)
    np.testing.assert_array_equal(run(tx, always({"learning_rate": 0.125})), correct)


# Refusals.

RULES = {
    "learning_rate": ("must be finite and not negative", "negate the gradients"),
    "mu": ("must be in (-1, 1]", "0.9 is usual, 0 is plain gradient descent"),
    "dampening": ("must be finite", "0 adds the whole gradient"),
}
OUT_OF_RANGE = [
    (mj.momentum, "learning_rate", [-0.5, np.nan, np.inf, -np.inf]),
    (mj.momentum, "mu", [-1.0, -1.5, 1.5, np.nan, np.inf]),
    (mj.trace, "mu", [-1.0, 1.5, np.nan, -np.inf]),
    (mj.trace, "dampening", [np.nan, np.inf, -np.inf]),
]
each_bad_number = pytest.mark.parametrize(
    ("factory", "name", "value"),
    [
        pytest.param(factory, name, value, id=f"{factory.__name__}, {name}={value}")
        for factory, name, values in OUT_OF_RANGE
        for value in values
    ],
)


def assert_says(error, *words):
    """Asserts that the message has all these words."""
    for word in words:
        assert word in str(error.value)


@each_bad_number
@each_way
@pytest.mark.parametrize("kind", [float, np.float32, np.array])
def test_c9_a_number_out_of_range_is_refused(as_shipped, factory, name, value, way, kind):
    """The error gives value, rule and remedy, however the number was given."""
    with pytest.raises(ValueError, match=f"{name}=") as error:
        way(factory, name, kind(value))
    assert_says(error, f"{name}={value}", *RULES[name])


@pytest.mark.parametrize("kind", [float, np.float64, int])
def test_c9_a_number_beyond_float32_is_refused(as_shipped, kind):
    """It would be infinite in the arithmetic; in 64-bit mode it is not."""
    for make in (mj.momentum, mj.frameworks.torch_sgd, mj.qhm):
        with pytest.raises(ValueError, match="is beyond float32, in which it would be infinite"):
            make(kind(1e39))
    mj.momentum(float(np.finfo(np.float32).max))


def test_a_number_beyond_float32_in_64_bit_mode(x64):
    tx: Any = mj.momentum(1e39)
    updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    assert float(updates[0]) == -1e39


@each_bad_number
@pytest.mark.parametrize("way", [given_to_the_factory, given_to_update])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_c9_an_array_out_of_range_is_refused(as_shipped, factory, name, value, way, dtype):
    """The value of a concrete array is checked."""
    with pytest.raises(ValueError, match=f"{name}=") as error:
        way(factory, name, dtype(value))
    assert_says(error, f"{name}={value}", *RULES[name])


@pytest.mark.parametrize(
    ("factory", "name", "value"),
    [
        (mj.momentum, "learning_rate", -0.5),
        (mj.momentum, "mu", 1.5),
        (mj.trace, "mu", np.nan),
        (mj.trace, "dampening", np.inf),
    ],
)
@each_way
def test_c9_a_traced_value_is_used_as_it_is(factory, name, value, way):
    """There is no branch on its value: the updates follow the recurrence."""
    updates = jax.jit(lambda value: way(factory, name, value))(value)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(updates, expected(factory, name, value))


@pytest.mark.parametrize(
    ("factory", "name", "value"),
    [
        (mj.momentum, "learning_rate", 0.0),
        (mj.momentum, "learning_rate", 1024.0),
        (mj.momentum, "mu", 1.0),
        (mj.momentum, "mu", 0.0),
        (mj.momentum, "mu", -0.5),
        (mj.trace, "mu", 1.0),
        (mj.trace, "mu", -0.5),
        (mj.trace, "dampening", 1.0),
        (mj.trace, "dampening", -2.0),
    ],
)
@each_way
def test_c9_the_ends_of_the_range_are_accepted(factory, name, value, way):
    """Accepts learning rate 0 and large ones, mu 1, mu 0, and negative mu."""
    np.testing.assert_array_equal(way(factory, name, value), expected(factory, name, value))


@each_hyperparameter
@each_way
@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        1j,
        np.complex64(1),
        "0.1",
        [0.5],
        np.array("0.1"),
        jnp.asarray(True),
        jnp.complex64(1),
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_c9_what_is_no_real_number_is_refused(as_shipped, factory, name, way, value):
    """The error gives value and rule, however it was given."""
    with pytest.raises(TypeError, match=f"{name}=") as error:
        way(factory, name, value)
    assert_says(error, str(value), "must be a real number")


@each_hyperparameter
@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["1e400", "-1e400"])
def test_c9_an_integer_beyond_the_floats_is_refused(as_shipped, factory, name, value):
    """Its float would be infinite."""
    with pytest.raises(ValueError, match=f"{name}=-?inf") as error:
        factory(**{**DEFAULTS[factory], name: value})
    assert_says(error, *RULES[name])


@each_hyperparameter
@pytest.mark.parametrize("way", [given_to_the_factory, given_by_a_schedule])
def test_c9_none_is_refused(as_shipped, factory, name, way):
    """As a value, and from a schedule that does not return a value."""
    with pytest.raises(TypeError, match=f"{name}=None") as error:
        way(factory, name, None)
    assert_says(error, "must be a real number, a scalar array or", "a schedule")


@each_hyperparameter
def test_c9_a_schedule_is_refused_as_an_override(as_shipped, factory, name):
    """The error says where to pass a schedule."""
    with pytest.raises(TypeError, match=f"{name}=<function") as error:
        given_to_update(factory, name, lambda count: 0.5)
    assert_says(
        error,
        "must be a real number, a scalar array or",
        "(when the transform is made) a schedule: a function of the step's count",
    )


@each_hyperparameter
@each_way
@pytest.mark.parametrize("kind", ["NumPy", "JAX", "traced"])
@pytest.mark.parametrize("shape", [(3,), (1,)], ids=str)
def test_c9_an_array_that_is_no_scalar_is_refused(as_shipped, factory, name, way, kind, shape):
    """It would broadcast silently. The error says what to use for several values."""

    def use(value):
        return way(factory, name, value)

    use = jax.jit(use) if kind == "traced" else use
    full = jnp.full if kind == "JAX" else np.full
    with pytest.raises(ValueError, match=f"{name} must be a scalar") as error:
        use(full(shape, 0.5))
    assert_says(error, f"has shape {shape}", "jax.vmap for a sweep", "optax.partition for groups")


@each_hyperparameter
@each_way
@pytest.mark.parametrize("dtype", ["bool", "complex64"])
def test_c9_a_traced_value_that_is_no_real_number_is_refused(as_shipped, factory, name, way, dtype):
    """Its dtype is known, though its value is not."""
    with pytest.raises(TypeError, match=f"{name}=") as error:
        jax.jit(lambda value: way(factory, name, value))(np.ones((), dtype))
    assert_says(error, f"is {dtype}, but must be a real number", "Give a float", RULES[name][1])


@pytest.mark.parametrize("factory", DEFAULTS)
@pytest.mark.parametrize("value", [0, 1, 0.9, "yes", None, np.array(True), jnp.asarray(True)])
def test_c9_nesterov_must_be_true_or_false(as_shipped, factory, value):
    """This detects a mu that is passed as nesterov."""
    with pytest.raises(TypeError, match="nesterov=") as error:
        factory(**DEFAULTS[factory], nesterov=value)
    assert_says(error, f"nesterov={value!r}", "must be True or False")


@pytest.mark.parametrize("factory", DEFAULTS)
def test_nesterov_may_be_a_numpy_boolean(as_shipped, factory):
    """Comparisons of NumPy numbers return these."""
    np.testing.assert_array_equal(
        run(factory(**DEFAULTS[factory], nesterov=np.True_)),
        run(factory(**DEFAULTS[factory], nesterov=True)),
    )


@pytest.mark.parametrize("factory", DEFAULTS)
@pytest.mark.parametrize(
    "zero",
    [0, 0.0, -0.0, np.float64(0), np.float32(0), np.array(0.0), np.int64(0), jnp.zeros(())],
    ids=lambda zero: f"{type(zero).__name__} {zero}",
)
def test_c9_nesterov_without_momentum_is_refused(as_shipped, factory, zero):
    """It would have no effect; holds for every type of zero mu."""
    with pytest.raises(ValueError, match="nesterov=True") as error:
        factory(**{**DEFAULTS[factory], "mu": zero}, nesterov=True)
    assert_says(error, "mu=0", "no effect", "Give a mu above 0, or leave nesterov out")


def test_nesterov_allows_a_mu_that_passes_through_zero():
    """From a schedule or an override, 0 is one value among others."""
    for tx, override in (
        (mj.momentum(0.5, lambda count: 0.0, nesterov=True), {}),
        (mj.momentum(0.5, 0.25, nesterov=True), {"mu": 0.0}),
    ):
        updates = run(tx, always(override))
        np.testing.assert_array_equal(updates, [-0.5 * g for g in GRADS])


@pytest.mark.parametrize("factory", DEFAULTS)
@pytest.mark.parametrize(
    "value",
    [
        *(np.int16, "uint8", "nonsense", np.complex64, "complex64", bool, object, 16, "float31"),
        *(np.float32(3), np.ones(2, np.float32)),
    ],
)
def test_c9_a_bad_velocity_dtype_is_refused(as_shipped, factory, value):
    """It is refused by the factory, with the list of valid ones."""
    with pytest.raises(TypeError, match="velocity_dtype=") as error:
        factory(**DEFAULTS[factory], velocity_dtype=value)
    assert_says(
        error,
        f"velocity_dtype={value!r}",
        "must be None or one of float32, float64, bfloat16, float16, int8",
    )


@pytest.mark.parametrize("factory", DEFAULTS)
@pytest.mark.parametrize(
    "value",
    [
        "float32",
        "bfloat16",
        "float16",
        np.float32,
        jnp.bfloat16,
        np.dtype(jnp.bfloat16),
        np.dtype("float16"),
    ],
)
def test_velocity_dtype_may_be_named_in_any_way(factory, value):
    """As a string, a scalar type of NumPy or JAX, or a dtype."""
    tx = factory(**DEFAULTS[factory], velocity_dtype=value)
    assert tx.init(GRADS[0])[1].dtype == np.dtype(value)


@pytest.mark.parametrize("factory", DEFAULTS)
def test_c9_a_float64_velocity_without_64_bit_mode_is_refused(factory):
    """JAX would make it float32 without an error."""
    tx = factory(**DEFAULTS[factory], velocity_dtype="float64")
    with pytest.raises(ValueError, match="velocity_dtype=float64") as error:
        tx.init(GRADS[0])
    assert_says(error, "needs 64-bit mode", "jax.config.update('jax_enable_x64', True)")


@pytest.mark.parametrize("factory", DEFAULTS)
def test_a_float64_velocity_is_held_in_64_bit_mode(x64, factory):
    """The remedy in the error message works."""
    tx = factory(**DEFAULTS[factory], velocity_dtype="float64")
    assert tx.init(GRADS[0])[1].dtype == np.float64


# New values compile nothing.

NUMBERS = [value for value in KINDS.values() if not isinstance(value, jax.Array)]
NUMBERS += [0.125, 0.0, 0.3, np.float32(0.7), np.float64(0.9), np.array(0.2)]


@each_hyperparameter
@each_way
def test_c8_no_value_and_no_type_of_number_compiles_anew(factory, name, way):
    """Neither in a new transformation nor as an override, outside jit."""
    way(factory, name, 0.5)
    with count_compiles() as compiles:
        for value in NUMBERS:
            way(factory, name, value)
    assert compiles.count == 0, compiles


@each_hyperparameter
@each_way
@pytest.mark.parametrize("kind", [jnp.asarray, jnp.float32, jnp.bfloat16])
def test_c8_no_value_of_an_array_compiles_anew(factory, name, way, kind):
    """Each dtype of an array compiles once."""
    first, *others = [kind(value) for value in (0.5, 0.125, 0.0, 0.3)]
    way(factory, name, first)
    with count_compiles() as compiles:
        for value in others:
            way(factory, name, value)
    assert compiles.count == 0, compiles


@each_hyperparameter
@each_way
@pytest.mark.parametrize("kind", [float, jnp.bfloat16])
def test_c8_no_value_compiles_anew_inside_jit(factory, name, way, kind):
    """An argument of a jitted function stays an argument of our programs."""
    use = jax.jit(lambda value: way(factory, name, value))
    values = [kind(value) for value in (0.5, 1, 0)]
    with count_compiles() as compiles:
        for value in values:
            use(value)
    assert compiles.count == 1, compiles


# The same rule for every type of number, in every function.

ONES = np.ones(2, np.float32)


def updated(tx, **overrides):
    """Returns one update of ones."""
    return jax.tree.leaves(tx.update(ONES, tx.init(ONES), ONES, **overrides)[0])


def measured(learning_rate, mu):
    found = mj.diagnostics.measure(ONES, ONES, learning_rate=learning_rate, mu=mu)
    by_leaf = mj.diagnostics.measure_by_leaf(ONES, ONES, learning_rate=learning_rate, mu=mu)
    return jax.tree.leaves((found, by_leaf))


def reset(scale):
    return jax.tree.leaves(mj.reset_velocity(mj.momentum(0.1).init(ONES), scale=scale))


def loaded(learning_rate):
    inside, outside = mj.momentum(0.1).init(ONES), mj.trace().init(ONES)
    inside = frameworks.momentum_from_trace(inside, outside, learning_rate=learning_rate)
    outside = frameworks.trace_from_momentum(outside, inside, learning_rate=learning_rate)
    return jax.tree.leaves((inside, outside))


# name: (a function of a number, a valid number, invalid numbers)
CALLS = {
    "momentum, learning_rate": (lambda x: updated(mj.momentum(x)), 0.5, [-0.5, np.inf]),
    "momentum, mu": (lambda x: updated(mj.momentum(0.5, x)), 0.5, [-1.0, 1.5, np.nan]),
    "momentum, mu with nesterov": (
        lambda x: updated(mj.momentum(0.5, x, nesterov=True)),
        0.5,
        [0.0, -0.0, -1.0],
    ),
    "momentum, override": (lambda x: updated(mj.momentum(0.5), mu=x), 0.5, [1.5]),
    "trace, mu": (lambda x: updated(mj.trace(x)), 0.5, [1.5]),
    "trace, mu with nesterov": (lambda x: updated(mj.trace(x, nesterov=True)), 0.5, [0.0, -0.0]),
    "trace, dampening": (lambda x: updated(mj.trace(0.5, dampening=x)), 0.5, [np.inf]),
    "qhm, learning_rate": (lambda x: updated(mj.qhm(x)), 0.5, [-0.5]),
    "qhm, mu": (lambda x: updated(mj.qhm(0.5, x)), 0.5, [1.5]),
    "qhm, nu": (lambda x: updated(mj.qhm(0.5, 0.5, x)), 0.5, [np.nan]),
    "aggmo, learning_rate": (lambda x: updated(mj.aggmo(x)), 0.5, [-0.5]),
    "aggmo, mus": (lambda x: updated(mj.aggmo(0.5, (0.0, x))), 0.5, [1.5]),
    "aggmo, override": (lambda x: updated(mj.aggmo(0.5, (0.5,)), mus=(x,)), 0.5, [1.5]),
    "reset_velocity": (reset, 0.5, [np.inf]),
    "measure, learning_rate": (lambda x: measured(x, 0.5), 0.5, [-0.5]),
    "measure, mu": (lambda x: measured(0.5, x), 0.5, [1.5, -1.0]),
    "torch_sgd, lr": (lambda x: updated(frameworks.torch_sgd(x)), 0.5, [-0.5]),
    "torch_sgd, momentum": (lambda x: updated(frameworks.torch_sgd(0.5, x)), 0.5, [-0.5, 1.5]),
    "torch_sgd, momentum with nesterov": (
        lambda x: updated(frameworks.torch_sgd(0.5, x, nesterov=True)),
        0.5,
        [0.0, -0.0],
    ),
    "torch_sgd, dampening": (lambda x: updated(frameworks.torch_sgd(0.5, 0.5, x)), 0.5, [np.nan]),
    "torch_sgd, dampening with nesterov": (
        lambda x: updated(frameworks.torch_sgd(0.5, 0.5, x, nesterov=True)),
        0.0,
        [0.5],
    ),
    "torch_sgd, weight_decay": (
        lambda x: updated(frameworks.torch_sgd(0.5, weight_decay=x)),
        0.5,
        [-0.5],
    ),
    "keras_sgd": (lambda x: updated(frameworks.keras_sgd(0.5, x, nesterov=True)), 0.0, [-0.5]),
    "keras_sgd, weight_decay": (
        lambda x: updated(frameworks.keras_sgd(0.5, weight_decay=x)),
        0.5,
        [-0.5],
    ),
    "caffe_sgd": (lambda x: updated(frameworks.caffe_sgd(x, 0.5, 0.5)), 0.5, [-0.5]),
    "optax_sgd": (lambda x: updated(frameworks.optax_sgd(0.5, x, nesterov=True)), 0.0, [1.5]),
    "inside and outside": (loaded, 0.5, [0.0, -0.0, -0.5]),
    "sutskever": (lambda x: [schedules.sutskever(x)(300)], 0.5, [1.5, -0.5, np.nan]),
    "demon": (lambda x: [schedules.demon(10, x)(5)], 0.5, [1.0, np.inf]),
    "gradient_descent": (lambda x: theory.gradient_descent(2.0, x), 0.5, [0.0, 3.0]),
    "heavy_ball": (lambda x: theory.heavy_ball(x, 0.25), 0.5, [0.125, np.inf]),
    "nesterov": (lambda x: theory.nesterov(x, 0.25), 0.5, [0.125]),
    "triple_momentum": (lambda x: theory.triple_momentum(x, 0.25), 0.5, [0.125]),
    "stability_limit": (lambda x: [theory.stability_limit(x)], 0.5, [-1.0, 1.5]),
    "spectral_radius": (lambda x: [theory.spectral_radius(x, x, x)], 0.5, [-0.5]),
    "curvature": (lambda x: [theory.spectral_radius(0.5, 0.5, x)], 0.5, [np.inf]),
    "effective_learning_rate": (
        lambda x: [theory.effective_learning_rate(0.5, x)],
        0.5,
        [1.0, np.nan],
    ),
    "friction": (lambda x: [theory.friction(x, 0.5)], 0.5, [0.0, -0.0]),
    "stationary_variance": (
        lambda x: theory.stationary_variance(0.5, 0.5, x, 0.5),
        0.5,
        [0.0, 6.0],
    ),
    "no_escape_bound": (lambda x: [theory.no_escape_bound(x, 2.0)], 0.5, [1.0]),
    "qhm_from_pid": (lambda x: theory.qhm_from_pid(-0.5, x, 0.5), 0.5, [0.0]),
    "qhm_from_accsgd": (lambda x: theory.qhm_from_accsgd(0.5, 4.0, x), 0.5, [3.0]),
    "qhm_from_synthesized_nesterov": (
        lambda x: theory.qhm_from_synthesized_nesterov(0.5, x, 0.5),
        0.5,
        [0.0, 1.0],
    ),
    "qhm_from_robust_momentum": (
        lambda x: theory.qhm_from_robust_momentum(4.0, 1.0, x),
        0.5,
        [0.25, 1.0],
    ),
    "qhm_from_triple_momentum": (
        lambda x: theory.qhm_from_triple_momentum(1.0, x),
        0.5,
        [1.0, 0.0],
    ),
}
TYPES = {
    "np.float32": np.float32,
    "np.float64": np.float64,
    "0-d": np.array,
    "0-d float32": lambda x: np.array(x, np.float32),
    "JAX": jnp.float32,
    "JAX weak": jnp.asarray,
}
WHOLE_TYPES = {"int": int, "np.int64": np.int64, "0-d int8": lambda x: np.array(x, np.int8)}
WHOLE_TYPES["JAX int32"] = jnp.int32


def said(call, value):
    """Returns the type of the error and its message."""
    with pytest.raises((ValueError, TypeError)) as error:
        call(value)
    return error.type, str(error.value)


@pytest.mark.parametrize("name", CALLS)
def test_c3_checked_alike_in_any_type(as_shipped, name):
    """Each type of a known value gives the same result or the same error as a float."""
    call, good, bad = CALLS[name]
    for make_number in TYPES.values():
        for found, correct in zip(call(make_number(good)), call(good), strict=True):
            np.testing.assert_array_equal(found, correct)
    for value in bad:
        whole = WHOLE_TYPES if np.isfinite(value) and value == int(value) else {}
        for make_number in {**TYPES, **whole}.values():
            kind, words = said(call, make_number(value))
            assert (kind, words.replace("-0.0", "0.0")) == (
                said(call, value)[0],
                said(call, value)[1].replace("-0.0", "0.0"),
            )


NOT_NUMBERS = [True, np.True_, np.array(True), 0.5j, "0.5", None, np.ones(1), jnp.ones((1,))]


@pytest.mark.parametrize("name", [name for name in CALLS if "override" not in name])
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: f"{type(value).__name__} {value}")
def test_c3_what_is_no_real_scalar_is_refused_everywhere(as_shipped, name, value):
    """We refuse it, before Python, NumPy or JAX fail on it later."""
    if value is None and name in ("optax_sgd", "keras_sgd, weight_decay"):
        return  # These mean no momentum and no decay.
    said(CALLS[name][0], value)


@pytest.mark.parametrize("name", ["sutskever", "demon", "stability_limit", "heavy_ball"])
def test_c3_what_is_computed_on_the_host_refuses_a_traced_value(as_shipped, name):
    """The error gives the name and the remedy."""
    with pytest.raises(TypeError, match="is traced, but must be known"):
        jax.jit(CALLS[name][0])(0.5)


def test_under_inject_hyperparams_what_is_no_number_is_static():
    """As documented. A type as velocity_dtype would be called, so it is refused."""
    given: dict[str, Any] = dict(learning_rate=0.5, mu=0.25, nesterov=True)
    given["velocity_dtype"] = jnp.bfloat16
    inject = optax.inject_hyperparams
    tx = inject(mj.momentum, static_args=("nesterov", "velocity_dtype"))(**given)
    state: Any = tx.init(GRADS[0])
    assert state.inner_state.velocity.dtype == jnp.bfloat16
    updates, state = jax.jit(tx.update)(GRADS[0], state)
    np.testing.assert_array_equal(updates, run(mj.momentum(**given))[0])
    assert sorted(state.hyperparams) == ["learning_rate", "mu"]
    with pytest.raises(TypeError, match="name it in static_args"):
        inject(mj.momentum)(**given).init(GRADS[0])
