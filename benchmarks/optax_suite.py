"""Runs Optax's own tests with this package's transformations: `python -m benchmarks.optax_suite`.

1. Runs all tests that are installed with Optax, with Optax's own `sgd` and `trace`. Notes which
   tests use one of the two, directly or inside another transformation of Optax, such as `rmsprop`
   with momentum.
2. For each variant, replaces `sgd` and `trace` by our transformations, and runs again the tests
   that use one of them and passed.
3. Each test that does not pass must match an entry of `DIFFERENCES`, which gives the reason. Each
   entry must match at least one test.

Takes 15 minutes on two cores.
"""

import argparse
import collections
import datetime
import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import pkgutil
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
import pytest

import momentum_jax

mj: Any = momentum_jax  # Optax's tests pass arguments of any type.
RESULT = pathlib.Path(__file__).parent / "results" / "optax-suite.json"
VARIANT, REPORT = "MOMENTUM_JAX_OPTAX_SUITE_VARIANT", "MOMENTUM_JAX_OPTAX_SUITE_REPORT"


def trace(decay: Any, nesterov: bool = False, accumulator_dtype: Any = None) -> Any:
    """`mj.trace` with the parameters of `optax.trace`."""
    return mj.trace(decay, nesterov=nesterov, velocity_dtype=accumulator_dtype)


def outside(
    learning_rate: Any, momentum: Any = None, nesterov: bool = False, accumulator_dtype: Any = None
) -> Any:
    """`mj.trace`, `optax.scale_by_learning_rate` (learning rate outside the velocity)."""
    if momentum is None:
        return mj.frameworks.optax_sgd(learning_rate, momentum, nesterov)
    velocity = trace(momentum, nesterov, accumulator_dtype)
    return optax.chain(velocity, optax.scale_by_learning_rate(learning_rate))


def inside(
    learning_rate: Any, momentum: Any = None, nesterov: bool = False, accumulator_dtype: Any = None
) -> Any:
    """`mj.momentum` (learning rate inside the velocity)."""
    mu = 0.0 if momentum is None else momentum
    return mj.momentum(learning_rate, mu, nesterov=nesterov, velocity_dtype=accumulator_dtype)


def aggmo(
    learning_rate: Any, momentum: Any = None, nesterov: bool = False, accumulator_dtype: Any = None
) -> Any:
    """`mj.aggmo` with one velocity (plain momentum); `mj.trace` for Nesterov momentum."""
    if nesterov:
        return outside(learning_rate, momentum, nesterov, accumulator_dtype)
    mu = 0.0 if momentum is None else momentum
    return mj.aggmo(learning_rate, (mu,), velocity_dtype=accumulator_dtype)


# By variant: the replacements of optax.sgd and optax.trace.
VARIANTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "optax": (optax.sgd, optax.trace),
    "outside": (outside, trace),
    "inside": (inside, trace),
    "aggmo": (aggmo, trace),
}


class Difference(NamedTuple):
    """A group of Optax's tests that our transformations do not pass, by design.

    Attributes:
      tests: a regular expression that matches the whole name of each test.
      message: a regular expression that matches a part of the error message.
      reason: why the tests do not pass.
    """

    tests: str
    message: str
    reason: str


NO_COMPLEX = Difference(
    r"test_explicit_dtype(6|18|30|42)",
    "must be None or one of",
    "`velocity_dtype` does not accept complex dtypes, because the velocity of a complex param is "
    "always complex",
)
NOT_REAL = Difference(
    r"test_explicit_dtype(24|27)",
    "cannot hold",
    "a real `velocity_dtype` for a complex param is refused, because it would drop the imaginary "
    "part",
)
WIDE = Difference(
    r"test_explicit_dtype9",
    "bfloat16.* != .*float32",
    "the velocity of a bfloat16 param is float32 by default",
)
NO_TRACE = Difference(
    r"test_explicit_dtype\d+|test_masked_state_structure",
    "no attribute 'dtype'|different structures",
    "the state has a field `velocity` instead of `trace`",
)
# By variant.
DIFFERENCES: dict[str, list[Difference]] = {
    "outside": [NO_COMPLEX, NOT_REAL, WIDE],
    "inside": [NO_COMPLEX, NOT_REAL, NO_TRACE],
    "aggmo": [NO_COMPLEX, NOT_REAL, NO_TRACE],
}


# The pytest plugin. -----------------------------------------------------------------------


class _Uses:
    """Whether the current test uses a replaced function."""

    now = False


def _noted(original: Callable[..., Any], substitute: Callable[..., Any]) -> Callable[..., Any]:
    # Keeps the signature of Optax's function: some tests inspect it to decide whether they apply.
    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        _Uses.now = True
        tx = substitute(*args, **kwargs)

        def init(params: Any) -> Any:
            _Uses.now = True
            return tx.init(params)

        def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
            _Uses.now = True
            return tx.update(updates, state, params, **extra_args)

        if isinstance(tx, optax.GradientTransformationExtraArgs):
            return optax.GradientTransformationExtraArgs(init, update)
        return optax.GradientTransformation(init, update)

    return make


def _replace(original: Callable[..., Any], substitute: Callable[..., Any]) -> None:
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "optax":
            for attribute, value in list(vars(module).items()):
                if value is original:
                    setattr(module, attribute, substitute)


def pytest_configure() -> None:
    """Replaces Optax's functions by ours in all modules of Optax."""
    variant = os.environ.get(VARIANT)
    if variant is None:
        return
    for found in pkgutil.walk_packages(optax.__path__, "optax."):
        if not found.name.endswith("_test") and "._" not in found.name:
            importlib.import_module(found.name)
    for original, substitute in zip((optax.sgd, optax.trace), VARIANTS[variant], strict=True):
        _replace(original, _noted(original, substitute))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Clears the note before each test."""
    _Uses.now = False
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Adds to the report whether the test used a replaced function."""
    report = yield
    report.user_properties.append(("uses", _Uses.now))
    return report


_reports: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes the outcome of a test. If a test has several reports, notes the worst."""
    if report.when != "call" and not report.failed:
        return
    first = {"outcome": "passed", "uses": False, "message": ""}
    noted = _reports.setdefault(report.nodeid, first)
    noted["uses"] |= any(value for name, value in report.user_properties if name == "uses")
    if noted["outcome"] != "failed":
        message = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
        noted |= {"outcome": report.outcome, "message": message}


def pytest_sessionfinish() -> None:
    """Writes all reports to a file."""
    if REPORT in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        pathlib.Path(os.environ[REPORT]).write_text(json.dumps(_reports))


# The command. ----------------------------------------------------------------------------


def run(variant: str, tests: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the outcome of each test, whether it used sgd or trace, and its error message."""
    folder = pathlib.Path(next(iter(optax.__path__)))
    # These variables would connect the tests to a surrounding pytest run.
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(RESULT.parents[2])
    with tempfile.TemporaryDirectory() as out:
        report = pathlib.Path(out) / "report.json"
        # The list of names is too long for a command line.
        names = pathlib.Path(out) / "names.txt"
        names.write_text("\n".join(tests))
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.optax_suite"),
                *("-p", "no:cacheprovider", "-p", "no:jaxtyping", "-c", os.devnull),
                *("--rootdir", str(folder), "-n", str(os.cpu_count()), "--tb=line"),
                f"@{names}",
            ],
            cwd=folder,
            env=environment | {VARIANT: variant, REPORT: str(report), "JAX_PLATFORMS": "cpu"},
            check=False,
            stdout=subprocess.DEVNULL,
        )
        return json.loads(report.read_text())


def sorted_out(variant: str, outcomes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns how many tests pass, and the other tests by reason.

    Raises:
      SystemExit: if a test fails without a known reason, or a known reason does not occur.
    """
    different: dict[str, list[str]] = collections.defaultdict(list)
    unknown = []
    for name, of in outcomes.items():
        if of["outcome"] == "passed" and of["uses"]:
            continue
        reasons = [
            known.reason
            for known in DIFFERENCES[variant]
            if re.fullmatch(known.tests, name.split("::")[-1])
            and re.search(known.message, of["message"])
        ]
        if len(reasons) == 1:
            different[reasons[0]].append(name)
        else:
            unknown.append(f"{name} ({of['outcome']}): {of['message'].splitlines()[:1]}")
    stale = [known.reason for known in DIFFERENCES[variant] if known.reason not in different]
    if unknown or stale:
        lines = [*unknown, *(f"does not occur: {reason}" for reason in stale)]
        raise SystemExit("\n".join([f"{variant}: the failures differ from DIFFERENCES:", *lines]))
    passed = sum(of["outcome"] == "passed" for of in outcomes.values())
    return {
        "passed": passed,
        "different": {reason: sorted(different[reason]) for reason in sorted(different)},
    }


def measure() -> dict[str, Any]:
    """Runs Optax's tests with each variant and returns the results."""
    folder = pathlib.Path(next(iter(optax.__path__)))
    own = run("optax", [str(path) for path in sorted(folder.rglob("*_test.py"))])
    passed = {name: of for name, of in own.items() if of["outcome"] == "passed"}
    selected = [name for name, of in passed.items() if of["uses"]]
    print(
        f"{len(own)} tests; {len(passed)} pass with Optax's own sgd and trace; {len(selected)} of "
        "these use sgd or trace"
    )
    found = {}
    for variant in DIFFERENCES:
        outcomes = run(variant, selected)
        assert outcomes.keys() == set(selected)
        found[variant] = sorted_out(variant, outcomes)
        print(f"{variant}: {found[variant]['passed']} of {len(selected)} pass")
    return {
        "date": str(datetime.date.today()),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": importlib.metadata.version("optax"),
        },
        "tests": len(own),
        "passed": len(passed),
        "using": len(selected),
        "variants": found,
    }


def table(result: dict[str, Any]) -> str:
    """Returns the third table of docs/works_with.md and the text before it."""
    versions, using = result["versions"], result["using"]
    lines = [
        f"Optax {versions['optax']} has {result['tests']:,} tests. On JAX {versions['jax']} "
        f"({result['date']}), {result['passed']:,} of them pass with Optax's own `sgd` and "
        f"`trace`, and {using} of these use one of the two. With our transformations instead:",
        "",
        "| replacement of `optax.sgd` | pass | do not pass: number and reason |",
        "| --- | --- | --- |",
    ]
    for variant, of in result["variants"].items():
        said = [f"{len(names)}: {reason}" for reason, names in of["different"].items()]
        what = (VARIANTS[variant][0].__doc__ or "").splitlines()[0].removesuffix(".")
        lines.append(f"| {what} | {of['passed']} of {using} | {'; '.join(said) or 'none'} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs all variants, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optax_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=RESULT,
        metavar="FILE",
        help=f"JSON file to write (default: benchmarks/results/{RESULT.name})",
    )
    args = parser.parse_args(arguments)
    result = measure()
    print(table(result))
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
