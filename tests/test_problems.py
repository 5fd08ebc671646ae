"""The problems are what their docstrings say."""

import random
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from momentum_jax.study import problems
from momentum_jax.study.problems import Problem, digits, double_well, quadratic, safran_shamir


@pytest.fixture(scope="module")
def digits16():
    return digits(hidden=16)


@pytest.fixture(scope="module")
def series():
    pytest.importorskip("mnist1d")
    return problems.mnist1d(channels=4)


def descended(problem, learning_rate, mu, steps, params):
    """Params after heavy ball from rest, from each of a batch of initial params."""

    def run(w):
        def step(_, carry):
            w, v = carry
            v = mu * v - learning_rate * jax.grad(problem.loss)(w)
            return w + v, v

        return jax.lax.fori_loop(0, steps, step, (w, jnp.zeros_like(w)))[0]

    return jax.jit(jax.vmap(run))(params)


def first(problem):
    return jax.jit(problem.init)(jax.random.key(0))


def drawn(problem, runs):
    return jax.jit(jax.vmap(problem.init))(jax.random.split(jax.random.key(0), runs))


# Problem


def test_a_problem_needs_two_functions_only():
    problem = Problem(lambda key: jnp.ones(3), lambda w: w @ w)
    assert problem.metric is problem.data is problem.test is None
    assert problem.worst is problem.solved_loss is problem.solved_metric is None
    assert problem.defaults == {}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(test=np.zeros(3)), "need data"),
        (dict(solved_metric=0.5), "solved_metric=0.5 needs a metric"),
        (dict(data={"x": np.zeros(3), "y": np.zeros(4)}), r"\[3, 4\]"),
        (dict(data=np.zeros(0)), r"\[0\]"),
        (dict(data=1.0), "none"),
        (dict(data={}), "none"),
        (dict(data=np.zeros(3), test={"x": np.zeros(3), "y": np.zeros(2)}), "test must hold"),
        (dict(defaults=dict(lr=0.1)), r"\['lr'\]"),
    ],
)
def test_a_field_without_effect_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Problem(lambda key: jnp.ones(3), lambda w, batch=None: w @ w, **fields)


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_every_problem_can_be_vmapped_and_has_defaults_that_fit_it(name):
    if name == "mnist1d":
        pytest.importorskip("mnist1d")
    problem = problems.PROBLEMS[name]()
    params = drawn(problem, 3)
    batch = () if problem.data is None else (jax.tree.map(lambda x: x[:5], problem.data),)
    losses, grads = jax.jit(
        jax.vmap(jax.value_and_grad(problem.loss), in_axes=(0, *(None for _ in batch)))
    )(params, *batch)
    assert losses.shape == (3,)
    assert len(set(np.asarray(losses))) == 3  # every run starts elsewhere
    assert all(np.isfinite(g).all() and g.dtype == np.float32 for g in jax.tree.leaves(grads))
    has_data = {"batch_size"} if batch else set()
    assert set(problem.defaults) == {"learning_rate", "steps", "init_scales"} | has_data


# find


def test_find_knows_the_names():
    assert problems.find("double-well").name == "double well"
    assert set(problems.PROBLEMS) == {
        "digits", "mnist1d", "double-well", "safran-shamir", "quadratic",
    }  # fmt: skip


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
        ("digit", "digits, mnist1d, double-well, safran-shamir, quadratic"),
        ("{own}", "own.py:object"),
        ("{own}x:flat", "no problem is called"),
        ("{own}/none.py:flat", "there is no file"),
        ("{own}:flatt", r"no 'flatt': it has broken, flat, steep\.$"),
        ("{own}:sloped", "sloped.. of .* fails: TypeError: .*slope"),
        ("{own}:broken", "RuntimeError: first line second line"),
        ("{own}:number", "number of .* is of type int"),
        ("{own}:Settings", "is of type type"),
        ("{bad}:flat", "bad.py does not import: SyntaxError"),
        ("{exits}:flat", "exits.py does not import: SystemExit: 3"),
    ],
)
def test_find_says_in_one_line_what_there_is(own, text, says):
    (own.parent / "bad.py").write_text("flat = = 1\n")
    (own.parent / "exits.py").write_text("raise SystemExit(3)\n")
    paths = dict(own=own, bad=own.parent / "bad.py", exits=own.parent / "exits.py")
    with pytest.raises(ValueError, match=says) as caught:
        problems.find(text.format(**paths))
    assert "\n" not in str(caught.value)


def test_functions_that_cannot_be_trained_are_refused_in_one_line():
    def draw(key):
        return jax.random.normal(key, (2,))

    def bowl(w):
        return jnp.sum(w**2)

    def broken(w):
        return jnp.sum(w @ jnp.ones(3))

    counted = {"init": lambda key: {"w": draw(key), "n": jnp.arange(3)}, "loss": lambda p: 0.0}
    for change, message in [
        (
            {"loss": lambda w: w**2},
            r"loss\(params\) of odd must return one float, but returns shape",
        ),
        ({"loss": lambda w: jnp.int32(1)}, r"one float, but returns shape \(\) of int32"),
        ({"loss": lambda w: None}, "one float, but returns NoneType"),
        (
            {"loss": broken},
            r"loss\(params\) of odd fails: TypeError: dot_general.*test_problems.py, ",
        ),
        ({"loss": lambda w, batch: bowl(w)}, "fails: TypeError: .* missing 1 required"),
        ({"metric": lambda w: w}, r"metric\(params\) of odd must return one number"),
        ({"loss": bowl, "data": np.ones((3, 1))}, r"loss\(params, batch\) of odd fails: TypeError"),
        ({"init": lambda key, size: key}, r"init\(key\) of odd fails: TypeError"),
        ({"init": lambda key: ()}, r"init\(key\) of odd must return params, but returns \(\)"),
        (counted, r"must return floats, but is int32 at params\['n'\]"),
    ]:
        odd: Any = Problem(**{"init": draw, "loss": bowl, "name": "odd"} | change)
        with pytest.raises(ValueError, match=message) as refused:
            problems.check(odd)
        assert "\n" not in str(refused.value)
    for make in problems.PROBLEMS.values():
        problems.check(make())


def test_a_package_that_is_missing_is_named_with_the_remedy(monkeypatch):
    problems._mnist1d_examples.cache_clear()
    for module in "mnist1d", "mnist1d.data":
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"mnist1d.*pip install 'momentum_jax\[study\]'"):
        problems.find("mnist1d")


# digits


def test_digits_are_split_and_standardized(digits16):
    train, test = digits16.data["x"], digits16.test["x"]
    assert train.shape == (1437, 64)
    assert test.shape == (360, 64)
    deviation = train.std(axis=0)
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(deviation[deviation > 0], 1, atol=1e-4)
    assert set(digits16.data["y"]) == set(digits16.test["y"]) == set(range(10))
    together = {row.tobytes() for row in np.concatenate([train, test])}
    assert len(together) == 1797  # no image is in both parts


def test_loss_and_accuracy_are_those_of_the_network_by_hand(digits16):
    params = first(digits16)
    layers = jax.tree.map(np.float64, params["params"])
    x, y = np.float64(digits16.test["x"]), digits16.test["y"]
    hidden = np.maximum(x @ layers["hidden_layer"]["kernel"] + layers["hidden_layer"]["bias"], 0)
    logits = hidden @ layers["logits"]["kernel"] + layers["logits"]["bias"]
    log_sum = np.log(np.exp(logits).sum(-1))
    loss = (log_sum - logits[np.arange(len(y)), y]).mean()
    assert float(jax.jit(digits16.loss)(params, digits16.test)) == pytest.approx(loss, rel=1e-5)
    assert float(jax.jit(digits16.metric)(params, digits16.test)) == pytest.approx(
        (logits.argmax(-1) == y).mean()
    )


def test_guessing_costs_what_the_problem_says(digits16):
    params = jax.tree.map(np.zeros_like, first(digits16))
    assert float(jax.jit(digits16.loss)(params, digits16.test)) == pytest.approx(digits16.worst)


# mnist1d


def test_mnist1d_has_the_published_sizes(series):
    assert series.data["x"].shape == (4000, 40)
    assert series.test["x"].shape == (1000, 40)
    assert set(series.data["y"]) == set(series.test["y"]) == set(range(10))
    together = np.concatenate([series.data["x"], series.test["x"]])
    assert together.mean() == pytest.approx(0, abs=1e-5)
    assert together.std() == pytest.approx(1, abs=1e-5)
    assert len({row.tobytes() for row in together}) == 5000


def test_mnist1d_leaves_the_global_generators_alone(series):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002  the global generator is what this is about
    expected = random.random(), np.random.random()  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    problems._mnist1d_examples.cache_clear()
    again, _ = problems._mnist1d_examples()
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002
    np.testing.assert_array_equal(again["x"], series.data["x"])


def test_the_conv_net_is_three_strided_convolutions(series):
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda w: np.float32(w + 0.1 * random.normal(size=w.shape)), first(series)
    )
    layers = jax.tree.map(np.float64, params["params"])
    few = {"x": series.test["x"][:7], "y": series.test["y"][:7]}
    h = np.asarray(few["x"], np.float64)[..., None]
    for layer, width in (1, 5), (2, 3), (3, 3):
        kernel, bias = (layers[f"convolution_{layer}"][name] for name in ("kernel", "bias"))
        kernel = kernel.reshape(width, h.shape[2], 4)
        out = np.zeros((7, (h.shape[1] - width) // 2 + 1, 4))
        for position in range(out.shape[1]):
            for offset in range(width):
                out[:, position] += h[:, 2 * position + offset] @ kernel[offset]
        h = np.maximum(out + bias, 0)
    logits = h.reshape(7, -1) @ layers["logits"]["kernel"] + layers["logits"]["bias"]
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(7), few["y"]]
    assert float(jax.jit(series.loss)(params, few)) == pytest.approx(losses.mean(), rel=1e-5)
    assert float(jax.jit(series.metric)(params, few)) == pytest.approx(
        (logits.argmax(-1) == few["y"]).mean()
    )


# double well


WELL = double_well()


def test_the_wells_are_where_the_docstring_says():
    slope, curvature = jax.jit(jax.grad(WELL.loss)), jax.jit(jax.hessian(WELL.loss))
    for x, height in (-1, 0), (1 / 4, 1375 / 3072), (1, 1 / 3):
        point = jnp.array([x, 0.0])
        np.testing.assert_allclose(slope(point), 0, atol=1e-7)
        assert float(WELL.loss(point)) == pytest.approx(height, abs=1e-7)
        curvatures = np.linalg.eigvalsh(curvature(point))
        assert (curvatures[0] < 0) == (x == 1 / 4)
    for x in np.linspace(-4, 4, 17):  # no other stationary point
        np.testing.assert_allclose(
            slope(jnp.array([x, 0.7])), [(x + 1) * (x - 0.25) * (x - 1), 0.7], rtol=1e-5, atol=1e-5
        )


def test_only_the_deep_valley_holds_a_solved_run():
    assert WELL.solved_loss is not None
    assert WELL.worst is not None
    assert 0 < WELL.solved_loss < 1 / 3 < WELL.worst
    x = np.linspace(1 / 4, 4, 100_001, dtype=np.float32)
    shallow = jax.jit(jax.vmap(WELL.loss))(np.stack([x, 0 * x], axis=1))
    assert shallow.min() > WELL.solved_loss
    assert float(WELL.loss(jnp.array([-1.0, 0.5]))) < WELL.solved_loss


def test_the_curvature_of_the_double_well_is_at_most_12():
    x = np.linspace(-2, 2, 1001, dtype=np.float32)
    hessians = jax.jit(jax.vmap(jax.hessian(WELL.loss)))(np.stack([x, 0 * x], axis=1))
    assert np.abs(np.linalg.eigvalsh(hessians)).max() == pytest.approx(12, rel=1e-6)


def test_a_good_share_of_runs_starts_in_the_shallow_valley():
    x, _ = np.asarray(drawn(WELL, 20_000)).T
    assert (x > 1 / 4).mean() == pytest.approx(7 / 16, abs=0.015)
    assert (x > 1.326).mean() == pytest.approx(0.1685, abs=0.01)
    assert float(WELL.loss(jnp.array([1.3260, 0]))) == pytest.approx(WELL.worst, abs=1e-4)


def test_momentum_crosses_the_barrier_from_above_alone():
    assert WELL.worst is not None
    starts = drawn(WELL, 500)
    high = jax.jit(jax.vmap(WELL.loss))(starts) > WELL.worst
    started_deep = starts[:, 0] < 1 / 4
    plain, heavy = (
        descended(WELL, 2 * (1 - 0.9) / 12, mu, 3000, starts)[:, 0] < 1 / 4 for mu in (0.0, 0.9)
    )
    assert (plain == started_deep).all()
    assert (heavy == started_deep)[~high].all()
    assert 0.02 < (heavy & ~started_deep).mean() < 0.2


def test_noise_has_mean_exactly_zero_and_the_deviation_asked_for():
    for make, dimensions in (double_well, 2), (quadratic, 20):
        noisy = make(noise=0.3)
        assert noisy.data.shape == (problems.NOISE_ROWS, dimensions)
        assert (np.float64(noisy.data).sum(axis=0) == 0).all()
        np.testing.assert_allclose(noisy.data.std(axis=0), 0.3, rtol=1e-5)
        w = first(make())
        slope = jax.jit(jax.grad(make().loss))(w)
        np.testing.assert_allclose(
            jax.jit(jax.grad(noisy.loss))(w, noisy.data[:3]),
            slope + noisy.data[:3].mean(0),
            rtol=1e-4,
        )
        assert noisy.loss(w, noisy.test) == make().loss(w)  # measured without noise
        assert noisy.loss(w, noisy.data[:1]) != make().loss(w)


@pytest.mark.parametrize("make", [double_well, quadratic])
@pytest.mark.parametrize("noise", [-1.0, np.nan, np.inf])
def test_a_noise_that_is_none_is_refused(make, noise):
    with pytest.raises(ValueError, match="noise="):
        make(noise=noise)


# quadratic


def test_the_quadratic_has_the_curvatures_asked_for():
    problem = quadratic(condition=100.0, dimensions=5)
    hessian = jax.jit(jax.hessian(problem.loss))(jnp.ones(5))
    np.testing.assert_allclose(hessian, np.diag(10 ** np.array([0, -0.5, -1, -1.5, -2])), rtol=1e-5)
    assert problem.solved_loss is not None
    mean_at_start = jax.jit(jax.vmap(problem.loss))(drawn(problem, 20_000)).mean()
    assert float(mean_at_start) == pytest.approx(1e4 * problem.solved_loss, rel=0.05)


def test_momentum_solves_the_quadratic_and_plain_descent_does_not_in_that_time():
    problem = quadratic()
    starts = drawn(problem, 100)
    steps = problem.defaults["steps"]
    assert problem.solved_loss is not None
    solved = {
        mu: float(
            (
                jax.jit(jax.vmap(problem.loss))(descended(problem, 1.0, mu, steps, starts))
                <= problem.solved_loss
            ).mean()
        )
        for mu in (0.0, 0.9)
    }
    assert solved[0.0] < 0.3
    assert solved[0.9] == 1


@pytest.mark.parametrize("settings", [dict(condition=0.5), dict(dimensions=1)])
def test_an_impossible_quadratic_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        quadratic(**settings)


# Safran and Shamir


def closed_form(w):
    """The loss as the paper has it: angles between units, in float64."""
    w = np.asarray(w, np.float64)

    def total(a, b):
        norms = np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        angle = np.arccos(np.clip(a @ b.T / norms, -1, 1))
        return (norms * (np.sin(angle) + (np.pi - angle) * np.cos(angle))).sum() / (2 * np.pi)

    teacher = np.eye(len(w))
    return (total(w, w) - 2 * total(w, teacher) + total(teacher, teacher)) / 2


def test_the_closed_form_is_the_mean_over_gaussian_inputs():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(6, 6)) / np.sqrt(6)
    x = rng.normal(size=(1_000_000, 6))
    errors = (np.maximum(x @ w.T, 0).sum(1) - np.maximum(x, 0).sum(1)) ** 2 / 2
    deviation = errors.std() / np.sqrt(len(errors))
    assert abs(errors.mean() - closed_form(w)) < 4 * deviation
    assert 4 * deviation < 0.01 * closed_form(w)  # or the line above would say nothing


@pytest.mark.parametrize("units", [2, 6, 10, 20])
def test_the_loss_is_that_of_the_paper_to_float32(units):
    loss = jax.jit(safran_shamir(units).loss)
    rng = np.random.default_rng(units)
    for distance in np.repeat([1e-4, 1e-3, 1e-2, 0.1, 1.0], 20):
        near = np.eye(units)[rng.permutation(units)]
        w = np.float32(near + distance * rng.normal(size=(units, units)))
        assert float(loss(w)) == pytest.approx(closed_form(w), rel=2e-6, abs=4e-7)


def test_the_slope_is_that_of_the_loss():
    slope = jax.jit(jax.grad(safran_shamir(6).loss))
    rng = np.random.default_rng(0)
    for scale in 0.01, 0.4, 2.0:
        w = np.float32(scale * rng.normal(size=(6, 6)))
        h = 1e-6 * scale
        numeric = [
            (closed_form(w + h * e) - closed_form(w - h * e)) / (2 * h)
            for e in np.eye(36).reshape(-1, 6, 6)
        ]
        np.testing.assert_allclose(np.ravel(slope(w)), numeric, rtol=1e-4, atol=2e-5)


def test_slope_and_curvature_are_finite_where_units_are_equal_opposite_or_dead():
    loss = jax.jit(safran_shamir(4).loss)
    slope, curvature = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    eye = np.eye(4, dtype=np.float32)
    for w in (
        eye,  # every unit is one of the teacher's
        eye[::-1],
        -eye,
        np.ones((4, 4), np.float32),  # all are the same
        np.repeat(eye[:1], 4, axis=0),
        np.concatenate([eye[:2], -eye[:2]]),
    ):
        assert np.isfinite(slope(w)).all()
        assert np.isfinite(curvature(w)).all()
        assert float(loss(w)) == pytest.approx(closed_form(w), abs=1e-6)
    np.testing.assert_allclose(slope(eye), 0, atol=1e-6)
    dead = np.diag(np.array([1, 1, 1, 0], np.float32))
    assert float(loss(dead)) == pytest.approx(0.25)  # 1/2 E relu(x)^2
    assert np.isfinite(slope(dead)).all()
    assert np.isfinite(slope(np.zeros_like(eye))).all()


@pytest.mark.parametrize("units", [2, 6, 20])
def test_the_global_minimum_is_zero_and_silence_is_the_worst(units):
    problem = safran_shamir(units)
    loss = jax.jit(problem.loss)
    order = np.random.default_rng(0).permutation(units)
    assert float(loss(np.eye(units, dtype=np.float32)[order])) == pytest.approx(0, abs=2e-7)
    silent = float(loss(np.zeros((units, units), np.float32)))
    assert silent == pytest.approx(problem.worst, rel=1e-6)


def test_gradient_descent_ends_at_zero_or_in_a_spurious_minimum():
    problem = safran_shamir(8)
    learning_rate, steps = (problem.defaults[name] for name in ("learning_rate", "steps"))
    ends = descended(problem, learning_rate, 0.0, steps, drawn(problem, 40))
    losses = np.asarray(jax.jit(jax.vmap(problem.loss))(ends))
    solved = losses <= problem.solved_loss
    assert 0.6 < solved.mean() < 0.97
    lowest = losses[~solved].argmin()
    # A spurious minimum it is, and not a slow run: nothing pulls there, and every way is up.
    spurious = np.asarray(ends)[~solved][lowest]
    assert losses[~solved][lowest] == pytest.approx(0.0215, abs=2e-4)
    assert np.abs(jax.jit(jax.grad(problem.loss))(spurious)).max() < 1e-3
    hessian = jax.jit(jax.hessian(lambda w: problem.loss(w.reshape(8, 8))))(spurious.ravel())
    assert np.linalg.eigvalsh(hessian).min() > 0


def test_one_unit_is_refused():
    with pytest.raises(ValueError, match="units=1"):
        safran_shamir(units=1)
