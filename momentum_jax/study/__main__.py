"""The command: trains a study, writes its report, and prints the verdict and the main table."""

import datetime
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax

from momentum_jax import _command
from momentum_jax.study import design, storing, sweep
from momentum_jax.study.options import PROGRAM, Parser, parse, without_locations
from momentum_jax.study.report import terminal_text, write
from momentum_jax.study.side_by_side import compare_studies


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments; by default, those of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = lambda message, *_: print(f"{PROGRAM}: {message}", file=sys.stderr)
    if arguments[:1] == ["compare"]:
        return _compare(arguments[1:])
    options = parse(arguments)
    if jax.process_index() == 0:
        _open_folder(options)
        _print_plan(options)
    _command.on_interrupt_say(f"{PROGRAM}: stopped; finished runs are kept: --resume {options.out}")
    started = time.monotonic()
    try:
        results = options.study.run(options.out, progress=jax.process_index() == 0)
        if jax.process_index() == 0:
            _report(options, results, time.monotonic() - started)
    except ValueError as error:
        options.error(str(error))
    except OSError as error:
        options.error(f"{error}; finished runs are kept: --resume {options.out}")


def _compare(arguments):
    parser = Parser(prog=f"{PROGRAM} compare", description="Compares two finished studies.")
    parser.add_argument(
        "folders", nargs=2, type=Path, metavar="DIR", help="folder of a finished study"
    )
    parser.add_argument("--csv", action="store_true", help="print the whole table as CSV")
    options = parser.parse_args(arguments)
    try:
        print(compare_studies(options.folders, csv=options.csv))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _print_plan(options):
    """Prints how many runs there will be, and on which devices."""
    study, counts = options.study, options.study.counts
    orders = "" if study.order_seeds is None else f" x {len(study.order_seeds)} data orders"
    tuning = f", {counts['tuning_runs']} runs to tune learning rates" if study.tuning_seeds else ""
    print(
        f"{study.problem.name}: {counts['runs']} runs of {counts['steps']} steps "
        f"({counts['arms']} arms x {len(study.seeds)} seeds{orders} x initial scales "
        f"{', '.join(f'{scale:g}' for scale in study.init_scales)}){tuning}, "
        f"on {sweep.describe_devices()}",
        file=sys.stderr,
        flush=True,
    )


def _report(options, results, seconds):
    provenance = json.loads(results.attrs["provenance"])
    calls = _calls(options, seconds)
    provenance["seconds"] = round(sum(call["seconds"] for call in calls), 1)
    provenance["command"] = "\n".join(call["command"] for call in calls if call["command"])
    results.attrs["provenance"] = json.dumps(provenance)
    paths, table = write(results, options.out, progress=True)
    print(table.to_csv(index=False) if options.csv else f"\n{terminal_text(results, table)}\n")
    for path in paths:
        print(f"wrote {path}", file=sys.stderr if options.csv else sys.stdout)


def _calls(options, seconds):
    """The commands of this study so far, with their times in seconds, kept in calls.json."""
    path = options.out / "calls.json"
    try:
        calls = storing.read_json(path) if path.exists() else []
        calls = [{"command": str(c["command"]), "seconds": float(c["seconds"])} for c in calls]
    except (ValueError, TypeError, KeyError):
        warnings.warn(
            f"{path} is damaged: the report will not list the earlier commands.", stacklevel=2
        )
        calls = []
    words = without_locations(options.arguments)
    again = ["--resume", "DIR"] if options.resume and words else []
    command = shlex.join([*PROGRAM.split(), *again, *words])
    calls.append({"command": "" if options.resume and not words else command, "seconds": seconds})
    storing.write_whole(path, json.dumps(calls).encode())
    return calls


def _open_folder(options):
    """Makes the folder for the results, and checks that the disk has enough space."""
    if options.out is None:
        now = datetime.datetime.now()
        name = "".join(c if c.isalnum() else "-" for c in options.study.problem.name)
        options.out = Path("study-results") / f"{name}-{now:%Y%m%d-%H%M%S}"
    folder = options.out
    if options.resume is None and folder.exists() and not _is_empty(folder):
        kept = (folder / design.FILE).exists() if folder.is_dir() else False
        options.error(
            f"--out {folder}: already exists and is not empty; "
            + (
                f"it holds a study: --resume {folder} resumes or extends it"
                if kept
                else "give a new or empty folder"
            )
        )
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        options.error(f"--out {folder}: cannot write there ({error.strerror}); give another folder")
    counts = options.study.counts
    runs = counts["runs"] + counts["tuning_runs"]
    needed = 2**24 + sweep.bytes_needed(options.study.problem, runs, counts["steps"])
    free = shutil.disk_usage(folder).free
    if free < needed:
        if made:
            folder.rmdir()
        options.error(
            f"--out {folder}: the results may need {needed / 2**20:.0f} MB, but only "
            f"{free / 2**20:.0f} MB are free; give a folder on another disk"
        )


def _is_empty(folder):
    return folder.is_dir() and not any(folder.iterdir())


if __name__ == "__main__":
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # One JAX device per core: with small models, a single device leaves most cores idle.
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    main()
