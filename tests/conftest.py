"""Gives the tests eight virtual devices, and 64-bit mode on request."""

import contextlib
import importlib.metadata
import itertools
import os

# JAX reads these when it starts its backend, so they are set before anything imports JAX.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest


@pytest.fixture
def x64():
    """Enables 64-bit arrays for one test."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def as_shipped():
    """Disables the run-time type checker that the tests add, so the package is as users have it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def trained(monkeypatch):
    """Returns a list with the number of runs that each call of `Program.train` trains."""
    from momentum_jax.study import training

    counts = []
    train = training.Program.train

    def noted(self, runs):
        counts.append(len(runs))
        return train(self, runs)

    monkeypatch.setattr(training.Program, "train", noted)
    return counts


ORACLES = ("torch", "keras")


def versions_of_oracles() -> dict[str, str | None]:
    """Returns the version of each framework to compare with, or None if not installed."""
    found: dict[str, str | None] = dict.fromkeys(ORACLES)
    for name in ORACLES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@pytest.fixture
def oracle(request):
    """Skips the test if the framework that it is parametrized with is not installed."""
    if versions_of_oracles()[request.param] is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def pytest_terminal_summary(terminalreporter):
    """Reports the frameworks compared with, so that a missing one is noticed."""
    for name, version in versions_of_oracles().items():
        terminalreporter.write_line(
            f"oracle {name}: "
            + (
                f"{version}, compared with ours"
                if version
                else "not installed: compared only with its recorded trajectories, and no "
                "checkpoint was converted. To install it: pip install -e '.[oracles]'"
            )
        )


def pytest_addoption(parser):
    parser.addoption(
        "--every-case",
        action="store_true",
        help="run every case of each test, not only cases in which each pair of values occurs",
    )


@pytest.hookimpl(tryfirst=True)  # Before `-m` looks at the markers.
def pytest_collection_modifyitems(config, items):
    """Deselects the cases of a grid whose pairs of values all occur in other cases.

    Of the others, those whose values all occur in other cases are slow tests: the pairs are tested
    once, and the values with every version of JAX.
    """
    if config.getoption("--every-case"):
        return
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for cases in tests.values() for item in covering(cases, 2)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
    for cases in tests.values():
        quick = [case for case in cases if case in kept and not case.get_closest_marker("slow")]
        for case in set(quick).difference(covering(quick, 1)):
            case.add_marker("slow")


def covering(cases, size):
    """Returns cases of one test in which all that occurs in `size` parameters together occurs.

    A test with no more parameters than that keeps all of its cases.
    """
    if not cases or not hasattr(cases[0], "callspec") or len(cases[0].callspec.params) <= size:
        return cases
    # The cases share the objects of their parameters, so values are compared by identity.
    left = {
        case: set(
            itertools.combinations([(k, id(v)) for k, v in case.callspec.params.items()], size)
        )
        for case in cases
    }
    found = []
    while any(left.values()):
        found.append(max(left, key=lambda case: len(left[case])))
        seen = left.pop(found[-1])
        left = {case: pairs - seen for case, pairs in left.items()}
    return found
