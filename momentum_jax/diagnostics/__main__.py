"""The command: trains a problem briefly, and shows how close each step is to diverging."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from momentum_jax import _command
from momentum_jax.diagnostics import edge
from momentum_jax.study import problems
from momentum_jax.study.options import FALLBACKS, Parser, positive, whole
from momentum_jax.study.problem import check
from momentum_jax.study.sweep import describe_devices
from momentum_jax.study.trajectory import draw, trajectory
from momentum_jax.theory import _formulas

PROGRAM = "python -m momentum_jax.diagnostics"
DESCRIPTION = """\
Shows whether the learning rate is too large or too small. Trains a problem once with momentum.
During training it measures the loss, the sharpness (the largest eigenvalue of the Hessian), the
fraction of the stability limit in use, and the alignment (the cosine of the angle between the
update and the negative gradient). Loss and sharpness are measured on the first 512 training rows.
Prints a table, compares the learning rate with the stability limit, and draws a figure."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments, by default those of the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        problem = problems.find(options.problem)
        check(problem)
    except ValueError as error:
        parser.error(str(error))
    fallbacks = FALLBACKS | dict(problem.defaults)
    rest = _formulas.one_minus_mu(options.mu)
    rate = options.learning_rate or fallbacks["learning_rate"] * rest
    if options.batch_size and problem.data is None:
        parser.error(f"--batch-size: {problem.name} has no data to draw batches from")
    size = min(options.batch_size or fallbacks["batch_size"], problem.examples or 1)
    if options.batch_size and size < options.batch_size:
        parser.error(
            f"--batch-size {options.batch_size}: {problem.name} has {problem.examples} training "
            "examples"
        )
    if options.lanczos_steps < 2:
        parser.error(f"--lanczos-steps {options.lanczos_steps}: must be at least 2")
    out = options.out or Path("".join(c if c.isalnum() else "-" for c in problem.name) + ".png")
    if not out.parent.is_dir():
        parser.error(f"--out {out}: the folder {out.parent} does not exist")
    if out.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        parser.error(f"--out {out}: the name must end in .png, .svg or .pdf")
    _command.on_interrupt_say(f"{PROGRAM}: stopped")
    kind = "nesterov" if options.nesterov else "momentum"
    batches = f", batches of {size}" if problem.data is not None else ""
    print(
        f"{problem.name}: {kind} at learning rate {rate:.4g}, mu {options.mu:g}{batches}, "
        f"on {describe_devices()}"
    )
    found = []
    print(f"{'step':>7}  {'loss':>10}  {'sharpness':>10}  {'of the limit':>12}  {'alignment':>9}")
    points = trajectory(
        problem,
        rate,
        options.mu,
        nesterov=options.nesterov,
        steps=options.steps or fallbacks["steps"],
        points=options.points,
        batch_size=size,
        seed=options.seed,
        init_scale=options.init_scale,
        lanczos_steps=options.lanczos_steps,
    )
    try:
        for point in points:
            found.append(point)
            print(_row(point), flush=True)
    except (ValueError, OverflowError) as error:
        parser.error(str(error))
    if not all(map(_is_known, found)):
        print("~: the error may be above 0.1%; increase --lanczos-steps")
    _advise(found, rate, options)
    figure = Figure(figsize=(9, 6), layout="constrained")
    draw(found, figure)
    figure.suptitle(f"{problem.name}, {kind}: learning rate {rate:.4g}, mu {options.mu:g}")
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}")
    print(f"wrote {out}")


def _row(point):
    unsure = " " if _is_known(point) else "~"
    alignment = "-" if math.isnan(point.alignment) else f"{point.alignment:.2f}"
    return (
        f"{point.step:>7}  {point.loss:>10.4g}  {unsure}{point.curvature.largest:>9.4g}  "
        f"{point.fraction:>12.1%}  {alignment:>9}"
    )


def _is_known(point):
    bent = point.curvature
    return not bent.largest_error > 1e-3 * abs(bent.largest)


def _advise(found, rate, options):
    """Prints the verdict, and `edge` at the last point.

    If the loss rose, it is `edge` at the first point above the stability limit instead, because the
    loss of a network may be flat again far from its start.
    """
    known = [point for point in found if math.isfinite(point.curvature.largest)]
    first, last = found[0], found[-1]
    if not known or not math.isfinite(first.loss):
        print("the loss or its curvature is not finite at the initial weights")
        return
    chosen, where = known[-1], "last measured"
    if not math.isfinite(last.loss):
        print(f"diverged: the loss is not finite after {last.step} steps")
    elif last.loss > first.loss:
        print(f"the loss rose, from {first.loss:.4g} to {last.loss:.4g}")
    elif chosen.fraction > 1:
        print(
            f"the loss fell, from {first.loss:.4g} to {last.loss:.4g}, but the sharpest "
            "direction is above the stability limit and grows unless the curvature falls"
        )
    above = [point for point in known if point.fraction > 1]
    if above and not last.loss <= first.loss:
        chosen, where = above[0], "first above the limit"
    print(f"after {chosen.step} steps, {where}:")
    print(edge(chosen.curvature, rate, options.mu, nesterov=options.nesterov))


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "problem",
        help=f"{', '.join(problems.PROBLEMS)}, or your own: path/to/file.py:object, where object "
        "is a momentum_jax.study.Problem",
    )
    add(
        "--learning-rate",
        type=positive,
        metavar="X",
        help="learning rate, applied inside the velocity (default: the effective learning rate of "
        "the problem, times 1 - mu)",
    )
    add("--mu", type=_mu, default=0.9, metavar="X", help="momentum coefficient (%(default)s)")
    add("--nesterov", action="store_true", help="use the Nesterov form of momentum")
    add(
        "--steps",
        type=whole,
        metavar="N",
        help="number of steps, rounded up to a multiple of --points (default: from the problem)",
    )
    add(
        "--points",
        type=whole,
        default=20,
        metavar="N",
        help="number of measurements after the first one (%(default)s)",
    )
    add(
        "--batch-size",
        type=whole,
        metavar="N",
        help="examples per step (default: from the problem)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the initial weights and the data order (%(default)s)",
    )
    add(
        "--init-scale",
        type=positive,
        default=1.0,
        metavar="X",
        help="factor for the initial weights, except biases and normalization (%(default)s)",
    )
    add(
        "--lanczos-steps",
        type=whole,
        default=96,
        metavar="N",
        help="Hessian-vector products per measurement; more products give a smaller error "
        "(%(default)s)",
    )
    add("--out", type=Path, metavar="FILE", help="file of the figure (PROBLEM.png)")
    return parser


def _mu(given: str) -> float:
    try:
        mu = float(given)
    except ValueError:
        mu = math.nan
    if not 0 <= mu < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number in [0, 1)")
    return mu


if __name__ == "__main__":
    main(sys.argv[1:])
