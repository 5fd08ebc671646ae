"""Compares theory with measurements of the optimizer: rates, variances and energies."""

import decimal
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_jax
from momentum_jax import theory
from momentum_jax.theory import _formulas

mj: Any = momentum_jax  # Any: Optax's types of trees are too wide for arithmetic.

pytestmark = pytest.mark.usefixtures("x64")

SPECTRUM = np.geomspace(0.05, 2.0, 24)  # curvatures from m to L
SMOOTHNESS, STRONG_CONVEXITY = SPECTRUM[-1], SPECTRUM[0]


def distances(tx, steps, curvatures=SPECTRUM):
    """Returns the distance to the minimum of a quadratic after each step, starting from ones."""

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(curvatures * w, state)
        w = w + updates
        return (w, state), jnp.linalg.norm(w)

    start = jnp.ones(len(curvatures))
    return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), None, steps)[1])()


def measured_rate(tx, steps=4000, curvatures=SPECTRUM):
    """Returns the factor per step for the distance, over the last half of the float64 range."""
    found = np.asarray(distances(tx, steps, curvatures))
    end = int(np.argmax(found < 1e-200)) or steps
    half = end // 2
    return (found[end - 1] / found[half - 1]) ** (1 / (end - half))


TUNINGS = {
    "gradient descent": (theory.gradient_descent, False),
    "heavy ball": (theory.heavy_ball, False),
    "Nesterov": (theory.nesterov, True),
    "Nesterov, tuned": (lambda big, small: theory.nesterov(big, small, tuned=True), True),
}


@pytest.mark.parametrize("name", TUNINGS)
def test_the_measured_rate_is_the_predicted_rate(name):
    """The largest spectral radius over the curvatures is the same, up to rounding."""
    make, nesterov = TUNINGS[name]
    tuning = make(SMOOTHNESS, STRONG_CONVEXITY)
    tx = mj.momentum(tuning.learning_rate, tuning.mu, nesterov=nesterov and tuning.mu > 0)
    # A double root adds a factor that grows with the number of steps to the measured rate.
    assert measured_rate(tx) == pytest.approx(tuning.rate, rel=2e-3)
    radii = [
        theory.spectral_radius(tuning.learning_rate, tuning.mu, c, nesterov=nesterov)
        for c in SPECTRUM
    ]
    # At a double root, the square root leaves only half of the accurate digits.
    assert max(radii) == pytest.approx(tuning.rate, rel=1e-7)


def test_the_order_of_the_methods_by_rate():
    """On an ill-conditioned quadratic, each method is faster than the previous one."""
    rates = [make(1000.0, 1.0).rate for make, _ in TUNINGS.values()]
    gradient, ball, standard, tuned = rates
    assert gradient > standard > tuned > ball
    assert theory.triple_momentum(1000.0, 1.0).rate == pytest.approx(standard)
    for make in (*(make for make, _ in TUNINGS.values()), theory.triple_momentum):
        assert make(3.0, 3.0).rate == pytest.approx(0, abs=1e-12)  # k = 1: one step


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9, 0.99, -0.2, -0.6])
def test_spectral_radius_is_that_of_the_iteration(mu, nesterov):
    """One step of the optimizer is linear: compare with its eigenvalues from NumPy."""
    for curvature in (-0.5, 0.0, 0.1, 1.0, 3.0):
        tx = mj.momentum(0.7, mu, nesterov=nesterov and mu != 0)

        def step(w, v, curvature=curvature, tx=tx):
            updates, state = tx.update(curvature * w, mj.MomentumState(jnp.int32(0), v))
            return w + updates, state.velocity

        (a, b), (c, d) = jax.jacobian(step, (0, 1))(1.0, 1.0)
        expected = np.abs(np.linalg.eigvals(np.array([[a, b], [c, d]]))).max()
        got = theory.spectral_radius(0.7, mu, curvature, nesterov=nesterov)
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mu", [-0.8, -0.4, -0.2, 0.0, 0.5, 0.9, 0.99])
def test_stability_limit(mu, nesterov):
    """Runs converge just below it and diverge just above it."""
    limit = theory.stability_limit(mu, nesterov=nesterov)
    for factor, converges in ((0.99, True), (1.01, False)):
        tx = mj.momentum(factor * limit / 2.0, mu, nesterov=nesterov and mu != 0)
        last = float(distances(tx, 20_000, np.array([2.0]))[-1])
        assert last < 1e-6 if converges else not last < 1e6  # NaN, after infinity


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, -0.3])
def test_stationary_variance(mu):
    """20,000 runs in noise start from 0 and reach the predicted variances."""
    rate, curvature, noise = 0.4, 1.5, 0.3
    predicted = theory.stationary_variance(rate, mu, curvature, noise)
    tx = mj.momentum(rate, mu)
    start = jnp.zeros(20_000)

    def step(carry, key):
        w, state = carry
        grads = curvature * w + math.sqrt(noise) * jax.random.normal(key, w.shape)
        updates, state = tx.update(grads, state)
        return (w + updates, state), None

    keys = jax.random.split(jax.random.key(0), 400)
    w, state = jax.lax.scan(step, (start, tx.init(start)), keys)[0]
    # The standard error of a variance of n normal values is sqrt(2 / n) times it: 1%.
    assert float(w.var()) == pytest.approx(predicted.params, rel=0.04)
    assert float(state.velocity.var()) == pytest.approx(predicted.velocity, rel=0.04)
    ratio = (predicted.velocity / rate) / (curvature * predicted.params)
    assert ratio == pytest.approx(2 / (1 + mu))


def test_without_friction_the_modified_energy_is_conserved():
    """Symplectic Euler: |v|^2 / (2 rate) + c w^2 / 2 - c w v / 2 is constant, to 1e-11."""
    rate, curvature = 0.3, 1.7
    tx = mj.momentum(rate, 1.0)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(curvature * w, state)
        v, w = state.velocity, w + updates
        return (w, state), v**2 / (2 * rate) + curvature * w**2 / 2 - curvature * w * v / 2

    start = jnp.float64(1.0)
    _, energy = jax.lax.scan(step, (start, tx.init(start)), None, 1000)
    np.testing.assert_allclose(energy, energy[0], rtol=1e-11)
    assert theory.friction(rate, 1.0) == 0


def lumpy(w):
    """A function with hills and valleys; its curvatures are at most 9.2 in absolute value."""
    return jnp.sum(jnp.cos(3 * w)) + 0.1 * jnp.sum(w**2)


def rise(learning_rate, mu, f, start, steps=500):
    """Returns the largest rise of the energy f + mu |v|^2 / (2 learning_rate) in one step."""
    tx = mj.momentum(learning_rate, mu)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(f)(w), state)
        w = w + updates
        return (w, state), f(w) + mu * jnp.sum(state.velocity**2) / (2 * learning_rate)

    _, energy = jax.lax.scan(step, (start, tx.init(start)), None, steps)
    return jnp.max(jnp.diff(jnp.concatenate([f(start)[None], energy])))


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 0.99])
def test_no_escape_bound(mu):
    """At the bound the energy never rises, also on a function with hills."""
    starts = jax.random.uniform(jax.random.key(1), (64, 2), minval=-4, maxval=4)
    bound = theory.no_escape_bound(mu, 9.2)
    rises = jax.jit(jax.vmap(lambda start: rise(bound, mu, lumpy, start)))(starts)
    assert float(rises.max()) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_no_escape_bound_is_sharp(mu, factor):
    """On a quadratic, just above the bound, the energy rises for some velocity."""
    curvature = 2.0
    rate = factor * theory.no_escape_bound(mu, curvature)
    tx = mj.momentum(rate, mu)

    def energy(w, v):
        return curvature * w**2 / 2 + mu * v**2 / (2 * rate)

    def change(w, v):
        updates, state = tx.update(curvature * w, mj.MomentumState(jnp.int32(0), v))
        return energy(w + updates, state.velocity) - energy(w, v)

    # The change is a quadratic form in (w, v): it is positive somewhere if an eigenvalue is.
    form = jax.hessian(lambda z: change(z[0], z[1]))(jnp.zeros(2))
    assert (float(jnp.linalg.eigvalsh(form).max()) > 1e-9) == (factor > 1)


def test_momentum_cannot_cross_a_barrier_higher_than_its_start():
    """From velocity 0, at the bound, no run leaves the well, for any mu."""

    def double_well(w):  # with a barrier of 1 at 0
        return jnp.sum((w**2 - 1) ** 2)

    starts = jnp.linspace(0.05, 1.4, 100)[:, None]  # in the right well, below the barrier
    smoothness = 12 * 1.42**2 - 4  # on |w| <= 1.42, which no run below the barrier leaves
    for mu in (0.5, 0.9, 0.99):
        bound = theory.no_escape_bound(mu, smoothness)

        def end(start, rate, mu=mu):
            tx = mj.momentum(rate, mu)

            def step(carry, _):
                w, state = carry
                updates, state = tx.update(jax.grad(double_well)(w), state)
                return (w + updates, state), None

            return jax.lax.scan(step, (start, tx.init(start)), None, 2000)[0][0][0]

        ends = jax.jit(jax.vmap(end, (0, None)))(starts, bound)
        assert bool(jnp.all(ends > 0))


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.3, 0.9, 1.0])
def test_the_jacobian_of_a_step_has_determinant_mu_a_dimension(mu):
    """Momentum is conformal symplectic for any function."""
    tx = mj.momentum(0.1, mu)

    def step(z):
        w, v = jnp.split(z, 2)
        updates, state = tx.update(
            jax.grad(lambda w: jnp.sum(jnp.cos(w)) * jnp.prod(w))(w),
            mj.MomentumState(jnp.int32(0), v),
        )
        return jnp.concatenate([w + updates, state.velocity])

    z = jax.random.normal(jax.random.key(0), (6,))
    assert float(jnp.linalg.det(jax.jacobian(step)(z))) == pytest.approx(mu**3, rel=1e-9)


# The methods that QHM includes, each written as in its own paper. -------------------------

CURVATURE = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.1], [0.0, 0.1, 0.4]])
START = np.array([1.0, -2.0, 0.5])
STEPS = 60


def grad(w, t):
    """Returns the gradient of a quadratic, with an added force that changes with time."""
    return CURVATURE @ w + 0.1 * np.cos(t + np.arange(3.0))


def by_qhm(settings):
    """Returns the params at which the gradients are evaluated, for each step."""
    tx = mj.qhm(*settings)
    w = jnp.asarray(START)
    state = tx.init(w)
    found = []
    for t in range(STEPS):
        updates, state = tx.update(jnp.asarray(grad(np.asarray(w), t)), state)
        w = w + updates
        found.append(np.asarray(w))
    return found


def by_pid(kp, ki, kd):
    """Runs the controller, with a smoothed derivative."""
    smoothing = kd / (kd - kp)
    last, total, derivative, w = 0.0, 0.0, 0.0, START
    found = []
    for t in range(STEPS):
        error = -grad(w, t)
        derivative = smoothing * derivative + (1 - smoothing) * (error - last)
        total, last = total + error, error
        w = START + kp * error + ki * total + kd * derivative
        found.append(w)
    return found


def by_accsgd(delta, kappa, xi, epsilon):
    """Runs AccSGD: a short step, and a running average of long steps."""
    a = 1 - epsilon**2 * xi / kappa
    w = u = START
    found = []
    for t in range(STEPS):
        g = grad(w, t)
        u = a * u + (1 - a) * (w - kappa * delta / epsilon * g)
        w = (epsilon * (w - delta * g) + (1 - a) * u) / (epsilon + 1 - a)
        found.append(w)
    return found


def by_look_ahead(rate, beta, gamma):
    """Returns the y of a synthesized Nesterov variant, at which the gradients are evaluated."""
    x = last = START
    found = []
    y = START
    for t in range(STEPS):
        x, last = x + beta * (x - last) - rate * grad(y, t), x
        y = x + gamma * (x - last)
        found.append(y)
    return found


def triple(smoothness, strong_convexity):
    tuning = theory.triple_momentum(smoothness, strong_convexity)
    return tuning.learning_rate, tuning.mu, tuning.gamma


def robust(big, small, r):
    """Returns the settings as in the formulas of the paper."""
    k = big / small
    return (
        k * (1 - r) ** 2 * (1 + r) / big,
        k * r**3 / (k - 1),
        r**3 / ((k - 1) * (1 - r) ** 2 * (1 + r)),
    )


RELATIVES = {
    "PID": (theory.qhm_from_pid(-0.2, 0.3, 0.5), lambda: by_pid(-0.2, 0.3, 0.5)),
    "AccSGD": (
        theory.qhm_from_accsgd(0.1, 40.0, 5.0),
        lambda: by_accsgd(0.1, 40.0, 5.0, 0.7),
    ),
    "AccSGD, epsilon": (
        theory.qhm_from_accsgd(0.05, 100.0, 10.0, epsilon=0.4),
        lambda: by_accsgd(0.05, 100.0, 10.0, 0.4),
    ),
    "synthesized Nesterov": (
        theory.qhm_from_synthesized_nesterov(0.2, 0.7, 0.4),
        lambda: by_look_ahead(0.2, 0.7, 0.4),
    ),
    "robust momentum": (
        theory.qhm_from_robust_momentum(2.5, 0.3, rate=0.75),
        lambda: by_look_ahead(*robust(2.5, 0.3, 0.75)),
    ),
    "triple momentum": (
        theory.qhm_from_triple_momentum(2.5, 0.3),
        lambda: by_look_ahead(*triple(2.5, 0.3)),
    ),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_methods_that_qhm_includes(name):
    """QHM equals 60 steps of the source algorithm in float64 NumPy, to 1e-12."""
    settings, run = RELATIVES[name]
    np.testing.assert_allclose(by_qhm(settings), run(), rtol=1e-10, atol=1e-12)


def test_robust_momentum_at_its_fastest_is_triple_momentum():
    """The formulas of the two papers agree."""
    fastest = theory.triple_momentum(9.0, 1.0).rate
    expected = theory.qhm_from_triple_momentum(9.0, 1.0)
    got = theory.qhm_from_robust_momentum(9.0, 1.0, rate=fastest)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("condition", "rate"), [(10.0, None), (100.0, None), (10.0, 0.75), (10.0, 0.85)]
)
def test_triple_and_robust_momentum_reach_their_rate(condition, rate):
    """They are run as QHM, on a quadratic with two curvatures."""
    if rate is None:
        settings = theory.qhm_from_triple_momentum(condition, 1.0)
        rate = theory.triple_momentum(condition, 1.0).rate
    else:
        settings = theory.qhm_from_robust_momentum(condition, 1.0, rate=rate)
    ends = np.array([1.0, condition])
    assert measured_rate(mj.qhm(*settings), curvatures=ends) <= rate + 2e-3


# At the ends of the range, compared with the formulas in 400 digits. -----------------------

CURVATURES = [
    (1.0, 1.0),
    (1e30, 1e30),
    (1e-30, 1e-30),
    (math.nextafter(1, 2), 1.0),
    (1 + 1e-12, 1.0),
    (1e12, 1.0),
    (1e30, 1e18),
    (1e-18, 1e-30),
    (1e16, 1.0),
    (1e30, 1e-30),
]


@pytest.fixture
def digits():
    """Sets the decimal precision to 400 digits, with a very large exponent range."""
    with decimal.localcontext(prec=400, Emin=-(10**6), Emax=10**6):
        yield


def in_digits(big, small):
    """Returns each tuning, computed by the formulas of the docstrings."""
    big, small = decimal.Decimal(big), decimal.Decimal(small)
    k, one = big / small, decimal.Decimal(1)
    root, root3 = k.sqrt(), (3 * k + 1).sqrt()
    r = 1 - one / root
    ball = (root - 1) / (root + 1)
    return {
        "gradient descent": (2 / (big + small), 0, (k - 1) / (k + 1)),
        "heavy ball": (4 / (big.sqrt() + small.sqrt()) ** 2, ball**2, ball),
        "Nesterov": (1 / big, ball, r),
        "Nesterov, tuned": (4 / (3 * big + small), (root3 - 2) / (root3 + 2), 1 - 2 / root3),
        "triple": (
            (1 + r) / big,
            r**2 / (2 - r),
            r**2 / ((1 + r) * (2 - r)),
            r**2 / (1 - r**2),
            r,
        ),
    }


@pytest.mark.parametrize(("big", "small"), CURVATURES)
def test_tunings_at_the_ends(big, small, digits):
    """The relative error is at most 1e-14; values below 1 stay below 1; the settings converge."""
    expected = in_digits(big, small)
    for name, (make, nesterov) in TUNINGS.items():
        tuning = make(big, small)
        np.testing.assert_allclose(tuning, [float(x) for x in expected[name]], rtol=1e-14)
        assert 0 <= tuning.mu < 1
        assert 0 <= tuning.rate < 1
        for curvature in (big, small):
            radius = theory.spectral_radius(
                tuning.learning_rate, tuning.mu, curvature, nesterov=nesterov
            )
            assert radius < 1
    triple = theory.triple_momentum(big, small)
    np.testing.assert_allclose(triple, [float(x) for x in expected["triple"]], rtol=1e-14)
    assert 0 <= triple.mu < 1
    assert 0 <= triple.rate < 1


MUS = [0.0, 0.5, 0.9, 1 - 1e-12, math.nextafter(1, 0), 1.0, -0.2, -1 / 3, -0.5, -1 + 1e-12]


def side(x):
    """Returns -1 if the radius is below 1 (it converges), 1 if above (it diverges), else 0."""
    return (x > 1) - (x < 1)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mu", MUS)
def test_spectral_radius_at_the_ends(mu, nesterov, digits):
    """The relative error is at most 1e-15, and the side of 1 is right one ulp from the limit."""
    limit = theory.stability_limit(mu, nesterov=nesterov)
    near = [limit, *(math.nextafter(limit, end) for end in (0, math.inf))]
    pairs = [(1.0, a) for a in (*near, 1e-12, 1e-20, 0.1, -1e-30, -1.0, (1 - mu) ** 2 / 4)]
    pairs += [(rate, c) for rate in (0.0, 1e-30, 1e30) for c in (0.0, 1e-30, 1.0, 1e30, -1e30)]
    for rate, curvature in pairs:
        m, a = decimal.Decimal(mu), decimal.Decimal(rate) * decimal.Decimal(curvature)
        trace, determinant = ((1 + m) * (1 - a), m * (1 - a)) if nesterov else (1 + m - a, m)
        discriminant = trace**2 - 4 * determinant
        expected = (
            determinant.sqrt() if discriminant < 0 else (abs(trace) + discriminant.sqrt()) / 2
        )
        got = theory.spectral_radius(rate, mu, curvature, nesterov=nesterov)
        assert got == pytest.approx(float(expected), rel=1e-15), (rate, curvature)
        # The reference has finite precision too: if it is 1 to 390 digits, it is taken as 1.
        exact = side(expected) if abs(expected - 1) > decimal.Decimal("1e-390") else 0
        assert side(got) == exact, (rate, curvature, got)


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mu", MUS)
def test_formulas_of_traced_values_equal_those_of_floats(mu, nesterov):
    """Diagnostics computes with arrays what theory computes with floats."""

    def formulas(rate, mu):
        rest = _formulas.one_minus_mu(mu)
        limit = _formulas.stability_limit(mu, nesterov=nesterov)
        return (
            rest,
            limit,
            _formulas.friction(rate, rest),
            _formulas.kinetic_energy(rate, 3.0),
            _formulas.speed(rate, 3.0),
            _formulas.fraction_of_limit(rate, 2.0, limit),
            _formulas.fraction_of_limit(rate, -2.0, limit),
        )

    # At mu -1/3 rounding may select the other branch of the limit, which is equal there.
    np.testing.assert_allclose(jax.jit(formulas)(0.1, mu), formulas(0.1, mu), rtol=1e-14)
    assert formulas(0.1, mu)[1] == pytest.approx(theory.stability_limit(mu, nesterov=nesterov))
    assert all(np.isfinite(x) for x in jax.jacobian(formulas, 1)(0.1, mu))
    if mu < 1:
        rest = _formulas.one_minus_mu(mu)
        expected = theory.effective_learning_rate(0.1, mu)
        assert _formulas.effective_learning_rate(0.1, rest) == expected
        got = jax.jit(_formulas.effective_learning_rate)(0.1, rest)
        np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_formulas_at_a_learning_rate_of_0_are_0():
    """Their derivatives are finite."""
    for formula in (_formulas.friction, _formulas.kinetic_energy, _formulas.speed):
        assert formula(0.0, 0.1) == jax.jit(formula)(0.0, 0.1) == 0
        assert jax.grad(formula, 1)(0.0, 0.1) == 0
    assert jax.jit(_formulas.effective_learning_rate)(0.0, 0.0) == 0
    assert jax.jit(_formulas.effective_learning_rate)(0.1, 0.0) == math.inf


def test_1_minus_mu_is_computed_before_rounding():
    """In low precision too."""
    assert _formulas.one_minus_mu(1 - 1e-12) == pytest.approx(1e-12, rel=1e-4)
    rest = _formulas.one_minus_mu(jnp.asarray(0.99, jnp.bfloat16))
    assert rest.dtype == jnp.float32
    assert float(rest) == 1 - float(jnp.asarray(0.99, jnp.bfloat16))


def test_a_radius_beyond_the_floats_is_infinite():
    assert theory.spectral_radius(1e300, 0.9, 1e300) == math.inf
    assert theory.spectral_radius(1e160, 0.9, 1.0) == pytest.approx(1e160)


@pytest.mark.parametrize("mu", [mu for mu in MUS if mu < 1])
@pytest.mark.parametrize("rate", [1e-30, 0.1, 1e30])
def test_the_numbers_of_the_ball_at_the_ends(mu, rate):
    """Compared with exact fractions."""
    m, lr = Fraction(mu), Fraction(rate)
    assert theory.stability_limit(mu) == pytest.approx(float(2 * (1 + m)), rel=1e-15)
    effective = theory.effective_learning_rate(rate, mu)
    assert effective == pytest.approx(float(lr / (1 - m)), rel=1e-15)
    friction = float((1 - m) ** 2 / lr) ** 0.5
    assert theory.friction(rate, mu) == pytest.approx(friction, rel=1e-15)
    if mu >= 0:
        bound = theory.no_escape_bound(mu, rate)
        assert bound == pytest.approx(float(2 * (1 - m) / lr), rel=1e-15)
    for part in (Fraction(1, 10**12), Fraction(1, 2), 1 - Fraction(1, 10**12)):
        curvature = float(part * 2 * (1 + m) / lr)
        c, noise = Fraction(curvature), Fraction(1e-3)
        room = (1 - m) * (2 * (1 + m) - lr * c)
        found = theory.stationary_variance(rate, mu, curvature, 1e-3)
        assert found.params == pytest.approx(float(lr * noise * (1 + m) / (c * room)), rel=1e-15)
        assert found.velocity == pytest.approx(float(2 * lr**2 * noise / room), rel=1e-15)
    limit = math.nextafter(float(2 * (1 + m) / lr), math.inf)
    with pytest.raises(ValueError, match="the stability limit at mu="):
        theory.stationary_variance(rate, mu, math.nextafter(limit, math.inf), 1e-3)


def test_small_variances_do_not_underflow():
    """The square of 1e-200 underflows, but the result is accurate where such factors cancel."""
    assert theory.stationary_variance(0.1, 0.9, 1.0, 0.0) == (0, 0)
    found = theory.stationary_variance(1e-200, 0.5, 1.0, 1e-150)
    assert found.params == pytest.approx(0.0, abs=0)  # 5e-351, which is below the smallest float
    found = theory.stationary_variance(1e200, 0.0, 1e-200, 1e-300)
    np.testing.assert_allclose(found, (1e100, 2e100), rtol=1e-14)


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_methods_that_qhm_includes_at_the_ends(size):
    """Compared with exact fractions; mu is below 1."""
    s = Fraction(size)
    found = theory.qhm_from_pid(-size, size, 3 * size)
    assert found == pytest.approx((size, 0.75, 1 / 3), rel=1e-15)
    assert theory.qhm_from_pid(-1e-30, size, 1.0).mu < 1
    found = theory.qhm_from_synthesized_nesterov(size, 1 - 1e-12, 0.5)
    b = Fraction(1 - 1e-12)
    exact = (s / (1 - b), b, 1 - (1 - b) / (2 * b))
    assert found == pytest.approx([float(x) for x in exact], rel=1e-15)
    if size >= 1:
        found = theory.qhm_from_accsgd(0.1, size, math.sqrt(size))
        d, e, x = Fraction(0.1), Fraction(0.7), Fraction(math.sqrt(size))
        exact = (
            d * e * (1 + x) / (1 + e),
            (s - e**2 * x) / (s + e * x),
            (e * x - 1) / (e * (1 + x)),
        )
        assert found == pytest.approx([float(x) for x in exact], rel=1e-15)
        assert found.mu < 1


@pytest.mark.parametrize(("big", "small"), [pair for pair in CURVATURES if pair[0] > pair[1]])
def test_robust_and_triple_momentum_at_the_ends(big, small):
    """All settings are finite with mu in range, for rates computed in several ways."""
    k = big / small
    fastest, slowest = 1 - 1 / math.sqrt(k), 1 - small / big
    settings = [theory.qhm_from_triple_momentum(big, small)]
    for rate in (fastest, theory.triple_momentum(big, small).rate, slowest, 1 - 1 / k):
        settings.append(theory.qhm_from_robust_momentum(big, small, rate=rate))
    for found in settings:
        assert all(math.isfinite(x) for x in found)
        assert 0 <= found.mu < 1
        assert found.learning_rate > 0
    if k < 1e24:  # For larger k, the last digit of mu is half of 1 - mu.
        np.testing.assert_allclose(settings[2], settings[0], rtol=1e-3, atol=1e-15)


def test_the_radius_is_1_without_friction():
    """At mu 1, up to the limit, the radius is exactly 1."""
    for a in (1e-30, 1.0, 4.0):
        assert theory.spectral_radius(a, 1.0, 1.0) == 1
    assert theory.spectral_radius(math.nextafter(4, 5), 1.0, 1.0) > 1
    assert theory.friction(1e30, 1.0) == 0
