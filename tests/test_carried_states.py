"""States that are carried over: what is refused because it would be lost, dtypes, shardings."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import (
    BUFFERS,
    CARRIED,
    FC,
    KERAS_OF_FC,
    WEIGHTS,
    fc,
    torch_state_dict,
)
from processes import run_job

import momentum_jax as mj
from momentum_jax.frameworks import (
    dump_keras,
    dump_optax,
    dump_torch,
    load_keras,
    load_optax,
    load_torch,
    momentum_from_trace,
    optax_sgd,
)

# Each wrapper of Optax that has a memory beside the velocity, and the error about it.
REMEMBERED = {
    "MultiSteps": (
        lambda inner: optax.MultiSteps(inner, 3).gradient_transformation(),
        "optax.MultiSteps has accumulated 1 gradients",
    ),
    "MultiSteps in a chain": (
        lambda inner: optax.chain(
            optax.identity(), optax.MultiSteps(inner, 3).gradient_transformation()
        ),
        "optax.MultiSteps has accumulated 1 gradients",
    ),
    "apply_every": (
        lambda inner: optax.chain(optax.apply_every(3), inner),
        "optax.apply_every has accumulated 1 gradients",
    ),
    "apply_if_finite": (
        lambda inner: optax.apply_if_finite(inner, 3),
        "optax.apply_if_finite has counted 1 gradients in a row",
    ),
    "lookahead": (
        lambda inner: optax.lookahead(inner, 3, 0.5),
        "optax.lookahead has taken 1 fast steps",
    ),
    "sam": (
        lambda inner: optax.contrib.sam(inner, optax.sgd(0.1), sync_period=3),
        "optax.contrib.sam has taken 1 steps",
    ),
    "reduce_on_plateau": (
        lambda inner: optax.chain(inner, optax.contrib.reduce_on_plateau(0.5, 1)),
        "optax.contrib.reduce_on_plateau has a scale of 0.25",
    ),
    "schedule_free": (
        lambda inner: optax.contrib.schedule_free(inner, 0.1),
        "optax.contrib.schedule_free has averaged params",
    ),
    "mechanize": (
        optax.contrib.mechanize,
        "optax.contrib.mechanize has taken 1 steps",
    ),
}


@functools.cache
def states_before_and_during(case, tx):
    """The initial state of a wrapper, and one in which it has something to lose."""
    tx = REMEMBERED[case][0](tx)
    params = optax.LookaheadParams.init_synced(FC) if case == "lookahead" else FC
    first = state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, FC)
    if case == "apply_if_finite":
        grads = jax.tree.map(lambda g: g * np.nan, grads)
    for _ in range(3 if case == "reduce_on_plateau" else 1):
        extra = {"value": jnp.ones([])} if case == "reduce_on_plateau" else {}
        _, state = tx.update(grads, state, params, **extra)
    return first, state


@pytest.mark.slow
@pytest.mark.parametrize("function", CARRIED)
@pytest.mark.parametrize("case", REMEMBERED)
def test_the_memory_of_a_wrapper_is_not_dropped(function, case):
    """Neither in the source nor in the target."""
    reads, fills, carry = CARRIED[function]
    source = None if reads is None else reads.init(FC)
    target: Any = None if fills is None else fills.init(FC)
    carry(source, target)  # Without a wrapper it works.
    if reads is not None:
        first, later = states_before_and_during(case, reads)
        carry(first, target)
        with pytest.raises(ValueError, match=re.escape(REMEMBERED[case][1])):
            carry(later, target)
    if fills is not None:
        first, later = states_before_and_during(case, fills)
        carry(source, first)
        with pytest.raises(ValueError, match=re.escape(REMEMBERED[case][1])):
            carry(source, later)


@pytest.mark.parametrize("function", [name for name in CARRIED if not name.startswith("load")])
def test_the_compensation_of_kahan_is_not_dropped(function):
    """The message says how to keep it."""
    reads, fills, carry = CARRIED[function]
    target: Any = None if fills is None else fills.init(FC)
    tx = mj.kahan(reads)
    state: Any
    params = jax.tree.map(lambda w: jnp.ones_like(w, jnp.bfloat16), FC)
    carry(tx.init(params), target)
    grads = jax.tree.map(lambda w: jnp.full(w.shape, 0.001), FC)
    _, state = tx.update(grads, tx.init(params), params)
    with pytest.raises(
        ValueError, match=r"kahan holds a compensation for \['bias'\], \['kernel'\]"
    ):
        carry(state, target)
    carry(state.inner_state, target)


def test_the_projected_momentum_of_galore_is_refused():
    """Its shapes may be equal to those of the params."""
    if not hasattr(optax.contrib, "GaLoreState"):
        pytest.skip("this Optax has no galore")
    source = optax.contrib.GaLoreState(jnp.array(1), optax.sgd(0.5, 0.5).init(FC), ())
    with pytest.raises(ValueError, match=r"optax\.contrib\.galore has taken 1 steps"):
        load_optax(optax_sgd(0.5, 0.5).init(FC), source)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", CARRIED)
def test_non_finite_values_are_refused(function, bad):
    """The message has the name, the number of such values and the remedy."""
    reads, fills, carry = CARRIED[function]
    target: Any = None if fills is None else fills.init(FC)
    if reads is not None:
        source = jax.tree.map(
            lambda leaf: leaf.at[1:, 0].set(bad) if leaf.shape == (3, 2) else leaf, reads.init(FC)
        )
        with pytest.raises(ValueError, match=r"velocity \['kernel'\] has 2 of 6 values that are"):
            carry(source, target)
        return
    buffer = BUFFERS[0].copy()
    buffer[0, 1:] = bad
    buffers = {i: {"momentum_buffer": b} for i, b in enumerate([buffer, BUFFERS[1]])}
    arguments: Any = dict(names=list(WEIGHTS), to_params=fc)
    message = r"momentum of fc\.weight has 2 of 6 .*np\.nan_to_num"
    if function == "load_torch":
        with pytest.raises(ValueError, match=message):
            load_torch(target, {**torch_state_dict(), "state": buffers}, **arguments)
    else:
        variables = {**KERAS_OF_FC, "sgd/fc.weight_momentum": buffer}
        with pytest.raises(ValueError, match=message):
            load_keras(target, variables, **arguments)


def test_real_and_complex_velocities_do_not_mix():
    """The imaginary part would be lost."""
    real, imaginary = ({"w": jnp.ones(2, dtype)} for dtype in ("float32", "complex64"))
    message = r"\['w'\] is (real|float32|complex64).*a real and a complex array do not mix"
    trace, momentum = mj.trace(0.5), mj.momentum(0.5)
    for to, of in ((real, imaginary), (imaginary, real)):
        with pytest.raises(TypeError, match=message):
            load_optax(trace.init(to), optax.trace(0.5).init(of))
        with pytest.raises(TypeError, match=message):
            dump_optax(optax.trace(0.5).init(to), trace.init(of))
        with pytest.raises(TypeError, match=message):
            momentum_from_trace(momentum.init(to), trace.init(of), learning_rate=0.5)
    buffers = {"w": np.array([1j, 2j]), "v": np.array([1.0])}
    group = dict(lr=0.5, momentum=0.5, dampening=0, nesterov=False, params=[0, 1])
    state_dict = {
        "state": {i: {"momentum_buffer": buffer} for i, buffer in enumerate(buffers.values())},
        "param_groups": [group],
    }
    named: Any = dict(names=list(buffers), to_params=lambda weights: weights)
    with pytest.raises(TypeError, match=r"velocity \['w'\] is float32, .* is complex128: a real"):
        load_torch(trace.init({"w": jnp.ones(2), "v": jnp.ones(1)}), state_dict, **named)
    params = {"w": jnp.ones(2, "complex64"), "v": jnp.ones(1)}
    state = load_torch(trace.init(params), state_dict, **named)
    dumped = dump_torch(state, state_dict, **named)["state"]
    assert [dumped[i]["momentum_buffer"].dtype for i in range(2)] == [np.complex64, np.float32]
    state = mj.MomentumState(jnp.int32(1), {"kernel": jnp.ones(2, "complex64")})
    variables = {"sgd/iteration": np.array(0), "sgd/kernel_momentum": np.zeros(2, "f")}
    with pytest.raises(
        TypeError, match="the velocity of kernel is complex64, but Keras's variable is float32"
    ):
        dump_keras(state, variables, names=["kernel"], to_params=lambda weights: weights)


def test_only_velocities_and_counts_are_carried_over():
    """An injected learning rate of the target does not change."""
    params = {"w": jnp.ones(3)}

    def outside(rate):
        return optax.inject_hyperparams(
            lambda learning_rate: optax.chain(
                mj.trace(0.9), optax.scale_by_learning_rate(learning_rate)
            )
        )(learning_rate=rate)

    def inside(rate):
        return optax.inject_hyperparams(lambda learning_rate: mj.momentum(learning_rate, 0.9))(
            learning_rate=rate
        )

    def theirs(rate):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=0.9)

    def stepped(tx):
        return tx.update(params, tx.init(params), params)[1]

    for carried in (
        momentum_from_trace(inside(0.5).init(params), stepped(outside(0.1)), learning_rate=0.5),
        load_optax(outside(0.5).init(params), stepped(theirs(0.1))),
        dump_optax(theirs(0.5).init(params), stepped(outside(0.1))),
    ):
        assert float(carried.hyperparams["learning_rate"]) == 0.5
        assert int(carried.count) == 1


JOB = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import momentum_jax as mj
from momentum_jax import frameworks

coordinator, processes, index, axis_type = sys.argv[1:]
jax.distributed.initialize(coordinator, int(processes), int(index))
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType[axis_type],))
values = np.arange(64.0 * 128).reshape(64, 128) % 100
gathered = []
gather = multihost_utils.process_allgather
multihost_utils.process_allgather = lambda x, **kw: gathered.append(x.shape) or gather(x, **kw)


def sharded(x, spec=P("d")):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def whole(state):
    (velocity,) = (x for x in jax.tree.leaves(mj.read_velocity(state)))
    return velocity if velocity.is_fully_addressable else gather(velocity, tiled=True)


def like(velocity_dtype, make, params):
    return make(0.5, velocity_dtype=velocity_dtype).init(params)


group = dict(lr=0.5, momentum=0.5, dampening=0, nesterov=False, params=[0])
buffers = {"state": {0: {"momentum_buffer": values}}, "param_groups": [group]}
variables = {"sgd/iteration": np.array(3), "sgd/w_momentum": values}
named = dict(names=["w"], to_params=lambda weights: weights["w"])
zeros = np.zeros_like(values, "f")
each, local = sharded(zeros), jnp.zeros_like(zeros)
for velocity_dtype in (None, "bfloat16", "int8"):
    # With int8, neighbouring codes of values up to 100 differ by at most 1.2, and some are rounded
    # twice.
    close = dict(atol=2.4 if velocity_dtype == "int8" else 0.5)
    for params in (each, sharded(zeros, P(None, "d")), sharded(zeros, P())):
        target = like(velocity_dtype, mj.trace, params)
        momentum = like(velocity_dtype, mj.momentum, params)
        theirs = optax.trace(0.5).init(params)
        filled = frameworks.load_torch(target, buffers, **named)
        results = [
            filled,
            frameworks.load_keras(momentum, variables, **named),
            frameworks.load_optax(target, frameworks.dump_optax(theirs, filled)),
            frameworks.trace_from_momentum(
                target,
                frameworks.momentum_from_trace(momentum, filled, learning_rate=0.5),
                learning_rate=0.5,
            ),
        ]
        assert not gathered
        for result, before in zip(results, [target, momentum, target, target]):
            assert type(result) is type(before)
            for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(before)):
                assert x.dtype == y.dtype
                if y.committed:
                    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
            np.testing.assert_allclose(whole(result), values, **close)
        dumped = frameworks.dump_torch(filled, buffers, **named)["state"][0]["momentum_buffer"]
        np.testing.assert_allclose(dumped, values, **close)
        dumped = frameworks.dump_keras(results[1], variables, **named)["sgd/w_momentum"]
        np.testing.assert_allclose(dumped, values, **close)
        # Between one process and several, the values go through the host.
        alone = frameworks.load_optax(like(None, mj.trace, local), optax.TraceState(filled.trace)) \
            if velocity_dtype != "int8" else None
        if alone is not None:
            assert alone.trace.is_fully_addressable
            np.testing.assert_allclose(alone.trace, values, **close)
            back = frameworks.load_optax(target, optax.TraceState(alone.trace))
            np.testing.assert_allclose(whole(back), values, **close)
        gathered.clear()
bad = sharded(np.where(values == 7, np.nan, values).astype("f"))
try:
    frameworks.load_optax(target, optax.TraceState(bad))
except ValueError as error:
    assert "82 of 8192 values that are not finite" in str(error), error
else:
    raise AssertionError("not refused")
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_states_sharded_over_several_processes(axis_type, tmp_path):
    """Shardings are kept, and nothing is gathered from state to state."""
    (tmp_path / "job.py").write_text(JOB)
    for printed in run_job(tmp_path / "job.py", axis_type, timeout=240):
        assert printed.splitlines()[-1] == "done"
