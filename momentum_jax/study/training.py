"""Compiles programs that train many runs at once: vmap over runs, scan over steps, sharded."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import momentum_jax as mj
from momentum_jax.diagnostics import curvature
from momentum_jax.study._physics import kinetic_energy
from momentum_jax.study.arms import Arm
from momentum_jax.study.problem import Problem

# What a run can record besides loss and metrics: the first two at each evaluation, the last at
# the end.
RECORDABLE = ("gradient_norm", "sharpness", "final_params")

# Sharpness and gradient norm are measured on the loss over the first rows of the training data.
MEASURED_ROWS = 512
LANCZOS_STEPS = 32

# The largest temporary memory of a compiled program on one device, in bytes.
MEMORY = 2**31


@dataclasses.dataclass(frozen=True)
class Run:
    """The seeds, initial scale and traced settings of one run."""

    seed: int
    order_seed: int
    init_scale: float
    settings: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Timetable:
    """When a run is evaluated: `evaluations` times, every `interval` steps."""

    evaluations: int
    interval: int

    @property
    def steps(self) -> int:
        """The number of steps of a run.

        Example:
          >>> Timetable(20, 10).steps
          200
        """
        return self.evaluations * self.interval


def timetable(problem: Problem, arms: Sequence[Arm], steps: int, evaluations: int | None):
    """Returns the timetable of each arm. All arms have equally many evaluations.

    The number of evaluations is rounded up to a multiple of the restarts of every arm. The steps
    of each arm are rounded up to a multiple of the evaluations. The last step is evaluated.

    Args:
      problem: what is trained.
      arms: all arms.
      steps: steps per run of arms without their own number.
      evaluations: number of evaluations; None means 20, or 200 without data, but at most the
        steps of the shortest arm.

    Example:
      >>> from momentum_jax.study.arms import baseline
      >>> from momentum_jax.study.problems import digits
      >>> timetable(digits(), [baseline()], 50, None)[0].steps
      60
    """
    wanted = evaluations or (200 if problem.data is None else 20)
    fewest = min(arm.steps or steps for arm in arms)
    restarts = math.lcm(*(arm.restarts for arm in arms))  # Each restart ends with an evaluation.
    evaluations = restarts * -(-min(fewest, wanted) // restarts)
    return [Timetable(evaluations, -(-(arm.steps or steps) // evaluations)) for arm in arms]


def keys(seed: Any, order_seed: Any, restart: Any):
    """Returns the random keys of a run: for initial weights, data order and noise.

    Example:
      >>> weights, order, noise = keys(0, 0, 0)
      >>> weights.shape
      ()
    """
    first = jax.random.split(jax.random.fold_in(jax.random.key(seed), restart), 3)
    second = jax.random.split(jax.random.fold_in(jax.random.key(order_seed), restart), 3)
    return first[0], second[1], second[2]


class Program:
    """One compiled program for runs that differ only in seeds, scale and traced settings.

    Args:
      problem: what is trained.
      arm: any of the arms that share the program.
      static: its static settings.
      times: when runs are evaluated.
      record: names from `RECORDABLE`.
      runs: the total number of runs that the program will train.
    """

    def __init__(
        self,
        problem: Problem,
        arm: Arm,
        static: Mapping[str, Any],
        times: Timetable,
        record: Sequence[str],
        runs: int,
    ) -> None:
        """Prepares the program, without compiling it."""
        self.restarts = arm.restarts
        self.traced = [name for name in arm.settings if name not in arm.static]
        # A separate program, because random numbers take longer to compile than the training.
        self._start = jax.jit(lambda seed, restart: problem.start(keys(seed, seed, restart)[0]))
        self.one_run = _one_run(problem, arm, static, times, record)
        self._examples = (problem.data, problem.test_examples())
        self.runs_at_once = _runs_at_once(problem, runs)
        self._compiled = None

    def lowered_text(self) -> str:
        """The program as text, independent of the number of runs and devices."""
        inputs = jax.tree.map(lambda x: x[0], self._inputs([Run(0, 0, 1.0, self._some())]))
        lowered = jax.jit(self.one_run).lower(self._examples, *inputs)
        return lowered.as_text() + self._start.lower(0, 0).as_text()

    def train(self, runs: Sequence[Run]) -> dict[str, np.ndarray]:
        """Trains runs, and returns arrays with one row per run."""
        compiled = self._compile()
        if len(runs) > self.runs_at_once:
            halves = [self.train(runs[: self.runs_at_once]), self.train(runs[self.runs_at_once :])]
            return {name: np.concatenate([h[name] for h in halves]) for name in halves[0]}
        # Padded, so that every chunk has the compiled shape.
        padded = [*runs, *[runs[-1]] * (self.runs_at_once - len(runs))]
        ended = compiled(self._examples, *self._inputs(padded))
        return {name: np.asarray(values)[: len(runs)] for name, values in ended.items()}

    def _compile(self):
        """Compiles for as many runs at once as fit into memory."""
        while self._compiled is None:
            devices = jax.local_devices()[: math.gcd(self.runs_at_once, jax.local_device_count())]
            mesh = jax.sharding.Mesh(np.array(devices), ("runs",))
            by_run, whole = (NamedSharding(mesh, PartitionSpec(*n)) for n in (["runs"], []))
            train = jax.jit(
                jax.vmap(self.one_run, in_axes=(None, 0, 0, 0, 0)),
                in_shardings=(whole, *[by_run] * 4),
                out_shardings=by_run,
            )
            some = [Run(0, 0, 1.0, self._some())] * self.runs_at_once
            compiled = train.lower(self._examples, *self._inputs(some)).compile()
            memory = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
            if memory > MEMORY and self.runs_at_once > 8:
                self.runs_at_once = max(8, 8 * (self.runs_at_once // 16))
                continue
            self._compiled = train
        return self._compiled

    def _some(self):
        return dict.fromkeys(self.traced, 0.5)

    def _inputs(self, runs):
        starts = {
            seed: stacked(*(self._start(seed, restart) for restart in range(self.restarts)))
            for seed in {run.seed for run in runs}
        }
        return (
            np.array([run.order_seed for run in runs], np.uint32),
            stacked(*(starts[run.seed] for run in runs)),
            np.array([run.init_scale for run in runs], np.float32),
            {n: np.array([run.settings[n] for run in runs], np.float32) for n in self.traced},
        )


def stacked(*trees: Any) -> Any:
    """Stacks the arrays of several trees along a new first axis.

    Example:
      >>> print(stacked({"a": 1.0}, {"a": 2.0}))
      {'a': array([1., 2.])}
    """
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(jax.device_get, trees))


def _runs_at_once(problem, runs):
    """Runs per chunk: few enough to show progress; a multiple of 8, to split over devices."""
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(_starts(problem))))
    most = max(8, min(256, 2**27 // (4 * size)))
    chunks = -(-runs // most)
    return 8 * -(-runs // (8 * chunks))


def _starts(problem):
    return lambda: problem.start(jax.random.key(0))[0]


def _one_run(problem, arm, static, times, record):
    """Makes the function (examples, order_seed, starts, init_scale, settings) -> results of a run.

    `examples` are the training rows and the test rows. `starts` are the initial weights and model
    states of all restarts.
    """
    stretches = times.evaluations // arm.restarts
    few_params = sum(x.size for x in jax.tree.leaves(jax.eval_shape(_starts(problem)))) <= 2

    def evaluated(params, state, update, examples, settings):
        data, test = examples
        squared = jnp.asarray(optax.tree.norm(update, squared=True))
        found = dict(problem.evaluate(params, state, test))
        rate = {**static, **settings}.get("learning_rate", jnp.nan)
        # A static learning rate may be a schedule, for which the energy is left undefined.
        found["kinetic_energy"] = kinetic_energy(squared, jnp.nan if callable(rate) else rate)
        if few_params:
            found["params"] = jax.flatten_util.ravel_pytree(params)[0]
        rows = jax.tree.map(lambda x: x[:MEASURED_ROWS], data)

        def loss(params):
            return problem.value_and_state(params, state, rows)[0]

        if "gradient_norm" in record:
            found["gradient_norm"] = optax.tree.norm(jax.grad(loss)(params))
        if "sharpness" in record:
            found["sharpness"] = sharpness(loss, params)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)

    def one_start(examples, order_key, noise_key, start, init_scale, settings):
        data, _ = examples
        params, state = start
        params = problem.scale(params, init_scale)
        tx = optax.with_extra_args_support(arm.make_transform(**settings, **static))
        order = jnp.arange(problem.examples)

        def step(carry, count):
            params, state, _, tx_state, order = carry
            batch, order = next_batch(data, arm.batch_size, order, order_key, count)
            (value, state), grads = jax.value_and_grad(problem.value_and_state, has_aux=True)(
                params, state, batch
            )
            key = jax.random.fold_in(noise_key, count)
            updates, tx_state = tx.update(grads, tx_state, params, value=value, key=key)
            updates = jax.tree.map(lambda u, w: u.astype(w.dtype), updates, params)
            return (mj.apply_updates(params, updates), state, updates, tx_state, order), None

        def stretch(carry, counts):
            carry, _ = jax.lax.scan(step, carry, counts)
            return carry, evaluated(*carry[:3], examples, settings)

        still = jax.tree.map(jnp.zeros_like, params)
        first = evaluated(params, state, still, examples, settings)
        counts = jnp.arange(stretches * times.interval).reshape(stretches, times.interval)
        carry = (params, state, still, tx.init(params), order)
        (params, state, *_), later = jax.lax.scan(stretch, carry, counts)
        curve = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)
        final = jax.flatten_util.ravel_pytree(params)[0].astype(jnp.float32)
        ended = {"final_params": final} if "final_params" in record else {}
        # The restart with the lowest loss on all training data counts.
        one = arm.restarts == 1
        return curve, ended, 0.0 if one else problem.value_and_state(params, state, data)[0]

    def train(examples, order_seed, starts, init_scale, settings):
        def one(each):
            restart, start = each
            _, order_key, noise_key = keys(order_seed, order_seed, restart)
            return one_start(examples, order_key, noise_key, start, init_scale, settings)

        curves, ended, losses = jax.lax.map(one, (jnp.arange(arm.restarts), starts))
        best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))

        def joined(curves):
            """Joins the curves of all restarts; the last value is the one of the best restart."""
            return jnp.concatenate([curves[0], *curves[1:, 1:]]).at[-1].set(curves[best, -1])

        return jax.tree.map(joined, curves) | jax.tree.map(lambda x: x[best], ended)

    return train


def next_batch(data: Any, size: int, order: jax.Array, key: jax.Array, count: Any):
    """Returns the batch of a step, and the order of all rows.

    Args:
      data: the training rows; None without data.
      size: rows per batch.
      order: the order of all rows in the last epoch.
      key: the random key of the data order.
      count: the number of the step, from 0.

    Returns:
      The batch (None without data), and the order, which is drawn again at the start of each
      epoch.

    Example:
      >>> batch, _ = next_batch(np.arange(6), 2, jnp.arange(6), jax.random.key(0), 0)
      >>> batch.shape
      (2,)
    """
    if data is None:
        return None, order
    epoch = len(order) // size
    # All runs have the same count, so this stays a branch under vmap.
    order = jax.lax.cond(
        count % epoch == 0,
        lambda key, order: jax.random.permutation(key, len(order)),
        lambda key, order: order,
        jax.random.fold_in(key, count // epoch),
        order,
    )
    rows = jax.lax.dynamic_slice_in_dim(order, count % epoch * size, size)
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], data), order


def sharpness(loss: Any, params: Any) -> jax.Array:
    """Computes the largest eigenvalue of the Hessian, with `momentum_jax.diagnostics.curvature`.

    Args:
      loss: `loss(params) -> scalar`.
      params: the params at which the Hessian is taken.

    Returns:
      The eigenvalue, which may be negative.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{sharpness(lambda w: 2 * w[0] ** 2 - 9 * w[1] ** 2, jnp.ones(2)):.3f}")
      4.000
    """
    return curvature(loss, params, steps=LANCZOS_STEPS).largest
