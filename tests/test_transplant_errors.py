"""What `transplant` refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jobs import begun, params_of, scheduled

import momentum_jax

mj: Any = momentum_jax  # Optax types a state as any tree of arrays.

STATE = mj.MomentumState(jnp.int32(2), {"a": jnp.ones(3), "b": jnp.ones((2, 2))})


FRESH = mj.momentum(0.1).init({"a": jnp.ones(3), "b": jnp.ones((2, 2))})


CASES: dict[str, Any] = {
    "inside to outside": (
        lambda: mj.transplant(STATE, mj.trace(0.9).init(STATE.velocity)),
        ValueError,
        r"is MomentumState, of momentum, and the new one is TraceState, .*trace_from_momentum",
    ),
    "outside to inside": (
        lambda: mj.transplant(optax.trace(0.9).init(STATE.velocity), STATE),
        ValueError,
        r"is TraceState, of trace, and the new one is MomentumState, .*momentum_from_trace",
    ),
    "another method": (
        lambda: mj.transplant(STATE, mj.qhm(0.1).init(STATE.velocity)),
        ValueError,
        "is MomentumState, of momentum, and the new one is QHMState, of qhm",
    ),
    "nothing in common": (
        lambda: mj.transplant(STATE, mj.momentum(0.1).init({"c": jnp.ones(3)})),
        ValueError,
        r"nothing of the old state can be carried.*\['c'\].*fresh.*\['a'\].*dropped",
    ),
    "strict": (
        lambda: mj.transplant(STATE, mj.momentum(0.1).init({"a": jnp.ones(3)}), strict=True),
        ValueError,
        r"strict=True, but not everything was carried over\..*"
        r"\['b'\] +MomentumState\.velocity +dropped",
    ),
    "a name that is not there": (
        lambda: mj.transplant(STATE, FRESH, {"['c']": "['d']"}),
        ValueError,
        r"rename has \"\['c'\]\", but no path .* starts with it\..* paths: \['a'\], \['b'\]\.",
    ),
    "one name for two": (
        lambda: mj.transplant(STATE, FRESH, {"['a']": "['b']"}),
        ValueError,
        r"rename gives two arrays the path \['b'\]: \['a'\] and \['b'\] of MomentumState\.velocity",
    ),
    "rename of another type": (
        lambda: mj.transplant(STATE, FRESH, "['a']"),
        TypeError,
        "rename=.* must be a dict of prefixes",
    ),
    "rename to no text": (
        lambda: mj.transplant(STATE, FRESH, lambda path: None),
        TypeError,
        "rename must return paths as text, but returned None",
    ),
    "resize of another type": (
        lambda: mj.transplant(STATE, FRESH, resize="yes"),
        TypeError,
        "resize='yes' must be True or False",
    ),
    "a resize of another shape": (
        lambda: mj.transplant(
            STATE,
            mj.momentum(0.1).init({"a": jnp.ones(5)}),
            resize=lambda path, old, shape: old[path],
        ),
        ValueError,
        r"resize returned an array of shape \(3,\) for \['a'\], but must .* shape \(5,\), or None",
    ),
    "real for complex": (
        lambda: mj.transplant(STATE, mj.momentum(0.1).init({"a": jnp.ones(3, "complex64")})),
        TypeError,
        r"\['a'\] is float32 in the old state, but complex64 .* do not mix",
    ),
    "complex for real": (
        lambda: mj.transplant(mj.momentum(0.1).init({"a": jnp.ones(3, "complex64")}), STATE),
        TypeError,
        r"\['a'\] is complex64 in the old state, but float32 .* do not mix",
    ),
    "values that do not fit": (
        lambda: mj.transplant(
            STATE._replace(velocity={"a": jnp.full(3, 1e6), "b": STATE.velocity["b"]}),
            mj.momentum(0.1, velocity_dtype="float16").init(STATE.velocity),
        ),
        ValueError,
        r"velocity at \['a'\] has 3 of 3 values that are too large for float16",
    ),
    "a transformation": (
        lambda: mj.transplant(mj.momentum(0.1), FRESH),
        TypeError,
        r"old_state at \.init is Function, not an array",
    ),
    "nothing": (lambda: mj.transplant(None, FRESH), TypeError, "old_state=None is not a state"),
    "shapes alone": (
        lambda: mj.transplant(STATE, jax.eval_shape(mj.momentum(0.1).init, {"a": jnp.ones(3)})),
        TypeError,
        r"new_state at \.count is ShapeDtypeStruct, not an array",
    ),
    "a resize to no array": (
        lambda: mj.transplant(
            STATE, mj.momentum(0.1).init({"a": jnp.ones(5)}), resize=lambda *_: "ab"
        ),
        TypeError,
        r"resize returned str for \['a'\], but must return an array or None",
    ),
    "counts that differ": (
        lambda: mj.transplant(
            (STATE, optax.ScaleByScheduleState(jnp.int32(5))),
            (STATE, optax.scale_by_schedule(scheduled).init({}), FRESH_INJECTED),
        ),
        ValueError,
        r"have counted \[2, 5\], but \S+ needs one count",
    ),
}


FRESH_INJECTED = optax.inject_hyperparams(optax.scale)(step_size=scheduled).init({})


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(as_shipped, case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_the_error_for_a_state_in_another_dtype_names_transplant():
    """The remedy works."""
    params, state = begun(mj.momentum(0.1), params_of("enc"))
    tx = mj.momentum(0.1, velocity_dtype="int8")
    with pytest.raises(TypeError, match=r"momentum_jax\.transplant\(state, tx\.init\(params\)\)"):
        tx.update(params, state)
    tx.update(params, mj.transplant(state, tx.init(params))[0])
