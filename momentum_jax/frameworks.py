"""Each framework's momentum, with its own arithmetic, and a running job carried over.

Recipes do not reproduce from one framework to the next because these differ:

    =========================  =============  =============  =============  =============
    what differs               torch_sgd      keras_sgd      caffe_sgd      optax_sgd
    =========================  =============  =============  =============  =============
    learning rate              outside        inside         inside         outside
    its default                1e-3           0.01           none           none
    default momentum           0              0              0              None
    dampening                  not in the     none           none           none
                               first step
    weight decay               coupled        decoupled      coupled        none
    maximize                   flips the      none           none           none
                               gradient, not
                               the decay
    nesterov without momentum  refused        ignored        no nesterov    ignored
    schedules count            from 0         from 0         from 0         from 0
    =========================  =============  =============  =============  =============

Inside and outside: see `momentum_jax.momentum`. Coupled decay adds weight_decay * w to the
gradient, and so to the velocity; decoupled decay shrinks w by learning_rate * weight_decay
beside it. A learning rate may be a schedule: a function of the number of steps taken, from 0.

The `update` of all four takes `learning_rate` and `mu` as overriding keywords for that call,
that of `torch_sgd` also `dampening`. Decoupled decay uses the same learning rate. Where there is
no velocity (momentum=0, or None in `optax_sgd`), a `mu` other than 0 is a ValueError.

A gradient that is None, an `optax.MaskedNode` or float0 means no update, no decay and an untouched
velocity. The arithmetic is at least float32 wide, and the updates are rounded once, to the
gradients' dtypes.

In float64 they equal the real PyTorch and Keras to 1e-10 over 48 steps, and Caffe's solver as
it is documented. With 16-bit params they differ from
them: the velocity is held in float32 here and in 16 bits there.

A job that has run elsewhere goes on here with `load_torch`, `load_keras` or `load_optax`, and
back with `dump_torch`, `dump_keras` or `dump_optax`. Neither PyTorch nor Keras is imported:
what comes in has `__array__`, what goes out is NumPy.

All of these, and `momentum_from_trace` and `trace_from_momentum`, carry over velocities and the
counts that schedules follow. They raise a ValueError where a state of ours or of Optax', on
either side, holds more that decides the steps to come:

  - gradients gathered by `optax.MultiSteps` or `optax.apply_every`;
  - a period of `optax.lookahead` or `optax.contrib.sam` that has not ended;
  - gradients in a row that `optax.apply_if_finite` has rejected;
  - a scale of `optax.contrib.reduce_on_plateau` other than 1;
  - a compensation of `momentum_jax.kahan`;
  - a step of `schedule_free`, `mechanize` or `galore` of `optax.contrib`.

The same holds for counts that differ, and velocities that are not finite. States may be sharded
over several processes: then each must make the call, and each gets the whole of what goes out as
NumPy. From state to state nothing goes through the host, where both are on the same devices.

Example:
  A checkpoint of PyTorch, `{"model": model.state_dict(), "optimizer": optimizer.state_dict()}`::

    checkpoint = torch.load("checkpoint.pt", map_location="cpu")
    name_of = {id(w): name for name, w in model.named_parameters()}
    names = [name_of[id(w)] for group in optimizer.param_groups for w in group["params"]]
    weights = {name: checkpoint["model"][name].detach().float().numpy() for name in names}

    def to_params(weights):  # whatever gives the params from the weights, by name
        return {
            "conv": {"kernel": np.transpose(weights["conv.weight"], (2, 3, 1, 0))},
            "head": {"kernel": np.transpose(weights["head.weight"]), "bias": weights["head.bias"]},
        }

    params = jax.tree.map(jnp.asarray, to_params(weights))
    settings = torch_hyperparameters(checkpoint["optimizer"])
    tx = torch_sgd(**{**settings, "lr": schedule})  # or **settings, at the present lr
    opt_state = load_torch(
        tx.init(params), checkpoint["optimizer"], names=weights, to_params=to_params, count=30_000
    )
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax import _carry, _velocity
from momentum_jax._carry import ToParams
from momentum_jax._dispatch import inlined_jit
from momentum_jax._hyperparameters import (
    Hyperparameter,
    by_value,
    check,
    check_flag,
    check_value,
    is_known,
    is_zero,
    resolve,
)
from momentum_jax._momentum import MomentumState, TraceState, momentum, trace
from momentum_jax._placement import in_memory_of, on_device
from momentum_jax._recurrence import incremented
from momentum_jax._states import Conversion, any_velocity_nonzero, carry_velocities, to_host

PyTree = Any
# The names of the weights in the optimizer's order, or the weights by name in that order.
Names = Sequence[str] | Mapping[str, Any]

_momentum = momentum  # Where an argument has the name.


def torch_sgd(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.0,
    dampening: jax.typing.ArrayLike = 0.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """PyTorch's `torch.optim.SGD`.

        g <- -g                        with maximize
        g <- g + weight_decay * w
        m <- g                         in the first step: no dampening
        m <- momentum * m + (1 - dampening) * g        in the others
        w <- w - lr * m,  with nesterov  w - lr * (g + momentum * m)

    PyTorch's first step is that of each param, the first with a gradient; here it is that of
    the optimizer. The two differ where dampening meets a param that is unfrozen later, and
    where a schedule lets momentum be 0 for a while: PyTorch then leaves m alone.

    Args:
      lr: the learning rate, or a schedule of it.
      momentum: the momentum coefficient, in [0, 1]. At 0 there is no velocity.
      dampening: what part of each gradient but the first is left out.
      weight_decay: coupled decay; `update` then needs the params.
      nesterov: whether the update looks one step ahead.
      maximize: whether to climb.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: a value out of range; nesterov without momentum or with dampening, as there.

    Example:
      >>> import jax.numpy as jnp
      >>> from momentum_jax.frameworks import torch_sgd
      >>> tx = torch_sgd(lr=0.1, momentum=0.9, dampening=0.5)
      >>> w = jnp.ones(1)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones(1), state, w)
      ...     print(updates)
      [-0.1]
      [-0.14]

    Source:
      PyTorch's documentation of torch.optim.SGD.
    """
    lr, momentum = check("lr", lr), check("momentum", momentum)
    dampening = check_value("dampening", dampening)
    weight_decay = check_value("weight_decay", weight_decay)
    nesterov, maximize = check_flag("nesterov", nesterov), check_flag("maximize", maximize)
    # Of traced values nothing is known.
    dampened = is_known(dampening) and not is_zero(dampening)
    if nesterov and (is_zero(momentum) or dampened):
        values: tuple[Any, ...] = momentum, dampening
        numbers = (float(x) if is_known(x) else x for x in values)
        raise ValueError(
            "nesterov=True needs a momentum above 0 and no dampening, but "
            "momentum={} and dampening={}. PyTorch refuses this too.".format(*numbers)
        )
    steps: list[Any] = [optax.stateless(_negated)] if maximize else []
    steps += _coupled_decay(weight_decay)
    if not _is_static_zero(momentum):
        steps.append(_torch_trace(momentum, nesterov, dampening))
    tx = _chain(*steps, _scale(lr), has_velocity=not _is_static_zero(momentum))
    return by_value(tx, "torch_sgd", lr, momentum, dampening, weight_decay, nesterov, maximize)


def keras_sgd(
    learning_rate: Hyperparameter = 0.01,
    momentum: Hyperparameter = 0.0,
    nesterov: bool = False,
    weight_decay: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keras' `keras.optimizers.SGD`.

        v <- momentum * v - learning_rate * g
        w <- w - learning_rate * weight_decay * w
        w <- w + v,  with nesterov  w + momentum * v - learning_rate * g

    Args:
      learning_rate: the learning rate, or a schedule of it.
      momentum: the momentum coefficient, in [0, 1]. At 0 there is no velocity, and nesterov
        has no effect.
      nesterov: whether the update looks one step ahead.
      weight_decay: decoupled decay; `update` then needs the params. Keras' excluded variables
        are left out with `optax.partition`.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from momentum_jax.frameworks import keras_sgd
      >>> tx = keras_sgd(learning_rate=0.1, momentum=0.9, weight_decay=0.5)
      >>> w = jnp.ones(1)
      >>> updates, state = tx.update(jnp.ones(1), tx.init(w), w)
      >>> print(updates)
      [-0.15]

    Source:
      Keras' documentation of keras.optimizers.SGD.
    """
    learning_rate = check("learning_rate", learning_rate)
    momentum, nesterov = check("momentum", momentum), check_flag("nesterov", nesterov)
    if _is_static_zero(momentum):
        step: Any = _chain(_scale(learning_rate), has_velocity=False)
    else:
        step = _momentum(learning_rate, momentum, nesterov=nesterov and not is_zero(momentum))
    if weight_decay is not None:
        weight_decay = check_value("weight_decay", weight_decay)
        step = _chain(step, *_decoupled_decay(weight_decay, learning_rate))
    return by_value(step, "keras_sgd", learning_rate, momentum, nesterov, weight_decay)


def caffe_sgd(
    base_lr: Hyperparameter,
    momentum: Hyperparameter = 0.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Caffe's SGD solver.

        v <- momentum * v - base_lr * (g + weight_decay * w)
        w <- w + v

    Args:
      base_lr: the learning rate, or a schedule of it (Caffe's lr_policy).
      momentum: the momentum coefficient, in [0, 1].
      weight_decay: coupled decay; `update` then needs the params.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from momentum_jax.frameworks import caffe_sgd
      >>> tx = caffe_sgd(base_lr=0.1, momentum=0.9, weight_decay=0.5)
      >>> w = jnp.ones(1)
      >>> updates, state = tx.update(jnp.ones(1), tx.init(w), w)
      >>> print(updates)
      [-0.15]

    Source:
      Jia and others (2014), Caffe: convolutional architecture for fast feature embedding;
      its tutorial on the solver.
    """
    base_lr, momentum = check("base_lr", base_lr), check("momentum", momentum)
    weight_decay = check_value("weight_decay", weight_decay)
    tx = _chain(*_coupled_decay(weight_decay), _momentum(base_lr, momentum))
    return by_value(tx, "caffe_sgd", base_lr, momentum, weight_decay)


def optax_sgd(
    learning_rate: Hyperparameter, momentum: Hyperparameter | None = None, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Optax' `optax.sgd`, with the stricter state of `momentum_jax.trace`.

    In float32 and float64 the same to the bit under jit (tested on CPU).

        m <- momentum * m + g
        w <- w - learning_rate * m,  with nesterov  w - learning_rate * (g + momentum * m)

    Args:
      learning_rate: the learning rate, or a schedule of it.
      momentum: the momentum coefficient, in (-1, 1]. At None there is no velocity, and
        nesterov has no effect.
      nesterov: whether the update looks one step ahead.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: a value out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from momentum_jax.frameworks import optax_sgd
      >>> tx = optax_sgd(learning_rate=0.1, momentum=0.5, nesterov=True)
      >>> updates, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
      >>> print(updates)
      [-0.15]

    Source:
      Optax' documentation of optax.sgd and optax.trace.
    """
    learning_rate = check("learning_rate", learning_rate)
    nesterov = check_flag("nesterov", nesterov)
    mu = None if momentum is None else check("mu", momentum, display_name="momentum")
    steps = [] if mu is None else [trace(mu, nesterov=nesterov and not is_zero(mu))]
    tx = _chain(*steps, _scale(learning_rate), has_velocity=mu is not None)
    return by_value(tx, "optax_sgd", learning_rate, mu, nesterov)


def torch_hyperparameters(
    state_dict: Mapping[str, Any], *, group: int | None = None
) -> dict[str, Any]:
    """The keyword arguments for `torch_sgd` that PyTorch's optimizer has at present.

    Args:
      state_dict: what `optimizer.state_dict()` returned.
      group: the number of the parameter group; None where all have the same settings.

    Returns:
      A dict of lr, momentum, dampening, weight_decay, nesterov and maximize. The lr is the
      present one: for a scheduler give a schedule in its place.

    Raises:
      ValueError: groups with different settings and none chosen; no state of SGD.

    Example:
      >>> from momentum_jax.frameworks import torch_hyperparameters, torch_sgd
      >>> settings = dict(dampening=0, weight_decay=0, nesterov=False, maximize=False)
      >>> group = {"lr": 0.1, "momentum": 0.9, **settings, "params": [0, 1]}
      >>> found = torch_hyperparameters({"state": {}, "param_groups": [group]})
      >>> found["lr"], found["momentum"]
      (0.1, 0.9)
      >>> tx = torch_sgd(**found)
    """
    groups = [_torch_settings(found) for found in _torch_groups(state_dict)]
    if group is not None:
        if not 0 <= group < len(groups):
            raise ValueError(
                f"group={group} must be at least 0 and below {len(groups)}, the number of groups."
            )
        return groups[group]
    differing = [name for name in groups[0] if any(g[name] != groups[0][name] for g in groups)]
    if differing:
        raise ValueError(
            f"the {len(groups)} parameter groups differ in {', '.join(differing)}. Make one "
            "transformation each:\n"
            "    tx = optax.partition(\n"
            '        {f"group_{i}": torch_sgd(**torch_hyperparameters(state_dict, group=i))'
            f" for i in range({len(groups)})}},\n"
            "        torch_labels(state_dict, names=names, to_params=to_params),\n"
            "    )"
        )
    return groups[0]


def torch_labels(state_dict: Mapping[str, Any], *, names: Names, to_params: ToParams) -> PyTree:
    """The parameter group of each param, "group_0", ..., as labels for `optax.partition`.

    Args:
      state_dict: what `optimizer.state_dict()` returned.
      names: as for `load_torch`.
      to_params: as for `load_torch`.

    Returns:
      A tree like the params, of text.

    Raises:
      ValueError: names or shapes that do not fit; a param made of weights of two groups.

    Example:
      >>> import numpy as np
      >>> from momentum_jax.frameworks import torch_labels
      >>> settings = dict(lr=0.1, momentum=0, dampening=0, weight_decay=0, nesterov=False)
      >>> groups = [{**settings, "maximize": False, "params": [i]} for i in range(2)]
      >>> torch_labels(
      ...     {"state": {}, "param_groups": groups},
      ...     names={"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2)},
      ...     to_params=lambda weights: {"w": weights["fc.weight"].T, "b": weights["fc.bias"]},
      ... )
      {'b': 'group_1', 'w': 'group_0'}
    """
    job = _TorchJob(state_dict, names)
    shapes = job.shapes()

    def label(path, leaf):
        groups = np.unique(np.asarray(leaf, np.float64))
        if groups.size != 1:
            raise ValueError(
                f"the param {jax.tree_util.keystr(path)} is made of weights of the parameter "
                f"groups {groups.astype(int).tolist()}. Split it, or give them one group."
            )
        return f"group_{int(groups[0])}"

    groups = {name: np.full(shapes[name], job.group_of[name], np.float32) for name in job.names}
    return jax.tree_util.tree_map_with_path(label, to_params(groups))


def load_torch(
    opt_state: optax.OptState,
    state_dict: Mapping[str, Any],
    *,
    names: Names,
    to_params: ToParams,
    count: int | None = None,
) -> Any:
    """Continues a job of PyTorch's SGD: its momentum buffers as our velocity.

    Args:
      opt_state: the state that init returned, of `torch_sgd` or any transformation with a
        `momentum_jax.trace` in it, also under `optax.partition` or in an `nnx.Optimizer`. For one
        of `momentum`, continue from this one with `momentum_from_trace`.
      state_dict: what `optimizer.state_dict()` returned, on the host.
      names: the names of the optimizer's params in its order, group by group, which is that of
        `model.named_parameters()` only if there is one group; the example at the top of the
        module finds it. PyTorch can keep them itself: `SGD(model.named_parameters())`, and
        they are compared. Or the weights themselves by name, in that order, which is needed
        where a param has no buffer yet.
      to_params: the function that gives the params from the weights, a dict by name. It is
        called with NumPy arrays of these names and must only move values: rename, reshape,
        transpose, split, join. PyTorch's gradient of a complex weight, and so its buffer, is
        the conjugate of what `jax.grad` returns: give `update` jax.tree.map(jnp.conj, grads).
      count: the number of steps taken, for schedules to continue from. PyTorch's SGD does not
        save it; a scheduler does, as `last_epoch` where it steps once a batch. A schedule of
        momentum itself, or of the number of gradients in `optax.MultiSteps`, cannot be seen in
        the state: give it for those too.

    Returns:
      The state with velocity and count filled, each leaf in its dtype and sharding. Without
      count, it is 1 if there is any buffer: enough for constant settings. On the way it takes
      at most 16 bytes of host memory per value (float32, tested), beside the arguments.

    Raises:
      ValueError: names, shapes or paths that do not fit, with both sides listed; a schedule
        without count; a missing buffer where there is dampening, which PyTorch leaves out of
        its first step; a buffer with values that are not finite, or too large for the dtype of
        the velocity; an `opt_state` that has gathered gradients.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from momentum_jax.frameworks import load_torch, torch_hyperparameters, torch_sgd
      >>> settings = dict(dampening=0, weight_decay=0, nesterov=False, maximize=False)
      >>> state_dict = {
      ...     "state": {0: {"momentum_buffer": np.array([[1.0, 2.0]])}},
      ...     "param_groups": [{"lr": 0.1, "momentum": 0.9, **settings, "params": [0]}],
      ... }
      >>> tx = torch_sgd(**torch_hyperparameters(state_dict))
      >>> opt_state = load_torch(
      ...     tx.init({"kernel": jnp.zeros((2, 1))}),
      ...     state_dict,
      ...     names=["fc.weight"],
      ...     to_params=lambda weights: {"kernel": weights["fc.weight"].T},
      ... )
      >>> print(opt_state[0].trace["kernel"].T)
      [[1. 2.]]
    """
    job = _TorchJob(state_dict, names)
    count = _steps(
        count,
        None,
        opt_state,
        bool(job.buffers),
        "last_epoch of a scheduler that steps once a batch",
    )
    velocities, missing = _arriving(opt_state, TraceState, job, to_params)
    dampened = [
        name for name in missing if _torch_settings(job.groups[job.group_of[name]])["dampening"]
    ]
    if dampened:
        raise ValueError(
            f"there is no momentum buffer of {_carry.join_names(dampened)}, and its group has "
            "dampening. PyTorch will leave the dampening out of its first step, and here only "
            "the first step of all params together has none. Take one step more there, so that "
            "every param has a buffer, or leave it out of the optimizer."
        )
    return _carry.fill(opt_state, velocities, count, TraceState)


def dump_torch(
    opt_state: optax.OptState,
    state_dict: Mapping[str, Any],
    *,
    names: Names,
    to_params: ToParams,
    to_tensor: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """Takes a job back to PyTorch: our velocity as the momentum buffers of its SGD.

    Args:
      opt_state: the state of `torch_sgd`, or of any transformation with a trace in it.
      state_dict: `optimizer.state_dict()` of the optimizer that goes on, new or old: its
        parameter groups are kept, its buffers replaced.
      names: as for `load_torch`; a new optimizer has no buffers yet, so give the weights.
      to_params: as for `load_torch`; it is used backwards.
      to_tensor: makes of a NumPy array what goes into the dict. Give `torch.from_numpy` for
        `optimizer.load_state_dict`, which takes tensors alone; the lr is that of `state_dict`.

    Returns:
      A new dict for `optimizer.load_state_dict`. Params that have no velocity here, and all
      before the first step, have no buffer.

    Raises:
      ValueError: names, shapes or paths that do not fit, with both sides listed.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from momentum_jax.frameworks import dump_torch, torch_sgd
      >>> settings = dict(dampening=0, weight_decay=0, nesterov=False, maximize=False)
      >>> group = {"lr": 0.1, "momentum": 0.9, **settings, "params": [0]}
      >>> tx = torch_sgd(0.1, 0.9)
      >>> params = {"kernel": jnp.zeros((2, 1))}
      >>> _, opt_state = tx.update({"kernel": jnp.array([[1.0], [2.0]])}, tx.init(params))
      >>> dumped = dump_torch(
      ...     opt_state,
      ...     {"state": {}, "param_groups": [group]},
      ...     names={"fc.weight": np.zeros((1, 2))},
      ...     to_params=lambda weights: {"kernel": weights["fc.weight"].T},
      ... )
      >>> print(dumped["state"][0]["momentum_buffer"])
      [[1. 2.]]
    """
    job = _TorchJob(state_dict, names)
    named = _leaving(opt_state, TraceState, job, to_params)
    momentums = [group["momentum"] for group in job.groups if group["momentum"]]
    if momentums and not _carry.parts(opt_state, TraceState):
        raise ValueError(
            f"the state has no velocity, but the optimizer that goes on has momentum="
            f"{momentums[0]}. Give the state of torch_sgd, or of any transformation with a trace."
        )
    if not _carry.has_stepped(opt_state):
        named = {}
    return {
        **state_dict,
        "state": {
            number: {"momentum_buffer": to_tensor(named[name])}
            for name, number in job.number_of.items()
            if name in named
        },
        "param_groups": copy.deepcopy(job.groups),
    }


def load_keras(
    opt_state: optax.OptState,
    variables: Iterable[Any] | Mapping[str, Any],
    *,
    names: Names,
    to_params: ToParams,
) -> Any:
    """Continues a job of Keras' SGD: its momentums as our velocity, its iteration as our count.

    Args:
      opt_state: the state that init returned, of `keras_sgd` or any transformation with a
        `momentum_jax.momentum` in it, also under `optax.partition`. For one of `trace`, continue
        from this one with `trace_from_momentum`.
      variables: `optimizer.variables`, or a dict of arrays by their paths.
      names: the paths of the trained weights, `[w.path for w in model.trainable_variables]`, or
        a dict of the weights by path.
      to_params: the function that gives the params from the weights, a dict by path, as for
        `load_torch`.

    Returns:
      The state with velocity and count filled, each leaf in its dtype and sharding.

    Raises:
      ValueError: names, shapes or paths that do not fit, with both sides listed; variables that
        are not those of SGD, or have the names of Keras 2; values that are not finite.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from momentum_jax.frameworks import keras_sgd, load_keras
      >>> variables = {
      ...     "sgd/iteration": np.array(7),
      ...     "sgd/learning_rate": np.array(0.1),
      ...     "sgd/dense_kernel_momentum": np.array([1.0, 2.0]),
      ... }
      >>> opt_state = load_keras(
      ...     keras_sgd(0.1, 0.9).init({"kernel": jnp.zeros(2)}),
      ...     variables,
      ...     names=["dense/kernel"],
      ...     to_params=lambda weights: {"kernel": weights["dense/kernel"]},
      ... )
      >>> print(opt_state.count, opt_state.velocity["kernel"])
      7 [1. 2.]
    """
    job = _KerasJob(variables, names)
    velocities, _ = _arriving(opt_state, MomentumState, job, to_params)
    return _carry.fill(opt_state, velocities, job.count, MomentumState)


def dump_keras(
    opt_state: optax.OptState,
    variables: Iterable[Any] | Mapping[str, Any],
    *,
    names: Names,
    to_params: ToParams,
) -> dict[str, np.ndarray]:
    """Takes a job back to Keras: our velocity as its SGD's momentums, our count as its iteration.

    Args:
      opt_state: the state of `keras_sgd`, or of any transformation with a momentum in it.
      variables: `optimizer.variables` of the built optimizer that goes on, or a dict of arrays
        by their paths.
      names: as for `load_keras`.
      to_params: as for `load_keras`; it is used backwards.

    Returns:
      A value for each variable by its path, the learning rate as it was:
      `for v in optimizer.variables: v.assign(values[v.path])`.

    Raises:
      ValueError: names, shapes or paths that do not fit, with both sides listed.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from momentum_jax.frameworks import dump_keras, keras_sgd
      >>> tx = keras_sgd(0.5, 0.9)
      >>> _, opt_state = tx.update({"kernel": jnp.ones(2)}, tx.init({"kernel": jnp.zeros(2)}))
      >>> values = dump_keras(
      ...     opt_state,
      ...     {"sgd/iteration": np.array(0), "sgd/dense_kernel_momentum": np.zeros(2)},
      ...     names=["dense/kernel"],
      ...     to_params=lambda weights: {"kernel": weights["dense/kernel"]},
      ... )
      >>> print(values["sgd/iteration"], values["sgd/dense_kernel_momentum"])
      1 [-0.5 -0.5]
    """
    job = _KerasJob(variables, names)
    named = _leaving(opt_state, MomentumState, job, to_params)
    if named.keys() != job.buffers.keys():
        raise ValueError(
            "the state and Keras' optimizer must have velocities of the same weights, but "
            f"only in the state: {_carry.join_names(named.keys() - job.buffers.keys())}; "
            f"only in Keras: {_carry.join_names(job.buffers.keys() - named.keys())}. Build Keras' "
            "optimizer first: optimizer.build(model.trainable_variables)."
        )
    values = dict(job.variables)
    for name, array in named.items():
        path = job.path_of[name]
        if np.iscomplexobj(array) and not np.iscomplexobj(values[path]):
            raise TypeError(
                f"the velocity of {name} is {array.dtype}, but Keras' is {values[path].dtype}: a "
                "real and a complex array do not mix."
            )
        with np.errstate(over="ignore"):
            values[path] = array.astype(values[path].dtype)
        _carry.check_finite(
            {name: values[path]},
            "as Keras stores it, the momentum of",
            f"They are too large for {values[path].dtype}: build Keras' optimizer with a wider "
            "dtype.",
        )
    count = _carry.taken_count(opt_state)
    if count is not None:  # Without momentum and schedules, nothing here has counted.
        (path,) = (path for path in values if path.split("/")[-1] == "iteration")
        values[path] = np.asarray(count, values[path].dtype)
    return values


def load_optax(
    opt_state: optax.OptState, optax_state: optax.OptState, *, count: int | None = None
) -> Any:
    """Continues a job of `optax.sgd` or `optax.trace`: its trace as our velocity.

    Args:
      opt_state: the state that init returned, of `optax_sgd` or any transformation with a
        `momentum_jax.trace` in it.
      optax_state: a state with one or more `optax.TraceState` in it.
      count: the number of steps taken, if no schedule in `optax_state` has counted it.

    Returns:
      The state with velocity and count filled, each leaf in its dtype and sharding. Without
      any count, it is 1 if the velocity has moved: enough for constant settings.

    Raises:
      ValueError: shapes or paths that do not fit, with both sides listed; a schedule without
        count; what the module refuses in every state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from momentum_jax.frameworks import load_optax, optax_sgd
      >>> old, new = optax.sgd(0.1, 0.9), optax_sgd(0.1, 0.9)
      >>> _, old_state = old.update(jnp.ones(1), old.init(jnp.ones(1)))
      >>> print(load_optax(new.init(jnp.ones(1)), old_state)[0].trace)
      [1.]
    """
    _carry.check_whole(opt_state, "opt_state")
    theirs = _departing(optax_state, "optax_state", optax.TraceState)
    _carry.match(_carry.velocities(opt_state, TraceState), theirs)
    known = _carry.scheduled_count(optax_state) if count is None else None
    moved = any_velocity_nonzero(theirs.values())
    count = _steps(count, known, opt_state, moved, "how often update was called")
    _carry.check_count_fits(opt_state, count, TraceState)
    return carry_velocities(optax_state, opt_state, count)


def dump_optax(optax_state: optax.OptState, opt_state: optax.OptState) -> Any:
    """Takes a job back to Optax: our velocity as the trace of `optax.sgd` or `optax.trace`.

    Args:
      optax_state: the state that init returned, with one or more `optax.TraceState` in it.
      opt_state: the state of `optax_sgd`, or of any transformation with a trace in it.

    Returns:
      `optax_state` with traces and the schedules' count filled.

    Raises:
      ValueError: shapes or paths that do not fit, with both sides listed.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from momentum_jax.frameworks import dump_optax, optax_sgd
      >>> ours, theirs = optax_sgd(0.1, 0.9), optax.sgd(0.1, 0.9)
      >>> _, state = ours.update(jnp.ones(1), ours.init(jnp.ones(1)))
      >>> print(dump_optax(theirs.init(jnp.ones(1)), state)[0].trace)
      [1.]
    """
    _carry.check_whole(optax_state, "optax_state")
    velocities = _departing(opt_state, "opt_state", TraceState)
    _carry.match(_carry.velocities(optax_state, optax.TraceState), velocities)
    count = _carry.taken_count(opt_state)
    _carry.check_count_fits(optax_state, count, optax.TraceState)
    return carry_velocities(opt_state, optax_state, count)


def momentum_from_trace(
    opt_state: optax.OptState, outside: optax.OptState, *, learning_rate: float
) -> Any:
    """Continues a job of `trace` with `momentum`: v = -learning_rate * m.

    Exact at the present learning rate only. After a schedule the velocity inside would hold
    each gradient times the learning rate of its own step; from outside, where all are scaled
    alike, that history cannot be had. What follows is the run as if the learning rate had
    always been the present one.

    Args:
      opt_state: the state that init returned, of a transformation with a `momentum` in it.
      outside: the state of a transformation with a `trace` in it.
      learning_rate: the present learning rate, above 0.

    Returns:
      `opt_state` with velocity and count filled.

    Raises:
      ValueError: a learning rate that is not above 0; shapes or paths that do not fit.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> from momentum_jax.frameworks import momentum_from_trace
      >>> outside = mj.TraceState(count=jnp.array(3), trace=jnp.array([2.0]))
      >>> state = mj.momentum(0.5).init(jnp.zeros(1))
      >>> print(momentum_from_trace(state, outside, learning_rate=0.5).velocity)
      [-1.]
    """
    factor = -_above_zero(learning_rate)
    return _scaled(opt_state, MomentumState, outside, "outside", TraceState, factor)


def trace_from_momentum(
    opt_state: optax.OptState, inside: optax.OptState, *, learning_rate: float
) -> Any:
    """Continues a job of `momentum` with `trace`: m = -v / learning_rate.

    Exact at the present learning rate only. After a schedule the velocity outside would hold
    the plain gradients; from inside, where each came with the learning rate of its own step,
    they cannot be had. The next update is the same; how the old gradients are scaled by
    learning rates to come is not.

    Args:
      opt_state: the state that init returned, of a transformation with a `trace` in it.
      inside: the state of a transformation with a `momentum` in it.
      learning_rate: the present learning rate, above 0.

    Returns:
      `opt_state` with velocity and count filled.

    Raises:
      ValueError: a learning rate that is not above 0; shapes or paths that do not fit.

    Example:
      >>> import jax.numpy as jnp, momentum_jax as mj
      >>> from momentum_jax.frameworks import trace_from_momentum
      >>> inside = mj.MomentumState(count=jnp.array(3), velocity=jnp.array([-1.0]))
      >>> state = mj.trace(0.9).init(jnp.zeros(1))
      >>> print(trace_from_momentum(state, inside, learning_rate=0.5).trace)
      [2.]
    """
    factor = -1 / _above_zero(learning_rate)
    return _scaled(opt_state, TraceState, inside, "inside", MomentumState, factor)


def _is_static_zero(value):
    # Of an array nothing is asked, also where it could be read: a state must not change its
    # structure when optax.inject_hyperparams hands a traced value in place of a known one.
    return isinstance(value, float) and value == 0


def _negated(updates, params):
    del params
    return jax.tree.map(jnp.negative, updates)


def _scale(learning_rate):
    def step(updates, params, rate):
        del params

        def leaf(path, g):
            _velocity.check_gradient_dtype(path, g.dtype, np.promote_types(g.dtype, np.float32))
            return _scaled_leaf(g, rate)

        return jax.tree_util.tree_map_with_path(leaf, updates)

    return _by_rate(learning_rate, step)


def _coupled_decay(weight_decay):
    def step(decay):
        return lambda updates, params: _decayed(updates, params, decay)

    return [optax.stateless(step(decay)) for decay in _decays(weight_decay)]


def _decoupled_decay(weight_decay, learning_rate):
    def step(decay):
        return lambda updates, params, rate: _decayed(updates, params, -1.0, decay, rate)

    return [_by_rate(learning_rate, step(decay)) for decay in _decays(weight_decay)]


def _decays(weight_decay):
    """The decay, as a list that is empty where there is none."""
    return [] if _is_static_zero(weight_decay) else [weight_decay]


def _by_rate(learning_rate, step):
    """The transformation of step(updates, params, rate), at the rate of a schedule or a call."""
    scheduled = callable(learning_rate)

    def init(params):
        del params
        zero = jnp.zeros([], jnp.int32)
        return optax.ScaleByScheduleState(zero) if scheduled else optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        count: Any = state.count if scheduled else None
        rate = resolve("learning_rate", learning_rate, extra_args.get("learning_rate"), count)
        updates = step(updates, params, rate)
        return updates, optax.ScaleByScheduleState(incremented(count)) if scheduled else state

    return optax.GradientTransformationExtraArgs(init, update)


def _decayed(updates, params, *factors):
    """The updates plus the product of the params and the factors."""
    if params is None:
        raise ValueError("weight_decay needs the params: update(grads, state, params).")
    treedef, pairs = _velocity.zip_leaves("gradients", updates, "params", params)

    def leaf(path, g, w):
        if g is None:
            return None
        g, w = _velocity.expect_pair("gradient", path, g, "param", w)
        _velocity.check_gradient_dtype(path, g.dtype, w.dtype, "param")
        return _decayed_leaf(g, w, *factors)

    return treedef.unflatten(leaf(*pair) for pair in pairs)


@inlined_jit
def _decayed_leaf(g, w, *factors):
    given = g
    g, w = on_device((g, w))
    dtype = np.promote_types(g.dtype, w.dtype)
    product = w.astype(dtype)
    for factor in factors:
        product = jnp.asarray(factor, dtype) * product
    total = _velocity.take_in(g, w).astype(dtype) + product
    return in_memory_of(given, _velocity.give_out(total))


@inlined_jit
def _scaled_leaf(g, rate):
    return -jnp.asarray(rate, g.dtype) * g


def _torch_trace(momentum, nesterov, dampening):
    """`trace` whose first step is not dampened, also where a call gives the dampening."""
    tx = trace(momentum, nesterov=nesterov, dampening=_exempt_first_step(dampening))

    def update(updates, state, params=None, **extra_args):
        given = extra_args.get("dampening")
        if given is not None and isinstance(state, TraceState):
            exempt = _exempt_first_step(check_value("dampening", given))
            extra_args["dampening"] = resolve("dampening", exempt, None, state.count)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _exempt_first_step(dampening):
    if _is_static_zero(dampening):
        return dampening
    return lambda count: jnp.where(count == 0, 0.0, dampening)


def _chain(*steps, has_velocity=True):
    """The steps one after the other, with wide arithmetic and all extra arguments for each.

    A step sees None for an absent gradient; the updates have the dtypes of the gradients.
    """
    tx = optax.chain(*steps)

    def widened(g):
        if _velocity.is_absent(g):
            return None
        g = jnp.asarray(g)
        floats = jnp.issubdtype(g.dtype, jnp.inexact)
        return g.astype(np.promote_types(g.dtype, np.float32)) if floats else g

    def narrowed(g, update):
        return g if _velocity.is_absent(g) else update.astype(jnp.asarray(g).dtype)

    def update(updates, state, params=None, **extra_args):
        mu = extra_args.get("mu")
        if mu is not None and not has_velocity and not is_zero(check_value("mu", mu)):
            raise ValueError(
                f"mu={mu} has no effect, because without momentum there is no velocity. Make the "
                "transformation with a momentum, or with jnp.zeros([]) to begin without."
            )
        _velocity.check_arrays("gradient", updates)
        if params is not None and not has_velocity:
            _check_params(updates, params)
        wide = jax.tree.map(widened, updates, is_leaf=_velocity.is_absent)
        moved, state = tx.update(wide, state, params, **extra_args)
        return jax.tree.map(narrowed, updates, moved, is_leaf=_velocity.is_absent), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _check_params(grads, params):
    """What a velocity would be compared with, where there is none."""
    for path, g, w in _velocity.zip_leaves("gradients", grads, "params", params)[1]:
        if not _velocity.is_absent(g):
            g, w = _velocity.expect_pair("gradient", path, g, "param", w)
            _velocity.check_gradient_dtype(path, g.dtype, w.dtype, "param")


class _Job:
    """The buffers by name, and the shapes of all that is named."""

    weights_by_name = ""  # How the framework's users get them.

    def __init__(self, names: Names) -> None:
        self.names = _carry.check_names(names)
        self.weights = names if isinstance(names, Mapping) else {}
        self.buffers: dict[str, np.ndarray] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(np.shape(buffer)) for name, buffer in self.buffers.items()}
        for name in self.names:
            if name not in self.weights:
                continue
            shape = tuple(self.weights[name].shape)
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"the weight {name} has shape {shape}, but its momentum has shape "
                    f"{shapes[name]}. Give names in the order of the optimizer's params."
                )
        unknown = [name for name in self.names if name not in shapes]
        if unknown:
            raise ValueError(
                f"the shape of {_carry.join_names(unknown)} is not known: there is no momentum of "
                f"it yet. Give the weights by name as names: {self.weights_by_name}."
            )
        return {name: shapes[name] for name in self.names}


class _TorchJob(_Job):
    """PyTorch's `optimizer.state_dict()`, with the names of what it numbers."""

    weights_by_name = "{name: weight} in the optimizer's order"

    def __init__(self, state_dict: Mapping[str, Any], names: Names) -> None:
        super().__init__(names)
        self.groups = _torch_groups(state_dict)
        numbers = [number for group in self.groups for number in group["params"]]
        if len(numbers) != len(self.names):
            raise ValueError(
                f"the optimizer has {len(numbers)} params, but names has {len(self.names)}: "
                f"{', '.join(self.names)}. Give the names of the params that the optimizer was "
                "made with, frozen ones too, in its order."
            )
        known = [name for group in self.groups for name in group.get("param_names", ())]
        if known and known != self.names:
            raise ValueError(
                f"the optimizer's own names are {', '.join(known)}, but names has "
                f"{', '.join(self.names)}. They must be equal, in one order: give the optimizer's."
            )
        self.number_of = dict(zip(self.names, numbers, strict=True))
        name_of = {number: name for name, number in self.number_of.items()}
        self.group_of = {
            name_of[number]: i for i, group in enumerate(self.groups) for number in group["params"]
        }
        strange = [number for number in state_dict["state"] if number not in name_of]
        if strange:
            raise ValueError(
                f"the state has params {strange} that no parameter group has. Give the whole of "
                "what optimizer.state_dict() returned."
            )
        for number, held in state_dict["state"].items():
            if held.get("momentum_buffer") is not None:
                name = name_of[number]
                self.buffers[name] = _carry.to_numpy(
                    f"the momentum buffer of {name}", held["momentum_buffer"]
                )


class _KerasJob(_Job):
    """Keras' `optimizer.variables`, with the weights that they belong to."""

    weights_by_name = (
        "{w.path: w for w in model.trainable_variables}, of an optimizer that was built with "
        "them: optimizer.build(model.trainable_variables)"
    )

    def __init__(self, variables: Iterable[Any] | Mapping[str, Any], names: Names) -> None:
        super().__init__(names)
        if not isinstance(variables, Mapping):
            each = list(variables) if isinstance(variables, Iterable) else [variables]
            for variable in each:
                if not hasattr(variable, "path"):
                    if hasattr(variable, "name"):
                        raise TypeError(_of_keras_2(variable.name))
                    raise TypeError(
                        f"variables has {type(variable).__name__}, which has no path: give "
                        "optimizer.variables, or of a LossScaleOptimizer "
                        "optimizer.inner_optimizer.variables, or a dict of arrays by their paths."
                    )
            variables = {variable.path: variable for variable in each}
        for path in variables:
            if path.endswith(":0"):
                raise ValueError(_of_keras_2(path))
        self.variables = {
            path: to_host(getattr(variable, "value", variable))
            for path, variable in variables.items()
        }
        # Keras calls the momentum of "dense/kernel" "sgd/dense_kernel_momentum".
        wanted = {f"{name.replace('/', '_')}_momentum": name for name in self.names}
        if len(wanted) < len(self.names):
            raise ValueError(
                f"Keras gives one name to the momentums of two of {', '.join(self.names)}. "
                "Rename a layer."
            )
        self.path_of: dict[str, str] = {}
        counts, strange = [], []
        for path, array in self.variables.items():
            last = path.split("/")[-1]
            if last in wanted:
                name = wanted[last]
                self.path_of[name] = path
                self.buffers[name] = _carry.to_numpy(f"the variable {path}", array)
            elif last == "iteration":
                counts.append(int(array))
            elif last != "learning_rate":
                strange.append(path)
        # Lion has variables of the same names.
        strange += [path for path in self.variables if path.startswith("lion/")]
        if strange or len(counts) != 1:
            raise ValueError(
                "the variables are not those of Keras' SGD for the weights "
                f"{', '.join(self.names)}: it has one iteration, here {len(counts)}, one "
                f"learning_rate and a momentum a weight, but not {', '.join(strange) or 'more'}. "
                "Give names the weights that it was built with; averages and gradients being "
                "accumulated are not carried over; of a LossScaleOptimizer give "
                "optimizer.inner_optimizer.variables."
            )
        self.count = counts[0]


def _of_keras_2(name):
    return (
        f"the variable {name} has a name of Keras 2 (tf_keras), but must have a path of Keras 3. "
        "Give a dict by such paths, and weights as names (a legacy optimizer has "
        'optimizer.get_slot(w, "momentum") for each weight w in place of momentums):\n'
        '    weights = {w.name.removesuffix(":0"): w for w in model.trainable_variables}\n'
        '    variables = {"sgd/iteration": optimizer.iterations.numpy()}\n'
        "    for name, m in zip(weights, optimizer.momentums):\n"
        "        variables[f\"sgd/{name.replace('/', '_')}_momentum\"] = m.numpy()\n"
    )


def _torch_groups(state_dict):
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        keys = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            "state_dict must be what optimizer.state_dict() returned, with state and "
            f"param_groups, but is {keys}. Of a checkpoint give the part that holds it."
        )
    for group in state_dict["param_groups"]:
        missing = [
            name for name in ("lr", "momentum", "dampening", "nesterov") if name not in group
        ]
        if missing:
            raise ValueError(
                f"a parameter group has no {', '.join(missing)}, so that it is not of "
                f"torch.optim.SGD: it has {', '.join(group)}. Of other optimizers nothing can be "
                "carried over: begin with the state that init returned."
            )
    return list(state_dict["param_groups"])


def _torch_settings(group):
    return {
        "lr": float(group["lr"]),
        "momentum": float(group["momentum"]),
        "dampening": float(group["dampening"]),
        "weight_decay": float(group.get("weight_decay", 0.0)),
        "nesterov": bool(group["nesterov"]),
        "maximize": bool(group.get("maximize", False)),
    }


def _arriving(opt_state, kind, job, to_params):
    """The velocities by path, and the names of those for which there was no buffer."""
    _carry.check_whole(opt_state, "opt_state")
    _carry.check_finite(
        job.buffers,
        "the momentum of",
        "Go back to an earlier checkpoint, or set them to 0: np.nan_to_num(buffer, posinf=0, "
        "neginf=0).",
    )
    routes = _carry.Routes(job.shapes(), to_params)
    ours = _carry.velocities(opt_state, kind)
    # What never had a gradient there need not have a velocity here.
    reached = routes.reached(job.buffers)
    wanted = [path for path in routes.places if path in ours or path in reached]
    _carry.match(ours, {path: routes.places[path] for path in wanted})
    missing = [name for name in routes.covered(wanted) if name not in job.buffers]
    return routes.forward(job.buffers, wanted), missing


def _leaving(opt_state, kind, job, to_params):
    """The velocities by name."""
    ours = _departing(opt_state, "opt_state", kind)
    routes = _carry.Routes(job.shapes(), to_params)
    _carry.match(ours, {path: p for path, p in routes.places.items() if path in ours})
    return routes.backward({path: to_host(leaf) for path, leaf in ours.items()})


def _departing(state, name, kind):
    """The velocities of a state that is carried over, by path."""
    _carry.check_whole(state, name)
    found = _carry.velocities(state, kind)
    _carry.check_finite(found, "the velocity", _carry.NOT_FINITE_HERE)
    return found


def _scaled(opt_state, kind, source, name, source_kind, factor):
    _carry.check_whole(opt_state, "opt_state")
    velocities = _departing(source, name, source_kind)
    _carry.match(_carry.velocities(opt_state, kind), velocities)
    count = _carry.taken_count(source)
    _carry.check_count_fits(opt_state, count, kind)
    conversion = Conversion(kind, source_kind, factor)
    return carry_velocities(source, opt_state, count, conversion)


def _above_zero(learning_rate):
    value = check_value("learning_rate", learning_rate)
    if is_zero(value):
        raise ValueError(
            "learning_rate=0 says nothing of the velocity: v = -learning_rate * m is 0 for every "
            "m. Give the learning rate of the last step that moved."
        )
    return float(value)


def _steps(count, known, opt_state, has_moved, hint):
    if count is not None:
        count = _carry.check_count(count)
        if has_moved and not count:
            raise ValueError(
                f"count={count}, but there is a velocity, so that at least one step was taken. "
                f"Count steps, not epochs ({hint})."
            )
        return count
    if known is not None:
        return known
    if _carry.follows_a_schedule(opt_state):
        raise ValueError(
            "the optimizer has a schedule that continues from the number of steps taken, which "
            f"is not saved in what is carried over. Give it: count=... ({hint})."
        )
    return int(has_moved)
