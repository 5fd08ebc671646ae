"""`python -m benchmarks.optax_suite`: Optax's own tests, with the package's transformations put in.

All tests that are installed with Optax are run with Optax's own `sgd` and `trace`, and it is noted
in which of them one of these two is used, also within another transformation of Optax's, such as
`rmsprop` with a momentum. The tests that use one and pass are run once more for each variant, in
which ours is in its place. A test that does not pass then must be one of `DIFFERENCES`, where the
reason is given, and each of these must occur. Takes a quarter of an hour on two cores.
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

mj: Any = momentum_jax  # What is put in is given whatever the tests give.
RESULT = pathlib.Path(__file__).parent / "results" / "optax-suite.json"
VARIANT, REPORT = "MOMENTUM_JAX_OPTAX_SUITE_VARIANT", "MOMENTUM_JAX_OPTAX_SUITE_REPORT"


def trace(decay: Any, nesterov: bool = False, accumulator_dtype: Any = None) -> Any:
    """`mj.trace` with the parameters of `optax.trace`."""
    return mj.trace(decay, nesterov=nesterov, velocity_dtype=accumulator_dtype)


def outside(
    learning_rate: Any, momentum: Any = None, nesterov: bool = False, accumulator_dtype: Any = None
) -> Any:
    """`mj.trace` and `optax.scale_by_learning_rate`, the learning rate outside the velocity."""
    if momentum is None:
        return mj.frameworks.optax_sgd(learning_rate, momentum, nesterov)
    velocity = trace(momentum, nesterov, accumulator_dtype)
    return optax.chain(velocity, optax.scale_by_learning_rate(learning_rate))


def inside(
    learning_rate: Any, momentum: Any = None, nesterov: bool = False, accumulator_dtype: Any = None
) -> Any:
    """`mj.momentum`, the learning rate inside the velocity."""
    mu = 0.0 if momentum is None else momentum
    return mj.momentum(learning_rate, mu, nesterov=nesterov, velocity_dtype=accumulator_dtype)


def aggmo(
    learning_rate: Any, momentum: Any = None, nesterov: bool = False, accumulator_dtype: Any = None
) -> Any:
    """`mj.aggmo` with one velocity, which is plain momentum; for Nesterov momentum the first."""
    if nesterov:
        return outside(learning_rate, momentum, nesterov, accumulator_dtype)
    mu = 0.0 if momentum is None else momentum
    return mj.aggmo(learning_rate, (mu,), velocity_dtype=accumulator_dtype)


# By variant: what takes the place of optax.sgd and of optax.trace.
VARIANTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "optax": (optax.sgd, optax.trace),
    "outside": (outside, trace),
    "inside": (inside, trace),
    "aggmo": (aggmo, trace),
}


class Difference(NamedTuple):
    """Tests of Optax's that ours does not pass.

    Attributes:
      tests: a regular expression for their names, which are matched to the end.
      message: another one, for a part of what is raised.
      reason: why.
    """

    tests: str
    message: str
    reason: str


NO_COMPLEX = Difference(
    r"test_explicit_dtype(6|18|30|42)",
    "must be None or one of",
    "`velocity_dtype` takes no complex dtype: the velocity of a complex param is complex anyway",
)
NOT_REAL = Difference(
    r"test_explicit_dtype(24|27)",
    "cannot hold",
    "a real velocity for a complex param is refused, as it would drop the imaginary part",
)
WIDE = Difference(
    r"test_explicit_dtype9",
    "bfloat16.* != .*float32",
    "the velocity of a bfloat16 param is float32, unless `velocity_dtype` says otherwise",
)
NO_TRACE = Difference(
    r"test_explicit_dtype\d+|test_masked_state_structure",
    "no attribute 'dtype'|different structures",
    "the state holds no `trace`, but a `velocity`",
)
# By variant.
DIFFERENCES: dict[str, list[Difference]] = {
    "outside": [NO_COMPLEX, NOT_REAL, WIDE],
    "inside": [NO_COMPLEX, NOT_REAL, NO_TRACE],
    "aggmo": [NO_COMPLEX, NOT_REAL, NO_TRACE],
}


# The plugin of pytest. -------------------------------------------------------------------


class _Uses:
    """Whether what was put in is used in the present test."""

    now = False


def _noted(original: Callable[..., Any], substitute: Callable[..., Any]) -> Callable[..., Any]:
    # With the signature of Optax's, by which some tests decide whether they are for it.
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
    """Puts ours in the place of Optax's, wherever it is."""
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
    """Each test begins without a use."""
    _Uses.now = False
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """The report says whether there was one."""
    report = yield
    report.user_properties.append(("uses", _Uses.now))
    return report


_reports: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes the outcome; of a test of several parts, which have a report each, the worst one."""
    if report.when != "call" and not report.failed:
        return
    first = {"outcome": "passed", "uses": False, "message": ""}
    noted = _reports.setdefault(report.nodeid, first)
    noted["uses"] |= any(value for name, value in report.user_properties if name == "uses")
    if noted["outcome"] != "failed":
        message = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
        noted |= {"outcome": report.outcome, "message": message}


def pytest_sessionfinish() -> None:
    """Writes all reports."""
    if REPORT in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        pathlib.Path(os.environ[REPORT]).write_text(json.dumps(_reports))


# The command. ----------------------------------------------------------------------------


def run(variant: str, tests: list[str]) -> dict[str, dict[str, Any]]:
    """The outcome of each test by its name, whether it used sgd or trace, and what it raised."""
    folder = pathlib.Path(next(iter(optax.__path__)))
    # Not as a part of the run of tests, if this is one.
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(RESULT.parents[2])
    with tempfile.TemporaryDirectory() as out:
        report = pathlib.Path(out) / "report.json"
        # Names are too many for a command line.
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
    """How many pass, and those that do not by their reason.

    Raises:
      SystemExit: a test fails without a reason that is known, or a known one does not occur.
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
        raise SystemExit("\n".join([f"{variant}: not as in DIFFERENCES:", *lines]))
    passed = sum(of["outcome"] == "passed" for of in outcomes.values())
    return {
        "passed": passed,
        "different": {reason: sorted(different[reason]) for reason in sorted(different)},
    }


def measure() -> dict[str, Any]:
    """All variants."""
    folder = pathlib.Path(next(iter(optax.__path__)))
    own = run("optax", [str(path) for path in sorted(folder.rglob("*_test.py"))])
    passed = {name: of for name, of in own.items() if of["outcome"] == "passed"}
    selected = [name for name, of in passed.items() if of["uses"]]
    print(f"{len(own)} tests, {len(passed)} pass with Optax's own, {len(selected)} of these use it")
    found = {}
    for variant in DIFFERENCES:
        outcomes = run(variant, selected)
        assert outcomes.keys() == set(selected)
        found[variant] = sorted_out(variant, outcomes)
        print(f"{variant}: {found[variant]['passed']} of {len(selected)}")
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
    """The third table of docs/works_with.md, and what stands around it."""
    versions, using = result["versions"], result["using"]
    lines = [
        f"Of the {result['tests']:,} tests of Optax {versions['optax']}, {result['passed']:,} pass "
        f"with Optax's own on JAX {versions['jax']} ({result['date']}). {using} of these use `sgd` "
        "or `trace`:",
        "",
        "| in the place of `optax.sgd` | pass | do not, with the reason |",
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
    parser.add_argument("--out", type=pathlib.Path, default=RESULT, metavar="FILE")
    args = parser.parse_args(arguments)
    result = measure()
    print(table(result))
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
