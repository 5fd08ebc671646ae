"""Eight virtual devices and 64-bit mode on request, for every test."""

import contextlib
import importlib.metadata
import os

# Read when JAX starts its backend, so set before anything imports it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest


@pytest.fixture
def x64():
    """64-bit arrays for the length of one test."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def as_shipped():
    """The package as users have it: without the type checker that the tests put around it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def trained(monkeypatch):
    """How many runs of a study were trained, by call."""
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
    """The version of each framework that is compared with where it is installed, or None."""
    found: dict[str, str | None] = dict.fromkeys(ORACLES)
    for name in ORACLES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@pytest.fixture
def oracle(request):
    """Skips the test where the framework that it is parametrized by is not installed."""
    if versions_of_oracles()[request.param] is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def pytest_terminal_summary(terminalreporter):
    """Names what was compared with, so that no oracle is missed silently."""
    for name, version in versions_of_oracles().items():
        terminalreporter.write_line(
            f"oracle {name}: "
            + (
                f"{version}, run beside ours"
                if version
                else "not installed, so that ours was compared with its recorded trajectories "
                "alone and no job was carried over from it: pip install -e '.[oracles]'"
            )
        )


def pytest_addoption(parser):
    parser.addoption(
        "--each-once",
        action="store_true",
        help="of each parametrized test, run few cases, in which each value occurs",
    )


def pytest_collection_modifyitems(config, items):
    """Leaves out the cases that `--each-once` does not ask for."""
    if not config.getoption("--each-once"):
        return
    families = {}
    for item in items:
        families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for cases in families.values() for item in each_once(cases)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def each_once(cases):
    """Few cases of one test, in which each value of each of its parameters occurs."""
    if not hasattr(cases[0], "callspec"):
        return cases
    # A product of parameters shares its values, which are compared by identity.
    left = {case: {(k, id(v)) for k, v in case.callspec.params.items()} for case in cases}
    found = []
    while any(left.values()):
        found.append(max(left, key=lambda case: len(left[case])))
        seen = left.pop(found[-1])
        left = {case: values - seen for case, values in left.items()}
    return found
