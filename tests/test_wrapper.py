"""What every wrapper has: tests of each type of state that is registered as a wrapper's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from tables import rows

import momentum_jax
from momentum_jax._state_types import WRAPPER_STATES, wrapper_state
from momentum_jax._wrapper import wrapper

mj: Any = momentum_jax

MADE_BY = {wrapper.made_by: state_type for state_type, wrapper in WRAPPER_STATES.items()}
# How each is made around a transformation.
MAKE: dict[str, Any] = {
    "kahan": mj.kahan,
    "adaptive_restart": mj.adaptive_restart,
    "diagnostics.record": lambda inner: mj.diagnostics.record(inner, 0.1),
}
# Those of Optax's wrappers that every wrapper must speak of.
OPTAX_WRAPPERS = {
    "MultiSteps",
    "apply_if_finite",
    "conditionally_mask",
    "conditionally_transform",
    "lookahead",
    "masked",
    "partition",
    "schedule_free",
}
PARAMS = {"w": jnp.arange(4.0).astype(jnp.bfloat16), "b": jnp.ones(2)}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)

each = pytest.mark.parametrize("made_by", MADE_BY)


def test_all_wrappers_are_tested_here():
    assert MADE_BY.keys() == MAKE.keys()


@each
def test_the_docstring_has_a_row_for_each_wrapper_of_optax(made_by):
    function = mj
    for name in made_by.split("."):
        function = getattr(function, name)
    assert rows(function).keys() >= OPTAX_WRAPPERS


@each
def test_what_is_not_a_transformation_is_refused(made_by, as_shipped):
    with pytest.raises(TypeError, match=r"inner=0\.1 must be an Optax transformation"):
        MAKE[made_by](0.1)


@each
def test_c9_a_state_of_another_type_is_refused(made_by):
    tx = MAKE[made_by](mj.momentum(0.1))
    name = MADE_BY[made_by].__name__
    with pytest.raises(TypeError, match=f"the state is MomentumState, but must be the {name}"):
        tx.update(GRADS, mj.momentum(0.1).init(PARAMS), PARAMS)


@each
def test_extra_arguments_reach_the_inner_transformation(made_by):
    tx = MAKE[made_by](mj.momentum(0.1, 0.0))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, learning_rate=0.5)
    np.testing.assert_array_equal(updates["b"], [-0.5, -0.5])


@each
def test_an_inner_transformation_without_extra_arguments_is_accepted(made_by):
    inner = mj.momentum(0.5, 0.0)

    def init(params):
        return inner.init(params)

    def update(updates, state, params=None):
        return inner.update(updates, state, params)

    tx = MAKE[made_by](optax.GradientTransformation(init, update))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=jnp.float32(1))
    np.testing.assert_array_equal(updates["b"], [-0.5, -0.5])


@each
def test_c8_equal_parts_make_equal_wrappers(made_by):
    make = MAKE[made_by]
    assert make(mj.momentum(0.1)) == make(mj.momentum(0.1)) != make(mj.momentum(0.2))
    assert hash(make(mj.momentum(0.1))) == hash(make(mj.momentum(0.1)))
    assert make(mj.momentum(0.1)).update.__name__ == "update"


@each
def test_c1_the_state_is_exported(made_by):
    tx, params = MAKE[made_by](mj.momentum(0.5)), PARAMS["w"]
    state, grads = tx.init(params), jnp.ones_like(params)
    step = jax.jit(tx.update)
    exported = export.deserialize(export.export(step)(grads, state, params).serialize())
    found, expected = exported.call(grads, state, params), step(grads, state, params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


@each
def test_c2_types_do_not_change(made_by):
    tx = MAKE[made_by](mj.momentum(0.5))
    state = tx.init(PARAMS)
    _, new = jax.jit(tx.update)(GRADS, state, PARAMS)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)


def test_a_new_wrapper_has_all_this():
    """One that counts steps, in a few lines: of a type of state, how it is made, and a step."""

    @wrapper_state("counting")
    class CountingState(NamedTuple):
        inner_state: Any
        steps: Any

    try:

        def make_state(inner, params):
            return CountingState(inner.init(params), jnp.int32(0))

        def step(inner, updates, state, params, extra_args):
            updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
            return updates, CountingState(inner_state, state.steps + 1)

        def counting(inner):
            return wrapper(CountingState, inner, make_state, step, needs_params="it counts them")

        tx = counting(mj.momentum(0.5))
        state: Any = tx.init(PARAMS)
        with pytest.raises(ValueError, match=r"params=None, but it counts them\. Call update\("):
            tx.update(GRADS, state)
        found: Any = tx.update(GRADS, state, PARAMS, learning_rate=0.25)
        state = found[1]
        assert state.steps == 1
        np.testing.assert_array_equal(mj.read_velocity(state)["b"], [-0.25, -0.25])
        assert counting(mj.momentum(0.5)) == tx
    finally:
        del WRAPPER_STATES[CountingState]
