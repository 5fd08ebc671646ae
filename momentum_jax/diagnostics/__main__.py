"""The command: trains a problem briefly, prints and draws how near each step is to diverging."""

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

PROGRAM = "python -m momentum_jax.diagnostics"
DESCRIPTION = """\
Does it diverge, or crawl? Trains a problem once with momentum, and measures on the way the loss,
the sharpness (the largest eigenvalue of the Hessian), the share of the stability limit that is in
use, and the alignment (the cosine of the update and the negative gradient). Loss and sharpness are
those of the first 512 training rows. Prints a table, then what the last curvature means for the
learning rate, and draws a picture."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line says."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        problem = problems.find(options.problem)
        check(problem)
    except ValueError as error:
        parser.error(str(error))
    fallbacks = FALLBACKS | dict(problem.defaults)
    rate = options.learning_rate or fallbacks["learning_rate"] * (1 - options.mu)
    if options.batch_size and problem.data is None:
        parser.error(f"--batch-size: {problem.name} has no data to draw batches from")
    size = min(options.batch_size or fallbacks["batch_size"], problem.examples or 1)
    if options.batch_size and size < options.batch_size:
        parser.error(
            f"--batch-size {options.batch_size}: {problem.name} has {problem.examples} training "
            "examples"
        )
    if options.lanczos_steps < 2:
        parser.error(f"--lanczos-steps {options.lanczos_steps}: at least 2")
    out = options.out or Path("".join(c if c.isalnum() else "-" for c in problem.name) + ".png")
    if not out.parent.is_dir():
        parser.error(f"--out {out}: there is no folder {out.parent}")
    if out.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        parser.error(f"--out {out}: give a name that ends in .png, .svg or .pdf")
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
        print("~: not known to 0.1%; more --lanczos-steps help")
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
    """What the last curvature means; or where the loss rose, the first that is above the limit."""
    known = [point for point in found if math.isfinite(point.curvature.largest)]
    first, last = found[0], found[-1]
    if not known or not math.isfinite(first.loss):
        print("the loss or its curvature is not finite at the initial weights")
        return
    if not math.isfinite(last.loss):
        print(f"diverged: the loss is not finite after {last.step} steps")
    elif last.loss > first.loss:
        print(f"the loss rose, from {first.loss:.4g} to {last.loss:.4g}")
    chosen = known[-1]
    if not last.loss <= first.loss:
        # Further out a network may be flat again.
        chosen = next((point for point in known if point.fraction > 1), chosen)
    where = "first above the limit" if chosen.fraction > 1 else "last measured"
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
        help="that of the update, inside the velocity (the problem's own effective learning rate "
        "times 1 - mu)",
    )
    add("--mu", type=_mu, default=0.9, metavar="X", help="momentum coefficient (%(default)s)")
    add("--nesterov", action="store_true", help="Nesterov's form")
    add(
        "--steps",
        type=whole,
        metavar="N",
        help="how many steps, rounded up to a multiple of --points (the problem's own)",
    )
    add("--points", type=whole, default=20, metavar="N", help="so many measurements (%(default)s)")
    add("--batch-size", type=whole, metavar="N", help="examples per step (the problem's own)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and data (%(default)s)")
    add(
        "--init-scale",
        type=positive,
        default=1.0,
        metavar="X",
        help="what the initial weights are multiplied by, not biases or normalization "
        "(%(default)s)",
    )
    add(
        "--lanczos-steps",
        type=whole,
        default=96,
        metavar="N",
        help="products of the Hessian with a vector in each measurement: the more, the smaller its "
        "error (%(default)s)",
    )
    add("--out", type=Path, metavar="FILE", help="the picture (PROBLEM.png)")
    return parser


def _mu(given: str) -> float:
    try:
        mu = float(given)
    except ValueError:
        mu = math.nan
    if not 0 <= mu < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number from 0 and below 1")
    return mu


if __name__ == "__main__":
    main(sys.argv[1:])
