"""Checks before training that everything can be trained and compared."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_jax.study.arms import Arm
from momentum_jax.study.contrasts import Contrast, Primary
from momentum_jax.study.problem import Problem, check, in_one_line
from momentum_jax.study.training import RECORDABLE, keys


def check_runs(
    problem: Problem,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    order_seeds: Sequence[int] | None,
    init_scales: Sequence[float],
    counts: dict[str, int | None],
    record: Sequence[str],
) -> None:
    """Checks the arguments of `run`, one by one and together.

    Args:
      problem: as for `run`.
      arms: as for `run`.
      seeds: as for `run`.
      order_seeds: as for `run`.
      init_scales: as for `run`.
      counts: numbers that must be at least 1, by name; None is allowed.
      record: as for `run`.

    Raises:
      ValueError: see `run`.

    Example:
      >>> from momentum_jax.study.problems import digits
      >>> check_runs(digits(), [], [0], None, [1.0], {}, ())
      Traceback (most recent call last):
      ...
      ValueError: arms=[] must be at least one arm, and their names must differ.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"arms={names} must be at least one arm, and their names must differ.")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")
    several = {"seeds": seeds, "init_scales": init_scales}
    for name, values in (
        several if order_seeds is None else several | {"order_seeds": order_seeds}
    ).items():
        # A repeated run would count as two runs.
        if np.ndim(values) != 1 or not 0 < len(values) == len(set(values)):
            hint = f", such as range({values})." if np.ndim(values) == 0 else "."
            raise ValueError(
                f"{name}={values} must be a sequence of one or more different numbers{hint}"
            )
        if name == "init_scales" and not all(0 < abs(value) < math.inf for value in values):
            raise ValueError(f"init_scales={values} must be finite and not 0.")
        if "seeds" in name and not all(isinstance(v, (int, np.integer)) for v in values):
            raise ValueError(f"{name}={values} must be whole numbers.")
        if "seeds" in name and (min(values) < 0 or max(values) >= 2**32):
            raise ValueError(f"{name}={values} must be at least 0 and below 2^32.")
    if unknown := set(record) - set(RECORDABLE):
        raise ValueError(
            f"record={sorted(unknown)} is unknown: it may contain {', '.join(RECORDABLE)}."
        )
    for arm in arms:
        for name, value in arm.settings.items():
            per_scale = isinstance(value, tuple) and name not in arm.static
            if per_scale and len(value) != len(init_scales):
                raise ValueError(
                    f"{name}={value} of the arm {arm.name!r} must be one number, or a sequence "
                    f"with one number for each of the {len(init_scales)} initial scales."
                )
        if problem.data is not None and arm.batch_size > problem.examples:
            raise ValueError(
                f"batch_size={arm.batch_size} of the arm {arm.name!r} must be at most the "
                f"number of training examples, {problem.examples}."
            )
    check(problem)
    for arm in arms:
        _check_arm(problem, arm)


def _check_arm(problem, arm):
    """Checks the transformation of an arm on shapes."""
    static = {name: arm.settings[name] for name in arm.static}

    def one_step(params, key, settings):
        tx = optax.with_extra_args_support(arm.make_transform(**settings, **static))
        return tx.update(params, tx.init(params), params, value=jnp.ones(()), key=key)

    traced = {name: jnp.ones(()) for name in arm.settings if name not in static}
    try:
        jax.eval_shape(one_step, _abstract(problem), jax.random.key(0), traced)
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"make_transform of the arm {arm.name!r} branches on the value of a traced setting "
            f"({type(error).__name__}): give static=(...) with the names of those settings, among "
            f"{sorted(traced)}."
        ) from error
    except Exception as error:
        raise ValueError(
            f"the transformation of the arm {arm.name!r} fails: {in_one_line(error)}"
        ) from error


def _abstract(problem):
    return jax.eval_shape(problem.start, jax.random.key(0))[0]


def check_contrasts(
    arms: Sequence[Arm], contrasts: Sequence[Contrast], primary: Primary | None
) -> None:
    """Checks that every arm in a comparison is one of the arms to train.

    Raises:
      ValueError: a comparison names an unknown arm; for "tuned", an unknown family.

    Example:
      >>> from momentum_jax.study.arms import baseline
      >>> check_contrasts([baseline().at(0.1)], [Contrast("arms", "mu 0", ("b",))], None)
      Traceback (most recent call last):
      ...
      ValueError: the contrast "arms" names ['b', 'mu 0'], but the arms are ['mu 0 at 0.1'].
    """
    names, families = ({getattr(arm, field) for arm in arms} for field in ("name", "family"))
    for contrast in contrasts:
        known = families if contrast.kind == "tuned" else names
        if unknown := {contrast.baseline, *contrast.arms} - known:
            raise ValueError(
                f'the contrast "{contrast.kind}" names {sorted(unknown)}, but the '
                f"{'families' if contrast.kind == 'tuned' else 'arms'} are {sorted(known)}."
            )
    if primary is not None and (unknown := {primary.arm, primary.baseline} - names):
        raise ValueError(
            f"the primary comparison names {sorted(unknown)}, but the arms are {sorted(names)}."
        )


def check_randomness(
    problem: Problem,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    order_seeds: Sequence[int] | None,
) -> list[str]:
    """Checks that runs of one arm differ, and returns what the report must say about it.

    Returns:
      Sentences for the report.

    Raises:
      ValueError: the seeds, or the order seeds, change nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> fixed = Problem(lambda key: jnp.ones(2), lambda w: w @ w)
      >>> check_randomness(fixed, [], [0, 1], None)
      Traceback (most recent call last):
      ...
      ValueError: init(key) of problem returns the same weights for different keys, and there is \
no data order to vary, so all runs of an arm would be equal: draw the weights from the key.
    """
    shuffled = problem.data is not None and any(a.batch_size < problem.examples for a in arms)
    orders_vary = shuffled and (order_seeds is None or len(order_seeds) > 1)
    if len(seeds) > 1:
        first, *others = (
            jax.tree.leaves(jax.device_get(problem.start(keys(seed, 0, 0)[0])[0]))
            for seed in seeds[:8]
        )
        if all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
            same = f"init(key) of {problem.name} returns the same weights for different keys"
            if not orders_vary:
                raise ValueError(
                    f"{same}, and there is no data order to vary, so all runs of an arm would be "
                    "equal: draw the weights from the key."
                )
            return [f"{same}: only the data order varies in this study."]
    if order_seeds is not None and len(order_seeds) > 1 and not shuffled:
        raise ValueError(
            f"order_seeds={list(order_seeds)} vary the data order, but {problem.name} has no data "
            "order: give order_seeds=None, or batches smaller than the data."
        )
    return []
