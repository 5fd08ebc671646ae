"""The command: trains, prints the tables, writes numbers and pictures."""

import argparse
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from momentum_jax.study import report, sweep
from momentum_jax.study.problems import digits

DESCRIPTION = """\
How much does the result of training depend on the luck of the initial weights, and does
momentum reduce that? Trains a small network on real images of digits from many random
initial weights, at several initial scales, without momentum and with it: at the same
learning rate, and at the same effective learning rate, learning_rate / (1 - mu). All arms
start from the same weights and see the same batches."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m momentum_jax.study",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=_whole, metavar="N", help="initial weights to start from (100)")
    add("--steps", type=_whole, metavar="N", help="steps a run (200)")
    add(
        "--init-scale",
        type=_positive,
        nargs="+",
        metavar="X",
        help="what the initial weights are multiplied by (0.25 0.5 1 2 4)",
    )
    add(
        "--learning-rate",
        type=_positive,
        default=0.05,
        metavar="X",
        help="learning rate of the arm without momentum (%(default)s)",
    )
    add(
        "--batch-size",
        type=_whole,
        default=32,
        metavar="N",
        help="examples a step (%(default)s)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="new or empty folder for the results (study-results/digits-DATE-TIME)",
    )
    add(
        "--quick",
        action="store_true",
        help="a look in half a minute: 20 seeds, 100 steps, initial scales 0.25 1 4",
    )
    options = parser.parse_args(arguments)
    seeds, steps, scales = (
        (20, 100, [0.25, 1, 4]) if options.quick else (100, 200, [0.25, 0.5, 1, 2, 4])
    )
    options.seeds = options.seeds or seeds
    options.steps = options.steps or steps
    options.init_scale = sorted(set(options.init_scale or scales))
    if options.seeds < 3:
        parser.error(f"--seeds {options.seeds}: a spread and its interval need at least 3")
    options.problem = digits()
    examples = len(options.problem.train["y"])
    if options.batch_size > examples:
        parser.error(f"--batch-size {options.batch_size}: digits has {examples} training examples")
    if options.out is None:
        now = datetime.datetime.now()
        options.out = Path("study-results") / f"digits-{now:%Y%m%d-%H%M%S}"
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"--out {options.out}: is there already, and is no empty folder")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        parser.error(f"--out {options.out}: cannot write there ({error.strerror})")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study as the command line says."""
    options = parse(arguments)
    problem = options.problem
    contrasts = sweep.contrasts(options.learning_rate)
    arms = list({arm.name: arm for group in contrasts.values() for arm in group}.values())
    runs = len(arms) * len(options.init_scale) * options.seeds
    print(
        f"{problem.name}: {runs} runs of {options.steps} steps ({len(arms)} arms, "
        f"{len(options.init_scale)} initial scales, {options.seeds} initial weights) "
        f"on {jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        flush=True,
    )
    start = time.monotonic()
    results = sweep.run(
        problem,
        arms,
        seeds=range(options.seeds),
        init_scales=options.init_scale,
        steps=options.steps,
        batch_size=options.batch_size,
        progress=True,
    )
    study = report.report(
        results, {name: [arm.name for arm in group] for name, group in contrasts.items()}
    )
    seconds = time.monotonic() - start
    print(f"\n{report.text(study)}\n")
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "problem")}
    for path in report.write(study, options.out, {**settings, "seconds": round(seconds, 1)}):
        print(f"wrote {path}")
    print(f"{seconds:.0f} s, {results.attrs['programs']} compiled training programs")


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


if __name__ == "__main__":
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # A device a core: one alone keeps only part of the machine busy with small models.
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was written")
