"""Compares measurements with their formulas in NumPy, and in training loops."""

import itertools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax

mj: Any = momentum_jax  # Any: Optax's types of trees are too wide for arithmetic.
measure, by_leaf = mj.diagnostics.measure, mj.diagnostics.measure_by_leaf

SETTINGS: dict[str, Any] = dict(learning_rate=0.25, mu=0.75)


def random_tree(seed):
    draw = np.random.default_rng(seed).standard_normal
    return {"a": draw((3, 2)), "b": [draw(4), draw(())]}


def by_hand(g, v, learning_rate, mu, loss):
    """Returns the measurements by their formulas, in float64."""
    g, v = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (g, v))
    kinetic = v @ v / (2 * learning_rate)
    return {
        "kinetic_energy": kinetic,
        "potential_energy": loss,
        "total_energy": kinetic + loss,
        "alignment": -(g @ v) / np.sqrt(g @ g) / np.sqrt(v @ v),
        "gain": np.sqrt(v @ v) / np.sqrt(g @ g) / learning_rate,
        "speed": np.sqrt(v @ v / learning_rate),
        "effective_learning_rate": learning_rate / (1 - mu),
        "friction": (1 - mu) / np.sqrt(learning_rate),
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_measure_is_its_formulas(wrap):
    """They agree to 1e-12 in float64."""
    g, v = random_tree(0), random_tree(1)
    found = wrap(lambda g, v, lr: measure(g, v, learning_rate=lr, mu=0.75, loss=1.5))(g, v, 0.3)
    for name, value in by_hand(g, v, 0.3, 0.75, 1.5).items():
        assert float(getattr(found, name)) == pytest.approx(value, rel=1e-12)
        assert getattr(found, name).shape == ()


@pytest.mark.usefixtures("x64")
def test_measure_by_leaf_is_that_of_each():
    """They are found by path, and their kinetic energies sum to the total."""
    g, v = random_tree(0), random_tree(1)
    found = jax.jit(lambda g, v: by_leaf(g, v, **SETTINGS))(g, v)
    assert list(found) == ["['a']", "['b'][0]", "['b'][1]"]
    each = measure(g["b"][0], v["b"][0], **SETTINGS)
    np.testing.assert_allclose(jax.tree.leaves(found["['b'][0]"]), jax.tree.leaves(each))
    whole = measure(g, v, **SETTINGS).kinetic_energy
    assert sum(float(m.kinetic_energy) for m in found.values()) == pytest.approx(float(whole))


def test_without_a_loss_there_is_no_potential():
    """It is None."""
    found = measure(jnp.ones(2), jnp.ones(2), **SETTINGS)
    assert found.potential_energy is None
    assert found.total_energy is None


@pytest.mark.parametrize("zero", ["gradient", "velocity", "both", "learning rate", "friction"])
def test_finite_where_something_is_zero(zero):
    """Derivatives through the measurement are finite too."""
    g = jnp.zeros(2) if zero in ("gradient", "both") else jnp.ones(2)
    v = jnp.zeros(2) if zero in ("velocity", "both") else -jnp.ones(2)
    settings = {
        "learning_rate": 0.0 if zero == "learning rate" else 0.25,
        "mu": 1.0 if zero == "friction" else 0.75,
    }
    found = measure(g, v, **settings, loss=1.0)._asdict()
    effective = found.pop("effective_learning_rate")
    assert np.isinf(effective) == (zero == "friction")
    assert all(np.isfinite(value) for value in found.values())
    if zero in ("gradient", "velocity", "both"):
        assert float(found["alignment"]) == 0


def test_alignment_and_gain_under_a_constant_gradient():
    """The alignment is 1, and the gain rises to 1 / (1 - mu)."""
    tx, g = mj.momentum(0.5, 0.75), jnp.array([3.0, -4.0])
    state = tx.init(g)
    gains = []
    for _ in range(100):
        _, state = tx.update(g, state)
        found = measure(g, state.velocity, learning_rate=0.5, mu=0.75)
        gains.append(float(found.gain))
        assert float(found.alignment) == pytest.approx(1)
    assert gains[0] == pytest.approx(1)
    assert gains == sorted(gains)
    assert gains[-1] == pytest.approx(4)


def test_what_has_no_gradient_is_left_out():
    """The optimizer leaves it out too. Half-precision values are summed in float32."""
    g = {"w": jnp.full(1000, 300.0, jnp.bfloat16), "frozen": None, "masked": optax.MaskedNode()}
    v = {"w": jnp.full(1000, -300.0), "frozen": jnp.ones(2), "masked": optax.MaskedNode()}
    found = measure(g, v, **SETTINGS)
    assert found.kinetic_energy.dtype == jnp.float32
    assert float(found.kinetic_energy) == pytest.approx(1000 * 300**2 / 0.5, rel=1e-2)
    assert float(found.alignment) == 1
    assert list(by_leaf(g, v, **SETTINGS)) == ["['w']"]


def test_on_a_mesh():
    """Sharded arrays give the same numbers."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    g, v = (np.random.default_rng(i).standard_normal((8, 4)).astype("float32") for i in (0, 1))
    placed = [jax.device_put(x, NamedSharding(mesh, P("d"))) for x in (g, v)]
    got, expected = (
        jax.jit(lambda g, v: measure(g, v, **SETTINGS))(*args) for args in (placed, (g, v))
    )
    np.testing.assert_allclose(jax.tree.leaves(got), jax.tree.leaves(expected), rtol=1e-6)


def test_in_a_training_loop_inside_scan():
    """At the learning rate of `no_escape_bound` the energy never rises."""
    mu, smoothness = 0.9, 1.0
    rate = mj.theory.no_escape_bound(mu, smoothness)
    tx = mj.momentum(rate, mu)

    def step(carry, _):
        w, state = carry
        grads = jax.grad(lambda w: jnp.sum(jnp.sin(w)))(w)
        updates, state = tx.update(grads, state)
        w = w + updates
        loss = jnp.sum(jnp.sin(w))
        found = measure(grads, state.velocity, learning_rate=rate, mu=mu, loss=loss)
        return (w, state), found

    w = jnp.linspace(-2.0, 2.0, 7)
    _, found = jax.lax.scan(step, (w, tx.init(w)), None, 200)
    energy = found.potential_energy + mu * found.kinetic_energy
    assert float(jnp.max(jnp.diff(energy))) < 1e-5
    assert found.gain.shape == (200,)


def motion(updates, state, params=None, **given):
    """Measures one step; without Nesterov, the updates of `momentum` are the velocity."""
    return measure(given["grad"], updates, **SETTINGS, loss=given["value"]), state


def train_measured(tx, of_state):
    """Runs ten jitted steps of a chain, and checks the measurements in its state."""

    @jax.jit
    def step(w, state):
        value, grad = jax.value_and_grad(lambda w: jnp.sum(w**2))(w)
        updates, new_state = tx.update(grad, state, w, value=value, grad=grad)
        found = of_state(new_state, value)
        velocity = optax.tree.get(new_state, "velocity")
        return w + updates, new_state, found, measure(grad, velocity, **SETTINGS, loss=value)

    w = jnp.array([1.0, -2.0])
    state = tx.init(w)
    for _ in range(10):
        w, state, found, expected = step(w, state)
        np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=1e-6)
        assert float(found.total_energy) > 0


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="Optax has monitor from 0.2.7 on")
def test_through_monitor_inside_jit():
    """Optax's monitor keeps each step's measurement in the state of the chain."""
    measuring = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), motion)
    tx = optax.chain(mj.momentum(**SETTINGS), optax.monitor({"motion": measuring}))
    train_measured(tx, lambda state, value: optax.tree.get(state, "motion"))


@pytest.mark.skipif(not hasattr(optax, "snapshot"), reason="Optax has snapshot from 0.2.6 on")
def test_through_snapshot_inside_jit():
    """Optax's snapshot keeps the gradient as it was before momentum."""
    keep = optax.snapshot("grads", lambda grads: grads)
    tx = optax.chain(keep, mj.momentum(**SETTINGS))

    def of_state(state, value):
        grads, velocity = (optax.tree.get(state, name) for name in ("grads", "velocity"))
        return measure(grads, velocity, **SETTINGS, loss=value)

    train_measured(tx, of_state)


def exact(g, v, learning_rate, mu):
    """Returns the measurements of lists of floats; only the roots are rounded."""
    lr, rest = Fraction(learning_rate), 1 - Fraction(mu)
    gg, gv, vv = (
        sum(Fraction(a) * Fraction(b) for a, b in zip(one, other, strict=True))
        for one, other in ((g, g), (g, v), (v, v))
    )

    def root(x):
        """Returns the square root to 100 digits."""
        shift = 10**400
        return Fraction(math.isqrt(x.numerator * shift**2 // x.denominator), shift)

    return {
        "kinetic_energy": vv / (2 * lr),
        "alignment": -gv / (root(gg) * root(vv)),
        "gain": root(vv) / (root(gg) * lr),
        "speed": root(vv / lr),
        "effective_learning_rate": lr / rest,
        "friction": rest / root(lr),
    }


SIZES = [1e-30, 1e-20, 1.0, 1e20, 1e30]


@pytest.mark.parametrize("by", ["measure", "measure_by_leaf", "jit"])
@pytest.mark.parametrize("mu", [0.0, 0.9, 1 - 1e-12])
def test_at_the_ends_of_the_floats(by, mu):
    """A result is 0 or infinite only if it is out of range, although 1e-30 and 1e30 squared are."""
    jitted = jax.jit(lambda g, v, rate: measure(g, v, learning_rate=rate, mu=mu))
    calls = {
        "measure": measure,
        "measure_by_leaf": lambda g, v, **given: by_leaf(g, v, **given)["['w']"],
        "jit": lambda g, v, *, learning_rate, mu: jitted(g, v, learning_rate),
    }
    least, most = (float(getattr(jnp.finfo(jnp.float32), name)) for name in ("tiny", "max"))
    for of_g, of_v, rate in itertools.product(SIZES, SIZES, [1e-30, 0.25, 1e30]):
        g = np.array([3 * of_g, -of_g, 0.5 * of_g], np.float32)
        v = np.array([-of_v, -2 * of_v, 1e-3 * of_v], np.float32)
        learning_rate = np.float32(rate)
        found = calls[by]({"w": g}, {"w": v}, learning_rate=learning_rate, mu=mu)
        for name, value in exact(g.tolist(), v.tolist(), float(learning_rate), mu).items():
            got, size = float(getattr(found, name)), abs(value)
            if least < size < most:
                assert got == pytest.approx(float(value), rel=1e-5), (name, of_g, of_v, rate)
            else:
                assert got in (0, np.inf), (name, got)


def test_leaves_of_very_different_sizes_are_summed():
    """The largest leaf decides the scale; zeros and infinite values do no harm."""
    g = {"a": jnp.full(3, 1e-30), "b": jnp.full(2, 1e-25), "zero": jnp.zeros(2)}
    v = {"a": jnp.full(3, -1e30), "b": jnp.zeros(2), "zero": jnp.zeros(2)}
    found = measure(g, v, learning_rate=1e30, mu=0.5)
    assert float(found.kinetic_energy) == pytest.approx(1.5e30, rel=1e-6)
    assert float(found.alignment) == pytest.approx(1e-5 * math.sqrt(1.5), rel=1e-5)
    v = {"a": jnp.full(1, jnp.inf), "b": jnp.full(1, 1e-30)}
    infinite = measure({"a": jnp.ones(1), "b": jnp.ones(1)}, v, **SETTINGS)
    assert float(infinite.kinetic_energy) == np.inf


@pytest.mark.parametrize("size", [2.0**126, 2.0**127, 3e38])
def test_beyond_the_inverses_of_the_normal_numbers(size):
    """A division may be compiled as a product with the inverse, which is 0 for these numbers."""
    found = jax.jit(lambda g, v: measure(g, v, learning_rate=0.25, mu=0.5))(
        {"w": jnp.full(3, size)}, {"w": jnp.full(3, -size)}
    )
    assert float(found.alignment) == pytest.approx(1)


def test_complex_velocities_at_the_ends():
    """The modulus of each value counts."""
    g, v = jnp.array([1e30 + 1e30j]), jnp.array([-1e-30 - 1e-30j])
    found = measure(g, v, learning_rate=1e-30, mu=0.5)
    assert float(found.alignment) == pytest.approx(1)
    assert float(found.kinetic_energy) == pytest.approx(1e-30)
    assert float(found.gain) == pytest.approx(1e-30)


@pytest.mark.parametrize("mu", [0.5, 1.0])
def test_a_learning_rate_of_0_has_no_effect(mu):
    """Results are 0, not NaN, also at mu 1."""
    found = measure(jnp.ones(2), jnp.ones(2), learning_rate=-0.0, mu=mu, loss=1.0)
    assert all(np.isfinite(value) for value in found)
    assert float(found.effective_learning_rate) == 0


@pytest.mark.parametrize("kind", [float, np.float64, np.array])
def test_a_mu_that_float32_would_round_to_1(kind):
    """1 - mu is computed before mu is rounded."""
    found = measure(jnp.ones(2), jnp.ones(2), learning_rate=0.25, mu=kind(1 - 1e-12))
    rest = 1 - (1 - 1e-12)
    assert float(found.effective_learning_rate) == pytest.approx(0.25 / rest, rel=1e-6)
    assert float(found.friction) == pytest.approx(2 * rest, rel=1e-6)


def test_differentiable_through_the_scaling():
    """The powers of 2 are constants for differentiation."""
    g = jnp.array([3.0, -4.0])

    def energy(v):
        return measure(g, v, learning_rate=0.25, mu=0.5).kinetic_energy

    v = jnp.array([1.0, 2.5])
    np.testing.assert_allclose(jax.grad(energy)(v), v / 0.25, rtol=1e-6)


def test_zeros_on_one_device_leave_the_others_as_they_are():
    """All arrays are divided by the same power of 2, that of the largest value on any device."""
    first, second = jax.devices()[:2]
    grads = {"a": jax.device_put(jnp.zeros(3), first), "b": jax.device_put(jnp.ones(3), second)}
    grads = jax.tree.map(lambda g: g * jnp.float32(1e-25), grads)
    velocity = jax.tree.map(lambda g: -0.1 * g, grads)
    found = mj.diagnostics.measure(grads, velocity, learning_rate=0.1, mu=0.9)
    assert (float(found.alignment), float(found.gain)) == (1, pytest.approx(1))
