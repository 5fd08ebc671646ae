"""Compares `edge` with theory and with what training then does."""

import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import momentum_jax
from momentum_jax.diagnostics.__main__ import main

mj: Any = momentum_jax
edge: Any = mj.diagnostics.edge


def of(largest, smallest, *, converged=True) -> Any:
    numbers = (jnp.asarray(x, jnp.float32) for x in (largest, smallest, 0.0, 0.0, largest))
    return mj.diagnostics.Curvature(*numbers, jnp.asarray(converged))


def test_it_is_what_theory_says():
    found = edge(of(10.0, 1.0), 0.3, 0.9, noise_variance=0.01)
    assert found.fraction == pytest.approx(3 / 3.8)
    assert found.largest_learning_rate == pytest.approx(0.38)
    assert found.growth == mj.theory.spectral_radius(0.3, 0.9, 10.0)
    assert found.heavy_ball == mj.theory.heavy_ball(10.0, 1.0)
    assert found.nesterov == mj.theory.nesterov(10.0, 1.0, tuned=True)
    variance = mj.theory.stationary_variance(0.3, 0.9, 10.0, 0.01).params
    assert found.scatter == pytest.approx(math.sqrt(variance))
    ahead = edge(of(10.0, 1.0), 0.3, 0.9, nesterov=True)
    assert ahead.fraction == pytest.approx(3 / (3.8 / 2.8))
    assert ahead.growth > 1


def test_without_a_curvature_above_0_there_is_no_limit():
    found = edge(of(-1.0, -2.0), 0.3, 0.9)
    assert (found.fraction, found.largest_learning_rate) == (0, math.inf)
    assert found.heavy_ball is found.nesterov is found.scatter is None
    assert found.growth > 1
    assert "no stability limit, because no curvature is above 0" in str(found)


@pytest.mark.parametrize("arguments", [{}, {"noise_variance": 0.1}, {"nesterov": True}])
def test_it_prints_five_lines(arguments):
    for curvature in (of(10.0, 1.0), of(10.0, -1.0), of(10.0, 1.0, converged=False)):
        lines = str(edge(curvature, 0.3, 0.9, **arguments)).splitlines()
        assert len(lines) == 5
        assert ("not converged" in lines[0]) == (not curvature.converged)


def test_it_prints_the_direction_of_each_factor():
    """The sharpest for the given learning rate, the slowest for the best settings."""
    found = edge(of(10.0, 1.0), 0.3, 0.9, noise_variance=0.01)
    assert str(found).splitlines()[1:] == [
        f"learning rate 0.3 at mu 0.9: at most 0.38 is stable; sharpest direction x "
        f"{found.growth:.4g} per step",
        "best heavy ball on a quadratic: 0.2309 at mu 0.2699; slowest direction x 0.5195 per step",
        "best nesterov on a quadratic: 0.129 at mu 0.4714; slowest direction x 0.6408 per step",
        f"standard deviation in gradient noise: {found.scatter:.4g}, sharpest direction",
    ]


def test_the_command_says_that_a_direction_grows_although_the_loss_falls(tmp_path, capsys):
    """The start is almost at the minimum along the sharpest direction, which is unstable."""
    problem = tmp_path / "bowl.py"
    problem.write_text(
        "import jax.numpy as jnp\n"
        "from momentum_jax.study import Problem\n"
        "bowl = Problem(lambda key: jnp.array([1.0, 1e-6]),\n"
        "               lambda w: jnp.sum(jnp.array([1.0, 10.0]) * w**2) / 2)\n"
    )
    options = ["--learning-rate", "0.4", "--steps", "10", "--points", "2"]
    main([f"{problem}:bowl", *options, "--out", str(tmp_path / "bowl.png")])
    printed = capsys.readouterr().out
    assert re.search(r"^the loss fell, from 0\.5 to \S+, but the sharpest", printed, re.M)
    assert "after 10 steps, last measured:" in printed
    assert "105.3% of the stability limit is used" in printed


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy ball", "nesterov"])
@pytest.mark.parametrize("fraction", [0.95, 1.05])
def test_a_network_just_below_and_above_the_edge(x64, nesterov, fraction):
    """Each step multiplies the distance along the sharpest direction by the predicted factor."""
    keys = jax.random.split(jax.random.key(3), 4)
    params = {"a": jax.random.normal(keys[0], (4, 5)) / 2, "b": jax.random.normal(keys[1], (5, 2))}
    x = jax.random.normal(keys[2], (30, 4))
    y = jnp.sin(x[:, :2]) + 0.1 * jax.random.normal(keys[3], (30, 2))

    def loss(params):
        decay = sum(jnp.sum(w**2) for w in params.values())
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2) + 0.01 * decay

    def run(tx, params, steps):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (mj.apply_updates(params, updates), state), params

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)

    minimum = jax.jit(lambda params: run(mj.momentum(0.1, 0.95), params, 20_000))(params)[0][0]
    assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(jax.grad(loss)(minimum))) < 1e-14
    curvature = mj.diagnostics.curvature(loss, minimum, steps=30)
    assert curvature.converged
    mu = 0.9
    limit = mj.theory.stability_limit(mu, nesterov=nesterov) / float(curvature.largest)
    found = edge(curvature, fraction * limit, mu, nesterov=nesterov)
    assert found.fraction == pytest.approx(fraction)
    assert (found.growth > 1) == (fraction > 1)
    flat, back = ravel_pytree(minimum)
    _, vectors = np.linalg.eigh(jax.hessian(lambda flat: loss(back(flat)))(flat))
    tx = mj.momentum(fraction * limit, mu, nesterov=nesterov)
    # Above the edge it leaves the quadratic region, below it falls to the rounding error.
    start, windows = (1e-6, (8, 22, 36)) if fraction < 1 else (1e-9, (8, 14, 20))
    path = jax.jit(lambda params: run(tx, params, 40))(back(flat + start * vectors[:, -1]))[1]
    path = jax.vmap(lambda params: ravel_pytree(params)[0])(path)
    distance = np.abs((np.asarray(path) - flat) @ vectors[:, -1])
    # The largest distance in a window, because the sign changes.
    before, after = (distance[a:b].max() for a, b in itertools.pairwise(windows))
    growth = (after / before) ** (1 / (windows[1] - windows[0]))
    assert growth == pytest.approx(found.growth, rel=5e-3)
