"""Compensated (Kahan) summation for bfloat16 and float16 params: keeps the rounding error."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax._dispatch import jit_by_leaf
from momentum_jax._jax import inlined_jit
from momentum_jax._leaves import (
    SAME_PARAMS,
    check_arrays,
    expect_pair,
    map_leaves,
    materialize,
    only_where,
    path_text,
)
from momentum_jax._placement import (
    isolate_input,
    shard_like,
    to_device_memory,
    to_memory_of,
    zeros_like,
)
from momentum_jax._rounding import round_to_nearest
from momentum_jax._state_types import wrapper_state
from momentum_jax._states import replace_states, rules_of
from momentum_jax._wrapper import wrapper

PyTree = Any


@wrapper_state("kahan", reset_with_velocity="compensation")
class KahanState(NamedTuple):
    """The state of `kahan`.

    Attributes:
      inner_state: the state of the inner transformation.
      compensation: a tree like the params. For each bfloat16 or float16 param: a bfloat16 array
        with the param's shape and sharding, the rounding error that is still to be added to the
        param. For all other params: `optax.MaskedNode`.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj, optax
      >>> tx = mj.kahan(optax.sgd(0.1))
      >>> tx.init({"w": jnp.ones(1, jnp.bfloat16), "b": jnp.ones(1)}).compensation
      {'b': MaskedNode(), 'w': Array([0], dtype=bfloat16)}
    """

    inner_state: Any
    compensation: Any


def kahan(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Adds updates to bfloat16 and float16 params with compensated (Kahan) summation.

        c <- c + update             the compensation c starts at 0
        new w = w + c, rounded      the returned update is new w - w
        c <- c - (new w - w)

    A bfloat16 has 8 significant bits: adding 0.001 to 1.0 does not change it, however often. With
    the 8 bits of the compensation, params behave as if they had 16 significant bits. This takes 2
    more bytes per parameter. Updates below about 1 / 100,000 of the param are still lost. If you
    set params by hand (prune, load, project), the compensation still belongs to the old values. To
    set it to 0, along with the velocity of these params, call `reset_velocity` with a `where` that
    selects them.

    With Optax's wrappers, inside (`wrapper(kahan(...))`) and around (`kahan(wrapper(...))`).
    "Right" means: param + compensation is what a float32 param would be under the same wrapper and
    gradients, up to the rounding of the compensation. The result is wrong if the wrapper changes
    the update afterwards. `kahan` cannot detect that, so nothing is raised.

    - `MultiSteps`: both are right. In loops such as `jax.lax.scan`, inside does not work before
      Optax 0.2.8.
    - `adaptive_restart`: both are right, and equal. Restarts depend on the movement of the rounded
      params. So they can happen at other steps than with float32 params, and none happens after a
      step in which no param changed.
    - `apply_if_finite`: both are right. Inside, the gradients must be float32, or JAX raises a
      TypeError: prefer around.
    - `chain`: inside, right if it is last. Wrong if anything after it changes the update, such as
      `optax.scale`. Around is right.
    - `conditionally_mask`: as `apply_if_finite`.
    - `conditionally_transform`: inside, the gradients must be float32, and a step that is not
      transformed is rounded without compensation. Around is right: prefer around.
    - `inject_hyperparams`: both are right. It rounds the learning rate to the params' dtype,
      unless it is given `hyperparam_dtype=jnp.float32`.
    - `lookahead`: inside is wrong: the slow params and the jump to them are rounded. Around, the
      slow and the fast params each have a compensation, and are right to the last bit of the param.
    - `masked`: inside, the params under the mask are right, and the others are rounded without
      compensation. Around, all are right.
    - `partition`: both are right.
    - `schedule_free`: inside is wrong: the update is rounded for the params, but added to z.
      Around is right: z and the sum of the weights are then float32. Without `kahan` they have the
      params' dtype.
    - `sharding.zero1`: both are right. Inside, `zero1` shards the compensation like the rest of the
      state. Around, it is sharded as the params are.

    Args:
      inner: any Optax transformation. `kahan` comes last: its updates must be applied unchanged, so
        the rest of a chain belongs inside.

    Returns:
      An Optax transformation whose state is a `KahanState`. `update` needs the params. For 16-bit
      params it returns float32 updates whose sum with the param is a 16-bit number, so that
      `optax.apply_updates` and `apply_updates` round nothing. Every update must be applied. The
      updates of other params are returned unchanged.

    Raises:
      ValueError: no params; trees or shapes that do not match; a state that was made for other
        16-bit params.
      TypeError: a param that has an update but is not an array. A param without an update can be
        any object, such as an activation function of an Equinox model, if `init` was given the
        arrays of the model only.

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
    return wrapper(
        KahanState, inner, _init, _update, needs_params="the rounding depends on the params"
    )


def _init(inner, params):
    inner_state = _with_wide_sums(inner.init(params))
    return KahanState(inner_state, _zero_compensations((), (materialize(params),))[0])


def _update(inner, updates, state, params, extra_args):
    updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    check_arrays("update", updates)
    arrays = only_where("updates", updates, params)
    (updates, compensation), _ = _compensated((), (updates, arrays, state.compensation))
    return updates, KahanState(inner_state, compensation)


def _with_wide_sums(state):
    """The state with running sums in float32, because 16 bits would lose small terms."""

    def widen(leaf):
        return leaf.astype(np.float32) if _is_16_bit(leaf) else leaf

    def part(node):
        fields = rules_of(node).running_sums
        wide = {field: jax.tree.map(widen, getattr(node, field)) for field in fields}
        return node._replace(**wide) if wide else node

    return replace_states(state, part)


def _is_16_bit(param):
    return jnp.asarray(param).dtype in (jnp.bfloat16, jnp.float16)


@jit_by_leaf
def _zero_compensations(_, trees, __):
    def leaf(param):
        if not _is_16_bit(param):
            return optax.MaskedNode()
        return zeros_like(param, np.dtype(jnp.bfloat16))

    return jax.tree.map(leaf, *trees), ()


@jit_by_leaf
def _compensated(_, trees, __):
    updates, params, compensation = trees

    def leaf(path, given, param, compensation):
        update, param = expect_pair(path, "update", given, "param", param)
        if _is_16_bit(param) == isinstance(compensation, optax.MaskedNode):
            needs, there = ("a", "none") if _is_16_bit(param) else ("no", "one")
            raise ValueError(
                f"the param {path_text(path)} is {param.dtype}, which needs {needs} compensation, "
                f"but the state has {there} for it. {SAME_PARAMS}"
            )
        if not _is_16_bit(param):
            return given, compensation
        param, compensation = expect_pair(path, "param", param, "compensation", compensation)
        return _compensated_leaf(update, param, compensation)

    return map_leaves(
        leaf,
        ("updates", updates),
        ("params", params),
        ("compensation", compensation),
        absent=lambda update, param, compensation: (update, compensation),
        outputs=2,
    ), ()


@inlined_jit
def _compensated_leaf(update, param, compensation):
    given = update, compensation
    update, param, compensation = to_device_memory((update, param, compensation))
    wide = param.astype(np.float32)
    wanted = isolate_input(update, param).astype(np.float32)
    wanted = wanted + shard_like(compensation, param).astype(np.float32)
    update = round_to_nearest(wide + wanted, param.dtype) - wide
    # The new param, computed as apply_updates computes it: then the compiler computes both once,
    # and makes one kernel of the step on a TPU, where it makes two of `wanted - update`. XLA for
    # GPUs removes both casts; then too `moved - wide` equals `update` to the last bit.
    moved = (wide + update).astype(param.dtype).astype(np.float32)
    rest = wanted - (moved - wide)
    rest = jnp.where(jnp.isfinite(rest), rest, np.float32(0)).astype(compensation.dtype)
    return to_memory_of(given, (update, shard_like(rest, compensation)))
