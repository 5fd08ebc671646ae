"""The options of the command line, and the `Study` that they define."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from momentum_jax.study import arms as make
from momentum_jax.study import problems
from momentum_jax.study.design import Study
from momentum_jax.study.problem import check, quarter_decades
from momentum_jax.study.training import RECORDABLE

PROGRAM = "python -m momentum_jax.study"
DESCRIPTION = """\
Measures how much the result of training depends on the random initial weights, and whether
momentum changes that. An arm is one way to train: a momentum coefficient mu with a learning rate.
Each arm is trained from many random initial weights (seeds) and in several data orders. All arms
start from the same weights and see the same batches, so they are compared in pairs.

The command writes into a folder: a report (report.html, report.md), its pictures, and its numbers
(results.nc, comparisons.csv, summary.json). Defaults are in parentheses.

  python -m momentum_jax.study --resume DIR     resume a stopped study, or extend a finished one
  python -m momentum_jax.study compare DIR DIR  compare two finished studies"""
FALLBACKS: dict[str, Any] = {
    "learning_rate": 0.1,
    "steps": 200,
    "batch_size": 32,
    "init_scales": (0.5, 1.0, 2.0),
}
# The options that may be given together with --resume, besides --csv and --distributed.
EXTENSIONS = ("seeds", "order_seeds", "mu", "rates", "init_scale", "tuning_seeds")


class Parser(argparse.ArgumentParser):
    """An argument parser that prints errors on one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the error on one line and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--problem",
        metavar="NAME",
        help=f"what to train: {', '.join(problems.PROBLEMS)}; or your own, as "
        "path/to/file.py:object, where object is a momentum_jax.study.Problem (digits)",
    )
    add = parser.add_argument_group("what is compared").add_argument
    add(
        "--mu",
        nargs="+",
        type=_mu,
        metavar="X",
        help="momentum coefficients above 0; each is compared with mu 0. nesterov-X is Nesterov "
        "momentum with coefficient X (0.9 0.99)",
    )
    add(
        "--learning-rate",
        type=positive,
        metavar="X",
        help="effective learning rate, learning_rate / (1 - mu), of the primary comparison, "
        "which is the first --mu against mu 0 (the problem's own; digits: 0.2)",
    )
    add(
        "--rates",
        nargs="+",
        type=positive,
        metavar="X",
        help="grid of effective learning rates at which each mu is trained (the problem's own; "
        "digits: 9 from 0.02 to 2)",
    )
    add(
        "--init-scale",
        nargs="+",
        type=positive,
        metavar="X",
        help="factors that multiply the initial weights, but not biases or normalization (the "
        "problem's own; digits: 0.5 1 2 4)",
    )
    add(
        "--batch-size",
        nargs="+",
        type=whole,
        metavar="N",
        help="examples per step, if the problem has data (the problem's own; digits: 32)",
    )
    add(
        "--equal-epochs",
        action="store_true",
        help="train all batch sizes for the same number of epochs: --steps then applies to the "
        "first batch size",
    )
    add(
        "--controls",
        action=argparse.BooleanOptionalAction,
        help="train two control arms without momentum at the primary learning rate: the best of "
        "4 restarts, each with a quarter of the steps; and gradients with added noise (yes; with "
        "--quick: no)",
    )
    add(
        "--margin",
        type=positive,
        default=0.1,
        metavar="X",
        help="two arms are equivalent if the 90%% confidence interval of the ratio of their "
        "standard deviations lies within 1/(1+X) to 1+X (%(default)s)",
    )
    add = parser.add_argument_group("how long it takes").add_argument
    add("--seeds", type=whole, metavar="N", help="number of random initial weights (40)")
    add(
        "--order-seeds",
        type=_orders,
        metavar="N",
        help="number of data orders; each seed is trained in each of them. 1: only the weights "
        'vary. "paired": each seed has its own data order (4; without data: paired)',
    )
    add(
        "--steps",
        type=whole,
        metavar="N",
        help="steps per run, rounded up to a multiple of the number of evaluations, which is 20 "
        "with data and 200 without (the problem's own; digits: 200)",
    )
    add(
        "--tuning-seeds",
        type=_count,
        metavar="N",
        help="number of separate seeds used only for tuning the learning rates; 0: no tuned "
        "comparison (10; with --quick: 0)",
    )
    add(
        "--quick",
        action="store_true",
        help="a quick preview: 20 seeds, one initial scale, every second learning rate, mu 0.9 "
        "only, no tuning, no control arms",
    )
    add = parser.add_argument_group("results").add_argument
    add(
        "--record",
        nargs="+",
        choices=RECORDABLE,
        default=(),
        metavar="NAME",
        help=f"also record {', '.join(RECORDABLE)}; the first two at each evaluation, which takes "
        "extra time (none)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="new or empty folder for the results (study-results/PROBLEM-DATE-TIME)",
    )
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="resume the study in DIR. To extend it, also give larger --seeds, --order-seeds or "
        "--tuning-seeds, or new values for --mu, --rates or --init-scale; no other options that "
        "define the study are allowed",
    )
    add("--csv", action="store_true", help="print the table of comparisons as CSV instead of text")
    add(
        "--distributed",
        nargs="*",
        metavar=("ADDRESS:PORT NUMBER", "INDEX"),
        help="run on several hosts, with this command on each: coordinator address, process count "
        "and this process's index; omit all three on clusters that JAX detects. --out must be a "
        "folder that all hosts share",
    )
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line.

    Args:
      arguments: the words of the command line; None means those of this process.

    Returns:
      The options. `study` is the `Study` that they define, `out` the folder for its results.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    options.error = parser.error
    if options.distributed is not None:
        _join(options)  # JAX must know all processes before anything uses a device.
    try:
        options.study = _extended(options) if options.resume else _new(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options


def _new(options):
    name = options.problem or "digits"
    try:
        problem = problems.find(name)
        check(problem)
    except ValueError as error:
        raise ValueError(f"--problem {name}: {error}") from error
    with_data = problem.data is not None
    fallbacks = FALLBACKS | dict(problem.defaults)
    rate = options.learning_rate or fallbacks["learning_rate"]
    around = quarter_decades(rate / 10, 9)
    rates = options.rates or (around if options.learning_rate else fallbacks.get("rates", around))
    scales, steps = sorted(fallbacks["init_scales"]), fallbacks["steps"]
    seeds, tuning_seeds, mus, controls = 40, 10, ["0.9", "0.99"], True
    if options.quick:
        scales, rates = [scales[len(scales) // 2]], options.rates or sorted(rates)[::2]
        seeds, tuning_seeds, mus, controls = 20, 0, ["0.9"], False
    if options.batch_size and not with_data:
        raise ValueError(
            f"--batch-size: the problem {problem.name} has no data to draw batches from; leave "
            "the option out"
        )
    if with_data and max(options.batch_size or [1]) > problem.examples:
        raise ValueError(
            f"--batch-size {max(options.batch_size)}: must be at most the number of training "
            f"examples of {problem.name}, {problem.examples}"
        )
    sizes = options.batch_size or [min(fallbacks["batch_size"], problem.examples or 1)]
    if options.seeds is not None and options.seeds < 3:
        raise ValueError(
            f"--seeds {options.seeds}: must be at least 3 to measure a standard deviation"
        )
    steps = options.steps or steps
    orders = options.order_seeds or (4 if with_data else "paired")
    study = Study(
        problem,
        _arms(sizes, options.mu or mus, steps if options.equal_epochs else None),
        rates=sorted(set(rates)),
        learning_rate=rate,
        seeds=range(options.seeds or seeds),
        order_seeds=None if orders == "paired" else range(orders),
        init_scales=sorted(set(options.init_scale or scales)),
        steps=steps,
        tuning_seeds=tuning_seeds if options.tuning_seeds is None else options.tuning_seeds,
        margin=options.margin,
        record=options.record,
    )
    if controls if options.controls is None else options.controls:
        extra = [arm for size in sizes for arm in _controls(study, size, len(sizes) > 1)]
        study = dataclasses.replace(study, arms=(*study.arms, *extra))
    return study


def _arms(sizes, mus, steps):
    """The arms without a learning rate: mu 0 and each mu, for each batch size."""
    families = []
    for size in dict.fromkeys(sizes):
        for arm in (make.baseline(size), *make.with_momentum(list(dict.fromkeys(mus)), size)):
            name = f"{arm.name}, batch {size}" if len(set(sizes)) > 1 else arm.name
            equal = None if steps is None else max(1, round(steps * sizes[0] / size))
            families.append(arm.replaced(name=name, family=name, steps=equal))
    return families


def _controls(study, size, several):
    steps = next(arm.steps for arm in study.arms if arm.batch_size == size)
    for arm in make.controls(study.learning_rate, size):
        name = f"{arm.name}, batch {size}" if several else arm.name
        yield arm.replaced(name=name, steps=steps)


def _extended(options):
    """The study in the folder, extended by what the other options add."""
    given = _given(options)
    folder = options.out = options.resume
    if others := sorted(set(given) - {*EXTENSIONS, "resume", "csv", "distributed"}):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(
            f"--resume {folder}: {names} cannot change in a study that has started; leave it out, "
            "or start a new study"
        )
    study = Study.load(folder)
    changes: dict[str, Any] = {}
    if options.seeds:
        changes["seeds"] = range(options.seeds)
    if options.order_seeds:
        changes["order_seeds"] = (
            None if options.order_seeds == "paired" else range(options.order_seeds)
        )
    if options.tuning_seeds is not None:
        changes["tuning_seeds"] = options.tuning_seeds
    if options.rates:
        changes["rates"] = {*study.rates, *options.rates}
    if options.init_scale:
        changes["init_scales"] = sorted({*study.init_scales, *options.init_scale})
    if options.mu:
        sizes = list(dict.fromkeys(arm.batch_size for arm in study.arms))
        names = {arm.name for arm in study.arms}
        made = _arms(sizes, options.mu, None)
        new = [arm for arm in made if arm.settings["mu"] > 0 and arm.name not in names]
        steps = {arm.batch_size: arm.steps for arm in study.arms}
        changes["arms"] = (*study.arms, *(a.replaced(steps=steps[a.batch_size]) for a in new))
    study = dataclasses.replace(study, **changes)
    study.check_folder(folder)
    return study


def without_locations(arguments: Sequence[str]) -> list[str]:
    """Removes the options that say where a study runs, is stored and is printed.

    Example:
      >>> without_locations(["--seeds", "9", "--out", "here"])
      ['--seeds', '9']
    """
    locations = Parser(add_help=False, allow_abbrev=False)
    locations.add_argument("--out")
    locations.add_argument("--resume")
    locations.add_argument("--csv", action="store_true")
    locations.add_argument("--distributed", nargs="*")
    return locations.parse_known_args(list(arguments))[1]


def _given(options):
    """The names of the options whose values differ from the defaults."""
    defaults = vars(_parser().parse_args([]))
    return [name for name, value in defaults.items() if getattr(options, name) != value]


def _join(options):
    """Connects this process to the others."""
    given = options.distributed
    if options.out is None and options.resume is None:
        options.error("--distributed: give --out too, a folder that all processes can access")
    if len(given) not in (0, 3):
        options.error(
            f"--distributed {' '.join(given)}: give all of ADDRESS:PORT NUMBER INDEX, or none of "
            "them on a cluster that JAX detects"
        )
    try:
        if given:
            jax.distributed.initialize(given[0], int(given[1]), int(given[2]))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        options.error(f"--distributed {' '.join(given)}: {str(error).splitlines()[0]}")


def _mu(given: str) -> str:
    try:
        mu = float(given.removeprefix("nesterov-"))
    except ValueError:
        mu = 0.0
    if not 0 < mu < 1:
        raise argparse.ArgumentTypeError(
            f"{given!r} must be a number above 0 and below 1, such as 0.9, or nesterov-0.9 for "
            "Nesterov momentum"
        )
    return given.replace(given.removeprefix("nesterov-"), f"{mu:.12g}")


def whole(given: str) -> int:
    """Parses a whole number, at least 1.

    Raises:
      argparse.ArgumentTypeError: the text is anything else.

    Example:
      >>> whole("3")
      3
    """
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} must be a whole number, at least 1")
    return int(given)


def _count(given: str) -> int:
    return 0 if given == "0" else whole(given)


def _orders(given: str) -> int | str:
    return given if given == "paired" else whole(given)


def positive(given: str) -> float:
    """Parses a finite number above 0.

    Raises:
      argparse.ArgumentTypeError: the text is anything else.

    Example:
      >>> positive("0.5")
      0.5
    """
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{given!r} must be a finite number above 0")
    return value
