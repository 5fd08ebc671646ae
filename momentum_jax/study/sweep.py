"""Trains all runs of all arms, in pairs with the same initial weights and data order."""

import datetime
import functools
import importlib.metadata
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import xarray as xr
from tqdm import tqdm

from momentum_jax.study import storing
from momentum_jax.study.arms import Arm, effective_rate, nesterov
from momentum_jax.study.checking import check_contrasts, check_randomness, check_runs
from momentum_jax.study.contrasts import Contrast, Primary, as_json
from momentum_jax.study.problem import Problem
from momentum_jax.study.training import Program, Run, timetable

PACKAGES = ("momentum_jax", "jax", "jaxlib", "optax", "flax", "scikit-learn", "scipy")


def run(
    problem: Problem,
    arms: Sequence[Arm],
    seeds: Sequence[int] = range(100),
    order_seeds: Sequence[int] | None = None,
    *,
    init_scales: Sequence[float] = (1.0,),
    steps: int = 200,
    evaluations: int | None = None,
    contrasts: Sequence[Contrast] | None = None,
    primary: Primary | None = None,
    record: Sequence[str] = (),
    folder: str | Path | None = None,
    progress: str | None = None,
) -> xr.Dataset:
    """Trains every arm from the same initial weights and in the same data orders.

    A seed fixes the initial weights. An order seed fixes the data order (and the random key of
    each step). Runs that differ only in the arm are a pair. `order_seeds` decides what varies:

    | order_seeds | what is trained |
    | --- | --- |
    | None | each seed is also its order seed: weights and data order vary together |
    | range(16) | each seed with each order seed (crossed): weights and order can be separated |
    | [0] | one data order: only the weights vary; with seeds=[0], only the order varies |

    With several hosts, after `jax.distributed.initialize`, each process trains a part of the
    chunks on its own devices. All processes must then be able to access `folder`.

    Args:
      problem: what to train.
      arms: how to train it; their names must differ.
      seeds: different integers, at least 0 and below 2^32.
      order_seeds: the same for the data order, or None.
      init_scales: factors that multiply the initial weights (see `Problem.scaled`).
      steps: steps per run of arms without their own number; rounded up to a multiple of
        `evaluations`.
      evaluations: at how many equally spaced steps loss and metrics are measured; the last step
        is one of them. By default 20, or up to 200 without data. Rounded up to a multiple of the
        `restarts` of each arm, so that all arms use equally many gradients.
      contrasts: which arms are compared; by default the first arm with all others.
      primary: the comparison that decides the verdict; by default, if `contrasts` is not given
        either, the second arm with the first.
      record: any of "gradient_norm", "sharpness" and "final_params". Sharpness is the largest
        Hessian eigenvalue. Gradient norm and sharpness are measured at each evaluation, on the
        training loss over the first 512 rows.
      folder: where finished runs are stored. Runs that it already has are not trained again, so
        seeds, arms and scales can be added.
      progress: label of the progress bar; None shows no bar.

    Returns:
      A dataset with the dimensions (arm, init_scale, seed, step), and order_seed unless it is
      None. Step 0 is before training. Variables: `loss` and each metric on the test data, not
      finite if a run diverged; `kinetic_energy` of the last update, |w' - w|^2 / (2
      learning_rate); what `record` lists; and, for problems of two params, `params` and the
      `landscape` around them. Each setting of the arms is a coordinate.

    Raises:
      ValueError: no arm; two arms with the same name; a batch larger than the training data; a
        contrast with unknown arms; a setting with a wrong number of values; runs without
        randomness; a folder with runs of another problem, or in use by another process; a
        function of the problem or of an arm that fails (see `problem.check`).
      OSError: the folder cannot be written to.

    Example:
      >>> import momentum_jax as mj
      >>> from momentum_jax.study.problems import digits
      >>> arms = [Arm(f"mu {mu}", mj.momentum, learning_rate=0.02, mu=mu) for mu in (0, 0.9)]
      >>> results = run(digits(), arms, seeds=[0, 1], order_seeds=[0, 1], steps=40)
      >>> dict(results.loss.isel(step=-1).sizes)
      {'arm': 2, 'init_scale': 1, 'seed': 2, 'order_seed': 2}
    """
    arms = list(arms)
    counts = {"steps": steps, "evaluations": evaluations}
    check_runs(problem, arms, seeds, order_seeds, init_scales, counts, record)
    if contrasts is None:
        others = tuple(arm.name for arm in arms[1:])
        contrasts = [Contrast("arms", arms[0].name, others)] if others else []
        if primary is None and others:
            primary = Primary(others[0], arms[0].name)
    check_contrasts(arms, contrasts, primary)
    notes = check_randomness(problem, arms, seeds, order_seeds)
    times = timetable(problem, arms, steps, evaluations)
    started = time.monotonic()
    folder = None if folder is None else Path(folder)
    with storing.locked(folder):
        store = storing.Store(folder, {} if folder is None else _fingerprint(problem))
        programs, places = _plan(
            problem, arms, times, seeds, order_seeds, init_scales, record, folder is not None
        )
        _train(programs, store, progress)
    shape = tuple(
        map(len, (arms, init_scales, seeds, *([] if order_seeds is None else [order_seeds])))
    )
    values: dict[str, np.ndarray] = {}
    for place, key in places.items():
        for name, ended in store[key].items():
            whole = values.setdefault(name, np.empty((*shape, *ended.shape), np.float32))
            whole[place] = ended
    runs = ("arm", "init_scale", "seed", *([] if order_seeds is None else ["order_seed"]))
    axes = {"params": ("step", "param"), "final_params": ("all_params",)}
    results = xr.Dataset(
        {name: ((*runs, *axes.get(name, ("step",))), whole) for name, whole in values.items()},
        coords={
            **_coordinates(problem, arms, times),
            "init_scale": np.array(init_scales, float),
            "seed": list(seeds),
            **({} if order_seeds is None else {"order_seed": list(order_seeds)}),
            "step": _study_steps(arms, times, steps),
        },
        attrs={
            "problem": problem.name,
            "loss_cap": math.nan if problem.loss_cap is None else float(problem.loss_cap),
            "solved": json.dumps(dict(problem.solved)),
            "metrics": json.dumps(
                [
                    {"name": name, "larger_is_better": getattr(metric, "larger_is_better", True)}
                    for name, metric in problem.metrics.items()
                ]
            ),
            "contrasts": json.dumps([as_json(contrast) for contrast in contrasts]),
            "primary": json.dumps(None if primary is None else as_json(primary)),
            "design": _design(seeds, order_seeds),
            "programs": len(programs),
            "provenance": json.dumps(
                {
                    "date": str(datetime.date.today()),
                    "seconds": round(time.monotonic() - started, 1),
                    "seeds": _range(seeds),
                    "order_seeds": None if order_seeds is None else _range(order_seeds),
                    "device": describe_devices(),
                    "versions": _versions(),
                }
            ),
        },
    )
    notes += _not_finite(problem, results)
    results.attrs["notes"] = json.dumps(notes)
    return _with_landscape(problem, results) if "params" in results else results


def _plan(problem, arms, times, seeds, order_seeds, init_scales, record, stored):
    """The programs, each with its runs by key; and the key of each index in the results."""
    families: dict[Any, list[int]] = {}
    for i, arm in enumerate(arms):
        static = tuple((name, arm.settings[name]) for name in arm.static)
        batch_size = None if problem.data is None else arm.batch_size
        shared = arm.make_transform, frozenset(arm.settings), static, batch_size, arm.restarts
        families.setdefault((*shared, times[i]), []).append(i)
    orders = [None] if order_seeds is None else order_seeds
    programs, places = [], {}
    for members in families.values():
        arm = arms[members[0]]
        static = {name: arm.settings[name] for name in arm.static}
        axes = (list(enumerate(axis)) for axis in (init_scales, seeds, orders))
        grid: Any = list(itertools.product(members, *axes))
        program = Program(problem, arm, static, times[members[0]], record, len(grid))
        base = storing.digest(program.lowered_text()) if stored else str(len(programs))
        runs = {}
        for i, (j, scale), (k, seed), (m, order_seed) in grid:
            settings = {n: v for n, v in arms[i].settings_at(j).items() if n not in arm.static}
            order = seed if order_seed is None else order_seed
            one = Run(int(seed), int(order), float(scale), settings)
            key = storing.digest(base, repr((*one.__dict__.values(),)))
            runs[key] = one
            places[(i, j, k) if order_seed is None else (i, j, k, m)] = key
        programs.append((program, runs))
    return programs, places


def _train(programs, store, progress):
    """Trains the missing runs; each process trains a part of the chunks."""
    chunks = []
    for program, runs in programs:
        missing = [key for key in runs if key not in store]
        at_once = program.runs_at_once
        chunks += [
            (program, runs, missing[i : i + at_once]) for i in range(0, len(missing), at_once)
        ]
    storing.wait_for_all()  # So that all processes make the same list of chunks.
    mine = chunks[jax.process_index() :: jax.process_count()]
    total = sum(len(runs) for _, runs in programs)
    left = sum(len(keys) for *_, keys in mine)
    with tqdm(
        total=total, initial=total - left, unit="run", desc=progress, disable=progress is None
    ) as bar:
        for program, runs, keys in mine:
            ended = program.train([runs[key] for key in keys])
            store.add(keys, ended)
            bar.update(len(keys))
            bar.set_postfix(loss=f"{_typical(ended['loss'][:, -1]):.3g}")
    if jax.process_count() > 1:
        store.read()


def _not_finite(problem, results):
    """A sentence for each metric that is not finite in a run whose loss is finite."""
    last = results.isel(step=-1)
    for name in problem.metrics:
        missing = int((~np.isfinite(last[name]) & np.isfinite(last.loss)).sum())
        if missing:
            yield (
                f"The metric {name} is not finite in {missing} of {last.loss.size} runs, although "
                "their loss is finite; in these runs it is set to the worst value of all runs."
            )


def describe_devices() -> str:
    """Describes the devices of this process, and says how many processes there are.

    Example:
      >>> describe_devices().endswith("cpu")
      True
    """
    text = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    processes = jax.process_count()
    return text if processes == 1 else f"{processes} processes, each with {text}"


def bytes_needed(problem: Problem, runs: int, steps: int) -> int:
    """Estimates how many bytes the results need on disk.

    Example:
      >>> from momentum_jax.study.problems import digits
      >>> bytes_needed(digits(), runs=1000, steps=200)
      504000
    """
    moments = min(steps, 200 if problem.data is None else 20) + 1
    return 2 * runs * moments * 4 * (2 + len(problem.metrics) + (2 if problem.data is None else 0))


def _design(seeds, order_seeds):
    if order_seeds is None:
        return "paired"
    if len(seeds) == 1 and len(order_seeds) > 1:
        return "order"
    return "weights" if len(order_seeds) == 1 else "crossed"


def _range(seeds):
    return f"{seeds[0]} to {seeds[-1]}"


def _versions():
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _fingerprint(problem):
    """What must be equal for all runs of a folder, by name."""

    def computed(params, state, examples):
        return problem.value_and_state(params, state, examples), problem.evaluate(
            params, state, examples
        )

    start = jax.jit(problem.start)
    abstract = jax.eval_shape(problem.start, jax.random.key(0))
    texts = (
        start.lower(jax.random.key(0)).as_text(),
        jax.jit(computed).lower(*abstract, problem.test_examples()).as_text(),
    )
    rows = jax.tree.leaves((problem.data, problem.test_examples()))
    return {
        "problem": problem.name,
        "data": storing.digest(*(np.asarray(leaf).tobytes() for leaf in rows)),
        "the functions of the problem": storing.digest(*texts),
        "versions": {name: v for name, v in _versions().items() if "jax" in name},
    }


def _coordinates(problem, arms, times):
    """The coordinates of the results that describe the arms."""
    found: dict[str, Any] = {
        "arm": [arm.name for arm in arms],
        "family": ("arm", [arm.family for arm in arms]),
        "effective_rate": ("arm", [_number(effective_rate(arm)) for arm in arms]),
        "nesterov": ("arm", np.array([_is_nesterov(arm) for arm in arms], np.int8)),
        "restarts": ("arm", [arm.restarts for arm in arms]),
        "steps_taken": (
            ("arm", "step"),
            [[t.interval * i for i in range(t.evaluations + 1)] for t in times],
        ),
    }
    if problem.data is not None:
        found["batch_size"] = ("arm", [arm.batch_size for arm in arms])
    for name in dict.fromkeys(name for arm in arms for name in arm.settings):
        values = [_number(arm.settings.get(name)) for arm in arms]
        several = [value for value in values if isinstance(value, tuple)]
        if several:
            rows = [v if isinstance(v, tuple) else (v,) * len(several[0]) for v in values]
            found[name] = (("arm", "init_scale"), np.array(rows, float))
        else:
            found[name] = ("arm", np.array(values, float))
    return found


def _number(value):
    """A number, a tuple of numbers, or nan for anything else."""
    if isinstance(value, tuple):
        return value if all(isinstance(v, (int, float)) for v in value) else math.nan
    return float(value) if isinstance(value, (int, float)) else math.nan


def _is_nesterov(arm):
    function = arm.make_transform
    keywords = function.keywords if isinstance(function, functools.partial) else {}
    return function is nesterov or bool({**keywords, **arm.settings}.get("nesterov", False))


def _study_steps(arms, times, steps):
    """The evaluated steps of an arm without its own number of steps; else of the first arm."""
    usual = next((t for arm, t in zip(arms, times, strict=True) if arm.steps is None), times[0])
    return usual.interval * np.arange(usual.evaluations + 1)


def _with_landscape(problem, results):
    """Adds the loss on a grid around the paths, for a contour map."""
    # Outliers are cut off: a diverged run would make most of the map empty.
    ends = (results.params.min("step", skipna=False), results.params.max("step", skipna=False))
    runs = [name for name in results.loss.dims if name != "step"]
    low, high = (
        end.where(np.isfinite(end)).quantile(part, runs).values
        for end, part in zip(ends, (0.02, 0.98), strict=True)
    )
    room = 0.1 * np.maximum(high - low, 0.1)
    axes = [np.linspace(*ends, 101) for ends in zip(low - room, high + room, strict=True)]
    params, state = jax.tree.map(jnp.zeros_like, problem.start(jax.random.key(0)))
    _, unravel = jax.flatten_util.ravel_pytree(params)
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)
    heights = jax.vmap(
        lambda w: problem.evaluate(unravel(w), state, problem.test_examples())["loss"]
    )(points.reshape(-1, points.shape[-1]))
    names = [f"landscape_{i}" for i in range(len(axes))]
    return results.assign_coords(dict(zip(names, axes, strict=True))).assign(
        landscape=(names, np.asarray(heights).reshape(points.shape[:-1]))
    )


def _typical(losses):
    return np.median(np.where(np.isnan(losses), np.inf, np.float64(losses)))
