"""Trains many runs at once: vmapped over runs, scanned over steps, sharded over devices.

Runs are trained in chunks. Given a folder, each chunk is written there as it ends, and a sweep
that was stopped goes on from the chunks that it finds.
"""

import datetime
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

import momentum_jax as mj
from momentum_jax.study.arms import Arm, friction
from momentum_jax.study.problems import Problem, check, in_one_line
from momentum_jax.study.statistics import final, interquartile_mean

PyTree = Any
# Contrast -> the names of its arms, the one that the others are compared with first.
Contrasts = Mapping[str, Sequence[str]]

PACKAGES = ("momentum_jax", "jax", "jaxlib", "optax", "flax", "scikit-learn", "scipy")
# Tuning draws its initial weights from here on, the study itself from 0: none is seen twice.
FIRST_TUNING_SEED = 1_000_000


def run(
    problem: Problem,
    arms: Sequence[Arm],
    seeds: Sequence[int] = range(100),
    *,
    init_scales: Sequence[float] = (1.0,),
    steps: int = 200,
    evaluations: int | None = None,
    contrasts: Contrasts | None = None,
    folder: str | Path | None = None,
    progress: str | None = None,
) -> xr.Dataset:
    """Trains every arm from the same initial weights on the same batches.

    A seed fixes the initial weights (before they are multiplied by the initial scale) and the
    order of the data: runs that differ in the arm alone are pairs.

    Over many hosts, after `jax.distributed.initialize`, each process trains its share of the
    chunks on its own devices; `folder` must then be one that all of them see.

    Args:
      problem: what to train.
      arms: how to train it; names must be unique.
      seeds: one run each, from 0 up to 1,000,000; above are those for `tune`. All different.
      init_scales: what the initial weights are multiplied by; one run each. All different.
      steps: how many steps a run takes; rounded up to a multiple of `evaluations`.
      evaluations: at how many equally spaced steps loss and metric are measured, the last step
        among them; by default 20, or up to 200 where no data make it costly. Rounded up to a
        multiple of the `tries` of each arm, so that all take equally many gradients.
      contrasts: which arms are to be compared, the one that the others are compared with first,
        by the name of the contrast; by default the first arm with all others.
      folder: where chunks of runs are kept. If some are there already, of the same sweep, they
        are not trained again, and the results are the same to the bit.
      progress: what to call the work in a progress bar; None shows none.

    Returns:
      A dataset of dimensions (arm, init_scale, seed, step), step 0 being the initial weights:
      `loss` and `metric` on the test examples, not finite where a run diverged;
      `kinetic_energy` of the last update, |w' - w|^2 / (2 learning_rate), where the arm has a
      learning rate; for problems of two params also `params` and the `landscape` around them.
      Each setting of the arms is a coordinate.

    Raises:
      ValueError: no arm, two arms of one name, a batch larger than the training data, a contrast
        of unknown arms, settings that fit no initial scale, a folder with another sweep; a
        function of the problem or of an arm that fails (see `problems.check`).
      OSError: a folder that cannot be written to.

    Example:
      >>> import momentum_jax as mj
      >>> from momentum_jax.study.problems import digits
      >>> arms = [Arm(f"mu {mu}", mj.momentum, learning_rate=0.02, mu=mu) for mu in (0, 0.9)]
      >>> results = run(digits(), arms, seeds=[0, 1], steps=40)
      >>> print(results.loss.isel(step=-1).mean(["init_scale", "seed"]).diff("arm").item() < 0)
      True
    """
    arms = list(arms)
    _check(problem, arms, seeds, init_scales, steps, evaluations)
    contrasts = _check_contrasts(arms, contrasts)
    evaluations, interval = _timetable(problem, arms, steps, evaluations)
    started = time.monotonic()

    chunks = []
    programs = []
    for members in _families(problem, arms):
        runs = list(itertools.product(members, range(len(init_scales)), range(len(seeds))))
        program = _Program(problem, arms[members[0]], evaluations, interval, len(runs))
        programs.append(program)
        at_once = program.runs_at_once
        chunks += [(program, runs[at : at + at_once]) for at in range(0, len(runs), at_once)]
    plan = {} if folder is None else _plan(problem, arms, seeds, init_scales, programs)
    kept = _Chunks(None if folder is None else Path(folder), plan)

    mine = range(jax.process_index(), len(chunks), jax.process_count())
    missing = [i for i in mine if i not in kept]
    runs_of = {i: len(chunks[i][1]) for i in mine}
    total, left = (sum(runs_of[i] for i in some) for some in (mine, missing))
    off = progress is None
    # What is there already is no work: the time left is for the others.
    with tqdm(total=total, initial=total - left, unit="run", desc=progress, disable=off) as bar:
        for i in missing:
            program, runs = chunks[i]
            kept[i] = program.train(arms, seeds, init_scales, runs)
            bar.update(len(runs))
            bar.set_postfix(loss=f"{_typical(kept[i]['loss'][:, -1]):.3g}")
    kept.wait_for_all()

    shape = (len(arms), len(init_scales), len(seeds))
    values: dict[str, np.ndarray] = {}
    for i, (_, runs) in enumerate(chunks):
        for name, ended in kept[i].items():
            whole = values.setdefault(name, np.empty((*shape, *ended.shape[1:]), np.float32))
            whole[tuple(np.array(runs).T)] = ended
    dimensions = ("arm", "init_scale", "seed", "step", "param")
    results = xr.Dataset(
        {name: (dimensions[: whole.ndim], whole) for name, whole in values.items()},
        coords={
            "arm": [arm.name for arm in arms],
            "init_scale": np.array(init_scales, float),
            "seed": list(seeds),
            "step": interval * np.arange(evaluations + 1),
            **_setting_coordinates(problem, arms),
        },
        attrs={
            "problem": problem.name,
            "metric_name": problem.metric_name,
            **{
                name: math.nan if value is None else float(value)
                for name, value in (
                    ("worst", problem.worst),
                    ("solved_loss", problem.solved_loss),
                    ("solved_metric", problem.solved_metric),
                )
            },
            "contrasts": json.dumps(
                [
                    {"name": name, "plain": one, "arms": others}
                    for name, (one, *others) in contrasts.items()
                ]
            ),
            "programs": len(programs),
            "provenance": json.dumps(
                {
                    "date": str(datetime.date.today()),
                    "seconds": round(time.monotonic() - started, 1),
                    "seeds": f"{seeds[0]} to {seeds[-1]}",
                    "device": describe_devices(),
                    "versions": _versions(),
                }
            ),
        },
    )
    return _with_landscape(problem, results) if "params" in results else results


def tune(
    problem: Problem,
    arms: Sequence[Arm],
    rates: Sequence[float],
    seeds: int = 10,
    *,
    init_scales: Sequence[float] = (1.0,),
    steps: int = 200,
    folder: str | Path | None = None,
    progress: str | None = None,
) -> tuple[list[Arm], list[dict[str, Any]]]:
    """Finds the best learning rate of each arm at each initial scale, all on an equal budget.

    The best is that of the lowest interquartile mean of the final loss over initial weights
    that the study itself does not use. The runs are as long, and as often begun anew, as those
    of `run` with the same `steps`.

    Args:
      problem: what to train.
      arms: arms that lack a learning rate.
      rates: effective learning rates to try: an arm's learning rate is 1 - mu times that.
      seeds: over how many initial weights.
      init_scales: as for `run`.
      steps: as for `run`.
      folder: as for `run`.
      progress: as for `run`.

    Returns:
      The arms with the learning rates found, and what was found: rows with `arm`, `init_scale`,
      `learning_rate` and `edge`, which is "lowest" or "highest" where the best is at that end
      of the grid and a better one may lie beyond it, else None.

    Raises:
      ValueError: as `run`; no or unordered rates.

    Example:
      >>> from momentum_jax.study.arms import plain
      >>> from momentum_jax.study.problems import digits
      >>> (arm,), (found,) = tune(digits(), [plain()], [0.001, 0.01, 0.1], 2, steps=20)
      >>> arm.settings["learning_rate"], found["edge"]
      ((0.1,), 'highest')
    """
    if len(rates) < 2 or list(rates) != sorted(set(rates)):
        raise ValueError(f"rates={rates} must be two or more different numbers, in rising order.")
    candidates = [
        arm.with_settings(f"{arm.name} at {rate}", learning_rate=rate * friction(arm))
        for arm in arms
        for rate in rates
    ]
    results = run(
        problem,
        candidates,
        range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds),
        init_scales=init_scales,
        steps=rounded(problem, arms, steps),
        evaluations=1,  # or, of an arm of several tries, as few as end each of them
        folder=folder,
        progress=progress,
    )
    loss = interquartile_mean(final(results).loss.values.astype(np.float64))
    best = loss.reshape(len(arms), len(rates), len(init_scales)).argmin(axis=1)
    tuned = []
    found = []
    for arm, places in zip(arms, best, strict=True):
        chosen = tuple(float(rates[place]) * friction(arm) for place in places)
        tuned.append(arm.with_settings(f"{arm.name}, tuned", learning_rate=chosen))
        found += [
            {
                "arm": arm.name,
                "init_scale": float(scale),
                "learning_rate": rate,
                "edge": {0: "lowest", len(rates) - 1: "highest"}.get(int(place)),
            }
            for scale, rate, place in zip(init_scales, chosen, places, strict=True)
        ]
    return tuned, found


def rounded(problem: Problem, arms: Sequence[Arm], steps: int) -> int:
    """How many steps a run takes that is asked for so many.

    Example:
      >>> from momentum_jax.study.arms import plain
      >>> from momentum_jax.study.problems import digits
      >>> rounded(digits(), [plain()], 50)
      60
    """
    return math.prod(_timetable(problem, arms, steps, None))


def describe_devices() -> str:
    """The devices of this process, and how many processes there are.

    Example:
      >>> describe_devices().endswith("cpu")
      True
    """
    text = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    processes = jax.process_count()
    return text if processes == 1 else f"{processes} processes, each with {text}"


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, even if the power goes.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_whole(Path(folder) / "file", b"content")
      ...     print((Path(folder) / "file").read_bytes())
      b'content'
    """
    unfinished = path.with_suffix(f".{jax.process_index()}.part")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def bytes_needed(problem: Problem, runs: int, steps: int) -> int:
    """How much room the results of so many runs take: as chunks, and then as a whole.

    Example:
      >>> from momentum_jax.study.problems import digits
      >>> bytes_needed(digits(), runs=1000, steps=200)
      504000
    """
    moments = min(steps, _evaluations(problem)) + 1
    return 2 * runs * moments * 4 * (5 if problem.data is None else 3)


class _Program:
    """Trains one run for each (seed, initial scale, settings), on all devices of this process."""

    def __init__(self, problem, arm, evaluations, interval, runs):
        """`arm` stands for all that differ from it in the values of settings alone."""
        self.settings = list(arm.settings)
        self.tries = arm.tries
        self.runs_at_once = _runs_at_once(problem, runs)
        # By itself: random numbers take longer to compile than all of the training.
        self._draw = jax.jit(lambda seed, i: problem.init(_keys(seed, i)[0]))
        self._data = (problem.data, problem.data if problem.test is None else problem.test)
        self._train = jax.vmap(
            _train_function(problem, arm, evaluations, interval), in_axes=(None, 0, 0, 0, 0)
        )
        devices = jax.local_devices()[: math.gcd(self.runs_at_once, jax.local_device_count())]
        mesh = jax.sharding.Mesh(np.array(devices), ("runs",))
        one_run_a_row, whole = (
            NamedSharding(mesh, PartitionSpec(*name)) for name in (["runs"], [])
        )
        self.compiled = jax.jit(
            self._train,
            in_shardings=(whole, *[one_run_a_row] * 4),
            out_shardings=one_run_a_row,
        )

    def train(self, arms, seeds, init_scales, runs):
        """The results of these runs: (arm, init_scale, seed), by their places."""
        # The last chunk is filled up, so that all have the shape that was compiled.
        padded = [*runs, *[runs[-1]] * (self.runs_at_once - len(runs))]
        ended = self.compiled(*self._inputs(arms, seeds, init_scales, padded))
        return {name: np.asarray(values)[: len(runs)] for name, values in ended.items()}

    def text(self, arms, seeds, init_scales):
        """What is computed, whatever the devices."""
        first = [
            (next(i for i, arm in enumerate(arms) if list(arm.settings) == self.settings), 0, 0)
        ]
        inputs = self._inputs(arms, seeds, init_scales, first * self.runs_at_once)
        lowered = jax.jit(self._train).lower(*inputs), self._draw.lower(0, 0)
        return "".join(each.as_text() for each in lowered)

    def _inputs(self, arms, seeds, init_scales, runs):
        def value(name, arm, scale):
            setting = arms[arm].settings[name]
            return setting[scale] if isinstance(setting, Sequence) else setting

        weights = {
            seed: [jax.device_get(self._draw(seeds[seed], i)) for i in range(self.tries)]
            for seed in {seed for _, _, seed in runs}
        }
        return (
            self._data,
            np.array([seeds[seed] for _, _, seed in runs], np.uint32),
            jax.tree.map(
                lambda *leaves: np.stack(leaves).reshape(len(runs), self.tries, *leaves[0].shape),
                *[each for _, _, seed in runs for each in weights[seed]],
            ),
            np.array([init_scales[scale] for _, scale, _ in runs], np.float32),
            {
                name: np.array([value(name, arm, scale) for arm, scale, _ in runs], np.float32)
                for name in self.settings
            },
        )


def _keys(seed, i):
    """For weights, order and noise of the i-th try; the first is what other arms have."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), i), 3)


def _train_function(problem, arm, evaluations, interval):
    """The function ((data, test), seed, weights a try, init_scale, settings) -> one run."""
    stretches = evaluations // arm.tries
    params_size = _size(problem)

    def evaluated(params, update, examples, settings):
        given = () if problem.data is None else (examples,)
        squared = jnp.asarray(optax.tree.norm(update, squared=True))
        found = {
            "loss": problem.loss(params, *given),
            "kinetic_energy": squared / (2 * settings.get("learning_rate", jnp.nan)),
        }
        if problem.metric is not None:
            found["metric"] = problem.metric(params, *given)
        if params_size <= 2:
            found["params"] = jax.flatten_util.ravel_pytree(params)[0]
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)

    def one_try(examples, keys, weights, init_scale, settings):
        data, test = examples
        _, order_key, noise_key = keys
        params = jax.tree.map(lambda w: (init_scale * w).astype(w.dtype), weights)
        tx = optax.with_extra_args_support(arm.make_transform(**settings))
        number = 0 if data is None else len(jax.tree.leaves(data)[0])
        epoch = number // arm.batch_size
        order = jnp.arange(number)

        def step(carry, count):
            params, _, state, order = carry
            batch = ()
            if data is not None:
                # The count is the same for all runs, so that they branch together.
                order = jax.lax.cond(
                    count % epoch == 0,
                    lambda key, order: jax.random.permutation(key, number),
                    lambda key, order: order,
                    jax.random.fold_in(order_key, count // epoch),
                    order,
                )
                start = count % epoch * arm.batch_size
                chosen = jax.lax.dynamic_slice_in_dim(order, start, arm.batch_size)
                batch = (jax.tree.map(lambda x: jnp.asarray(x)[chosen], data),)
            value, grads = jax.value_and_grad(problem.loss)(params, *batch)
            key = jax.random.fold_in(noise_key, count)
            updates, state = tx.update(grads, state, params, value=value, key=key)
            updates = jax.tree.map(lambda u, w: u.astype(w.dtype), updates, params)
            return (mj.apply_updates(params, updates), updates, state, order), None

        def stretch(carry, counts):
            carry, _ = jax.lax.scan(step, carry, counts)
            return carry, evaluated(carry[0], carry[1], test, settings)

        still = jax.tree.map(jnp.zeros_like, params)
        carry = (params, still, tx.init(params), order)
        counts = jnp.arange(stretches * interval).reshape(stretches, interval)
        carry, later = jax.lax.scan(stretch, carry, counts)
        first = evaluated(params, still, test, settings)
        curve = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)
        return curve, problem.loss(carry[0], *(() if data is None else (data,)))

    def train(examples, seed, weights, init_scale, settings):
        curves, losses = jax.lax.map(
            lambda each: one_try(examples, _keys(seed, each[0]), each[1], init_scale, settings),
            (jnp.arange(arm.tries), weights),
        )
        best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))

        def joined(curves):
            """One try after the other, and at the end the best."""
            return jnp.concatenate([curves[0], *curves[1:, 1:]]).at[-1].set(curves[best, -1])

        return jax.tree.map(joined, curves)

    return train


class _Chunks:
    """The chunks of runs that have ended: in memory, and in a folder where there is one."""

    def __init__(self, folder, plan):
        if folder is None and jax.process_count() > 1:
            raise ValueError(
                f"there are {jax.process_count()} processes, so that a folder is needed that all "
                "of them see: give run(..., folder=...)."
            )
        self._folder: Any = folder
        self._held = {}
        if folder is None:
            return
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob("*.part"):
                unfinished.unlink()
            if not (folder / "plan.json").exists():
                write_whole(folder / "plan.json", json.dumps(plan).encode())
        self.wait_for_all()
        began = json.loads((folder / "plan.json").read_text())
        other = [name for name in plan if began.get(name) != json.loads(json.dumps(plan[name]))]
        if other:
            raise ValueError(
                f"{folder} holds chunks of another sweep, which differs in {', '.join(other)}. "
                "Give the settings and the versions with which it was begun, or another folder."
            )

    def _path(self, i):
        return self._folder / f"{i:05d}.npz"

    def __contains__(self, i):
        return i in self._held or (self._folder is not None and self._path(i).exists())

    def __getitem__(self, i):
        if i not in self._held:
            with np.load(self._path(i)) as arrays:
                self._held[i] = dict(arrays)
        return self._held[i]

    def __setitem__(self, i, values):
        self._held[i] = values
        if self._folder is not None:
            buffer = io.BytesIO()
            np.savez(buffer, **values)
            write_whole(self._path(i), buffer.getvalue())

    def wait_for_all(self):
        """Waits for the chunks of the other processes."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("momentum_jax.study")


def _plan(problem, arms, seeds, init_scales, programs):
    """What must be the same for a sweep to go on."""

    def digest(*parts):
        return hashlib.sha256(b"".join(parts)).hexdigest()

    return {
        "problem": problem.name,
        "arms": [[arm.name, arm.batch_size, arm.tries, dict(arm.settings)] for arm in arms],
        "seeds": list(seeds),
        "init_scales": list(init_scales),
        "versions": {name: version for name, version in _versions().items() if "jax" in name},
        "data": digest(
            *(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((problem.data, problem.test)))
        ),
        "the functions of the problem and the arms, or steps": [
            digest(program.text(arms, seeds, init_scales).encode()) for program in programs
        ],
    }


def _versions():
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _families(problem, arms):
    """The places of the arms that share a program."""
    families: dict[Any, list[int]] = {}
    for i, arm in enumerate(arms):
        batch_size = None if problem.data is None else arm.batch_size
        shared = (arm.make_transform, frozenset(arm.settings), batch_size, arm.tries)
        families.setdefault(shared, []).append(i)
    return list(families.values())


def _setting_coordinates(problem, arms):
    coordinates = {}
    for name in dict.fromkeys(name for arm in arms for name in arm.settings):
        values = [arm.settings.get(name, math.nan) for arm in arms]
        if any(isinstance(value, Sequence) for value in values):
            scales = max(len(value) for value in values if isinstance(value, Sequence))
            rows = [v if isinstance(v, Sequence) else [v] * scales for v in values]
            coordinates[name] = (("arm", "init_scale"), np.array(rows, float))
        else:
            coordinates[name] = ("arm", np.array(values, float))
    if problem.data is not None:
        coordinates["batch_size"] = ("arm", [arm.batch_size for arm in arms])
    return coordinates


def _with_landscape(problem, results):
    """The loss on a grid around the paths, for a map of it."""
    # Not out to where a run went that diverged: most of the map would be empty.
    ends = (results.params.min("step", skipna=False), results.params.max("step", skipna=False))
    low, high = (
        end.where(np.isfinite(end)).quantile(part, ["arm", "init_scale", "seed"]).values
        for end, part in zip(ends, (0.02, 0.98), strict=True)
    )
    room = 0.1 * np.maximum(high - low, 0.1)
    axes = [np.linspace(*ends, 101) for ends in zip(low - room, high + room, strict=True)]
    _, unravel = jax.flatten_util.ravel_pytree(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _abstract(problem))
    )
    examples = problem.data if problem.test is None else problem.test
    given = () if problem.data is None else (examples,)
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)
    heights = jax.vmap(lambda w: problem.loss(unravel(w), *given))(
        points.reshape(-1, points.shape[-1])
    )
    names = [f"landscape_{i}" for i in range(len(axes))]
    return results.assign_coords(dict(zip(names, axes, strict=True))).assign(
        landscape=(names, np.asarray(heights).reshape(points.shape[:-1]))
    )


def _abstract(problem):
    return jax.eval_shape(problem.init, jax.random.key(0))


def _size(problem):
    return sum(leaf.size for leaf in jax.tree.leaves(_abstract(problem)))


def _timetable(problem, arms, steps, evaluations):
    """At how many moments runs are measured, and how many steps these are apart."""
    evaluations = min(steps, evaluations or _evaluations(problem))
    tries = math.lcm(*(arm.tries for arm in arms))  # each ends at one of these moments
    evaluations = tries * -(-evaluations // tries)
    return evaluations, -(-steps // evaluations)


def _evaluations(problem):
    return 200 if problem.data is None else 20


def _runs_at_once(problem, runs):
    """As many as the memory surely holds, few enough for the progress bar to move.

    A multiple of 8, whatever the devices, so that they share the work evenly and that a sweep
    begun on some of them can go on upon others.
    """
    most = max(8, min(256, 2**27 // (4 * _size(problem))))
    chunks = -(-runs // most)
    return 8 * -(-runs // (8 * chunks))


def _typical(losses):
    return np.median(np.where(np.isnan(losses), np.inf, np.float64(losses)))


def _check(problem, arms, seeds, init_scales, steps, evaluations):
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the arms need unique names, at least one, but are {names}.")
    for name, count in ("steps", steps), ("evaluations", evaluations):
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")
    for name, several in ("seeds", seeds), ("init_scales", init_scales):
        # A run that is there twice would count as two.
        if np.ndim(several) != 1 or not 0 < len(several) == len(set(several)):
            raise ValueError(
                f"{name}={several} must be a sequence of different numbers, at least one"
                + (f", such as range({several})." if np.ndim(several) == 0 else ".")
            )
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"seeds={seeds} must be at least 0 and below 2^32.")
    for arm in arms:
        for name, value in arm.settings.items():
            if isinstance(value, Sequence) and len(value) != len(init_scales):
                raise ValueError(
                    f"{name}={value} of the arm {arm.name!r} must be a number, or one for each of "
                    f"the {len(init_scales)} initial scales."
                )
        if problem.data is not None:
            examples = len(jax.tree.leaves(problem.data)[0])
            if arm.batch_size > examples:
                raise ValueError(
                    f"batch_size={arm.batch_size} of the arm {arm.name!r} must be at most the "
                    f"number of training examples, {examples}."
                )
    check(problem)
    for places in _families(problem, arms):
        _check_arm(problem, arms[places[0]])


def _check_arm(problem, arm):
    """Tries its transform on shapes alone."""

    def one_step(params, key, settings):
        tx = optax.with_extra_args_support(arm.make_transform(**settings))
        return tx.update(params, tx.init(params), params, value=jnp.ones(()), key=key)

    settings = {name: jnp.ones(()) for name in arm.settings}
    try:
        jax.eval_shape(one_step, _abstract(problem), jax.random.key(0), settings)
    except Exception as error:
        raise ValueError(
            f"the transform of the arm {arm.name!r} fails: {in_one_line(error)}"
        ) from error


def _check_contrasts(arms, contrasts):
    names = [arm.name for arm in arms]
    if contrasts is None:
        return {"all arms": names} if len(names) > 1 else {}
    for contrast, chosen in contrasts.items():
        unknown = set(chosen) - set(names)
        if unknown or len(chosen) < 2:
            raise ValueError(
                f"the contrast {contrast!r} compares {list(chosen)}, but must name two or more "
                f"of the arms {names}."
            )
    return contrasts
