"""Tests that the closed-form losses have the documented minima, barriers and curvatures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from momentum_jax import theory
from momentum_jax.study import landscapes
from momentum_jax.study.landscapes import double_well, quadratic, safran_shamir

pytestmark = pytest.mark.slow


def descended(problem, learning_rate, mu, steps, params):
    """Runs heavy ball from velocity 0, for a batch of initial params; returns the final params."""

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


# Double well.


WELL = double_well()


def test_the_wells_are_where_the_docstring_says():
    slope, curvature = jax.jit(jax.grad(WELL.loss)), jax.jit(jax.hessian(WELL.loss))
    for x, height in (-1, 0), (1 / 4, 1375 / 3072), (1, 1 / 3):
        point = jnp.array([x, 0.0])
        np.testing.assert_allclose(slope(point), 0, atol=1e-7)
        assert float(WELL.loss(point)) == pytest.approx(height, abs=1e-7)
        curvatures = np.linalg.eigvalsh(curvature(point))
        assert (curvatures[0] < 0) == (x == 1 / 4)
    for x in np.linspace(-4, 4, 17):  # There is no other stationary point.
        np.testing.assert_allclose(
            slope(jnp.array([x, 0.7])), [(x + 1) * (x - 0.25) * (x - 1), 0.7], rtol=1e-5, atol=1e-5
        )


def test_only_the_deep_valley_holds_a_solved_run():
    assert set(WELL.solved) == {"loss"}
    assert WELL.loss_cap is not None
    assert 0 < WELL.solved["loss"] < 1 / 3 < WELL.loss_cap
    x = np.linspace(1 / 4, 4, 100_001, dtype=np.float32)
    shallow = jax.jit(jax.vmap(WELL.loss))(np.stack([x, 0 * x], axis=1))
    assert shallow.min() > WELL.solved["loss"]
    assert float(WELL.loss(jnp.array([-1.0, 0.5]))) < WELL.solved["loss"]


def test_the_curvature_of_the_double_well_is_at_most_12():
    x = np.linspace(-2, 2, 1001, dtype=np.float32)
    hessians = jax.jit(jax.vmap(jax.hessian(WELL.loss)))(np.stack([x, 0 * x], axis=1))
    assert np.abs(np.linalg.eigvalsh(hessians)).max() == pytest.approx(12, rel=1e-6)


def test_a_good_share_of_runs_starts_in_the_shallow_valley():
    x, _ = np.asarray(drawn(WELL, 20_000)).T
    assert (x > 1 / 4).mean() == pytest.approx(7 / 16, abs=0.015)
    assert (x > 1.326).mean() == pytest.approx(0.1685, abs=0.01)
    assert float(WELL.loss(jnp.array([1.3260, 0]))) == pytest.approx(WELL.loss_cap, abs=1e-4)


def test_momentum_crosses_the_barrier_from_above_alone():
    assert WELL.loss_cap is not None
    starts = drawn(WELL, 500)
    high = jax.jit(jax.vmap(WELL.loss))(starts) > WELL.loss_cap
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
        assert noisy.data.shape == (landscapes.NOISE_ROWS, dimensions)
        assert (np.float64(noisy.data).sum(axis=0) == 0).all()
        np.testing.assert_allclose(noisy.data.std(axis=0), 0.3, rtol=1e-5)
        w = first(make())
        slope = jax.jit(jax.grad(make().loss))(w)
        np.testing.assert_allclose(
            jax.jit(jax.grad(noisy.loss))(w, noisy.data[:3]),
            slope + noisy.data[:3].mean(0),
            rtol=1e-4,
        )
        assert noisy.loss(w, noisy.test_data) == make().loss(w)  # Measured without noise.
        assert noisy.loss(w, noisy.data[:1]) != make().loss(w)
        assert noisy.for_tuning().evaluate(w, None, noisy.validation_data)["loss"] == make().loss(w)


@pytest.mark.parametrize("make", [double_well, quadratic])
@pytest.mark.parametrize("noise", [-1.0, np.nan, np.inf])
def test_a_noise_that_is_none_is_refused(make, noise):
    with pytest.raises(ValueError, match="noise="):
        make(noise=noise)


# Quadratic.


def test_the_quadratic_has_the_curvatures_asked_for():
    problem = quadratic(condition=100.0, dimensions=5)
    hessian = jax.jit(jax.hessian(problem.loss))(jnp.ones(5))
    np.testing.assert_allclose(hessian, np.diag(10 ** np.array([0, -0.5, -1, -1.5, -2])), rtol=1e-5)
    mean_at_start = jax.jit(jax.vmap(problem.loss))(drawn(problem, 20_000)).mean()
    assert float(mean_at_start) == pytest.approx(1e4 * problem.solved["loss"], rel=0.05)


def test_momentum_solves_the_quadratic_and_plain_descent_does_not_in_that_time():
    problem = quadratic()
    starts = drawn(problem, 100)
    steps = problem.defaults["steps"]
    solved = {
        mu: float(
            (
                jax.jit(jax.vmap(problem.loss))(descended(problem, 1.0, mu, steps, starts))
                <= problem.solved["loss"]
            ).mean()
        )
        for mu in (0.0, 0.9)
    }
    assert solved[0.0] < 0.3
    assert solved[0.9] == 1


def edge(mu, curvature):
    """Returns the largest stable effective learning rate."""
    return theory.stability_limit(mu) / (1 - mu) / curvature


def test_the_rates_of_the_quadratic_reach_beyond_the_edge_of_stability():
    problem = quadratic()
    assert problem.curvature == quadratic(noise=0.1).curvature == 1
    starts = drawn(problem, 5)
    for mu in 0.0, 0.9:
        rates = np.array(problem.defaults["rates"])
        limit = edge(mu, problem.curvature)
        below, above = rates[rates < limit][-1], rates[rates > limit][0]
        for rate, stable in (below, True), (above, False):
            ends = descended(problem, float(rate * (1 - mu)), mu, 500, starts)
            assert (np.abs(ends) < 10).all() == stable


@pytest.mark.parametrize("settings", [dict(condition=0.5), dict(dimensions=1)])
def test_an_impossible_quadratic_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        quadratic(**settings)


# Safran and Shamir.


def closed_form(w):
    """Computes the loss as in the paper, from angles between units, in float64."""
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
    assert 4 * deviation < 0.01 * closed_form(w)  # Otherwise the assertion above would be too weak.


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
        eye,  # Every unit equals a unit of the teacher.
        eye[::-1],
        -eye,
        np.ones((4, 4), np.float32),  # All units are equal.
        np.repeat(eye[:1], 4, axis=0),
        np.concatenate([eye[:2], -eye[:2]]),
    ):
        assert np.isfinite(slope(w)).all()
        assert np.isfinite(curvature(w)).all()
        assert float(loss(w)) == pytest.approx(closed_form(w), abs=1e-6)
    np.testing.assert_allclose(slope(eye), 0, atol=1e-6)
    dead = np.diag(np.array([1, 1, 1, 0], np.float32))
    assert float(loss(dead)) == pytest.approx(0.25)  # 1/2 E relu(x)^2.
    assert np.isfinite(slope(dead)).all()
    assert np.isfinite(slope(np.zeros_like(eye))).all()


@pytest.mark.parametrize("problem", [double_well(), safran_shamir(4)], ids=lambda p: p.name)
def test_the_rates_reach_from_stable_to_unstable(problem):
    rates, starts = problem.defaults["rates"], drawn(problem, 10)
    for rate, stable in (problem.defaults["learning_rate"], True), (rates[-1], False):
        losses = jax.jit(jax.vmap(problem.loss))(descended(problem, rate, 0.0, 100, starts))
        assert (np.asarray(losses) <= 10).all() == stable


@pytest.mark.parametrize("units", [2, 6, 20])
def test_the_global_minimum_is_zero_and_silence_is_the_worst(units):
    problem = safran_shamir(units)
    loss = jax.jit(problem.loss)
    order = np.random.default_rng(0).permutation(units)
    assert float(loss(np.eye(units, dtype=np.float32)[order])) == pytest.approx(0, abs=2e-7)
    silent = float(loss(np.zeros((units, units), np.float32)))
    assert silent == pytest.approx(problem.loss_cap, rel=1e-6)


def test_gradient_descent_ends_at_zero_or_in_a_spurious_minimum():
    problem = safran_shamir(8)
    learning_rate, steps = (problem.defaults[name] for name in ("learning_rate", "steps"))
    ends = descended(problem, learning_rate, 0.0, steps, drawn(problem, 40))
    losses = np.asarray(jax.jit(jax.vmap(problem.loss))(ends))
    solved = losses <= problem.solved["loss"]
    assert 0.6 < solved.mean() < 0.97
    lowest = losses[~solved].argmin()
    # It is a spurious minimum and not a slow run: zero gradient, positive curvature.
    spurious = np.asarray(ends)[~solved][lowest]
    assert losses[~solved][lowest] == pytest.approx(0.0215, abs=2e-4)
    assert np.abs(jax.jit(jax.grad(problem.loss))(spurious)).max() < 1e-3
    hessian = jax.jit(jax.hessian(lambda w: problem.loss(w.reshape(8, 8))))(spurious.ravel())
    assert np.linalg.eigvalsh(hessian).min() > 0


def test_one_unit_is_refused():
    with pytest.raises(ValueError, match="units=1"):
        safran_shamir(units=1)
