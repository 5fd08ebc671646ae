"""`python -m benchmarks.study`: measures runs per second of the study and of a Python loop."""

import argparse
import datetime
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.__main__ import machine
from benchmarks.timing import compare, interleave
from momentum_jax.study import Arm, problems
from momentum_jax.study.training import Program, Run, Timetable

STEPS, EVALUATIONS, BATCH_SIZE, RUNS = 200, 20, 32, 256
LEARNING_RATE, MU = 0.05, 0.9


def usual_loop(problem: problems.Problem) -> Any:
    """Makes a function that trains one run in a Python loop, with a jitted Optax step."""
    tx = optax.sgd(LEARNING_RATE, MU)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(problem.loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    init, loss = jax.jit(problem.init), jax.jit(problem.loss)
    accuracy = jax.jit(problem.metrics["accuracy"])
    examples = len(problem.data["y"])

    def run(seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        params = init(jax.random.key(seed))
        state = tx.init(params)
        order = np.empty(0, int)
        curve = []
        for count in range(STEPS):
            if len(order) < BATCH_SIZE:
                order = random.permutation(examples)
            rows, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
            batch = {name: values[rows] for name, values in problem.data.items()}
            params, state = step(params, state, batch)
            if (count + 1) % (STEPS // EVALUATIONS) == 0:
                curve.append([float(f(params, problem.test_data)) for f in (loss, accuracy)])
        return np.array(curve)

    return run


def measure(rounds: int, sample_seconds: float) -> dict[str, Any]:
    """Measures seconds per run of the study and of the loop, on the digits problem."""
    problem = problems.digits()
    arm = Arm("", optax.sgd, learning_rate=LEARNING_RATE, momentum=MU)
    times = Timetable(EVALUATIONS, STEPS // EVALUATIONS)
    program = Program(problem, arm, {}, times, (), RUNS)
    runs = [Run(seed, seed, 1.0, arm.settings) for seed in range(RUNS)]
    one = usual_loop(problem)

    def ours(calls: int) -> None:
        for _ in range(calls):
            program.train(runs)

    def loop(calls: int) -> None:
        for seed in range(calls):
            one(seed)

    seconds = interleave({"ours": ours, "loop": loop}, rounds, sample_seconds)
    seconds["ours"] = [each / RUNS for each in seconds["ours"]]
    # The target is a ratio of times: 1 / 4 means four times as many runs per second.
    return compare(seconds, "loop", target=1 / 4)


def main() -> None:
    """Measures, prints the result and writes it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="number of rounds (%(default)s)"
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write the JSON here")
    options = parser.parse_args()
    result = {
        "date": str(datetime.date.today()),
        "machine": machine(),
        "runs_at_once": RUNS,
        "steps": STEPS,
        "rounds": options.rounds,
        **measure(options.rounds, sample_seconds=0.5),
    }
    times = result["loop"]["median"] / result["ours"]["median"]
    print(
        f"digits, {STEPS} steps: {1 / result['ours']['median']:.1f} runs per second in the study, "
        f"{1 / result['loop']['median']:.1f} in a Python loop: {times:.1f} times as many "
        f"(paired ratio of times {result['ratio']['median']:.3f} "
        f"[{result['ratio']['low']:.3f}, {result['ratio']['high']:.3f}])"
    )
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    # One device per core, as in the command of the study.
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    main()
