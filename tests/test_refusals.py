"""What the public functions refuse: one table of calls, with the type and the words of the error.

Refusals that are tested over a grid, that need arrays on a mesh, or whose remedy is tried too, are
in the tests of their modules.
"""

import inspect
import math
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from checkpoints import (
    FC,
    KERAS_OF_FC,
    PARAMS,
    SETTINGS,
    WEIGHTS,
    fc,
    rate,
    torch_state_dict,
)
from checkpoints import load as load_torch  # Its arguments are right, except for the given ones.
from jax.sharding import AxisType

import momentum_jax

mj: Any = momentum_jax  # Gets arguments of wrong types on purpose.
diagnostics, frameworks, schedules = mj.diagnostics, mj.frameworks, mj.schedules
sharding, theory = mj.sharding, mj.theory


class Refusal(NamedTuple):
    """A call that is refused.

    Attributes:
      call: makes the inputs and the call. The first public function that it names is the one that
        the row tests.
      error: the exact type of the error.
      words: a pattern that the message must match.
    """

    call: Callable[[], Any]
    error: type[Exception]
    words: str


W = jnp.ones(3)
TREE = {"body": {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, "head": jnp.zeros(3)}
OLD = mj.MomentumState(jnp.int32(2), {"a": jnp.ones(3), "b": jnp.ones((2, 2))})
NEW = mj.momentum(0.1).init(OLD.velocity)
MEASURED: dict[str, Any] = dict(learning_rate=0.25, mu=0.75)
CURVATURE = diagnostics.Curvature(*map(jnp.float32, (10, 1, 0, 0, 10)), jnp.asarray(True))
# A velocity that float16 cannot hold.
HUGE = jax.tree.map(lambda w: jnp.full(w.shape, 1e6), FC)
HALF = jax.tree.map(lambda w: w.astype("float16"), FC)
# A state whose two parts have counted different numbers of steps.
APART = (mj.TraceState(jnp.int32(7), FC), optax.ScaleByScheduleState(jnp.int32(2)))
TWO_GROUPS = torch_state_dict() | {"param_groups": [{**SETTINGS, "params": [i]} for i in (0, 1)]}
INTEGERS = {i: {"momentum_buffer": np.ones(2, int)} for i in (0, 1)}
KERAS = {
    "sgd/iteration": np.array(3),
    "sgd/learning_rate": np.array(0.5),
    "sgd/fc_kernel_momentum": np.ones(2),
}


def step(tx: Any, grads: Any, of: Any = None, params: Any = None, **extra: Any) -> Any:
    """Takes a step from the state of the params `of`, which are like the gradients by default."""
    return tx.update(grads, tx.init(grads if of is None else of), params, **extra)


def of_keras(variables: Any) -> dict[str, Any]:
    """The arguments of `load_keras` with these variables."""
    state = frameworks.keras_sgd(0.5, 0.5).init(jnp.zeros(2))
    return dict(
        opt_state=state,
        variables=variables,
        names=["fc/kernel"],
        to_params=lambda weights: weights["fc/kernel"],
    )


def lion(velocity, gradient, learning_rate, b1=0.9, b2=0.5):
    update = -learning_rate * jnp.sign(b1 * velocity + (1 - b1) * gradient)
    return b2 * velocity + (1 - b2) * gradient, update


def plain(velocity, gradient):
    return velocity, gradient


def scheduled(count):
    return 0.1 / (1 + count)


def on_device(index: int) -> jax.Array:
    return jax.device_put(W, jax.devices()[index])


def data_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def mixed_mesh() -> jax.sharding.Mesh:
    kinds = (AxisType.Auto, AxisType.Explicit)
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)


REFUSALS: list[Refusal] = [
    # apply_updates
    *(
        Refusal(
            lambda update=update: mj.apply_updates({"act": jax.nn.relu}, {"act": update}),
            TypeError,
            r"(?s)the param.*\['act'\].*not an array",
        )
        for update in (None, 1.0)
    ),
    # recurrence
    Refusal(lambda: mj.recurrence(3), TypeError, "function=3 must be a function"),
    Refusal(
        lambda: mj.recurrence(lambda velocity: velocity),
        TypeError,
        "must take a velocity and a gradient first",
    ),
    Refusal(
        lambda: mj.recurrence(lambda velocity, gradient, *rest: (velocity, gradient)),
        TypeError,
        "must take its hyperparameters by name",
    ),
    Refusal(
        lambda: mj.recurrence(lion, learning_rate=0.1, b3=0.9),
        TypeError,
        r"lion has no hyperparameter called b3\. It has: learning_rate, b1, b2\.",
    ),
    Refusal(
        lambda: mj.recurrence(reference.heavy_ball, mu=0.9),
        TypeError,
        r"heavy_ball needs learning_rate\. "
        r"Give each: recurrence\(heavy_ball, learning_rate=\.\.\.\)",
    ),
    Refusal(
        lambda: mj.recurrence(lambda v, g, params: (v, g), params=0.1),
        TypeError,
        "has a hyperparameter called params, which is an argument of update",
    ),
    Refusal(
        lambda: mj.recurrence(reference.heavy_ball, learning_rate=0.1, mu=1.5),
        ValueError,
        r"mu=1\.5 must be in \(-1, 1\]",
    ),
    Refusal(
        lambda: mj.recurrence(lion, learning_rate=0.1, b1=float("nan")),
        ValueError,
        r"b1=nan must be finite\. Give b1 a number or a schedule\.",
    ),
    Refusal(
        lambda: mj.recurrence(lion, learning_rate=0.1, b1=jnp.ones(3)),
        ValueError,
        r"b1 must be a scalar, but has shape \(3,\)",
    ),
    Refusal(
        lambda: step(mj.recurrence(lion, learning_rate=0.1), jnp.ones(1), b1=np.inf),
        ValueError,
        "b1=inf must be finite",
    ),
    Refusal(
        lambda: mj.recurrence(lambda v, g, nesterov=True: (v, g)),
        TypeError,
        "nesterov=True is bool, but must be a real number",
    ),
    Refusal(
        lambda: mj.recurrence(plain, velocities=0),
        ValueError,
        "velocities=0 must be a whole number, at least 1",
    ),
    Refusal(
        lambda: step(mj.recurrence(lambda v, g: v), {"w": W}),
        TypeError,
        r"must return the new velocity and the update, but returned one array\. "
        r"\(for the param at \['w'\]\)",
    ),
    Refusal(
        lambda: step(mj.recurrence(lambda v, g: (v, g, g)), {"w": W}),
        TypeError,
        "must return the new velocity and the update, but returned 3 values",
    ),
    Refusal(
        lambda: step(mj.recurrence(lambda v, g: (v, None)), {"w": W}),
        TypeError,
        "must return arrays, but its update is None",
    ),
    Refusal(
        lambda: step(mj.recurrence(lambda v, g: (v.sum(), g)), {"w": W}),
        TypeError,
        r"was given a velocity and a gradient of float32\[3\], "
        r"but its new velocity is float32\[\]",
    ),
    Refusal(
        lambda: step(mj.recurrence(lambda v, g: (v, g.astype(jnp.bfloat16))), {"w": W}),
        TypeError,
        r"was given a velocity and a gradient of float32\[3\], but its update is bfloat16\[3\]",
    ),
    Refusal(
        lambda: step(mj.recurrence(lambda v, g: (v[0], g), velocities=2), {"w": W}),
        TypeError,
        "must return 2 new velocities, but returned one array",
    ),
    Refusal(
        lambda: mj.recurrence(plain, velocities=2).update(
            W, mj.recurrence(plain, velocities=1).init(W)
        ),
        ValueError,
        "the state must have 2 velocities, but has 1",
    ),
    Refusal(
        lambda: mj.recurrence(plain, velocities=2).update(W, mj.recurrence(plain).init(W)),
        TypeError,
        "the state is RecurrenceState, but must be the SeveralVelocitiesState",
    ),
    Refusal(
        lambda: mj.recurrence(plain).update(W, mj.momentum(0.1).init(W)),
        TypeError,
        "the state is MomentumState, but must be the RecurrenceState",
    ),
    # momentum and trace
    Refusal(
        lambda: step(mj.momentum(0.5), {"w": jax.random.key(0)}, {"w": jnp.ones(())}),
        TypeError,
        r"(?s)the gradient at \['w'\] is key.*floating-point or complex",
    ),
    Refusal(
        lambda: mj.momentum(0.1).init({"names": np.array(["text"])}),
        TypeError,
        r"(?s)the param.*\['names'\].*which no velocity can have.*optax\.masked",
    ),
    Refusal(
        lambda: mj.momentum(0.1).init({"names": np.array([None, 1.0], object)}),
        TypeError,
        r"(?s)the param.*\['names'\].*which no velocity can have.*optax\.masked",
    ),
    Refusal(
        lambda: mj.momentum(0.1, velocity_dtype="bfloat16").init({"w": W, "phase": 1j * W}),
        TypeError,
        r"(?s)the param at \['phase'\] is complex64.*velocity_dtype=bfloat16.*None",
    ),
    Refusal(
        lambda: mj.momentum(0.1).update(W, None),
        TypeError,
        r"the state is None\. Call `state = tx\.init\(params\)`",
    ),
    Refusal(
        lambda: step(mj.momentum(0.1), {"encoder": W}, {"encoder": W, "decoder": W}),
        ValueError,
        r"(?s)only in the velocity: \['decoder'\].*Call init",
    ),
    Refusal(
        lambda: mj.momentum(0.1).update(mj.momentum(0.1).init({"w": W}), {"w": W}),
        TypeError,
        r"(?s)swapped.*update\(grads, state, params\)",
    ),
    Refusal(
        lambda: step(mj.momentum(0.25, 0.5), on_device(1), on_device(0)),
        ValueError,
        "root are on different devices",
    ),
    # The message is about the params, not about the codes and scales.
    Refusal(
        lambda: step(
            mj.momentum(0.1, velocity_dtype="int8"),
            {"w": jnp.ones((64, 64))},
            {"w": jnp.ones((64, 128))},
        ),
        ValueError,
        r"at \['w'\] has shape \(64, 64\), but .* \(64, 128\)",
    ),
    Refusal(
        lambda: step(
            mj.momentum(0.1, velocity_dtype="int8"),
            {"v": jnp.ones((64, 128))},
            {"w": jnp.ones((64, 128))},
        ),
        ValueError,
        r"only in the gradients: \['v'\]; .*: \['w'\]\.",
    ),
    Refusal(
        lambda: mj.trace(0.9).update(W, optax.trace(0.9).init(W)),
        TypeError,
        "the state is TraceState of Optax, but must be the TraceState .*load_optax",
    ),
    # qhm and aggmo
    Refusal(lambda: mj.aggmo(0.5, ()), ValueError, r"mus=\(\) must be a tuple of one or more"),
    Refusal(lambda: mj.aggmo(0.5, 0.9), ValueError, r"mus=0\.9 must be a tuple of one or more"),
    Refusal(lambda: mj.aggmo(0.5, (0.0, 1.5)), ValueError, r"mus\[1\]=1\.5 must be in \(-1, 1\]"),
    Refusal(lambda: mj.qhm(0.5, 0.9, float("nan")), ValueError, "nu=nan must be finite"),
    Refusal(
        lambda: step(mj.aggmo(0.5), jnp.ones(1), mus=(0.5,)),
        ValueError,
        "mus has 1 values, but the state has 3 velocities",
    ),
    Refusal(
        lambda: step(mj.aggmo(0.5), jnp.ones(1), mus=0.5),
        ValueError,
        r"mus=0\.5 must be a tuple of one or more",
    ),
    Refusal(
        lambda: step(mj.aggmo(0.5), jnp.ones(1), mus=(0, 0, 2)),
        ValueError,
        r"mus\[2\]=2\.0 must be in \(-1, 1\]",
    ),
    Refusal(
        lambda: step(mj.qhm(lambda count: -0.5), jnp.ones(1)),
        ValueError,
        r"the schedule's learning_rate=-0\.5 must be finite and not negative",
    ),
    Refusal(
        lambda: mj.aggmo(0.5).update(W, mj.aggmo(0.5, (0.0,)).init(W)),
        ValueError,
        "the state must have 3 velocities, but has 1",
    ),
    # read_velocity
    Refusal(lambda: mj.read_velocity(optax.adam(0.1).init(W)), ValueError, "there is no velocity"),
    Refusal(
        lambda: mj.read_velocity(
            optax.chain(mj.momentum(0.1), mj.momentum(0.1, velocity_dtype="int8")).init(W)
        ),
        ValueError,
        "two velocities",
    ),
    Refusal(
        lambda: mj.read_velocity(
            optax.partition({0: mj.momentum(0.1), 1: mj.aggmo(0.5)}, {"a": 0, "b": 1}).init(
                {"a": W, "b": W}
            )
        ),
        ValueError,
        "of momentum, aggmo, which do not have the same",
    ),
    # reset_velocity
    Refusal(lambda: mj.reset_velocity(optax.adam(0.1).init(TREE)), ValueError, "there is no velo"),
    Refusal(
        lambda: mj.reset_velocity(mj.momentum(0.5).init(TREE), {"head": True}),
        ValueError,
        r"where must be a prefix of the velocity, but is PyTreeDef\(\{'head': \*\}\)",
    ),
    Refusal(
        lambda: mj.reset_velocity(
            mj.momentum(0.5).init(TREE), {"body": False, "head": np.ones(2, bool)}
        ),
        ValueError,
        r"where at \['head'\] has shape \(2,\), but the velocity there has shape \(3,\)",
    ),
    Refusal(
        lambda: mj.reset_velocity(mj.momentum(0.5).init(TREE), {"body": False, "head": 1}),
        TypeError,
        r"where at \['head'\] is 1, but must be boolean",
    ),
    Refusal(
        lambda: mj.reset_velocity(mj.momentum(0.5).init(TREE), lambda path: None),
        TypeError,
        r"where at \['body'\]\['b'\] is None, but must be boolean",
    ),
    Refusal(
        lambda: mj.reset_velocity(mj.momentum(0.5).init(TREE), scale=np.inf),
        ValueError,
        "scale=inf must be finite",
    ),
    # transplant
    Refusal(
        lambda: mj.transplant(OLD, mj.trace(0.9).init(OLD.velocity)),
        ValueError,
        r"(?s)is MomentumState, of momentum, and the new one is TraceState, .*trace_from_momentum",
    ),
    Refusal(
        lambda: mj.transplant(optax.trace(0.9).init(OLD.velocity), OLD),
        ValueError,
        r"(?s)is TraceState, of trace, and the new one is MomentumState, .*momentum_from_trace",
    ),
    Refusal(
        lambda: mj.transplant(OLD, mj.qhm(0.1).init(OLD.velocity)),
        ValueError,
        "is MomentumState, of momentum, and the new one is QHMState, of qhm",
    ),
    Refusal(
        lambda: mj.transplant(OLD, mj.momentum(0.1).init({"c": jnp.ones(3)})),
        ValueError,
        r"(?s)nothing of the old state can be carried.*\['c'\].*fresh.*\['a'\].*dropped",
    ),
    Refusal(
        lambda: mj.transplant(
            mj.aggmo(0.1, (0.0, 0.9, 0.99)).init(W), mj.aggmo(0.1, (0.9, 0.99)).init(W)
        ),
        ValueError,
        "nothing of the old state can be carried",
    ),
    Refusal(
        lambda: mj.transplant(OLD, mj.momentum(0.1).init({"a": jnp.ones(3)}), strict=True),
        ValueError,
        r"(?s)strict=True, but not everything was carried over\..*"
        r"\['b'\] +MomentumState\.velocity +dropped",
    ),
    Refusal(
        lambda: mj.transplant(OLD, NEW, {"['c']": "['d']"}),
        ValueError,
        r"(?s)rename has \"\['c'\]\", but no path .* starts with it\..* paths: \['a'\], \['b'\]\.",
    ),
    Refusal(
        lambda: mj.transplant(OLD, NEW, {"['a']": "['b']"}),
        ValueError,
        r"rename gives two arrays the path \['b'\]: \['a'\] and \['b'\] of MomentumState\.velocity",
    ),
    Refusal(
        lambda: mj.transplant(OLD, NEW, "['a']"),
        TypeError,
        "(?s)rename=.* must be a dict of prefixes",
    ),
    Refusal(
        lambda: mj.transplant(OLD, NEW, lambda path: None),
        TypeError,
        "rename must return paths as text, but returned None",
    ),
    Refusal(
        lambda: mj.transplant(OLD, NEW, resize="yes"),
        TypeError,
        "resize='yes' must be True or False",
    ),
    Refusal(
        lambda: mj.transplant(
            OLD,
            mj.momentum(0.1).init({"a": jnp.ones(5)}),
            resize=lambda path, old, shape: old[path],
        ),
        ValueError,
        r"(?s)resize returned an array of shape \(3,\) for \['a'\], but must .* shape \(5,\), "
        r"or None",
    ),
    Refusal(
        lambda: mj.transplant(
            OLD, mj.momentum(0.1).init({"a": jnp.ones(5)}), resize=lambda *_: "ab"
        ),
        TypeError,
        r"resize returned str for \['a'\], but must return an array or None",
    ),
    Refusal(
        lambda: mj.transplant(OLD, mj.momentum(0.1).init({"a": jnp.ones(3, "complex64")})),
        TypeError,
        r"(?s)\['a'\] is float32 in the old state, but complex64 .* do not mix",
    ),
    Refusal(
        lambda: mj.transplant(mj.momentum(0.1).init({"a": jnp.ones(3, "complex64")}), OLD),
        TypeError,
        r"(?s)\['a'\] is complex64 in the old state, but float32 .* do not mix",
    ),
    Refusal(
        lambda: mj.transplant(
            OLD._replace(velocity={"a": jnp.full(3, 1e6), "b": OLD.velocity["b"]}),
            mj.momentum(0.1, velocity_dtype="float16").init(OLD.velocity),
        ),
        ValueError,
        r"velocity at \['a'\] has 3 of 3 values that are too large for float16",
    ),
    Refusal(
        lambda: mj.transplant(mj.momentum(0.1), NEW),
        TypeError,
        r"old_state at \.init is Function, not an array",
    ),
    Refusal(lambda: mj.transplant(None, NEW), TypeError, "old_state=None is not a state"),
    Refusal(
        lambda: mj.transplant(OLD, jax.eval_shape(mj.momentum(0.1).init, {"a": jnp.ones(3)})),
        TypeError,
        r"new_state at \.count is ShapeDtypeStruct, not an array",
    ),
    Refusal(
        lambda: mj.transplant(
            (OLD, optax.ScaleByScheduleState(jnp.int32(5))),
            (
                OLD,
                optax.scale_by_schedule(scheduled).init({}),
                optax.inject_hyperparams(optax.scale)(step_size=scheduled).init({}),
            ),
        ),
        ValueError,
        r"have counted \[2, 5\], but \S+ needs one count",
    ),
    # kahan
    *(
        Refusal(
            lambda inner=inner: mj.kahan(inner),
            TypeError,
            "must be an Optax transformation, for example",
        )
        for inner in (0.1, mj.momentum)
    ),
    Refusal(
        lambda: step(mj.kahan(optax.sgd(0.1)), {"w": jnp.ones(2, "bfloat16")}),
        ValueError,
        r"params=None, .* update\(grads, state, params\)",
    ),
    Refusal(
        lambda: mj.kahan(optax.sgd(0.1)).update(W, optax.sgd(0.1).init(W), W),
        TypeError,
        "must be the KahanState",
    ),
    Refusal(
        lambda: step(
            mj.kahan(optax.sgd(0.1)),
            {"w": jnp.ones(3)},
            *[{"w": jnp.ones(2, "bfloat16")}] * 2,
        ),
        ValueError,
        r"the update at \['w'\] has shape \(3,\)",
    ),
    # adaptive_restart
    *(
        Refusal(
            lambda inner=inner: mj.adaptive_restart(inner),
            TypeError,
            "must be an Optax transformation, for example",
        )
        for inner in (0.1, mj.momentum)
    ),
    Refusal(
        lambda: mj.adaptive_restart(optax.adam(0.1)).init(jnp.ones(1)),
        ValueError,
        "there is no velocity in the state",
    ),
    Refusal(
        lambda: mj.adaptive_restart(mj.momentum(0.1)).update(W, mj.momentum(0.1).init(W)),
        TypeError,
        "must be the AdaptiveRestartState",
    ),
    Refusal(
        lambda: step(mj.adaptive_restart(mj.momentum(0.1)), {"w": jnp.ones(2)}),
        ValueError,
        r"params=None, but .* update\(grads, state, params\)",
    ),
    Refusal(
        lambda: step(
            mj.adaptive_restart(mj.momentum(0.1)), {"w": jnp.ones(2)}, params={"w": jnp.ones(3)}
        ),
        ValueError,
        r"the param at \['w'\] has shape \(3,\)",
    ),
    Refusal(
        lambda: step(
            mj.adaptive_restart(mj.momentum(0.1)), {"w": jnp.ones(2)}, params={"v": jnp.ones(2)}
        ),
        ValueError,
        r"only in the params: \['v'\]",
    ),
    Refusal(
        lambda: step(
            mj.adaptive_restart(mj.momentum(0.1)), {"w": jnp.ones(2)}, params={"w": lambda: None}
        ),
        TypeError,
        r"the param at \['w'\] is function",
    ),
    # frameworks: the recipes
    Refusal(
        lambda: frameworks.torch_sgd(lr=-1.0),
        ValueError,
        r"lr=-1\.0 must be finite and not negative",
    ),
    Refusal(
        lambda: frameworks.torch_sgd(momentum=-0.1),
        ValueError,
        r"momentum=-0\.1 must be in \[0, 1\]",
    ),
    Refusal(
        lambda: frameworks.torch_sgd(weight_decay=-0.1),
        ValueError,
        r"weight_decay=-0\.1 must be finite and not neg",
    ),
    Refusal(
        lambda: frameworks.keras_sgd(momentum=1.1),
        ValueError,
        r"momentum=1\.1 must be in \[0, 1\]",
    ),
    Refusal(
        lambda: frameworks.caffe_sgd(base_lr=float("nan")), ValueError, "base_lr=nan must be finite"
    ),
    Refusal(
        lambda: frameworks.optax_sgd(0.1, momentum=-1.0),
        ValueError,
        r"momentum=-1\.0 must be in \(-1, 1\]",
    ),
    # frameworks: the state_dict of PyTorch
    Refusal(
        lambda: load_torch({"model": {}, "optimizer": torch_state_dict()}),
        ValueError,
        r"state_dict is \['model', 'optimizer'\], "
        r"but must be what optimizer\.state_dict\(\) returned",
    ),
    Refusal(
        lambda: load_torch(
            {"state": {}, "param_groups": [{"lr": 1, "betas": (0, 0), "params": []}]}
        ),
        ValueError,
        r"but no momentum, dampening, nesterov: it is not of torch\.optim\.SGD",
    ),
    Refusal(
        lambda: load_torch(names=["fc.weight"]),
        ValueError,
        "the optimizer has 2 params, but names has 1",
    ),
    Refusal(
        lambda: load_torch(names=["fc.bias", "fc.bias"]),
        ValueError,
        r"these repeat: \['fc\.bias'\]",
    ),
    # Otherwise each letter would be a name.
    Refusal(
        lambda: load_torch(names="fc"),
        TypeError,
        r"names='fc' must be a list of names, here \['fc'\]",
    ),
    Refusal(
        lambda: load_torch(names=list(WEIGHTS)[::-1]),
        ValueError,
        r"the velocity \['bias'\] has shape \(2,\), "
        r"but the values to carry over have shape \(2, 3\)",
    ),
    Refusal(
        lambda: load_torch(names=dict(reversed(WEIGHTS.items()))),
        ValueError,
        r"the weight fc\.bias has shape \(2,\), but its momentum has shape \(2, 3\)",
    ),
    Refusal(
        lambda: load_torch(names=["fc.weight", "bias"]),
        ValueError,
        r"to_params reads the weight 'fc\.bias', but it is given only the params of the optim",
    ),
    Refusal(
        lambda: load_torch(params={"kernel": FC["kernel"]}),
        ValueError,
        r"only in the state: none; only in the values to carry over: \['bias'\]",
    ),
    Refusal(
        lambda: load_torch(params={**FC, "kernel": jnp.zeros((2, 3))}),
        ValueError,
        r"the velocity \['kernel'\] has shape \(2, 3\), "
        r"but the values to carry over have shape \(3, 2\)",
    ),
    Refusal(
        lambda: load_torch(tx=frameworks.torch_sgd(0.5)),
        ValueError,
        "the state has no velocity, but there are values to carry over for",
    ),
    Refusal(
        lambda: load_torch(tx=optax.chain(mj.trace(0.5), mj.trace(0.25))),
        ValueError,
        "the state holds two velocities of the param",
    ),
    Refusal(
        lambda: load_torch(to_params=lambda weights: jax.tree.map(lambda w: 2 * w, fc(weights))),
        ValueError,
        "does more than move values",
    ),
    Refusal(
        lambda: load_torch(to_params=lambda weights: jax.tree.map(lambda w: w + 1, fc(weights))),
        ValueError,
        "does more than move values",
    ),
    Refusal(
        lambda: load_torch(
            to_params=lambda weights: {
                **fc(weights),
                "kernel": np.broadcast_to(weights["fc.weight"][:1].T, (3, 2)),
            }
        ),
        ValueError,
        r"does more than move values to \['kernel'\]",
    ),
    Refusal(
        lambda: load_torch(torch_state_dict([1])),
        ValueError,
        r"the shape of fc\.weight is not known",
    ),
    Refusal(
        lambda: load_torch(torch_state_dict([1], dampening=0.5), WEIGHTS),
        ValueError,
        r"there is no momentum buffer of fc\.weight, but its group has dampening",
    ),
    Refusal(
        lambda: load_torch(torch_state_dict([]) | {"state": INTEGERS}),
        TypeError,
        r"the momentum buffer of fc\.weight is int64",
    ),
    Refusal(lambda: load_torch(count=0), ValueError, "count=0, but there is a velocity"),
    Refusal(lambda: load_torch(count=-1), ValueError, "count=-1 must be the number of steps taken"),
    Refusal(
        lambda: load_torch(count=2**31),
        ValueError,
        "count=2147483648 must be at most 2147483647",
    ),
    Refusal(
        lambda: load_torch(tx=frameworks.torch_sgd(rate, 0.5)),
        ValueError,
        r"Give it: count=\.\.\. \(last_epoch of a scheduler that steps once per batch\)",
    ),
    # Otherwise PyTorch would start with a velocity of 0.
    Refusal(
        lambda: frameworks.dump_torch(
            optax.adam(0.1).init(FC), torch_state_dict(), names=WEIGHTS, to_params=fc
        ),
        ValueError,
        r"no velocity, but PyTorch's optimizer has momentum=0\.5",
    ),
    Refusal(
        lambda: frameworks.torch_labels(
            TWO_GROUPS,
            names=WEIGHTS,
            to_params=lambda weights: np.concatenate([w.ravel() for w in weights.values()]),
        ),
        ValueError,
        r"made from weights of the parameter groups \[0, 1\]",
    ),
    # frameworks: the variables of Keras
    Refusal(
        lambda: frameworks.load_keras(**of_keras({**KERAS, "adam/fc_kernel_velocity": np.ones(2)})),
        ValueError,
        "unknown variables: adam/fc_kernel_velocity",
    ),
    Refusal(
        lambda: frameworks.load_keras(
            **of_keras({path.replace("sgd", "lion"): value for path, value in KERAS.items()})
        ),
        ValueError,
        "unknown variables: lion/iteration, lion/learning_rate, lion/fc_kernel_momentum",
    ),
    Refusal(
        lambda: frameworks.load_keras(**of_keras({"sgd/fc_kernel_momentum": np.ones(2)})),
        ValueError,
        "unknown variables: none; iterations: 0",
    ),
    Refusal(
        lambda: frameworks.load_keras(**of_keras({**KERAS, "sgd/fc_kernel_momentum": np.ones(3)})),
        ValueError,
        r"has shape \(2,\), but the values to carry over have shape \(3,\)",
    ),
    Refusal(
        lambda: frameworks.load_keras(**of_keras({"sgd/iteration": np.array(3)})),
        ValueError,
        "the shape of fc/kernel is not known",
    ),
    # The optimizer in place of its variables.
    Refusal(
        lambda: frameworks.load_keras(
            frameworks.keras_sgd().init(FC), object(), names=[], to_params=fc
        ),
        TypeError,
        r"variables has object, .* Give optimizer\.variables",
    ),
    *(
        Refusal(
            lambda variables=variables: frameworks.load_keras(
                frameworks.keras_sgd().init(FC), variables, names=[], to_params=fc
            ),
            TypeError,
            r"needs variables with a path\. Give optimizer\.variables",
        )
        for variables in ("x", [np.ones(2)])
    ),
    Refusal(
        lambda: frameworks.dump_keras(
            (mj.MomentumState(jnp.int32(1), HUGE),),
            {
                path: value.astype(np.float16) if "momentum" in path else value
                for path, value in KERAS_OF_FC.items()
            },
            names=list(WEIGHTS),
            to_params=fc,
        ),
        ValueError,
        r"momentum of fc\.weight has 6 of 6 .* float16",
    ),
    # frameworks: the states of Optax
    Refusal(
        lambda: frameworks.load_optax(
            frameworks.optax_sgd(0.5, 0.5).init(PARAMS),
            optax.sgd(0.5, 0.5).init({"x": jnp.ones(1)}),
        ),
        ValueError,
        r"only in the state: \['a'\], \['b'\]; only in .*\['x'\]",
    ),
    Refusal(
        lambda: frameworks.load_optax(
            frameworks.optax_sgd(0.1, 0.9).init(FC), optax.adam(0.1).init(FC)
        ),
        ValueError,
        "no velocity to carry over, but the state has velocities of",
    ),
    Refusal(
        lambda: frameworks.dump_optax(
            optax.chain(optax.trace(0.5, accumulator_dtype=jnp.float16)).init(HALF),
            (mj.TraceState(jnp.int32(1), HUGE),),
        ),
        ValueError,
        r"has 2 of 2 values .* too large for float16",
    ),
    Refusal(
        lambda: frameworks.dump_optax(optax.sgd(rate, 0.5).init(FC), APART),
        ValueError,
        r"numbers of steps, \[2, 7\] \(TraceState.count 7, ScaleByScheduleState.count 2\)",
    ),
    # frameworks: from momentum to trace and back
    Refusal(
        lambda: frameworks.momentum_from_trace(mj.momentum(0.5).init(FC), APART, learning_rate=0.5),
        ValueError,
        r"numbers of steps, \[2, 7\] \(TraceState.count 7, ScaleByScheduleState.count 2\)",
    ),
    # At a learning rate of 0, the velocity of momentum is 0, whatever that of trace is.
    Refusal(
        lambda: frameworks.momentum_from_trace(
            *[mj.momentum(0.25).init(PARAMS)] * 2, learning_rate=0.0
        ),
        ValueError,
        "learning_rate=0 must be above 0",
    ),
    Refusal(
        lambda: frameworks.trace_from_momentum(
            *[mj.momentum(0.25).init(PARAMS)] * 2, learning_rate=0.0
        ),
        ValueError,
        "learning_rate=0 must be above 0",
    ),
    Refusal(
        lambda: frameworks.trace_from_momentum(
            mj.trace(0.5).init(FC), (mj.MomentumState(jnp.int32(1), HUGE),), learning_rate=1e-35
        ),
        ValueError,
        "too large for float32",
    ),
    # schedules
    Refusal(
        lambda: schedules.sutskever(mu_max=1.5), ValueError, r"mu_max=1\.5 must be in \[0, 1\]"
    ),
    Refusal(lambda: schedules.sutskever(mu_max=math.nan), ValueError, "mu_max=nan"),
    Refusal(
        lambda: schedules.sutskever(period=0),
        ValueError,
        "period=0 must be a whole number, at least 1",
    ),
    Refusal(
        lambda: schedules.sutskever(period=np.array([5])), ValueError, "must be a whole number"
    ),
    Refusal(
        lambda: schedules.demon(total_steps=0), ValueError, "total_steps=0 must be a whole number"
    ),
    Refusal(
        lambda: schedules.demon(np.float64(10.0)),
        ValueError,
        r"total_steps=10\.0 must be a whole number",
    ),
    Refusal(
        lambda: schedules.demon(np.array(True)),
        ValueError,
        "total_steps=True must be a whole number",
    ),
    Refusal(lambda: schedules.demon(10**400), ValueError, "must be a whole number"),
    Refusal(
        lambda: schedules.demon(10, mu_init=1.0), ValueError, r"mu_init=1\.0 must be in \[0, 1\)"
    ),
    # theory
    Refusal(lambda: theory.gradient_descent(math.inf, 1.0), ValueError, "smoothness=inf"),
    Refusal(
        lambda: theory.heavy_ball(1.0, 2.0),
        ValueError,
        r"smoothness=1\.0 must be at least strong_",
    ),
    Refusal(
        lambda: theory.nesterov(1.0, 0.0), ValueError, r"strong_convexity=0\.0 must be above 0"
    ),
    Refusal(
        lambda: theory.triple_momentum(1.0, 2.0),
        ValueError,
        r"smoothness=1\.0 must be at least strong_",
    ),
    Refusal(lambda: theory.stability_limit(-1.0), ValueError, r"mu=-1\.0 must be in \(-1, 1\]"),
    Refusal(lambda: theory.spectral_radius(0.1, math.nan, 1.0), ValueError, "mu=nan"),
    Refusal(lambda: theory.no_escape_bound(1.0, 1.0), ValueError, r"mu=1\.0 must be in \[0, 1\)"),
    Refusal(
        lambda: theory.effective_learning_rate(0.1, 1.0), ValueError, "at 1 the sum has no limit"
    ),
    Refusal(lambda: theory.friction(0.0, 0.9), ValueError, r"learning_rate=0\.0 must be above 0"),
    Refusal(
        lambda: theory.stationary_variance(4.0, 0.0, 1.0, 1.0),
        ValueError,
        r"learning_rate \* curvature=4\.0 must be below 2\.0, the stability limit at mu=0\.0",
    ),
    Refusal(lambda: theory.qhm_from_pid(1.0, 1.0, 1.0), ValueError, r"kp=1\.0 must be below 0"),
    Refusal(
        lambda: theory.qhm_from_accsgd(0.1, 4.0, 3.0),
        ValueError,
        r"xi=3\.0 must be in \(0, sqrt\(kappa\)",
    ),
    Refusal(
        lambda: theory.qhm_from_synthesized_nesterov(0.1, 0.0, 0.5),
        ValueError,
        r"beta1=0\.0 must be in \(-1, 1\) and not 0",
    ),
    Refusal(
        lambda: theory.qhm_from_robust_momentum(4.0, 1.0, rate=0.4),
        ValueError,
        r"rate=0\.4 must be in \[0\.5, 0\.75\]",
    ),
    Refusal(lambda: theory.qhm_from_triple_momentum(1.0, 1.0), ValueError, "must be above 1"),
    # diagnostics
    Refusal(
        lambda: diagnostics.curvature(lambda w: w, jnp.ones(2)),
        TypeError,
        r"float32\[2\], but must",
    ),
    Refusal(
        lambda: diagnostics.curvature(lambda w: jnp.sum(w * 1j), jnp.ones(2)),
        TypeError,
        r"complex64\[\], but must be a real scalar",
    ),
    Refusal(
        lambda: diagnostics.curvature(jnp.sum, jnp.arange(3)),
        TypeError,
        "no floating-point array",
    ),
    Refusal(
        lambda: diagnostics.curvature(lambda p: 0.0, {"f": jnp.tanh}),
        TypeError,
        r"the param at \['f'\] is",
    ),
    Refusal(
        lambda: diagnostics.curvature(jnp.sum, jnp.ones(3), steps=1),
        ValueError,
        "steps=1 must be a whole number, at least 2",
    ),
    Refusal(
        lambda: diagnostics.edge(CURVATURE, -1.0, 0.9),
        ValueError,
        r"learning_rate=-1\.0 must be at least 0",
    ),
    Refusal(
        lambda: diagnostics.edge(CURVATURE, 0.1, 1.0), ValueError, r"mu=1\.0 must be in \(-1, 1\)"
    ),
    Refusal(
        lambda: diagnostics.edge(CURVATURE, 0.1, 0.9, nesterov=True, noise_variance=0.1),
        ValueError,
        r"noise_variance=0\.1 has no effect with nesterov=True",
    ),
    Refusal(
        lambda: jax.jit(lambda curvature: diagnostics.edge(curvature, 0.1, 0.9).fraction)(
            CURVATURE
        ),
        TypeError,
        "is traced, but must be known",
    ),
    Refusal(
        lambda: diagnostics.measure(jnp.ones(2), jnp.ones(3), **MEASURED),
        ValueError,
        r"has shape \(2,\), but the velocity",
    ),
    Refusal(
        lambda: diagnostics.measure({"a": jnp.ones(2)}, {"b": jnp.ones(2)}, **MEASURED),
        ValueError,
        "only in the grad",
    ),
    Refusal(
        lambda: diagnostics.measure(jnp.ones(2), jnp.ones(2), learning_rate=-1.0, mu=0.5),
        ValueError,
        "not negative",
    ),
    Refusal(
        lambda: diagnostics.measure(jax.nn.relu, jnp.ones(2), **MEASURED),
        TypeError,
        "not an array",
    ),
    Refusal(
        lambda: diagnostics.measure_by_leaf(jnp.ones(2), jnp.ones(2), learning_rate=0.1, mu=1.5),
        ValueError,
        r"must be in \(-1, 1\]",
    ),
    Refusal(lambda: diagnostics.record(0.1, 0.1), TypeError, "must be an Optax transformation"),
    Refusal(
        lambda: diagnostics.record(mj.momentum(0.1), -1.0),
        ValueError,
        r"learning_rate=-1\.0 must be finite and not",
    ),
    Refusal(
        lambda: diagnostics.record(mj.momentum(0.1), 0.1, every=0),
        ValueError,
        "every=0 must be a whole number",
    ),
    Refusal(
        lambda: diagnostics.record(mj.momentum(0.1), 0.1, steps=1),
        ValueError,
        "steps=1 must be a whole number",
    ),
    Refusal(
        lambda: step(diagnostics.record(mj.momentum(0.1), 0.1, every=2), W, params=W),
        ValueError,
        "every=2 needs the params and the loss",
    ),
    Refusal(
        lambda: step(diagnostics.record(mj.momentum(0.1), 0.1, every=2), W, value_fn=jnp.sum),
        ValueError,
        "every=2 needs the params and the loss",
    ),
    Refusal(
        lambda: diagnostics.record(mj.momentum(0.1), 0.1, every=2).update(
            W, mj.momentum(0.1).init(W), W
        ),
        TypeError,
        "must be the RecordState",
    ),
    # sharding
    *(
        Refusal(
            lambda inner=inner: sharding.zero1(inner, data_mesh()),
            TypeError,
            "must be an Optax transformation, for example",
        )
        for inner in (0.1, mj.momentum)
    ),
    Refusal(
        lambda: sharding.zero1(mj.momentum(0.1), (8,)),
        TypeError,
        r"must be a jax\.sharding\.Mesh",
    ),
    Refusal(
        lambda: sharding.zero1(mj.momentum(0.1), data_mesh(), "model"),
        ValueError,
        r"axis='model' must be one of .*'data'",
    ),
    Refusal(
        lambda: sharding.zero1(mj.momentum(0.1), mixed_mesh()),
        ValueError,
        "all Auto or all Explicit",
    ),
    Refusal(
        lambda: sharding.zero1(mj.momentum(0.1), data_mesh(), strict="yes"),
        TypeError,
        "strict='yes' must be True or False",
    ),
    Refusal(
        lambda: sharding.zero1(mj.momentum(0.1), data_mesh()).init({"out": "w"}),
        TypeError,
        r"\['out'\] is str",
    ),
    Refusal(
        lambda: step(sharding.zero1(mj.momentum(0.1), data_mesh()), {"w": np.ones((8, 2), "f")}),
        ValueError,
        r"params=None, .*update\(grads, state, params\)",
    ),
    Refusal(
        lambda: sharding.unsharded_params({"w": W}, (8,)),
        TypeError,
        r"must be a jax\.sharding\.Mesh",
    ),
    Refusal(
        lambda: sharding.unsharded_params({"w": W}, data_mesh(), "model"),
        ValueError,
        r"axis='model' must be one of .*'data'",
    ),
]


def public_functions() -> dict[str, Callable[..., Any]]:
    """The public functions of the package without the study, by name."""
    return {
        name: function
        for space in (momentum_jax, diagnostics, frameworks, schedules, sharding, theory)
        for name in getattr(space, "__all__", vars(space))
        if inspect.isfunction(function := getattr(space, name))
        and not name.startswith("_")
        and function.__module__.startswith(space.__name__)
    }


PUBLIC = public_functions()
# Functions without a row: by name, the test of what they refuse.
ELSEWHERE = {
    "torch_hyperparameters": "test_the_error_about_different_groups_contains_the_solution",
}


def names_in(code: types.CodeType) -> Iterator[str]:
    """The names in a function's code, in the order of their first use; inner functions last."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def refused_by(row: Refusal) -> str:
    """The name of the function that a row tests."""
    return next(name for name in names_in(row.call.__code__) if name in PUBLIC)


def named(row: Refusal) -> str:
    """The id of a row: the function, and the first words without the signs of a pattern."""
    words = re.sub(r"\\(.)|\.\*", lambda found: found[1] or " ", row.words.removeprefix("(?s)"))
    return f"{refused_by(row)}: {' '.join(words.split())[:60]}"


@pytest.mark.parametrize("row", REFUSALS, ids=named)
def test_c9_bad_input_is_refused(as_shipped, row):
    """Each row of the table raises an error of exactly this type, with these words."""
    with pytest.raises(row.error, match=row.words) as raised:
        row.call()
    assert raised.type is row.error


def test_c9_each_public_function_that_raises_is_tested():
    """Each function whose docstring says what it raises has a row, or a test elsewhere."""
    raising = {
        name
        for name, function in PUBLIC.items()
        if inspect.signature(function).parameters and "Raises:" in (function.__doc__ or "")
    }
    rows = {refused_by(row) for row in REFUSALS}
    assert rows | ELSEWHERE.keys() == raising
    assert not rows & ELSEWHERE.keys()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for test in ELSEWHERE.values():
        assert f"\ndef {test}(" in tests


class Range(NamedTuple):
    """A number that a function takes, and where its range ends.

    Attributes:
      function: takes the number and `given`.
      name: the name of the number.
      refused, accepted: values just outside and just inside the ends.
      given: the other arguments.
    """

    function: Callable[..., Any]
    name: str
    refused: tuple[float, ...]
    accepted: tuple[float, ...]
    given: dict[str, Any]


TINY, JUST_BELOW_1 = 5e-324, 1 - 2**-53
ABOVE_0 = (0.0, -TINY), (TINY,)
AT_LEAST_0 = (-TINY,), (0.0,)
BELOW_1 = (-1.0, 1.0), (-JUST_BELOW_1, JUST_BELOW_1)
UP_TO_1 = (-1.0, 1 + 2**-52), (-JUST_BELOW_1, 1.0)
FINITE = (math.inf, -math.inf, math.nan), (0.0, -1.0)


def measured_edge(largest: Any = 10.0, smallest: Any = 1.0, **given: Any) -> Any:
    curvature = CURVATURE._replace(largest=jnp.float32(largest), smallest=jnp.float32(smallest))
    return diagnostics.edge(curvature, **{"learning_rate": 0.1, "mu": 0.5, **given})


RANGES = [
    Range(theory.effective_learning_rate, "learning_rate", *AT_LEAST_0, dict(mu=0.5)),
    Range(theory.effective_learning_rate, "mu", *BELOW_1, dict(learning_rate=0.1)),
    Range(theory.friction, "learning_rate", *ABOVE_0, dict(mu=0.5)),
    Range(theory.friction, "mu", *UP_TO_1, dict(learning_rate=0.1)),
    Range(theory.stability_limit, "mu", *UP_TO_1, {}),
    Range(theory.spectral_radius, "learning_rate", *AT_LEAST_0, dict(mu=0.5, curvature=1.0)),
    Range(theory.spectral_radius, "mu", *UP_TO_1, dict(learning_rate=0.1, curvature=1.0)),
    Range(theory.spectral_radius, "curvature", *FINITE, dict(learning_rate=0.1, mu=0.5)),
    Range(theory.no_escape_bound, "mu", (-TINY, 1.0), (0.0, JUST_BELOW_1), dict(smoothness=1.0)),
    Range(theory.no_escape_bound, "smoothness", (0.0, -1.0), (1e-300,), dict(mu=0.5)),
    Range(theory.gradient_descent, "strong_convexity", (0.0,), (1.0,), dict(smoothness=1.0)),
    Range(theory.gradient_descent, "smoothness", (JUST_BELOW_1,), (1.0,), dict(strong_convexity=1)),
    Range(theory.heavy_ball, "smoothness", (JUST_BELOW_1,), (1.0,), dict(strong_convexity=1.0)),
    Range(theory.nesterov, "smoothness", (JUST_BELOW_1,), (1.0,), dict(strong_convexity=1.0)),
    Range(theory.triple_momentum, "smoothness", (JUST_BELOW_1,), (1.0,), dict(strong_convexity=1)),
    Range(
        theory.stationary_variance,
        "mu",
        (-1.0, 1.0),
        (-0.5, 0.999),
        dict(learning_rate=0.1, curvature=1.0, noise_variance=1.0),
    ),
    Range(
        theory.stationary_variance,
        "noise_variance",
        *AT_LEAST_0,
        dict(learning_rate=0.1, mu=0.5, curvature=1.0),
    ),
    Range(
        theory.stationary_variance,
        "curvature",
        (0.0, -1.0),
        (1e-9,),
        dict(learning_rate=0.1, mu=0.5, noise_variance=1.0),
    ),
    Range(theory.qhm_from_pid, "kp", (0.0, 1.0), (-0.01,), dict(ki=1.0, kd=1.0)),
    Range(theory.qhm_from_pid, "ki", (0.0, -1.0), (1.0,), dict(kp=-0.1, kd=1.0)),
    Range(theory.qhm_from_pid, "kd", (0.0, -1.0), (1.0,), dict(kp=-0.1, ki=1.0)),
    Range(theory.qhm_from_accsgd, "delta", (0.0, -1.0), (1e-9,), dict(kappa=9.0, xi=3.0)),
    Range(theory.qhm_from_accsgd, "kappa", (JUST_BELOW_1,), (1.0,), dict(delta=0.1, xi=0.5)),
    Range(theory.qhm_from_accsgd, "xi", (0.0, 3.0000001), (3.0,), dict(delta=0.1, kappa=9.0)),
    Range(
        theory.qhm_from_accsgd,
        "epsilon",
        (-0.5, 0.0, 1.0, 1.5),
        (0.5,),
        dict(delta=0.1, kappa=9.0, xi=3.0),
    ),
    Range(
        theory.qhm_from_synthesized_nesterov,
        "beta1",
        (-1.0, 0.0, 1.0),
        (-0.5, 0.5),
        dict(gamma=0.1, beta2=0.5),
    ),
    Range(
        theory.qhm_from_synthesized_nesterov,
        "gamma",
        (0.0, -1.0),
        (1e-9,),
        dict(beta1=0.5, beta2=0.5),
    ),
    Range(schedules.sutskever, "mu_max", (-TINY, 1 + 2**-52), (0.0, 1.0), {}),
    Range(schedules.sutskever, "period", (0, -1), (1,), {}),
    Range(schedules.demon, "total_steps", (0, -1), (1,), {}),
    Range(schedules.demon, "mu_init", (-TINY, 1.0), (0.0, JUST_BELOW_1), dict(total_steps=10)),
    Range(measured_edge, "largest", FINITE[0], (1.0,), {}),
    Range(measured_edge, "smallest", FINITE[0], (0.0, -1.0), {}),
    Range(measured_edge, "learning_rate", *AT_LEAST_0, {}),
    Range(measured_edge, "mu", (-1.0, 1.0), (-0.5, 0.999), {}),
]


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("row", RANGES, ids=lambda row: f"{row.function.__name__}: {row.name}")
def test_c9_a_range_ends_where_it_says(row):
    for value in row.accepted:
        row.function(**row.given, **{row.name: value})
    for value in row.refused:
        with pytest.raises(ValueError, match=re.escape(f"{row.name}={value!r}")):
            row.function(**row.given, **{row.name: value})
