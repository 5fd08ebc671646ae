"""The `state_dict` of PyTorch's SGD: what is read and what is written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import BUFFERS, FC, WEIGHTS, fc, injected, load, rate, torch_state_dict
from flax import nnx

from momentum_jax.frameworks import (
    dump_torch,
    load_torch,
    torch_hyperparameters,
    torch_labels,
    torch_sgd,
)


def test_load_torch_fills_velocity_and_count():
    """The count is 1 if none is given; otherwise it is filled into all schedules too."""
    state: Any = load()[0]
    np.testing.assert_array_equal(state.trace["kernel"], BUFFERS[0].T)
    np.testing.assert_array_equal(state.trace["bias"], BUFFERS[1])
    assert (int(state.count), state.count.dtype) == (1, np.int32)
    assert int(load(torch_state_dict([]), names=WEIGHTS)[0].count) == 0
    momentum, schedule = load(tx=torch_sgd(rate, 0.5), count=7)
    assert int(momentum.count) == int(schedule.count) == 7


def test_load_torch_keeps_dtype_and_sharding():
    """The filled state has the dtype and the sharding of the given state."""
    mesh = jax.make_mesh((8,), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    buffer = np.arange(64.0).reshape(8, 8)
    state_dict = torch_state_dict([])
    state_dict["state"] = {0: {"momentum_buffer": buffer}}
    state_dict["param_groups"][0]["params"] = [0]
    tx = torch_sgd(0.5, 0.5)
    w = jax.device_put(np.zeros((8, 8), np.float32), sharding)
    state: Any = load_torch(tx.init(w), state_dict, names=["w"], to_params=lambda ws: ws["w"].T)
    velocity = state[0].trace
    assert velocity.sharding == sharding
    assert velocity.dtype == np.float32
    np.testing.assert_array_equal(velocity, buffer.T)


def test_a_missing_buffer_becomes_a_velocity_of_0():
    """A param that never had a gradient has no buffer; its shape must be known."""
    state: Any = load(torch_state_dict([1]), names=WEIGHTS)[0]
    np.testing.assert_array_equal(state.trace["kernel"], np.zeros((3, 2)))
    np.testing.assert_array_equal(state.trace["bias"], BUFFERS[1])
    dumped = dump_torch((state,), torch_state_dict([]), names=WEIGHTS, to_params=fc)
    np.testing.assert_array_equal(dumped["state"][1]["momentum_buffer"], BUFFERS[1])


def test_before_the_first_step_no_buffer_is_dumped():
    """PyTorch must still treat its next step as the first."""
    state = torch_sgd(0.5, 0.5).init(FC)
    dumped = dump_torch(state, torch_state_dict(), names=list(WEIGHTS), to_params=fc)
    assert dumped["state"] == {}
    assert dumped["param_groups"] == torch_state_dict()["param_groups"]


def test_a_frozen_param_needs_no_buffer():
    """If a param is masked here and has a buffer in PyTorch, the buffer would be lost: refused."""
    tx = optax.masked(torch_sgd(0.5, 0.5), {"kernel": False, "bias": True})
    state: Any = load(torch_state_dict([1]), names=WEIGHTS, tx=tx)
    np.testing.assert_array_equal(state.inner_state[0].trace["bias"], BUFFERS[1])
    with pytest.raises(ValueError, match=r"only in the values to carry over: \['kernel'\]"):
        load(tx=tx)
    dumped = dump_torch(state, torch_state_dict([]), names=WEIGHTS, to_params=fc)
    assert list(dumped["state"]) == [1]


def test_the_error_about_different_groups_contains_the_solution():
    """The code in the message runs."""
    state_dict = torch_state_dict()
    settings = state_dict["param_groups"][0]
    state_dict["param_groups"] = [
        {**settings, "params": [0]},
        {**settings, "params": [1], "momentum": 0.25},
    ]
    with pytest.raises(ValueError, match="the 2 parameter groups differ in momentum") as error:
        torch_hyperparameters(state_dict)
    _, code = str(error.value).split("\n", 1)
    scope: dict[str, Any] = dict(
        optax=optax,
        torch_sgd=torch_sgd,
        torch_labels=torch_labels,
        torch_hyperparameters=torch_hyperparameters,
        state_dict=state_dict,
        names=list(WEIGHTS),
        to_params=fc,
    )
    exec("if True:\n" + code, scope)
    state = load(state_dict, tx=scope["tx"])
    updates, _ = scope["tx"].update(jax.tree.map(jnp.zeros_like, FC), state, FC)
    np.testing.assert_array_equal(updates["kernel"], -0.5 * 0.5 * BUFFERS[0].T)
    np.testing.assert_array_equal(updates["bias"], -0.5 * 0.25 * BUFFERS[1])
    with pytest.raises(ValueError, match="group=2 must be at least 0 and below 2"):
        torch_hyperparameters(state_dict, group=2)


@pytest.mark.parametrize(
    ("tx", "rate"),
    [
        (injected(torch_sgd, lr=0.5, momentum=0.5), 0.5),
        (injected(torch_sgd, lr=rate, momentum=0.5), 0.125),
        (optax.chain(injected(torch_sgd, lr=rate, momentum=0.5), optax.identity()), 0.125),
    ],
    ids=["constants", "schedule", "chain"],
)
def test_load_torch_inside_inject_hyperparams(tx, rate):
    """Velocity and schedules inside it are filled."""
    count = None if rate == 0.5 else 7
    state = load(tx=tx, count=count)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, FC), state, FC)
    np.testing.assert_allclose(updates["kernel"], -rate * 0.5 * BUFFERS[0].T, rtol=1e-6)


def test_load_torch_in_an_nnx_optimizer():
    """Its state holds each array in an `nnx.Variable`."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, torch_sgd(0.5, 0.5), wrt=nnx.Param)
    before = np.asarray(model.kernel[...])
    optimizer.opt_state = load_torch(
        optimizer.opt_state, torch_state_dict(), names=list(WEIGHTS), to_params=fc
    )
    grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    moved = np.asarray(model.kernel[...]) - before
    np.testing.assert_allclose(moved, -0.25 * BUFFERS[0].T, rtol=1e-5)


def test_load_torch_fills_a_state_of_numpy_arrays():
    """Pickle and flax.serialization return such states."""
    tx = torch_sgd(0.5, 0.5)
    state = jax.tree.map(np.asarray, tx.init(FC))
    filled: Any = load_torch(state, torch_state_dict(), names=list(WEIGHTS), to_params=fc)[0]
    np.testing.assert_array_equal(filled.trace["bias"], BUFFERS[1])
