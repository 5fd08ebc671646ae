"""Training in 16 bits: what rounding takes from each param is kept for the next step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export, lax

from momentum_jax import _velocity
from momentum_jax._dispatch import by_leaf, inlined_jit
from momentum_jax._hyperparameters import by_value, check_state, check_transformation
from momentum_jax._placement import in_memory_of, on_device
from momentum_jax._states import replace_states

PyTree = Any


class KahanState(NamedTuple):
    """What `kahan` carries from step to step.

    Attributes:
      inner_state: the state of the transformation around which it is.
      compensation: a tree like the params: what each is short of, in bfloat16 and in its sharding;
        `optax.MaskedNode` where the param is neither bfloat16 nor float16.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj, optax
      >>> tx = mj.kahan(optax.sgd(0.1))
      >>> tx.init({"w": jnp.ones(1, jnp.bfloat16), "b": jnp.ones(1)}).compensation
      {'b': MaskedNode(), 'w': Array([0], dtype=bfloat16)}
    """

    inner_state: Any
    compensation: Any


export.register_namedtuple_serialization(KahanState, serialized_name="momentum_jax.KahanState")


def kahan(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets bfloat16 and float16 params learn from updates too small for them.

        r <- r + update             r starts at 0
        new w = w + r, rounded      which is what apply_updates makes of the update new w - w
        r <- r - (new w - w)

    A bfloat16 has 8 bits: 1.0 does not change when 0.001 is added, however often. With the 8 bits
    of the compensation, params move as if they had 16, for 2 bytes more each; what is smaller than
    about 1 / 100,000 of the param is still lost. After params were set by hand (pruned, loaded,
    projected), the compensation still belongs to the old ones: `reset_velocity` with a `where` of
    these params clears it, along with their velocity.

    With other wrappers, inside (`wrapper(kahan(...))`) and around
    (`kahan(wrapper(...))`). Right means: param + compensation is what a float32 param would be
    under the same wrapper and gradients, to what the compensation rounds. What makes a row wrong is
    what the wrapper does to the update afterwards. `kahan` cannot see that, so nothing is
    raised.

    - `MultiSteps`: both are right. Before Optax 0.2.8, only around can be carried by a loop, such
      as `jax.lax.scan`.
    - `adaptive_restart`: both are right, and equal, but the movement is that of the rounded
      params. Restarts can come at other steps than with float32 params, and none comes after a
      step in which no param changed.
    - `apply_if_finite`: both are right. Inside, the gradients must be float32, or JAX raises a
      TypeError: prefer around.
    - `chain`: inside, right if it is last. Wrong if anything after it changes the update, such as
      `optax.scale`. Around is right.
    - `conditionally_mask`: as `apply_if_finite`.
    - `conditionally_transform`: inside, the gradients must be float32, and a step that is not
      transformed is rounded without a compensation. Around is right: prefer around.
    - `inject_hyperparams`: both are right. It rounds the learning rate to the params' dtype,
      unless it is given `hyperparam_dtype=jnp.float32`.
    - `lookahead`: inside is wrong: the slow params and the jump to them are rounded. Around, the
      slow and the fast params each have a compensation, and are right to the last bit of the param.
    - `masked`: inside, the params under the mask are right, and the others are rounded without a
      compensation. Around, all are right.
    - `partition`: both are right.
    - `schedule_free`: inside is wrong: the update is rounded for the params, but added to z.
      Around is right: z and the sum of the weights are float32, where Optax alone has them in
      the params' dtype.
    - `sharding.zero1`: both are right. Inside, the compensation is split too. Around, it is sharded
      as the params are.

    Args:
      inner: any Optax transformation. This one comes last: what it returns is to be applied as it
        is, so the rest of a chain belongs inside.

    Returns:
      An Optax transformation whose state is a `KahanState`. `update` needs the params; it
      returns, for params of 16 bits, float32 updates whose sums with them are numbers of 16 bits:
      `optax.apply_updates` and `apply_updates` round nothing. Every one is to be applied. Other
      params, and those without an update, pass.

    Raises:
      ValueError: no params; trees or shapes that do not match; a state of params of which others
        have 16 bits.
      TypeError: a param with an update that is not an array. Without one it may be anything, such
        as the activation functions of an Equinox model whose arrays alone `init` was given.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj, optax
      >>> w, grad = jnp.ones(1, jnp.bfloat16), -jnp.ones(1)
      >>> for tx in (optax.sgd(0.001), mj.kahan(optax.sgd(0.001))):
      ...     moved, state = w, tx.init(w)
      ...     for _ in range(1000):
      ...         updates, state = tx.update(grad, state, moved)
      ...         moved = optax.apply_updates(moved, updates)
      ...     print(moved)
      [1]
      [2]

    Source:
      Kahan (1965), Further remarks on reducing truncation errors; Zamirai, Zhang, Aberger and
      De Sa (2020), Revisiting BFloat16 training, algorithm 3.
    """
    check_transformation(inner)
    given, inner = inner, optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> KahanState:
        inner_state = _with_wide_averages(inner.init(params))
        return KahanState(inner_state, _zero_compensations((), (_velocity.materialize(params),))[0])

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KahanState]:
        state = check_state(state, KahanState)
        if params is None:
            raise ValueError(
                "params=None, but what rounding takes depends on the params. Call "
                "update(grads, state, params)."
            )
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        _velocity.check_arrays("update", updates)
        arrays = _velocity.only_where("updates", updates, params)
        (updates, compensation), _ = _kept((), (updates, arrays, state.compensation))
        return updates, KahanState(inner_state, compensation)

    tx = optax.GradientTransformationExtraArgs(init, update)
    return by_value(tx, "kahan", given)


def _with_wide_averages(state):
    """The state, with what `schedule_free` sums in float32: in 16 bits, small terms are lost."""

    def widen(leaf):
        return leaf.astype(np.float32) if _is_narrow(leaf) else leaf

    def part(node):
        if not isinstance(node, optax.contrib.ScheduleFreeState):
            return node
        weights = {"weight_sum": widen(node.weight_sum), "max_lr": widen(node.max_lr)}
        return node._replace(z=jax.tree.map(widen, node.z), **weights)

    return replace_states(state, part)


def _is_narrow(param):
    return jnp.asarray(param).dtype in (jnp.bfloat16, jnp.float16)


@by_leaf
def _zero_compensations(_, trees, __):
    def leaf(param):
        if not _is_narrow(param):
            return optax.MaskedNode()
        return _velocity.zeros_like(param, np.dtype(jnp.bfloat16))

    return jax.tree.map(leaf, *trees), ()


@by_leaf
def _kept(_, trees, __):
    updates, params, compensation = trees

    def leaf(path, given, param, compensation):
        if _velocity.is_absent(given):
            return given, compensation
        update, param = _velocity.expect_pair("update", path, given, "param", param)
        if _is_narrow(param) == isinstance(compensation, optax.MaskedNode):
            there = "none" if _is_narrow(param) else "one"
            raise ValueError(
                f"the param {_velocity.path_text(path)} is {param.dtype}, and such a param has "
                f"{'a' if _is_narrow(param) else 'no'} compensation, but the state has {there} of "
                f"it. {_velocity.SAME_PARAMS}"
            )
        if not _is_narrow(param):
            return given, compensation
        param, compensation = _velocity.expect_pair(
            "param", path, param, "compensation", compensation
        )
        return _kept_leaf(update, param, compensation)

    treedef, found = _velocity.zip_leaves("updates", updates, "params", params)
    _, held = _velocity.zip_leaves("params", params, "compensation", compensation)
    compensations = (compensation for _, _, compensation in held)
    pairs = [leaf(*each, kept) for each, kept in zip(found, compensations, strict=True)]
    updates, compensations = zip(*pairs, strict=True) if pairs else ((), ())
    return (treedef.unflatten(updates), treedef.unflatten(compensations)), ()


@inlined_jit
def _kept_leaf(update, param, compensation):
    given = update, compensation
    update, param, compensation = on_device((update, param, compensation))
    wide = param.astype(np.float32)
    wanted = _velocity.take_in(update, param).astype(np.float32)
    wanted = wanted + _velocity.hold_like(compensation, param).astype(np.float32)
    update = _rounded(wide + wanted, param.dtype) - wide
    # The new param, computed as apply_updates computes it: compiled together, the two are one
    # value, and XLA makes one kernel of a step on a TPU; with `wanted - update` it makes two. XLA
    # for GPUs drops the two casts, and then too `moved - wide` is `update` to the last bit.
    moved = (wide + update).astype(param.dtype).astype(np.float32)
    short = wanted - (moved - wide)
    short = jnp.where(jnp.isfinite(short), short, np.float32(0)).astype(compensation.dtype)
    return in_memory_of(given, (update, _velocity.hold_like(short, compensation)))


def _rounded(total, dtype):
    """Rounds as a cast to `dtype` and back, which XLA may drop (`xla_allow_excess_precision`)."""
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(total, exponent_bits=8, mantissa_bits=7)
    normal = lax.reduce_precision(total, exponent_bits=5, mantissa_bits=10)
    # That makes 0 of what is below the normal numbers, where float16 counts in units.
    unit = np.float32(jnp.finfo(dtype).smallest_subnormal)
    low = lax.round(total / unit, lax.RoundingMethod.TO_NEAREST_EVEN) * unit
    return jnp.where(jnp.abs(total) < np.float32(jnp.finfo(dtype).tiny), low, normal)
