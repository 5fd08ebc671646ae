"""The rules for one leaf, and what is said to whoever breaks one: value, rule, remedy, path."""

import collections
import dataclasses
import re
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_jax as mj

# Optax types a state as any tree of arrays, in which a type checker finds no field.
momentum: Any = mj.momentum
trace: Any = mj.trace
apply_updates: Any = mj.apply_updates

W = jnp.ones(3)
FLOAT0 = np.zeros((3,), jax.dtypes.float0)


def words(*parts):
    """A pattern that finds all parts, in this order, however far apart."""
    return "(?s)" + ".*".join(re.escape(part) for part in parts)


def check_refused(grads, params, error, *parts, traced):
    """The step is refused in these words, also while a caller's program is being traced."""
    tx = momentum(0.5)
    state = tx.init(params)

    def step(state):  # What is no array cannot be an argument when traced: it is closed over.
        return tx.update(grads, state)

    with pytest.raises(error, match=words(*parts)):
        jax.eval_shape(step, state) if traced else step(state)


each_way = pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])


class Pair(NamedTuple):
    """A container with names."""

    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A container with a field that is no leaf."""

    kernel: Any
    activation: str = dataclasses.field(default="relu", metadata={"static": True})


# grads, params, words of the message in their order
STRUCTURES = {
    "missing leaf": (
        {"a": W},
        {"a": W, "b": W},
        ["only in the gradients: none", "only in the velocity: ['b']"],
    ),
    "extra leaf": (
        {"a": W, "b": W},
        {"a": W},
        ["only in the gradients: ['b']", "only in the velocity: none"],
    ),
    "nested": (
        {"layer": [{"w": W}, {"w": W, "scale": W}]},
        {"layer": [{"w": W}, {"w": W, "b": W}]},
        ["gradients: ['layer'][1]['scale']", "velocity: ['layer'][1]['b']"],
    ),
    "shorter list": ([W], [W, W], ["gradients: none", "velocity: [1]"]),
    "many, of which five are named": (
        {str(i): W for i in range(7)},
        {},
        ["gradients: ['0'], ['1'], ['2'], ['3'], ['4'], ...;", "velocity: none"],
    ),
    "tree for a leaf": ({"a": {"w": W}}, {"a": W}, ["['a']['w']", "velocity: ['a']"]),
    "tree for the root": ({"a": W}, W, ["gradients: ['a']", "velocity: the root"]),
    "list for a tuple": ([W], (W,), ["the containers differ", "[*]", "(*,)"]),
    "other names": (Pair(W, W), [W, W], ["gradients: .kernel, .bias", "velocity: [0], [1]"]),
    "other dict": ({"a": W}, collections.OrderedDict(a=W), ["containers differ", "OrderedDict"]),
    "other static field": (
        Layer(W, "tanh"),
        Layer(W, "relu"),
        ["the containers differ", "tanh", "relu"],
    ),
}


@each_way
@pytest.mark.parametrize("case", STRUCTURES)
def test_c9_gradients_of_another_structure(case, traced):
    """Which leaves are where, and what to do about it."""
    grads, params, parts = STRUCTURES[case]
    rule = "the gradients and the velocity must be trees of one structure"
    remedies = ["Call init with the params", "give None where a param has no gradient"]
    check_refused(grads, params, ValueError, rule, *parts, *remedies, traced=traced)


@each_way
@pytest.mark.parametrize(
    ("grads", "params", "there"),
    [
        ({"x": {"a": W}}, {"x": {"a": None}}, ["at ['x']['a']", "NoneType"]),
        ({"a": W}, {"a": optax.MaskedNode()}, ["at ['a']", "MaskedNode"]),
        ({"a": W}, {"a": ()}, ["at ['a']", "tuple"]),
        ({"a": [W]}, {"a": [{"w": W}]}, ["at ['a'][0]", "dict"]),
        (W, {"a": W}, ["at the root of the tree", "dict"]),
        (W, None, ["at the root of the tree", "NoneType"]),
    ],
)
def test_c9_gradient_where_init_saw_no_param(grads, params, there, traced):
    """None at init, as for a leaf that is masked, and a real gradient later."""
    place, kind = there
    message = [place, "is an array, but the velocity there is", kind, "Call init with the params"]
    check_refused(grads, params, ValueError, "the gradient", *message, traced=traced)


@each_way
@pytest.mark.parametrize(
    ("grads", "params", "parts"),
    [
        ({"x": [W]}, {"x": [jnp.ones((3, 1))]}, ["at ['x'][0]", "(3,)", "(3, 1)"]),
        ({"x": jnp.ones(())}, {"x": W}, ["at ['x']", "()", "(3,)"]),
        ({"x": 1.0}, {"x": W}, ["at ['x']", "()", "(3,)"]),
        (jnp.ones((1, 3)), W, ["at the root of the tree", "(1, 3)", "(3,)"]),
        (jnp.ones((0,)), jnp.ones((0, 3)), ["at the root of the tree", "(0,)", "(0, 3)"]),
        (Pair(W, W), Pair(W, jnp.ones(4)), ["at .bias", "(3,)", "(4,)"]),
    ],
)
def test_c9_gradient_of_another_shape(grads, params, parts, traced):
    """Also where broadcasting would have let it pass."""
    remedy = "They must be equal. Call init with the params"
    check_refused(grads, params, ValueError, "the gradient", *parts, remedy, traced=traced)


@each_way
@pytest.mark.parametrize(
    ("param", "dtype"),
    [
        (jnp.arange(3), "int32"),
        (np.ones(3, np.uint8), "uint8"),
        (jnp.array([True, False, True]), "bool"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_c5_integer_or_boolean_param_with_a_gradient(param, dtype, nested, traced):
    """By its path, with both ways out."""
    params, grads, path = (
        ({"ids": (param,)}, {"ids": (W,)}, "at ['ids'][0]")
        if nested
        else (param, W, "at the root of the tree")
    )
    parts = [f"the param {path} is {dtype}", "integer or a boolean", "None", "optax.partition"]
    check_refused(grads, params, TypeError, *parts, traced=traced)


@each_way
@pytest.mark.parametrize(
    ("grad", "dtype"),
    [(jnp.arange(3), "int32"), (jnp.array([True] * 3), "bool"), (np.ones(3, np.int8), "int8")],
)
def test_c9_integer_gradient(grad, dtype, traced):
    """Nothing differentiable gives one: it is a mistake."""
    parts = [f"the gradient at ['w'] is {dtype}", "floating-point or complex", "Convert it"]
    check_refused({"w": grad}, {"w": W}, TypeError, *parts, "None", traced=traced)


@each_way
@pytest.mark.parametrize(
    ("grad", "param", "dtypes"),
    [(1j * W, W, ["complex64", "float32"]), (W, 1j * W, ["float32", "complex64"])],
)
def test_c9_real_and_complex_do_not_mix(grad, param, dtypes, traced):
    """A complex gradient of a real param would lose its imaginary part."""
    of_grad, of_velocity = dtypes
    parts = [f"at ['w'] is {of_grad}", f"its velocity is {of_velocity}", "do not mix", "init"]
    check_refused({"w": grad}, {"w": param}, TypeError, *parts, traced=traced)


@each_way
@pytest.mark.parametrize(
    "grad",
    [jax.nn.relu, "text", jax.ShapeDtypeStruct((3,), "float32")],
    ids=["function", "text", "shape"],
)
def test_c9_gradient_that_is_no_array(grad, traced):
    """A leaf that was left in a model, or a gradient that is only its shape."""
    name = type(grad).__name__
    check_refused(
        {"x": [grad]}, {"x": [W]}, TypeError, "the gradient at ['x'][0]", name, traced=traced
    )


@each_way
@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"layer": {"act": jax.nn.relu}}, ["at ['layer']['act'] is", "not an array"]),
        ({"name": "text"}, ["at ['name'] is str, not an array"]),
        (object(), ["at the root of the tree is object, not an array"]),
        (eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)), ["at .activation is", "not an array"]),
    ],
)
def test_c9_param_that_is_no_array(params, parts, traced):
    """Most often a whole model, functions and all; the remedy is named."""
    init = jax.jit(lambda: momentum(0.1).init(params)) if traced else None
    with pytest.raises(TypeError, match=words("the param", *parts, "equinox.filter")):
        init() if init else momentum(0.1).init(params)


@each_way
def test_c9_param_that_is_a_key(traced):
    """A dropout key kept among the params."""
    params = {"dropout": [jax.random.key(0)]}
    init = momentum(0.1).init
    message = words("the param at ['dropout'][0]", "key", "no velocity", "optax.masked", "None")
    with pytest.raises(TypeError, match=message):
        (jax.jit(init) if traced else init)(params)


def test_c9_key_params_can_be_masked_as_the_message_says():
    """The remedy works."""
    params = {"w": W, "key": jax.random.key(0)}
    tx: Any = optax.masked(momentum(0.5), {"w": True, "key": False})
    updates, _ = tx.update({"w": W, "key": None}, tx.init(params), params)
    moved = apply_updates(params, updates)
    np.testing.assert_array_equal(moved["w"], 0.5)
    assert moved["key"] == params["key"]


@pytest.mark.parametrize(
    "state",
    [
        lambda state: tuple(state),
        lambda state: state._asdict(),
        lambda state: (state,),
        lambda state: optax.TraceState(state[1]),
        lambda state: state[1],
    ],
    ids=["tuple", "dict", "of a chain", "of optax.trace", "velocity alone"],
)
@pytest.mark.parametrize("tx", [momentum(0.1), trace()], ids=["momentum", "trace"])
def test_c9_state_of_another_type(tx, state):
    """As a checkpoint that was restored without its structure is."""
    good = tx.init(W)
    wrong = state(good)
    message = words(f"the state is {type(wrong).__name__}", type(good).__name__, "chain", "restore")
    with pytest.raises(TypeError, match=message):
        tx.update(W, wrong)
    tx.update(W, good)


MODEL = {"w": W, "ids": jnp.arange(2), "deep": [jnp.ones(2), None]}
GRADS = {"w": W, "ids": None, "deep": [jnp.ones(2), None]}
REFUSED = {
    "structure": {"w": W, "ids": None, "deep": [jnp.ones(2)]},
    "shape of the last leaf": {**GRADS, "w": jnp.ones(4)},
    "integer param": {**GRADS, "ids": jnp.ones(2)},
    "integer gradient": {**GRADS, "w": jnp.arange(3)},
    "complex gradient": {**GRADS, "w": 1j * W},
    "no param": {**GRADS, "deep": [jnp.ones(2), W]},
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_c9_after_an_error_the_state_is_as_it_was(case, compiled):
    """And goes on from there, in the very program that refused."""
    tx = momentum(0.5, 0.5)
    update = jax.jit(tx.update) if compiled else tx.update
    state = tx.update(GRADS, tx.init(MODEL))[1]
    before = jax.tree.map(np.array, state)
    with pytest.raises((TypeError, ValueError)):
        update(REFUSED[case], state)
    jax.tree.map(np.testing.assert_array_equal, state, before)
    _, after = update(GRADS, state)
    np.testing.assert_array_equal(after.velocity["w"], -0.75)
    assert int(after.count) == int(before.count) + 1


# The rules of apply_updates. -------------------------------------------------------------


@each_way
@pytest.mark.parametrize(
    ("params", "updates", "error", "parts"),
    [
        ({"a": W, "b": W}, {"a": W}, ValueError, ["one structure", "only in the params: ['b']"]),
        ({"a": W}, {"a": W, "b": W}, ValueError, ["one structure", "only in the updates: ['b']"]),
        ((W,), [W], ValueError, ["one structure", "the containers differ"]),
        ({"a": None}, {"a": W}, ValueError, ["the update at ['a']", "the param there is NoneType"]),
        ({"a": [W]}, {"a": [1.0]}, ValueError, ["the update at ['a'][0]", "()", "(3,)"]),
        (W, jnp.ones((3, 3)), ValueError, ["at the root of the tree", "(3, 3)", "(3,)"]),
    ],
)
def test_c9_updates_that_do_not_match(params, updates, error, parts, traced):
    """The same words as for gradients, about updates and params."""
    add = jax.jit(apply_updates) if traced else apply_updates
    before = jax.tree.map(np.array, params)
    with pytest.raises(error, match=words(*parts)):
        add(params, updates)
    jax.tree.map(np.testing.assert_array_equal, params, before)


@each_way
@pytest.mark.parametrize(
    ("param", "update", "dtypes"),
    [
        (jnp.arange(3), W, ["float32", "int32"]),
        (jnp.array([True] * 3), W, ["float32", "bool"]),
        (jnp.array([True] * 3), jnp.array([True] * 3), ["bool", "bool"]),
        (W, 1j * W, ["complex64", "float32"]),
        (W, jnp.array([True] * 3), ["bool", "float32"]),
    ],
)
def test_c5_update_that_the_param_would_truncate(param, update, dtypes, traced):
    """A fraction, an imaginary part: what does not fit is not dropped."""
    add = jax.jit(apply_updates) if traced else apply_updates
    of_update, of_param = dtypes
    parts = [f"at ['x'][0] is {of_update}", f"a param that is {of_param}", "losing part of it"]
    with pytest.raises(TypeError, match=words("the update", *parts, "None", "optax.partition")):
        add({"x": [param]}, {"x": [update]})


@pytest.mark.parametrize(
    ("param", "update", "expected"),
    [
        (jnp.arange(3), jnp.array([1, -1, 2]), [1, 0, 4]),
        (1j * W, W, [1 + 1j] * 3),
        (W, jnp.array([1, -1, 2]), [2, 0, 3]),
        (W.astype("bfloat16"), jnp.array([0.5, -1.0, 2.0]), [1.5, 0.0, 3.0]),
        (np.ones(3, np.float32), np.ones(3, np.float64), [2.0] * 3),
        (1.0, 0.5, 1.5),
        (3, 4, 7),
    ],
)
def test_updates_that_fit_are_added(param, update, expected):
    """No more is refused than would be lost; the param's dtype stays."""
    moved = apply_updates(param, update)
    np.testing.assert_array_equal(moved, np.asarray(expected))
    assert moved.dtype == jnp.asarray(param).dtype
    assert moved.weak_type == (not hasattr(param, "dtype"))


@pytest.mark.parametrize("nothing", [None, optax.MaskedNode(), FLOAT0])
@pytest.mark.parametrize(
    "param", [W, jnp.arange(3), jnp.array([True, False, True]), {"deep": [W, 2]}, None]
)
def test_c5_no_update_leaves_anything_as_it_is(param, nothing):
    """Any param, a whole subtree, or none."""
    moved = apply_updates({"still": param, "moved": W}, {"still": nothing, "moved": W})
    assert jax.tree.structure(moved["still"]) == jax.tree.structure(param)
    jax.tree.map(np.testing.assert_array_equal, moved["still"], param)
    np.testing.assert_array_equal(moved["moved"], 2.0)


# What a velocity is. ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "dtype"),
    [
        (jnp.arange(3, dtype=jnp.int8), "int8"),
        (np.ones(3, np.uint16), "uint16"),
        (jnp.array([True, False]), "bool"),
        (7, "int32"),
        (True, "bool"),
    ],
)
def test_velocity_of_a_param_that_never_moves(param, dtype):
    """It mirrors the param, stays zero, and costs no more than it."""
    for velocity_dtype in (None, "float32"):
        tx = momentum(0.5, velocity_dtype=velocity_dtype)
        state = tx.init({"ids": param, "w": W})
        for _ in range(2):
            velocity = state.velocity["ids"]
            assert (velocity.shape, velocity.dtype) == (np.shape(param), jnp.dtype(dtype))
            assert not velocity.weak_type
            assert not np.any(np.asarray(velocity))
            _, state = tx.update({"ids": None, "w": W}, state)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_velocity_of_an_8_bit_float(dtype):
    """Held and computed wide, like any narrow float."""
    params = jnp.ones(2, dtype)
    tx = momentum(0.5)
    state = tx.init(params)
    updates, after = tx.update(params, state)
    assert state.velocity.dtype == after.velocity.dtype == jnp.float32
    assert updates.dtype == dtype
    moved = apply_updates(params, updates)
    assert moved.dtype == dtype
    np.testing.assert_array_equal(moved.astype(jnp.float32), 0.5)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1, 1, 1), (1_000_003,)])
def test_velocity_of_any_shape(shape):
    """None is special: a scalar, nothing at all, a million."""
    params = jnp.ones(shape)
    tx = momentum(0.5)
    updates, state = tx.update(params, tx.init(params))
    assert state.velocity.shape == updates.shape == shape
    np.testing.assert_array_equal(state.velocity, -0.5)
    np.testing.assert_array_equal(apply_updates(params, updates), 0.5)


@pytest.mark.parametrize("param", [np.nan, np.inf, -np.inf])
def test_velocity_at_rest_is_zero_whatever_the_param(param):
    """It has the param's place, not its value."""
    params = {"real": jnp.full(3, param), "complex": jnp.full(2, param + 1j * param)}
    for init in (momentum(0.5).init, jax.jit(momentum(0.5).init)):
        for velocity in jax.tree.leaves(init(params).velocity):
            np.testing.assert_array_equal(velocity, 0)


def test_count_stops_at_its_limit():
    """It never turns negative, where a schedule would begin anew or worse."""
    limit = np.iinfo(np.int32).max
    tx = momentum(0.5)
    state = tx.init(W)._replace(count=jnp.int32(limit))
    _, after = tx.update(W, state)
    assert int(after.count) == limit
