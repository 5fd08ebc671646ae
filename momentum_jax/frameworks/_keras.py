"""Keras's SGD, and its variables: `keras_sgd`, `load_keras`, `dump_keras`."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from momentum_jax import _momentum
from momentum_jax._hyperparameters import (
    Hyperparameter,
    by_value,
    check,
    check_flag,
    check_value,
    is_zero,
)
from momentum_jax._states import to_host
from momentum_jax.frameworks import _carry, _counts
from momentum_jax.frameworks._checkpoint import (
    Checkpoint,
    Names,
    dump_velocities,
    load_velocities,
    to_numpy,
)
from momentum_jax.frameworks._routes import ToParams, join_names
from momentum_jax.frameworks._steps import chain, decoupled_decay, is_static_zero, scale


def keras_sgd(
    learning_rate: Hyperparameter = 0.01,
    momentum: Hyperparameter = 0.0,
    nesterov: bool = False,
    weight_decay: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keras's `keras.optimizers.SGD`.

        v <- momentum * v - learning_rate * g
        w <- w - learning_rate * weight_decay * w
        w <- w + v
        w <- w + momentum * v - learning_rate * g        with nesterov: the new v

    Args:
      learning_rate: the learning rate, or a schedule of it.
      momentum: the momentum coefficient, in [0, 1]. At 0 there is no velocity, and nesterov
        has no effect.
      nesterov: whether the update looks one step ahead.
      weight_decay: decoupled decay; `update` then needs the params. For the variables that Keras
        excludes from decay, use `optax.partition`.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: a value is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from momentum_jax.frameworks import keras_sgd
      >>> tx = keras_sgd(learning_rate=0.1, momentum=0.9, weight_decay=0.5)
      >>> w = jnp.ones(1)
      >>> updates, state = tx.update(jnp.ones(1), tx.init(w), w)
      >>> print(updates)
      [-0.15]

    Source:
      Keras's documentation of keras.optimizers.SGD.
    """
    learning_rate = check("learning_rate", learning_rate)
    momentum, nesterov = check("momentum", momentum), check_flag("nesterov", nesterov)
    if is_static_zero(momentum):
        step: Any = chain(scale(learning_rate), has_velocity=False)
    else:
        looks_ahead = nesterov and not is_zero(momentum)
        step = _momentum.momentum(learning_rate, momentum, nesterov=looks_ahead)
    if weight_decay is not None:
        weight_decay = check_value("weight_decay", weight_decay)
        step = chain(step, *decoupled_decay(weight_decay, learning_rate))
    return by_value(step, "keras_sgd", learning_rate, momentum, nesterov, weight_decay)


def load_keras(
    opt_state: optax.OptState,
    variables: Iterable[Any] | Mapping[str, Any],
    *,
    names: Names,
    to_params: ToParams,
) -> Any:
    """Resumes a checkpoint of Keras's SGD: fills a state with its momentums and its iteration.

    Args:
      opt_state: the state to fill: what init returned, from `keras_sgd` or any transformation
        that contains a `momentum_jax.momentum`. It may be inside `optax.partition`. To fill a
        state of `trace`, pass the result to `trace_from_momentum`.
      variables: `optimizer.variables`, or a dict of arrays by their paths.
      names: the paths of the trained weights, `[w.path for w in model.trainable_variables]`, or
        a dict of the weights by path.
      to_params: the function that makes the params from the weights, a dict by path, as for
        `load_torch`.

    Returns:
      `opt_state` with velocity and count filled; each leaf keeps its dtype and sharding.

    Raises:
      ValueError: names, shapes or paths do not match (the message lists both sides); the
        variables are not of SGD, or have names of Keras 2; values are not finite; `opt_state`
        holds what `momentum_jax.frameworks` refuses to drop.

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
    checkpoint = _KerasCheckpoint(variables, names)
    state_type = _momentum.MomentumState
    velocities, _ = load_velocities(opt_state, state_type, checkpoint, to_params)
    return _carry.fill(opt_state, velocities, checkpoint.count, state_type)


def dump_keras(
    opt_state: optax.OptState,
    variables: Iterable[Any] | Mapping[str, Any],
    *,
    names: Names,
    to_params: ToParams,
) -> dict[str, np.ndarray]:
    """Exports the velocity as the momentums of Keras's SGD, and the count as its iteration.

    Args:
      opt_state: the state of `keras_sgd`, or of any transformation that contains a
        `momentum_jax.momentum`.
      variables: `optimizer.variables` of the optimizer that will continue, after
        `optimizer.build`, or a dict of arrays by their paths.
      names: as for `load_keras`.
      to_params: as for `load_keras`; it is applied backwards.

    Returns:
      The value of each variable by its path, with the learning rate unchanged. Assign them:
      `for v in optimizer.variables: v.assign(values[v.path])`.

    Raises:
      ValueError: names, shapes or paths do not match (the message lists both sides); values are
        too large for the dtype of Keras's variables; the state holds what
        `momentum_jax.frameworks` refuses to drop.
      TypeError: a velocity is complex, but Keras's variable is real.

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
    checkpoint = _KerasCheckpoint(variables, names)
    buffers = dump_velocities(opt_state, _momentum.MomentumState, checkpoint, to_params)
    if buffers.keys() != checkpoint.buffers.keys():
        raise ValueError(
            "the state and Keras's optimizer must have velocities of the same weights, but only "
            f"in the state: {join_names(buffers.keys() - checkpoint.buffers.keys())}; only in "
            f"Keras: {join_names(checkpoint.buffers.keys() - buffers.keys())}. Build Keras's "
            "optimizer first: optimizer.build(model.trainable_variables)."
        )
    values = dict(checkpoint.variables)
    for name, array in buffers.items():
        path = checkpoint.path_of[name]
        dtype = values[path].dtype
        if np.iscomplexobj(array) and not np.iscomplexobj(values[path]):
            raise TypeError(
                f"the velocity of {name} is {array.dtype}, but Keras's variable is {dtype}: a real "
                "and a complex array do not mix. Build the optimizer with complex weights."
            )
        with np.errstate(over="ignore"):  # Overflow is an error below.
            values[path] = array.astype(dtype)
        _carry.check_finite(
            {name: values[path]},
            f"after conversion to {dtype}, the momentum of",
            f"They are too large for {dtype}: build Keras's optimizer with a wider dtype.",
        )
    count = _counts.taken_count(opt_state)
    if count is not None:  # A state without momentum and schedules has no count.
        (path,) = (path for path in values if path.split("/")[-1] == "iteration")
        values[path] = np.asarray(count, values[path].dtype)
    return values


class _KerasCheckpoint(Checkpoint):
    """Keras's `optimizer.variables`, with the names of the weights that they belong to.

    Attributes:
      variables: the variables by path, as NumPy arrays.
      path_of: the path of each weight's momentum, by the weight's name.
      count: the number of steps taken.
    """

    weights_by_name = (
        "{w.path: w for w in model.trainable_variables}, and the variables of an optimizer that "
        "was built with them: optimizer.build(model.trainable_variables)"
    )

    def __init__(self, variables: Iterable[Any] | Mapping[str, Any], names: Names) -> None:
        super().__init__(names)
        if not isinstance(variables, Mapping):
            variables = _by_path(variables)
        for path in variables:
            if path.endswith(":0"):
                raise ValueError(_keras_2_message(path))
        self.variables = {
            path: to_host(getattr(variable, "value", variable))
            for path, variable in variables.items()
        }
        # Keras calls the momentum of "dense/kernel" "sgd/dense_kernel_momentum".
        wanted = {f"{name.replace('/', '_')}_momentum": name for name in self.names}
        if len(wanted) < len(self.names):
            raise ValueError(
                "Keras gives the momentums of two of these weights the same name: "
                f"{', '.join(self.names)}. Rename a layer."
            )
        self.path_of: dict[str, str] = {}
        counts, unknown = [], []
        for path, array in self.variables.items():
            last = path.split("/")[-1]
            if last in wanted:
                name = wanted[last]
                self.path_of[name] = path
                self.buffers[name] = to_numpy(f"the variable {path}", array)
            elif last == "iteration":
                counts.append(int(array))
            elif last != "learning_rate":
                unknown.append(path)
        # The variables of Lion have the same last names.
        unknown += [path for path in self.variables if path.startswith("lion/")]
        if unknown or len(counts) != 1:
            raise ValueError(
                f"unknown variables: {', '.join(unknown) or 'none'}; iterations: {len(counts)}. "
                f"Keras's SGD for the weights {', '.join(self.names)} has one iteration, one "
                "learning_rate and a momentum for each weight, and nothing else. Give as names the "
                "weights that the optimizer was built with. Averaged weights and accumulated "
                "gradients are not carried over. For a LossScaleOptimizer, give "
                "optimizer.inner_optimizer.variables."
            )
        self.count = counts[0]


def _by_path(variables):
    """Variables of Keras 3 by their paths."""
    each = list(variables) if isinstance(variables, Iterable) else [variables]
    for variable in each:
        if not hasattr(variable, "path"):
            if hasattr(variable, "name"):
                raise TypeError(_keras_2_message(variable.name))
            raise TypeError(
                f"variables has {type(variable).__name__}, but needs variables with a path. Give "
                "optimizer.variables (for a LossScaleOptimizer "
                "optimizer.inner_optimizer.variables), or a dict of arrays by their paths."
            )
    return {variable.path: variable for variable in each}


def _keras_2_message(name):
    return (
        f"the variable {name} has a name of Keras 2 (tf_keras), but must have a path of Keras 3. "
        "Give a dict of arrays by such paths, and a dict of the weights as names. (A legacy "
        'optimizer has no momentums: use optimizer.get_slot(w, "momentum") for each weight w.)\n'
        '    weights = {w.name.removesuffix(":0"): w for w in model.trainable_variables}\n'
        '    variables = {"sgd/iteration": optimizer.iterations.numpy()}\n'
        "    for name, m in zip(weights, optimizer.momentums):\n"
        "        variables[f\"sgd/{name.replace('/', '_')}_momentum\"] = m.numpy()\n"
    )
