"""C8: transformations that are made alike are equal, so that jit may take them as static."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax

mj: Any = momentum_jax  # Given other types on purpose.
frameworks, schedules = mj.frameworks, mj.schedules


def bits(tree):
    return [(np.shape(x), x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


FACTORIES: dict[str, Any] = {
    "momentum": (mj.momentum, {"learning_rate": 0.1, "mu": 0.9}),
    "trace": (mj.trace, {"mu": 0.9, "dampening": 0.1}),
    "qhm": (mj.qhm, {"learning_rate": 0.1, "mu": 0.9, "nu": 0.7}),
    "aggmo": (mj.aggmo, {"learning_rate": 0.1, "mus": (0.0, 0.9)}),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_c8_transformations_of_equal_hyperparameters_are_equal(name):
    """And static arguments of jit, which compiles once for them; all others differ."""
    factory, given_values = FACTORIES[name]
    schedule, array = optax.linear_schedule(0.1, 0.2, 10), jnp.asarray(0.5)
    called = "mus" if name == "aggmo" else "mu"

    def made(**changes):
        return factory(**{**given_values, **changes})

    def mu(value):
        return {called: (value,) if name == "aggmo" else value}

    equal = [
        ({}, {}),
        ({"velocity_dtype": "int8"}, {"velocity_dtype": jnp.int8}),
        ({"velocity_dtype": jnp.bfloat16}, {"velocity_dtype": np.dtype("bfloat16")}),
        (mu(1), mu(1.0)),  # Both are the number 1.
        (mu(np.float64(0.5)), mu(0.5)),
        (mu(schedule), mu(schedule)),
        (mu(array), mu(array)),
    ]
    for one, other in equal:
        assert made(**one) == made(**other)
        assert hash(made(**one)) == hash(made(**other))
    different = [
        {},
        mu(0.0),
        mu(-0.0),
        mu(1.0),
        mu(schedule),
        mu(optax.linear_schedule(0.1, 0.2, 10)),
        mu(array),
        mu(jnp.asarray(0.5)),  # Arrays are compared by identity.
        mu(0.5),
        {"velocity_dtype": "bfloat16"},
        {"velocity_dtype": "int8"},
    ]
    if name in ("momentum", "trace"):
        different.append({"nesterov": True})
    all_made = [made(**changes) for changes in different]
    assert len(set(all_made)) == len(all_made)
    with pytest.raises(TypeError, match="real number"):
        made(**mu(True))

    traces = []

    @jax.jit
    def plain(grads, state):
        return made().update(grads, state)

    def step(tx, grads, state):
        traces.append(tx)
        return tx.update(grads, state)

    static = jax.jit(step, static_argnums=0)
    grads = jnp.ones(3)
    for _ in range(2):
        assert bits(static(made(), grads, made().init(grads))) == bits(
            plain(grads, made().init(grads))
        )
    assert len(traces) == 1


def test_c8_transformations_of_different_factories_differ():
    """Where two factories have arguments in common, and for what is not a transformation."""
    assert mj.momentum(0.5, 0.5) != mj.qhm(0.5, 0.5)
    assert mj.momentum(0.5, 0.5) != mj.aggmo(0.5, (0.5,))
    assert mj.momentum(0.5, 0.25) != mj.trace(0.5, dampening=0.25)
    assert mj.momentum(0.5).init != mj.momentum(0.5).update
    assert mj.momentum(0.5) != 0.5


def a_mesh(shape=(8,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


# Of each, ways to make it alike; the inner ones and the schedules are made anew each time.
ALIKE = {
    "kahan": lambda: mj.kahan(mj.momentum(0.1)),
    "kahan of another": lambda: mj.kahan(mj.trace(0.5)),
    "adaptive_restart": lambda: mj.adaptive_restart(mj.momentum(0.1)),
    "both": lambda: mj.kahan(mj.adaptive_restart(mj.momentum(0.1))),
    "both, exchanged": lambda: mj.adaptive_restart(mj.kahan(mj.momentum(0.1))),
    "zero1": lambda: mj.sharding.zero1(mj.momentum(0.1), a_mesh()),
    "zero1, strict": lambda: mj.sharding.zero1(mj.momentum(0.1), a_mesh(), strict=True),
    "zero1, another mesh": lambda: mj.sharding.zero1(
        mj.momentum(0.1), a_mesh((4, 2), ("data", "model"))
    ),
    "zero1, another axis": lambda: mj.sharding.zero1(
        mj.momentum(0.1), a_mesh((4, 2), ("data", "model")), "model"
    ),
    "torch_sgd": lambda: frameworks.torch_sgd(0.1, 0.9),
    "torch_sgd, dampening": lambda: frameworks.torch_sgd(0.1, 0.9, 0.5),
    "torch_sgd, decay": lambda: frameworks.torch_sgd(0.1, 0.9, 0.0, 0.5),
    "torch_sgd, nesterov": lambda: frameworks.torch_sgd(0.1, 0.9, nesterov=True),
    "torch_sgd, maximize": lambda: frameworks.torch_sgd(0.1, 0.9, maximize=True),
    "torch_sgd, no momentum": lambda: frameworks.torch_sgd(0.1),
    "keras_sgd": lambda: frameworks.keras_sgd(0.1, 0.9),
    "keras_sgd, nesterov": lambda: frameworks.keras_sgd(0.1, 0.9, True),
    "keras_sgd, decay": lambda: frameworks.keras_sgd(0.1, 0.9, weight_decay=0.5),
    "keras_sgd, decay 0": lambda: frameworks.keras_sgd(0.1, 0.9, weight_decay=0),
    "caffe_sgd": lambda: frameworks.caffe_sgd(0.1, 0.9),
    "caffe_sgd, decay": lambda: frameworks.caffe_sgd(0.1, 0.9, 0.5),
    "optax_sgd": lambda: frameworks.optax_sgd(0.1, 0.9),
    "optax_sgd, nesterov": lambda: frameworks.optax_sgd(0.1, 0.9, True),
    "optax_sgd, no momentum": lambda: frameworks.optax_sgd(0.1),
    "optax_sgd, momentum 0": lambda: frameworks.optax_sgd(0.1, 0.0),
    "momentum": lambda: mj.momentum(0.1),
    "sutskever": lambda: mj.momentum(0.1, schedules.sutskever()),
    "sutskever, 0.9": lambda: mj.momentum(0.1, schedules.sutskever(0.9)),
    "sutskever, 10": lambda: mj.momentum(0.1, schedules.sutskever(period=10)),
    "nesterov": lambda: mj.momentum(0.1, schedules.nesterov_convex()),
    "demon": lambda: mj.momentum(0.1, schedules.demon(100)),
    "demon, 0.5": lambda: mj.momentum(0.1, schedules.demon(100, 0.5)),
    "demon, 200": lambda: mj.momentum(0.1, schedules.demon(200)),
}


def test_c8_what_is_made_alike_is_equal_and_all_else_differs():
    for make in ALIKE.values():
        assert make() == make()
        assert hash(make()) == hash(make())
    assert len({make() for make in ALIKE.values()}) == len(ALIKE)


@pytest.mark.parametrize("name", ["kahan", "both", "zero1", "torch_sgd, decay", "demon"])
def test_c8_what_is_made_alike_is_one_program(name):
    """Made anew in each step, as a static argument of the step: one trace, and the same bits."""
    make, traces = ALIKE[name], []
    grads = jax.device_put(jnp.arange(8.0), NamedSharding(a_mesh(), P()))

    def step(tx, params, state):
        traces.append(tx)
        updates, state = tx.update(grads, state, params)
        return mj.apply_updates(params, updates), state

    compiled = jax.jit(step, static_argnums=0)
    found = expected = (grads, make().init(grads))
    for _ in range(3):
        found = compiled(make(), *found)
    assert len(traces) == 1
    tx = make()
    for _ in range(3):
        expected = jax.jit(lambda params, state: step(tx, params, state))(*expected)
    assert bits(found) == bits(expected)


def test_c8_three_learning_rates_are_three_programs():
    traces = []

    def step(tx, grads, state):
        traces.append(tx)
        return tx.update(grads, state)

    compiled = jax.jit(step, static_argnums=0)
    grads = jnp.ones(3)
    for learning_rate in (0.1, 0.2, 0.3, 0.1, np.float64(0.2), jnp.float32(0.5).item()):
        tx = mj.momentum(learning_rate)
        compiled(tx, grads, tx.init(grads))
    assert len(traces) == 4


def test_c8_around_what_optax_made_by_identity():
    """Optax's transformations are functions, each equal to itself alone."""
    inner = optax.sgd(0.1)
    assert mj.kahan(inner) == mj.kahan(inner)
    assert mj.kahan(inner) != mj.kahan(optax.sgd(0.1))
    assert mj.sharding.zero1(inner, a_mesh()) == mj.sharding.zero1(inner, a_mesh())


def test_equal_functions_still_say_what_they_are():
    """Clients look at signatures, and profiles at names."""
    update = mj.momentum(0.1).update
    assert list(inspect.signature(update).parameters)[:3] == ["updates", "state", "params"]
    assert list(inspect.signature(schedules.demon(10)).parameters) == ["count"]
    assert update.__name__ == "update"
    compiled: Any = jax.jit(update)
    assert compiled.__name__ == "update"
