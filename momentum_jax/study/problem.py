"""Defines what a study trains: initial weights, a loss, data, and how results are measured."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from momentum_jax.study._shapes import expect_number, expect_pair, expect_same_state, shapes
from momentum_jax.study._shapes import in_one_line as in_one_line
from momentum_jax.study._shapes import path_text as path_text

PyTree = Any

DEFAULTS = {"learning_rate", "rates", "steps", "batch_size", "init_scales"}

# Names of other variables, coordinates and questions of the results: no metric may use them.
RESERVED = {
    "loss", "kinetic_energy", "sharpness", "gradient_norm", "final_params", "params", "landscape",
    "tuning_loss", "initial_sharpness", "arm", "init_scale", "seed", "order_seed", "step", "probe",
    "tuning_seed", "param", "landscape_0", "landscape_1", "family", "effective_rate", "mu",
    "learning_rate", "nesterov", "batch_size", "restarts", "steps_taken", "std", "std of log loss",
    "10-90% range", "total std", "failures", "rescued", "lost", "lower loss",
}  # fmt: skip


def quarter_decades(first: float, count: int) -> tuple[float, ...]:
    """Returns learning rates in steps of 10^(1/4), rounded to three significant digits.

    Example:
      >>> quarter_decades(0.1, 5)
      (0.1, 0.178, 0.316, 0.562, 1.0)
    """
    return tuple(float(f"{first * 10 ** (k / 4):.3g}") for k in range(count))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number to report beside the loss, and whether larger values are better.

    Attributes:
      function: takes the arguments of the problem's `test_loss` and returns one number.
      larger_is_better: True for an accuracy, False for an error.

    Example:
      >>> Metric(lambda params: abs(params - 3.0), larger_is_better=False)(1.0)
      2.0
    """

    function: Callable[..., Any]
    larger_is_better: bool = True

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function."""
        return self.function(*arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A training problem: the functions and the data that training needs.

    Only `init` and `loss` are required. A problem without data is deterministic, and its
    functions take only the params. With data, the loss of a step is the loss of a batch of rows,
    and results are measured on all rows of `test_data`.

    Attributes:
      init: `init(key) -> params` draws the initial weights; `(params, state)` if stateful.
      loss: `loss(params, batch) -> scalar` is minimized; `loss(params)` without data;
        `loss(params, state, batch) -> (scalar, new_state)` if stateful.
      metrics: numbers to report beside the loss, by name: a `Metric`, or a function whose larger
        values are better. They take the arguments of `test_loss`.
      data: a tree of arrays with one training example per row; batches are drawn from it.
      test_data: the same, for the examples on which results are measured; None means `data`.
      validation_data: the same, for the examples on which learning rates are tuned; None means
        that tuning first holds out rows of `data`, see `with_validation`.
      test_loss: `test_loss(params, batch) -> scalar` is the loss to report. It takes the
        arguments of `loss`, so that BatchNorm can use its running statistics. None means the
        value of `loss`.
      stateful: whether the model has state that is not trained, such as BatchNorm statistics.
      scaled: `scaled(path, leaf) -> bool` chooses the params that the initial scale multiplies,
        by path ("hidden/kernel") and array. None chooses arrays with two or more axes, which are
        weights, not biases or normalization; or all params if no array has two axes.
      name: the name of the problem in the report.
      loss_cap: a final loss that is larger or not finite is set to this value; None means the
        run's own loss before training.
      solved: limits that a solved run must reach: {"loss": 0.3} means a final loss of at most
        0.3, {"accuracy": 0.5} a final accuracy of at least 0.5 (at most, for a metric whose
        smaller values are better). All limits must hold. Empty: every run that did not diverge
        is solved.
      curvature: the largest Hessian eigenvalue at the initial weights and at every point with a
        lower loss, if it is known. Pictures show the edge of stability computed from it.
      defaults: default settings of a study: `learning_rate` (the effective learning rate of the
        primary comparison), `rates` (the grid of effective learning rates), `steps`, `batch_size`
        and `init_scales`.
      source: where `find` found the problem: a name, or "/path/file.py:object".

    Raises:
      ValueError: a field that would have no effect, a metric with a reserved name, or data whose
        arrays have different lengths.

    Example:
      >>> import jax
      >>> bowl = Problem(lambda key: jax.random.normal(key, (3,)), lambda w: w @ w / 2)
      >>> print(bowl.loss(bowl.init(jax.random.key(0))) > 0)
      True
    """

    init: Callable[[PRNGKeyArray], PyTree]
    loss: Callable[..., Any]
    metrics: Mapping[str, Callable[..., Any] | Metric] = dataclasses.field(default_factory=dict)
    data: PyTree = None
    _: dataclasses.KW_ONLY
    test_data: PyTree = None
    validation_data: PyTree = None
    test_loss: Callable[..., Any] | None = None
    stateful: bool = False
    scaled: Callable[[str, Array], bool] | None = None
    name: str = "problem"
    loss_cap: float | None = None
    solved: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curvature: float | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str | None = None

    def __post_init__(self):
        """Refuses fields that would have no effect or be misread."""
        metrics = {n: m if isinstance(m, Metric) else Metric(m) for n, m in self.metrics.items()}
        object.__setattr__(self, "metrics", metrics)
        if taken := sorted(RESERVED & set(metrics)):
            raise ValueError(
                f"the name of the metric {taken[0]!r} is reserved for the results: rename the "
                "metric."
            )
        if unknown := sorted(set(self.solved) - {"loss", *metrics}):
            raise ValueError(
                f"solved names {unknown}, but must name 'loss' or a metric: "
                + (f"the metrics are {sorted(metrics)}." if metrics else "there is no metric.")
            )
        if self.curvature is not None and not 0 < self.curvature < np.inf:
            raise ValueError(
                f"curvature={self.curvature} must be above 0 and finite. Give None if it is "
                "unknown."
            )
        if unknown := sorted(set(self.defaults) - DEFAULTS):
            raise ValueError(f"defaults has {unknown}, but may only have {sorted(DEFAULTS)}.")
        for field in "data", "test_data", "validation_data":
            rows = getattr(self, field)
            if rows is None:
                continue
            if self.data is None:
                raise ValueError(
                    f"{field} is given without data to train on: give data too, or no {field}."
                )
            lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(rows)}
            if len(lengths) != 1 or lengths & {(), (0,)}:
                raise ValueError(
                    f"{field} must hold arrays of equal length, at least 1, with one example per "
                    f"row, but their lengths are {sorted(sum(lengths, ())) or 'none'}."
                )
        if self.data is None and "batch_size" in self.defaults:
            raise ValueError("defaults has batch_size, but there is no data: leave it out.")

    @property
    def examples(self) -> int:
        """The number of training examples; 0 without data.

        Example:
          >>> Problem(lambda key: 0.0, lambda w, x: w, data=np.zeros((7, 2))).examples
          7
        """
        return 0 if self.data is None else len(jax.tree.leaves(self.data)[0])

    def test_examples(self) -> PyTree:
        """Returns the rows on which results are measured; None without data.

        Example:
          >>> Problem(lambda key: 0.0, lambda w, x: w, data=np.arange(2)).test_examples()
          array([0, 1])
        """
        return self.data if self.test_data is None else self.test_data

    def start(self, key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        """Draws the initial weights, and the initial state or None.

        Example:
          >>> Problem(lambda key: 1.0, lambda w: w).start(jax.random.key(0))
          (1.0, None)
        """
        return self.init(key) if self.stateful else (self.init(key), None)

    def scale(self, params: PyTree, factor: Any) -> PyTree:
        """Multiplies the params that `scaled` chooses by a factor.

        Args:
          params: the params.
          factor: a number; it may be traced.

        Returns:
          The params, with the same dtypes.

        Raises:
          ValueError: `scaled` chooses no array.

        Example:
          >>> layer = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
          >>> scaled = Problem(lambda key: layer, lambda w: 0.0).scale(layer, 3)
          >>> print(scaled["kernel"], scaled["bias"])
          [[3. 3.]] [1. 1.]
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        if self.scaled is None:
            chosen = [leaf.ndim >= 2 for _, leaf in leaves]
            chosen = chosen if any(chosen) else [True] * len(chosen)
        else:
            chosen = [bool(self.scaled(path_text(path), leaf)) for path, leaf in leaves]
        if not any(chosen):
            paths = ", ".join(path_text(path) for path, _ in leaves)
            raise ValueError(
                f"scaled of {self.name} is false for all params: it must be true for at least one "
                f"of {paths}."
            )

        def times(leaf):
            wide = jnp.promote_types(leaf.dtype, jnp.float32)
            return (leaf.astype(wide) * factor).astype(leaf.dtype)

        return jax.tree.unflatten(
            structure,
            [times(leaf) if c else leaf for c, (_, leaf) in zip(chosen, leaves, strict=True)],
        )

    def value_and_state(self, params: PyTree, state: PyTree, batch: PyTree) -> tuple[Any, PyTree]:
        """Returns the training loss and the next state.

        Has the form that `jax.value_and_grad(..., has_aux=True)` expects. The state is None if
        the problem is not stateful; the batch is None without data.

        Example:
          >>> Problem(lambda key: 1.0, lambda w: 2 * w).value_and_state(3.0, None, None)
          (6.0, None)
        """
        found = self.loss(*self._arguments(params, state, batch))
        return found if self.stateful else (found, None)

    def evaluate(self, params: PyTree, state: PyTree, examples: PyTree) -> dict[str, Any]:
        """Returns the loss to report, as "loss", and each metric by its name.

        The state is None if the problem is not stateful; the examples are None without data.

        Example:
          >>> Problem(lambda key: 1.0, lambda w: w**2, {"w": abs}).evaluate(-3, None, None)
          {'loss': 9, 'w': 3}
        """
        arguments = self._arguments(params, state, examples)
        if self.test_loss is None:
            loss, _ = self.value_and_state(params, state, examples)
        else:
            loss = self.test_loss(*arguments)
        return {"loss": loss} | {name: metric(*arguments) for name, metric in self.metrics.items()}

    def with_validation(self, fraction: float = 1 / 6) -> "Problem":
        """Returns the problem with a fraction of its training rows held out for validation.

        Every call holds out the same rows. A problem without data, or with validation data, is
        returned unchanged.

        Args:
          fraction: the fraction of the training rows to hold out.

        Raises:
          ValueError: a fraction that holds out no row, or leaves none to train on.

        Example:
          >>> all_rows = Problem(lambda key: 0.0, lambda w, x: w, data=np.arange(6))
          >>> all_rows.with_validation().examples
          5
        """
        if self.data is None or self.validation_data is not None:
            return self
        held_out = round(fraction * self.examples)
        if not 0 < held_out < self.examples:
            raise ValueError(
                f"fraction={fraction} holds out {held_out} of {self.examples} examples: it must "
                "hold out at least 1 and leave at least 1. Give another fraction, or "
                "validation_data."
            )
        rows = np.random.default_rng(0).permutation(self.examples)

        def take(chosen):
            return jax.tree.map(lambda leaf: leaf[np.sort(chosen)], self.data)

        data, validation_data = take(rows[held_out:]), take(rows[:held_out])
        return dataclasses.replace(self, data=data, validation_data=validation_data)

    def for_tuning(self) -> "Problem":
        """Returns the same problem, measured on its validation data.

        A problem without data is returned unchanged.

        Raises:
          ValueError: a problem with data but without validation data.

        Example:
          >>> all_rows = Problem(lambda key: 0.0, lambda w, x: w, data=np.arange(6))
          >>> len(all_rows.with_validation().for_tuning().test_examples())
          1
        """
        if self.data is None:
            return self
        if self.validation_data is None:
            raise ValueError(
                f"the problem {self.name} has no validation_data, but tuning needs rows that are "
                "used neither for training nor for testing: give some, or use with_validation()."
            )
        return dataclasses.replace(self, test_data=self.validation_data, validation_data=None)

    def _arguments(self, params, state, batch):
        # Rebuilt because NNX refuses to update variables that were made in another trace.
        state = jax.tree.map(lambda leaf: leaf, state)
        with_state = (params, state) if self.stateful else (params,)
        return with_state if self.data is None else (*with_state, batch)


def check(problem: Problem) -> None:
    """Checks the functions of a problem on shapes, before any training.

    Raises:
      ValueError: a function that fails; params that are empty or not floats; a loss or metric
        that is not one number; a new state whose structure, shapes or dtypes differ from the old
        state. The message is one line.

    Example:
      >>> import jax
      >>> check(Problem(lambda key: jax.random.normal(key, (3,)), lambda w: w**2, name="bowl"))
      Traceback (most recent call last):
      ...
      ValueError: loss(params) of bowl must return one float, but returns shape (3,) of float32.
    """
    call = f"init(key) of {problem.name}"
    made = shapes(call, problem.init, jax.random.key(0))
    params, state = expect_pair(call, "params, state", made) if problem.stateful else (made, None)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"{call} must return params, but returns {params}.")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{call} must return floats, but returns {leaf.dtype} at {path_text(path)}: "
                "numbers that are not trained belong in the loss or the state."
            )
    shapes(f"scaled(path, leaf) of {problem.name}", lambda w: problem.scale(w, 1.0), params)

    names = ["params"] + ["state"] * problem.stateful + ["batch"] * (problem.data is not None)
    signature = f"({', '.join(names)}) of {problem.name}"
    with_state = (params, state) if problem.stateful else (params,)
    all_rows = (problem.data, problem.test_data, problem.validation_data)
    for rows in [(given,) for given in all_rows if given is not None] or [()]:
        arguments, call = (*with_state, *rows), f"loss{signature}"
        found = shapes(call, problem.loss, *arguments)
        if problem.stateful:
            found, new_state = expect_pair(call, "loss, new_state", found)
            expect_same_state(call, state, new_state)
        expect_number(call, found, "one float", jnp.floating)
        if problem.test_loss is not None:
            found = shapes(f"test_{call}", problem.test_loss, *arguments)
            expect_number(f"test_{call}", found, "one float", jnp.floating)
        for name, metric in problem.metrics.items():
            found = shapes(f"{name}{signature}", metric, *arguments)
            expect_number(f"{name}{signature}", found, "one number", np.generic)
