"""Training through other libraries, and what docs/works_with.md says of it.

Flax NNX has a file of its own, which runs beside this one.
"""

import json
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from works_with import (
    CLIENTS,
    INPUTS,
    OTHERS,
    OUTPUTS,
    STEPS,
    TRANSFORMATIONS,
    VELOCITY_DTYPES,
    Cell,
    Linear,
    bits,
    check,
    expected,
    gradients,
    make,
    mj,
    plain_loop,
    plain_step,
    start,
    table,
    whole,
)

from benchmarks import clients, optax_suite

PAGE = Path(__file__).parents[1] / "docs" / "works_with.md"


@pytest.mark.slow
@pytest.mark.parametrize("velocity_dtype", VELOCITY_DTYPES, ids=str)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("name", OTHERS)
def test_c6_a_client_trains_as_a_plain_loop(name, transformation, velocity_dtype, tmp_path):
    check(name, Cell(transformation, velocity_dtype, tmp_path))


@pytest.mark.slow
def test_the_cells_differ():
    """Each transformation and each dtype ends elsewhere, so that none passes for another."""
    ends = {
        (name, dtype): bits(expected(name, dtype)[0])
        for name in TRANSFORMATIONS
        for dtype in VELOCITY_DTYPES
        if name not in ("trace", "kahan")
    }
    for cell, end in ends.items():
        assert [other for other in ends if ends[other] == end] == [cell]
    # At a constant learning rate it does not matter on which side of the velocity it is.
    assert bits(expected("trace", None)[0]) == ends["momentum", None]
    restarted, going_on = (expected(n, None, "valley")[0] for n in ("adaptive_restart", "momentum"))
    assert bits(restarted) != bits(going_on)
    for dtype in VELOCITY_DTYPES:
        # What it keeps moves the params: without it, and without it in the second step alone.
        kept, grads = expected("kahan", dtype)[0], gradients(jnp.bfloat16)
        first = start(jnp.bfloat16)
        assert bits(kept) != bits(plain_loop(make("momentum", dtype), first, grads)[0])
        tx, params = make("kahan", dtype), first
        state = tx.init(params)
        for i, each in enumerate(grads):
            params, state = plain_step(tx, params, state, each)
            if i == 0:
                cleared = jax.tree.map(jnp.zeros_like, state.compensation)
                state = state._replace(compensation=cleared)
        assert bits(kept) != bits(params)


def test_equinox_own_apply_updates_widens_params_of_16_bits():
    """Why the row of Equinox uses another one: it adds, and does not round to the param's dtype."""
    params = Linear(**start(jnp.bfloat16), name="linear")
    params = eqx.filter(params, eqx.is_inexact_array)
    tx = mj.kahan(mj.momentum(0.25))
    updates, _ = tx.update(params, tx.init(params), params)
    assert eqx.apply_updates(params, updates).kernel.dtype == jnp.float32
    assert mj.apply_updates(params, updates).kernel.dtype == jnp.bfloat16


# Each with a traced hyperparameter within a transformation of ours.
UNSEEN = {
    "momentum": lambda rate: mj.momentum(rate, 0.5),
    "mu": lambda rate: mj.momentum(0.1, 5 * rate),
    "trace": lambda rate: optax.chain(mj.trace(5 * rate), optax.scale(-0.1)),
    "qhm": lambda rate: mj.qhm(rate, 0.5),
    "aggmo": lambda rate: mj.aggmo(rate),
    "adaptive_restart": lambda rate: mj.adaptive_restart(
        optax.chain(mj.trace(0.5), optax.scale_by_learning_rate(rate))
    ),
    "kahan": lambda rate: mj.kahan(optax.chain(mj.trace(0.5), optax.scale_by_learning_rate(rate))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSEEN)
def test_optimistix_does_not_find_a_traced_hyperparameter_of_ours_if_it_differentiates(name):
    """It looks for arrays in the closures of a transformation, and finds those of Optax alone."""
    optx = pytest.importorskip("optimistix")

    def grads(make):
        def solve(learning_rate, target):
            solver = optx.OptaxMinimiser(make(learning_rate), rtol=1e-6, atol=1e-6)
            distance = lambda y, args: jnp.sum((y - args) ** 2)  # noqa: E731
            return optx.minimise(distance, solver, jnp.zeros(2), target).value.sum()

        return jax.jit(jax.grad(solve, argnums=1))(0.1, jnp.array([1.0, 2.0]))

    with pytest.raises(TypeError, match=r"No constant handler for type|not a valid JAX type"):
        grads(UNSEEN[name])
    found = grads(lambda rate: optax.chain(mj.trace(0.5), optax.scale_by_learning_rate(rate)))
    np.testing.assert_allclose(found, 1.0)


# The page. -------------------------------------------------------------------------------


def test_the_table_of_the_page_is_that_of_the_tests():
    assert table() in PAGE.read_text()
    assert len(re.findall(r"^\| \w.* \|$", PAGE.read_text(), re.MULTILINE)) == len(CLIENTS) + 1


def test_the_oldest_versions_of_the_page_are_those_that_are_supported():
    """And tested: JAX, Optax, Flax and Orbax in a lane of their own."""
    (oldest,) = re.findall(r"oldest supported versions \(([^)]*)\)", PAGE.read_text())
    found = dict(each.split() for each in oldest.replace("\n", " ").split(", "))
    root = PAGE.parents[1]
    lane = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (root / "constraints-oldest.txt").read_text(), re.M)
    )
    project = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (root / "pyproject.toml").read_text()))
    for name, version in found.items():
        distribution = {"Orbax": "orbax-checkpoint"}.get(name, name.lower())
        supported = lane.get(distribution) or project[distribution]
        assert version.removesuffix(".0") == supported.removesuffix(".0"), name


PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=[str(i) for i in range(len(PROGRAMS))])
def test_a_program_of_the_page_prints_what_its_comments_say(program, capsys):
    for name in re.findall(r"^import (haiku|optimistix|numpyro)\b", program, re.MULTILINE):
        pytest.importorskip(name)
    if "nnx" in program and "optax.partition" in program:
        pytest.importorskip("flax", minversion="0.12")  # As the page says.
    exec(program, {})
    said = re.findall(r"^print\(.*\)  # (.+)$", program, re.MULTILINE)
    assert said
    assert capsys.readouterr().out.splitlines() == said


def test_what_was_tested_by_hand_has_every_client_and_is_what_the_page_says():
    """Each cell of benchmarks/results/clients.json is "ok", or says why not."""
    results = json.loads(clients.RESULT.read_text())
    assert results.keys() == clients.CLIENTS.keys()
    for distribution, of in results.items():
        assert of["cells"].keys() == clients.TRANSFORMATIONS.keys()
        # The page says that all are as they should be.
        assert set(of["cells"].values()) == {"ok"}
        assert {"python", "jax", "optax", distribution} == of["versions"].keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", of["date"])


def sum_of_squares(tx):
    """A client that needs nothing to be installed."""
    params = start = {"w": jnp.asarray(whole((INPUTS, OUTPUTS), 3, 8))}
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = plain_step(tx, params, state, params)
    return start, params


@pytest.mark.slow
@pytest.mark.parametrize("name", clients.TRANSFORMATIONS)
def test_the_script_finds_what_is_wrong(name, monkeypatch):
    """Right params are ok; other params, other dtypes and errors are not."""
    by_sgd = clients.changes(sum_of_squares(optax.sgd(clients.LEARNING_RATE, clients.MU)))
    assert clients.cell(sum_of_squares, name, by_sgd) == "ok"

    def raises(tx):
        raise TypeError("no such thing")

    assert clients.cell(raises, name, by_sgd) == "refused: TypeError: no such thing"
    found = clients.cell(sum_of_squares, name, [0 * x for x in by_sgd])
    assert found == "error: no param moved with optax.sgd"
    for factor in (2, 1.1):
        found = clients.cell(sum_of_squares, name, [factor * x for x in by_sgd])
        assert "differs from optax.sgd" in found
    # A client that does not use the updates, and one that makes NaN of them.
    for scale, said in ((0.0, "no param moved"), (np.nan, "some params are not finite")):

        def scaled(tx, scale=scale):
            return sum_of_squares(optax.chain(tx, optax.scale(scale)))

        assert clients.cell(scaled, name, by_sgd) == f"error: {said}"
    monkeypatch.setitem(clients.TRANSFORMATIONS, name, lambda: optax.sgd(0.01))
    assert "no array of the state is" in clients.cell(sum_of_squares, name, by_sgd)
    cast = optax.stateless(lambda updates, params: updates)._replace(
        init=lambda params: jnp.zeros((), jnp.bfloat16),
        update=lambda updates, state, params=None: (updates, jnp.zeros((), jnp.float32)),
    )
    monkeypatch.setitem(clients.TRANSFORMATIONS, name, lambda: cast)
    assert clients.cell(sum_of_squares, name, by_sgd) == "error: the state changes its dtypes"


# Optax's own tests. ----------------------------------------------------------------------


def test_what_optax_own_tests_found_has_all_variants():
    """And each difference that is known."""
    result = json.loads(optax_suite.RESULT.read_text())
    assert result["variants"].keys() == optax_suite.DIFFERENCES.keys()
    for variant, of in result["variants"].items():
        reasons = {known.reason for known in optax_suite.DIFFERENCES[variant]}
        assert of["different"].keys() == reasons
        assert of["passed"] + sum(map(len, of["different"].values())) == result["using"]
        assert f"| {of['passed']} of {result['using']} |" in optax_suite.table(result)


@pytest.mark.slow
def test_the_script_puts_ours_into_the_tests_of_optax():
    """A file of them: the test uses what was put in, and passes or not as it does alone."""
    name = "transforms/_masking_test.py::MaskedTest::test_masked_state_structure"
    if optax.__version__ != json.loads(optax_suite.RESULT.read_text())["versions"]["optax"]:
        pytest.skip("the script is for the tests of the version of Optax in its result")
    found = {variant: optax_suite.run(variant, [name])[name] for variant in ("optax", "inside")}
    assert found["optax"] == {"outcome": "passed", "uses": True, "message": ""}
    assert (found["inside"]["outcome"], found["inside"]["uses"]) == ("failed", True)
    assert "different structures" in found["inside"]["message"]


def test_the_script_tells_known_differences_from_others():
    ok = {"outcome": "passed", "uses": True, "message": ""}
    known = {
        "a::test_explicit_dtype6": "TypeError: velocity_dtype='complex64' must be None or one of",
        "a::test_explicit_dtype24": "TypeError: which velocity_dtype=bfloat16 cannot hold",
        "a::test_explicit_dtype9": "AssertionError: dtype(bfloat16) != dtype('float32')",
    }
    outcomes = {name: ok | {"outcome": "failed", "message": said} for name, said in known.items()}
    found = optax_suite.sorted_out("outside", outcomes | {"a::test_other": ok})
    assert found["passed"] == 1
    assert sorted(name for names in found["different"].values() for name in names) == sorted(known)
    for other in (
        {"outcome": "failed", "message": "AssertionError: 1 != 2"},
        {"outcome": "skipped", "message": ""},
        {"uses": False},
    ):
        said = r"outside: the failures differ from DIFFERENCES:\na::test_other"
        with pytest.raises(SystemExit, match=said):
            optax_suite.sorted_out("outside", outcomes | {"a::test_other": ok | other})
    del outcomes["a::test_explicit_dtype9"]
    with pytest.raises(SystemExit, match="does not occur: the velocity of a bfloat16 param"):
        optax_suite.sorted_out("outside", outcomes)
