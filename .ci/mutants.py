"""Mutation testing: changes one operator, number or condition at a time, and runs the tests.

    .venv/bin/pip install -q cosmic-ray && .venv/bin/python .ci/mutants.py --sample 100 --seed 0

`--in-turn` takes a mutant of each file, then another of each, and so on.

A mutant is killed if a test fails or takes too long. A mutant that cannot be imported is not
counted. Each mutant is made in a copy of the repository. Without `--files`, all of `momentum_jax/`
is mutated, except the study and `_command.py`.
"""

import argparse
import collections
import concurrent.futures
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
# What a mutant of these files must not pass, besides the tests of the file's own name.
TESTS = {
    "_states/": "transplant matching globals moving renaming user_states "
    "another_optimizer step_counts counts velocity restart storage works_with",
    "frameworks/": "frameworks carry checkpoint counts routes steps step_counts torch_state_dict "
    "keras convert recipes carried_states transplant",
    "theory/": "theory",
    "schedules": "schedules",
    "diagnostics/": "diagnostics record curvature edge invariants",
    "sharding/": "sharding invariants clients",
    "": "invariants contract momentum velocity storage quantization dispatch placement kahan "
    "restart clients wrapper sharding diagnostics record transplant",
}


def tests_of(path: Path) -> list[str]:
    """The tests of a file, its own first."""
    name = path.relative_to(ROOT / "momentum_jax").as_posix()
    group = next(tests for prefix, tests in TESTS.items() if name.startswith(prefix))
    own = path.stem.removeprefix("_")
    modules = dict.fromkeys([own, "refusals", *group.split()])
    found = [ROOT / f"tests/test_{module}.py" for module in modules]
    return [path.relative_to(ROOT).as_posix()] + [
        test.relative_to(ROOT).as_posix() for test in found if test.exists()
    ]


# Left out: operators that make a program that cannot be imported, or one that means the same.
LEFT_OUT = ("Variable", "Decorator", "Exception", "Is_", "IsNot_", "_Is", "_IsNot")
USED = ("Is_IsNot", "IsNot_Is")


def mutants_of(path: Path) -> dict[int, list[str]]:
    """The mutated sources of a file, by the number of the first line that changes."""
    source = path.read_text()
    found = collections.defaultdict(list)
    for name in plugins.operator_names():
        if any(word in name for word in LEFT_OUT) and not name.endswith(USED):
            continue
        for occurrence in itertools.count():
            mutated = mutate_code(source, plugins.get_operator(name)(), occurrence)
            if mutated is None:
                break
            line, before, after = changed(source, mutated)
            if before.replace("strict=True", "strict=False") != after:  # An assertion of zip.
                found[line].append(mutated)
    return found


def changed(before: str, after: str) -> tuple[int, str, str]:
    """The number of the first line that differs, and the line before and after."""
    pairs = enumerate(zip(before.splitlines(), after.splitlines(), strict=False), 1)
    return next(((n, a.strip(), b.strip()) for n, (a, b) in pairs if a != b), (0, "", ""))


def python(copy: Path, limit: float, *arguments: str) -> int:
    """Runs Python on a copy of the repository; returns the exit status."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        check=False,
        timeout=limit,
    ).returncode


TEST = ("-m", "pytest", "-x", "-q", "--numprocesses=0")


def run(copy: Path, path: Path, mutated: str, limit: float) -> str:
    """Runs the tests of a mutant in a copy of the repository: killed, survived or no module."""
    target = copy / path.relative_to(ROOT)
    original = target.read_text()
    target.write_text(mutated)
    try:
        if python(copy, limit, "-c", "import momentum_jax.diagnostics.__main__"):
            return "no module"
        return "killed" if python(copy, limit, *TEST, *tests_of(path)) else "survived"
    except subprocess.TimeoutExpired:
        return "killed"
    finally:
        target.write_text(original)


def sample(paths: list[Path], seed: int, in_turn: bool) -> Iterator[tuple[Path, str]]:
    """Draws a file, then a line that was not drawn yet, then one of its mutants.

    A file is drawn by its size, or each is taken in turn.
    """
    rng = random.Random(seed)
    left = {path: path.stat().st_size for path in paths}
    lines: dict[Path, dict[int, list[str]]] = {}
    while left:
        some = list(left) if in_turn else rng.choices(list(left), list(left.values()))
        for path in some:
            if path not in lines:
                lines[path] = mutants_of(path)
            if lines[path]:
                yield path, rng.choice(lines[path].pop(rng.choice(sorted(lines[path]))))
            else:
                del left[path]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=100, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="how many copies of the repository")
    parser.add_argument("--limit", type=float, default=900, help="seconds that a mutant may take")
    parser.add_argument("--files", nargs="+", type=Path, help="default: all but the study")
    parser.add_argument("--in-turn", action="store_true", help="a mutant of each file, and so on")
    options = parser.parse_args()
    paths = options.files or sorted((ROOT / "momentum_jax").rglob("*.py"))
    paths = [p.resolve() for p in paths if "study" not in p.parts and p.name != "_command.py"]
    drawn = sample(paths, options.seed, options.in_turn)
    lock, results, passing = threading.Lock(), [], set()
    with tempfile.TemporaryDirectory() as folder:

        def work(number: int) -> None:
            copy = Path(folder, str(number), "main")
            ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "__pycache__")
            shutil.copytree(ROOT, copy, ignore=ignored)
            while True:
                with lock:
                    if len(results) >= options.sample or (found := next(drawn, None)) is None:
                        return
                    results.append(None)
                    place = len(results) - 1
                path, mutated = found
                new = [test for test in tests_of(path) if test not in passing]
                if new and python(copy, options.limit, *TEST, *new):
                    raise RuntimeError(f"without a mutant, one of these fails: {new}")
                passing.update(new)
                outcome = run(copy, path, mutated, options.limit)
                name = path.relative_to(ROOT).as_posix()
                line, before, after = changed(path.read_text(), mutated)
                print(f"{outcome:9s} {name}:{line}\n    - {before}\n    + {after}", flush=True)
                results[place] = (name, outcome)

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(work, range(options.jobs)))
    by_file = collections.defaultdict(list)
    for name, outcome in results:
        if outcome != "no module":
            by_file[name].append(outcome == "killed")
    for name, killed in sorted(by_file.items()):
        print(f"{sum(killed):4d} of {len(killed):3d} {name}")
    killed = [one for several in by_file.values() for one in several]
    print(f"killed: {sum(killed)} of {len(killed)}, {sum(killed) / max(len(killed), 1):.0%}")


if __name__ == "__main__":
    main()
