"""The command: trains, writes the report, prints the answer and its tables."""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from momentum_jax.study import arms as make
from momentum_jax.study import problems, sweep
from momentum_jax.study.arms import Arm
from momentum_jax.study.report import KINDS, text, write
from momentum_jax.study.statistics import summarize

PROGRAM = "python -m momentum_jax.study"
DESCRIPTION = """\
How much does the result of training depend on the luck of the initial weights, and does
momentum reduce that? Trains a problem from many random initial weights, at several initial
scales, without momentum and with it. All arms start from the same weights and see the same
batches. Writes a report (report.html, report.md), its pictures and its numbers (results.nc,
summary.json) into a folder. A study that was stopped goes on with --resume."""
# The contrasts, as they are typed and as the report calls them.
CONTRASTS = {name.replace(" ", "-"): name for name in KINDS}
# Where what the study needs to go on is kept until it has ended.
UNFINISHED = "unfinished"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A mistake is one line."""
        self.exit(2, f"{PROGRAM}: error: {message}\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options; what was not given has the problem's defaults."""
    parser = _Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--problem",
        default="digits",
        metavar="NAME",
        help=f"{', '.join(problems.PROBLEMS)}, or one of your own: path/to/file.py:object, where "
        "object is a momentum_jax.study.Problem (%(default)s)",
    )
    add = parser.add_argument_group("what is compared").add_argument
    add(
        "--mu",
        nargs="+",
        type=_mu,
        default=["0.9", "0.99", "nesterov-0.9"],
        metavar="X",
        help="momentum coefficients above 0, beside 0; nesterov-X for Nesterov's form "
        "(0.9 0.99 nesterov-0.9)",
    )
    add(
        "--learning-rate",
        nargs="+",
        type=_positive,
        metavar="X",
        help="learning rates of the arm without momentum (digits: 0.05)",
    )
    add(
        "--contrast",
        nargs="+",
        choices=list(CONTRASTS),
        metavar="NAME",
        help="same-rate: one learning rate for all arms; same-effective-rate: one "
        "learning_rate / (1 - mu); tuned: each arm at its best learning rate (all three)",
    )
    add(
        "--init-scale",
        nargs="+",
        type=_positive,
        metavar="X",
        help="what the initial weights are multiplied by (digits: 0.25 0.5 1 2 4)",
    )
    add(
        "--batch-size",
        nargs="+",
        type=_whole,
        metavar="N",
        help="examples a step, where the problem has data (digits: 32)",
    )
    add(
        "--controls",
        action=argparse.BooleanOptionalAction,
        help="whether to compare with two other means too: the best of 4 starts on the same "
        "number of gradients, and noise (yes, but not with --quick)",
    )
    add = parser.add_argument_group("how long it takes").add_argument
    add("--seeds", type=_whole, metavar="N", help="initial weights to start from (100)")
    add(
        "--steps",
        type=_whole,
        metavar="N",
        help="steps a run, rounded up to a multiple of the moments at which the loss is measured: "
        "20, or 200 without data (digits: 200)",
    )
    add(
        "--tuning-rates",
        nargs="+",
        type=_positive,
        metavar="X",
        help="effective learning rates to try for the tuned arms (9, from a hundredth of the "
        "first learning rate to a hundred times it)",
    )
    add(
        "--tuning-seeds",
        type=_whole,
        default=10,
        metavar="N",
        help="initial weights to tune on, others than those of the study (%(default)s)",
    )
    add(
        "--quick",
        action="store_true",
        help="a look in half a minute: 20 seeds, half the steps, three initial scales, no tuned "
        "arms, no controls",
    )
    add = parser.add_argument_group("where it runs and writes").add_argument
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="new or empty folder for the results (study-results/PROBLEM-DATE-TIME)",
    )
    add("--resume", type=Path, metavar="DIR", help="go on with the study of this folder; alone")
    add(
        "--distributed",
        nargs="*",
        metavar=("ADDRESS:PORT NUMBER", "INDEX"),
        help="one process of many, over several hosts: of the coordinator, how many processes, "
        "and which of them this is; nothing on a cluster that JAX knows. They share --out",
    )
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    options.error = parser.error
    if options.distributed is not None:
        _join(options)  # Before anything asks for devices, a look at the problem among it.
    if options.resume is not None:
        return _resumed(options)
    return _completed(options)


def _resumed(options):
    """The options with which the study in this folder was begun."""
    folder = options.resume
    alone = ["--resume", str(folder)]
    if options.distributed is None and options.arguments != alone:
        options.error("--resume goes alone: the folder says how the study was begun")
    began = folder / UNFINISHED / "command.json"
    if not began.exists():
        if (folder / "summary.json").exists():
            options.error(f"--resume {folder}: that study has ended, see {folder / 'report.html'}")
        options.error(f"--resume {folder}: there is no unfinished study")
    resumed = parse(json.loads(began.read_text()))
    resumed.out, resumed.resume, resumed.distributed = folder, folder, options.distributed
    return resumed


def _completed(options):
    name = options.problem
    try:
        options.problem = problems.find(name)
        problems.check(options.problem)
    except ValueError as error:
        options.error(f"--problem {name}: {error}")
    defaults = {
        "learning_rate": 0.1,
        "steps": 200,
        "batch_size": 32,
        "init_scales": (0.25, 0.5, 1.0, 2.0, 4.0),
        **options.problem.defaults,
    }
    scales, steps, seeds = sorted(defaults["init_scales"]), defaults["steps"], 100
    contrasts, controls = list(CONTRASTS), True
    if options.quick:
        scales = sorted({scales[0], scales[len(scales) // 2], scales[-1]})
        steps, seeds = max(1, steps // 2), 20
        contrasts, controls = ["same-rate", "same-effective-rate"], False
    options.learning_rate = sorted(set(options.learning_rate or [defaults["learning_rate"]]))
    options.init_scale = sorted(set(options.init_scale or scales))
    options.mu = list(dict.fromkeys(options.mu))
    options.steps = options.steps or steps
    options.seeds = options.seeds or seeds
    options.contrast = options.contrast or contrasts
    options.controls = controls if options.controls is None else options.controls
    rates = [options.learning_rate[0] * 10 ** (half / 2) for half in range(-4, 5)]
    options.tuning_rates = sorted(set(options.tuning_rates or rates))
    if options.seeds < 3:
        options.error(f"--seeds {options.seeds}: a spread needs at least 3")
    if options.seeds > sweep.FIRST_TUNING_SEED:
        options.error(f"--seeds {options.seeds}: at most {sweep.FIRST_TUNING_SEED}")
    if "tuned" in options.contrast and len(options.tuning_rates) < 2:
        options.error("--tuning-rates: there must be two or more to choose from")
    name, data = options.problem.name, options.problem.data
    examples = 1 if data is None else len(jax.tree.leaves(data)[0])
    if options.batch_size and data is None:
        options.error(f"--batch-size: {name} has no data to draw batches from")
    sizes = options.batch_size or [min(defaults["batch_size"], examples)]
    options.batch_size = sorted(set(sizes))
    if options.batch_size[-1] > examples:
        options.error(
            f"--batch-size {options.batch_size[-1]}: {name} has {examples} training examples"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study as the command line says."""
    options = parse(arguments)
    first = jax.process_index() == 0
    if first:
        _open_folder(options)
    started = time.monotonic()
    results = _train_or_exit(options, first)
    if first:
        _report(options, results, time.monotonic() - started)


def _train_or_exit(options, first):
    go_on = f"what has ended is kept: go on with --resume {options.out}"
    try:
        return _train(options, first)
    except ValueError as error:
        return options.error(str(error))
    except OSError as error:
        return options.error(f"{error}; {go_on}")
    except KeyboardInterrupt:
        return options.error(f"stopped; {go_on}")


def _report(options, results, seconds):
    provenance = json.loads(results.attrs["provenance"])
    command = shlex.join([*PROGRAM.split(), *_without_places(options.arguments)])
    provenance |= {"command": command, "seconds": round(seconds, 1)}
    results.attrs["provenance"] = json.dumps(provenance)
    summary = summarize(results, progress="statistics")
    paths = write(results, summary, options.out, progress="pictures")
    shutil.rmtree(options.out / UNFINISHED)
    print(f"\n{text(results, summary)}\n")
    for path in paths:
        print(f"wrote {path}")
    print(f"{seconds:.0f} s of training, {results.attrs['programs']} compiled programs")


def _train(options, first):
    """Tunes what is to be tuned, and trains all."""
    problem = options.problem
    # All that a sweep takes beside its arms.
    common: dict[str, Any] = {"init_scales": options.init_scale, "steps": options.steps}
    contrasts: dict[str, list[Arm]] = {}
    to_tune = []
    for batch_size in options.batch_size:
        several = len(options.batch_size) > 1
        group = [make.plain(batch_size), *make.with_momentum(options.mu, batch_size)]
        group += make.controls(batch_size) if options.controls else []
        if several:
            group = [arm.with_settings(f"{arm.name}, batch {batch_size}") for arm in group]
        batch = f", batch {batch_size}" if several else ""
        for rate in options.learning_rate:
            at = f", {rate:g}" if len(options.learning_rate) > 1 else ""
            for name, choose in (
                ("same-rate", make.same_rate),
                ("same-effective-rate", make.same_effective_rate),
            ):
                if name in options.contrast:
                    contrasts[f"{CONTRASTS[name]}{at}{batch}"] = choose(group, rate)
        if "tuned" in options.contrast:
            contrasts[f"tuned{batch}"] = group  # Their learning rates are still to be found.
            to_tune += group

    def count(arms):
        return len(arms) * len(options.init_scale)

    unique = {arm.name: arm for group in contrasts.values() for arm in group}
    steps = sweep.rounded(problem, list(unique.values()), options.steps)
    tuning_runs = count(to_tune) * len(options.tuning_rates) * options.tuning_seeds
    if first:
        _check_room(options, tuning_runs + count(unique) * options.seeds)
        print(
            f"{problem.name}: {count(unique) * options.seeds} runs of {steps} steps "
            f"({len(unique)} arms, {len(options.init_scale)} initial scales, {options.seeds} "
            f"initial weights)"
            + (f", after {tuning_runs} runs to tune learning rates," if to_tune else "")
            + f" on {sweep.describe_devices()}",
            flush=True,
        )
    folder = options.out / UNFINISHED
    found = []
    if to_tune:
        tuned, found = sweep.tune(
            problem,
            to_tune,
            options.tuning_rates,
            options.tuning_seeds,
            **common,
            folder=folder / "tuning",
            progress="tuning" if first else None,
        )
        replaced = {arm.name: new for arm, new in zip(to_tune, tuned, strict=True)}
        contrasts = {
            name: [replaced[arm.name] for arm in group] if name.startswith("tuned") else group
            for name, group in contrasts.items()
        }
    results = sweep.run(
        problem,
        list({arm.name: arm for group in contrasts.values() for arm in group}.values()),
        range(options.seeds),
        **common,
        contrasts={name: [arm.name for arm in group] for name, group in contrasts.items()},
        folder=folder / "runs",
        progress="training" if first else None,
    )
    results.attrs["tuning"] = json.dumps(found)
    return results


def _join(options):
    """Makes this process one of many."""
    given = options.distributed
    if options.out is None and options.resume is None:
        options.error("--distributed needs --out: a folder that all processes see")
    if len(given) not in (0, 3):
        options.error(
            f"--distributed {' '.join(given)}: give ADDRESS:PORT NUMBER INDEX, or nothing on a "
            "cluster that JAX knows"
        )
    try:
        if given:
            jax.distributed.initialize(given[0], int(given[1]), int(given[2]))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        options.error(f"--distributed {' '.join(given)}: {str(error).splitlines()[0]}")


def _open_folder(options):
    """Makes the folder, and writes into it how to go on."""
    if options.out is None:
        now = datetime.datetime.now()
        options.out = Path("study-results") / f"{options.problem.name}-{now:%Y%m%d-%H%M%S}"
    folder = options.out
    if (
        options.resume is None
        and folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        unfinished = (folder / UNFINISHED / "command.json").exists()
        options.error(
            f"--out {folder}: is there already, and is no empty folder"
            + (f"; an unfinished study is in it: --resume {folder}" if unfinished else "")
        )
    try:
        (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        options.error(f"--out {folder}: cannot write there ({error.strerror})")
    began = folder / UNFINISHED / "command.json"
    if not began.exists():
        # From wherever it is resumed, the problem's file is found.
        kept = [_from_anywhere(argument) for argument in _without_places(options.arguments)]
        sweep.write_whole(began, json.dumps(kept).encode())


def _from_anywhere(argument):
    option, equals, value = argument.partition("=") if argument[:2] == "--" else ("", "", argument)
    return f"{option}{equals}{Path(value).absolute()}" if ".py:" in value else argument


def _check_room(options, runs):
    needed = 2**24 + sweep.bytes_needed(options.problem, runs, options.steps)
    free = shutil.disk_usage(options.out).free
    if free < needed:
        with contextlib.suppress(OSError):
            shutil.rmtree(options.out / UNFINISHED)
        options.error(
            f"--out {options.out}: {free / 2**20:.0f} MB are free there, and the results may take "
            f"{needed / 2**20:.0f} MB"
        )


def _without_places(arguments):
    """The arguments that say what is done, without those that say where."""
    places = _Parser(add_help=False, allow_abbrev=False)
    places.add_argument("--out")
    places.add_argument("--resume")
    places.add_argument("--distributed", nargs="*")
    return places.parse_known_args(arguments)[1]


def _mu(given: str) -> str:
    try:
        mu = float(given.removeprefix("nesterov-"))
    except ValueError:
        mu = 0.0
    if not 0 < mu < 1:
        raise argparse.ArgumentTypeError(
            f"{given!r} is not a number above 0 and below 1, or nesterov- and such a number"
        )
    return given.replace(given.removeprefix("nesterov-"), f"{mu:g}")


def _whole(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is not a whole number from 1")
    return int(given)


def _positive(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{given!r} is not a number above 0")
    return value


if __name__ == "__main__":
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # A device a core: one alone keeps only part of the machine busy with small models.
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    main()
