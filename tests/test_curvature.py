"""Compares extreme eigenvalues with known spectra and with numpy.linalg.eigh of the Hessian."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import run_for_gpu, run_for_tpu

import momentum_jax

mj: Any = momentum_jax
curvature: Any = mj.diagnostics.curvature

SPECTRA = {
    "spread": np.linspace(-3, 10, 200),
    "clustered": np.concatenate([10 + np.linspace(0, 1e-3, 100), np.linspace(0, 1, 100)]),
    "one above zeros": np.concatenate([np.zeros(50), [1.0]]),
    "all below 0": -np.linspace(1, 5, 50),
    "a condition of 1e8": np.logspace(-8, 0, 100),
    "three": np.array([10.0, 2.0, -1.0]),
    "one": np.array([-3.0]),
    "of one value": np.full(20, 4.0),
    "large": 1e30 * np.linspace(1, 2, 30),
    "small": 1e-30 * np.linspace(1, 2, 30),
}


def quadratic(eigenvalues, dtype=jnp.float32):
    size = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    matrix = jnp.asarray((q * eigenvalues) @ q.T, dtype)
    return lambda w: jnp.dot(w, matrix @ w) / 2


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name, jitted):
    """Both eigenvalues are within their error bounds, which are small with 96 products."""
    eigenvalues = SPECTRA[name]
    loss = quadratic(eigenvalues)
    measure = lambda w: curvature(loss, w, steps=96)  # noqa: E731
    found = (jax.jit(measure) if jitted else measure)(jnp.ones(len(eigenvalues)))
    size = np.max(np.abs(eigenvalues))
    for value, error, exact in (
        (found.largest, found.largest_error, eigenvalues.max()),
        (found.smallest, found.smallest_error, eigenvalues.min()),
    ):
        assert abs(float(value) - exact) <= float(error)
        assert abs(float(value) - exact) <= 1e-5 * size
        assert float(error) <= 2e-3 * size
    assert bool(found.converged)


def test_too_few_steps_have_not_converged():
    """The error bounds hold."""
    loss = quadratic(SPECTRA["spread"])
    few, many = (curvature(loss, jnp.ones(200), steps=steps) for steps in (8, 96))
    assert not few.converged
    assert abs(float(few.largest) - 10) <= float(few.largest_error)
    assert float(few.largest_error) > 100 * float(many.largest_error)


@pytest.mark.parametrize("sign", [1, -1])
def test_each_end_has_an_error_bound_of_its_own(sign):
    """In a few steps only the eigenvalue that is far from the others has converged."""
    found = curvature(
        quadratic(sign * np.append(np.linspace(0, 1, 99), 10)), jnp.ones(100), steps=8
    )
    alone, among = found.largest_error, found.smallest_error
    if sign < 0:
        alone, among = among, alone
    assert float(alone) < 1e-3 < 1e-2 < float(among)
    assert not found.converged


def network():
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        "a": jax.random.normal(keys[0], (6, 8)) / 2,
        "b": jax.random.normal(keys[1], (8, 3)) / 2,
    }
    x = jax.random.normal(keys[2], (20, 6))
    return params, (x, jnp.sin(x[:, :3]))


def model(params, x, y):
    del y
    return jnp.tanh(x @ params["a"]) @ params["b"]


def squared(outputs, x, y):
    del x
    return jnp.mean((outputs - y) ** 2)


def network_loss(params, x, y):
    return squared(model(params, x, y), x, y)


def whole(loss, params, *batch):
    """Returns the Hessian and the gradient with respect to all values in one array."""
    flat, back = ravel_pytree(params)
    hessian = jax.hessian(lambda flat: loss(back(flat), *batch))(flat)
    gradient = jax.grad(lambda flat: loss(back(flat), *batch))(flat)
    return np.asarray(hessian, np.float64), np.asarray(gradient, np.float64)


def assert_is(found, hessian, gradient, rtol=1e-5):
    values = np.linalg.eigvalsh(hessian)
    size = float(np.max(np.abs(values)))
    assert float(found.largest) == pytest.approx(values[-1], abs=rtol * size)
    assert float(found.smallest) == pytest.approx(values[0], abs=rtol * size)
    along = gradient @ hessian @ gradient / (gradient @ gradient)
    assert float(found.along_gradient) == pytest.approx(along, abs=rtol * size)


@pytest.mark.slow
def test_a_network_against_its_whole_hessian():
    params, batch = network()
    assert_is(curvature(network_loss, params, *batch), *whole(network_loss, params, *batch))


@pytest.mark.slow
def test_gauss_newton_against_its_whole_matrix():
    params, batch = network()
    flat, back = ravel_pytree(params)
    jacobian = jax.jacobian(lambda flat: model(back(flat), *batch).ravel())(flat)
    matrix = np.asarray(jacobian, np.float64).T @ np.asarray(jacobian, np.float64) * 2 / 60
    _, gradient = whole(network_loss, params, *batch)
    found = curvature(squared, params, *batch, steps=72, model=model)
    assert_is(found, matrix, gradient)
    assert float(found.smallest) > -1e-5


@pytest.mark.slow
def test_64_bit_params_have_64_bit_results(x64):
    params, batch = network()
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float64), (params, batch))
    found = curvature(network_loss, params, *batch, steps=72)
    assert found.largest.dtype == jnp.float64
    assert_is(found, *whole(network_loss, params, *batch), rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_params_of_16_bits_are_widened(dtype):
    """The Hessian is computed in float32, at the 16-bit params."""
    params, batch = network()
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    found = curvature(network_loss, params, *batch)
    assert found.largest.dtype == jnp.float32
    assert_is(found, *whole(network_loss, wide, *batch))


@pytest.mark.slow
def test_complex_params_by_their_real_and_imaginary_parts():
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(4, 3)) + 1j * rng.normal(size=(4, 3)), jnp.complex64)
    params = jnp.asarray([1 + 2j, 0.5 - 1j, 0.3j], jnp.complex64)

    def outputs(z):
        return 0.3 * (matrix @ z) * jnp.abs(z[0])

    def outer(outputs):
        return jnp.sum(jnp.abs(outputs) ** 4)

    def joined(parts):
        return parts[:3] + 1j * parts[3:]

    def split(values):
        return jnp.concatenate([values.real, values.imag])

    parts = split(params)
    loss = lambda z: outer(outputs(z))  # noqa: E731
    hessian, gradient = whole(lambda parts: loss(joined(parts)), parts)
    assert_is(curvature(loss, params), hessian, gradient)
    jacobian = np.asarray(jax.jacobian(lambda parts: split(outputs(joined(parts))))(parts))
    bend = jax.hessian(lambda o: outer(o[:4] + 1j * o[4:]))(split(outputs(params)))
    found = curvature(outer, params, model=outputs)
    assert_is(found, jacobian.T @ np.asarray(bend) @ jacobian, gradient)


def test_what_is_no_float_is_held_fixed():
    params = {"w": jnp.ones(3), "scale": jnp.arange(1, 4), "none": None}

    def loss(params):
        return jnp.sum(params["scale"] * params["w"] ** 2) / 2

    found = curvature(loss, params)
    assert float(found.largest) == pytest.approx(3)
    assert float(found.smallest) == pytest.approx(1)


def test_at_a_minimum_the_gradient_has_no_direction():
    found = curvature(lambda w: jnp.sum(w**2), jnp.zeros(3))
    assert (float(found.along_gradient), float(found.largest)) == (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_params_are_never_whole_on_a_device(axis_type):
    """The numbers equal those of one device; each device holds its shard of every vector."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    scale = jnp.linspace(1, 5, 512 * 64).reshape(512, 64)

    def loss(params, scale):
        return jnp.sum(scale * (params["w"] + params["w"] ** 3 / 10) ** 2) / 2

    params = {"w": jnp.full((512, 64), 0.5)}
    sharding = NamedSharding(mesh, P("d"))
    measure = jax.jit(lambda params, scale: curvature(loss, params, scale, steps=24))
    arguments = jax.device_put(params, sharding), jax.device_put(scale, sharding)
    compiled: Any = measure.lower(*arguments).compile().as_text()
    assert "all-gather" not in compiled
    assert not re.search(r"f32\[512,64\]|f32\[32768\]", compiled)
    found, expected = measure(*arguments), measure(params, scale)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_its_memory_is_a_few_copies_of_the_params():
    scale = jnp.linspace(1, 2, 1 << 16)
    measure = jax.jit(lambda w, scale: curvature(lambda w, s: jnp.sum(s * w**4), w, scale)[:2])
    memory: Any = measure.lower(scale, scale).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 7.5 * scale.nbytes


SPLIT_PROGRAM = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
import momentum_jax as mj
from benchmarks.compiled import topology
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

platform, name = sys.argv[1:]
mesh = Mesh(np.array(topology(platform, name).devices), ("d",), axis_types=(AxisType.Auto,))


def array(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def loss(params, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)


params = {"a": array((1024, 2048), None, "d"), "b": array((2048, 1024), "d")}
program = jax.jit(lambda params, x: mj.diagnostics.curvature(loss, params, x)[:2])
text = program.lower(params, array((64, 1024))).compile().as_text()
print("all-gather" in text, len(re.findall(r"f32\\[1024,2048\\]|f32\\[2048,1024\\]", text)))
"""


@pytest.mark.parametrize(
    ("run", "platform", "name"), [(run_for_tpu, "tpu", "v5e:2x2"), (run_for_gpu, "gpu", "1x1x4")]
)
def test_compiled_for_several_devices_no_param_is_gathered(run, platform, name, tmp_path):
    """A network with layers sharded over four devices, compiled without these devices."""
    (tmp_path / "program.py").write_text(SPLIT_PROGRAM)
    assert run(tmp_path / "program.py", platform, name).split() == ["False", "0"]


def test_its_cost_is_that_of_its_products():
    """Each product costs about three gradients, in floating-point operations as compiled."""
    layers, batch = jnp.ones((3, 64, 64)) / 64, jnp.ones((128, 64))

    def loss(layers, x):
        for w in layers:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def operations(function, *arguments):
        costs: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
        return costs["flops"]

    gradient = operations(jax.grad(loss), layers, batch)
    first, last = (
        operations(lambda w, x, n=n: sum(unrolled(loss, w, x, n)[:2]), layers, batch)
        for n in (2, 6)
    )
    assert (last - first) / 4 < 3 * gradient


def unrolled(loss, params, batch, products):
    """Computes the products without a loop, because operations in a loop are counted once."""
    from momentum_jax.diagnostics import _curvature

    gradient, product = _curvature._hessian(lambda w, x: loss(w[0], x), [params], (batch,))
    for _ in range(products):
        gradient = product(gradient)
    return jnp.sum(gradient[0]), 0.0


def test_it_is_compiled_once_for_a_loss():
    traces = []

    def loss(w):
        traces.append(w.shape)
        return jnp.sum(w**2)

    for seed in range(3):
        curvature(loss, jnp.ones(5) * seed, key=jax.random.key(seed))
    assert len(traces) == 1
