"""What JAX does not document: each use of it does what is assumed, on every supported version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from momentum_jax import _jax


def eight(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("d",), axis_types=(axis_type,))


def test_inlined_jit_leaves_no_function_in_the_program_that_calls_it():
    @_jax.inlined_jit
    def inner(x):
        return jnp.sin(x)

    text = jax.jit(lambda x: inner(x) + inner(2 * x)).lower(1.0).as_text()
    assert text.count("func.func") == 1
    assert text.count("sine") == 2


def test_elementwise_primitives_are_primitives_of_jax():
    """By computing with them: a name that JAX no longer has would never be found in a jaxpr."""
    x = jnp.float32(0.5)

    def function(x):
        parts = [lax.exp(x), lax.sqrt(x), lax.max(x, x), lax.select(x > 0, x, -x), lax.floor(x)]
        parts += [lax.integer_pow(x, 3), lax.convert_element_type(x, np.int32) * 1.0, jnp.sign(x)]
        parts += [lax.bitwise_and(jnp.int32(3), x.astype(np.int32)) * 1.0, lax.stop_gradient(x)]
        return sum(parts, jnp.float32(0))

    names = {equation.primitive.name for equation in jax.make_jaxpr(function)(x).jaxpr.eqns}
    called = {e.primitive.name for e in jax.make_jaxpr(function)(x).jaxpr.eqns if has_jaxpr(e)}
    assert names - called <= _jax.ELEMENTWISE_PRIMITIVES
    assert {"exp", "sqrt", "max", "select_n", "floor", "integer_pow", "and"} <= names | called


def has_jaxpr(equation):
    return _jax.called_jaxpr(equation) is not None


def test_called_jaxpr_is_what_a_jitted_function_was_traced_to():
    traced = jax.make_jaxpr(lambda x: jax.jit(jnp.sin)(x) + x)(1.0)
    inner = [_jax.called_jaxpr(equation) for equation in traced.jaxpr.eqns]
    assert [each is not None for each in inner] == [True, False]
    assert [equation.primitive.name for equation in inner[0].jaxpr.eqns] == ["sin"]


def test_memory_space_tells_the_host_from_the_device():
    array = jnp.ones(3)
    if jax.__version_info__ < (0, 8):
        assert _jax.memory_space(array) is None
        return
    on_host = jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))
    assert _jax.memory_space(array) == jax.memory.Space.Device
    assert _jax.memory_space(on_host) == jax.memory.Space.Host


def test_varying_axes_of_shard_map():
    def axes(x, y):
        found.append((_jax.varying_axes(x), _jax.varying_axes(y), _jax.varying_axes(x + y)))
        return x + y

    found = []
    mesh = eight()
    ones = jnp.ones(8)
    jax.jit(jax.shard_map(axes, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d")))(
        ones, jnp.ones(1)
    )
    assert found[0] == ({"d"}, set(), {"d"})
    assert _jax.varying_axes(ones) == set()


def test_64_bit_mode_is_off():
    assert not _jax.is_x64_enabled()


@pytest.mark.usefixtures("x64")
def test_64_bit_mode_is_on():
    assert _jax.is_x64_enabled()


@pytest.mark.parametrize("given", [None, "cpu", "a device"])
def test_default_device(given):
    device = jax.devices()[3] if given == "a device" else given
    with jax.default_device(device):
        assert _jax.default_device() == next(iter(jnp.zeros(1).devices()))


@pytest.mark.parametrize("direction", ["FORWARD", "BACKWARD", "NONE"])
def test_the_barrier_is_an_operation_of_the_partitioner(direction):
    sharding = NamedSharding(eight(), P("d"))
    x = jax.device_put(jnp.arange(8.0), sharding)

    def function(x):
        return _jax.propagation_barrier(x, direction)

    lowered = jax.jit(function).lower(x)
    assert f"allowed_direction={direction}" in lowered.as_text()
    np.testing.assert_array_equal(jax.jit(function)(x), np.arange(8.0))
    np.testing.assert_array_equal(function(x), np.arange(8.0))


def test_a_program_for_one_device_has_no_barrier():
    text = jax.jit(lambda x: _jax.propagation_barrier(x, "NONE")).lower(jnp.ones(8)).as_text()
    assert "barrier" not in text


def test_the_barrier_is_linear_and_batched():
    def function(x):
        return _jax.propagation_barrier(3 * x, "FORWARD").sum()

    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.grad(function)(x), np.full((2, 3), 3.0))
    np.testing.assert_array_equal(jax.vmap(function)(x), 3 * x.sum(axis=1))
    primal, tangent = jax.jvp(function, (x,), (jnp.ones_like(x),))
    assert (primal, tangent) == (45, 18)


def test_a_condition_must_be_an_argument_of_the_program():
    """Else the barrier lets nothing pass."""
    sharding = NamedSharding(eight(), P("d"))
    x = jax.device_put(jnp.arange(8.0), sharding)

    def directly(x, condition):
        return _jax.propagation_barrier(x, "BACKWARD", condition)

    def computed(x, condition):
        return _jax.propagation_barrier(x, "BACKWARD", condition + 1)

    texts = [jax.jit(function).lower(x, x).as_text() for function in (directly, computed)]
    assert "allowed_direction=BACKWARD" in texts[0]
    assert "allowed_direction=NONE" in texts[1]
