"""kahan: 16-bit params that learn from updates too small for their dtype."""

import functools
import inspect
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import rows

import momentum_jax

mj: Any = momentum_jax  # Avoids casts: Optax types its trees too widely.

APPLY = {"optax": optax.apply_updates, "ours": mj.apply_updates}
each_apply = pytest.mark.parametrize("apply", APPLY.values(), ids=APPLY)
each_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def types(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def run(tx, params, grads, steps, apply=mj.apply_updates, jitted=True):
    def step(carry, _=None):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (apply(params, updates), state), None

    carry = params, tx.init(params)
    if jitted:
        return jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps)[0])(carry)
    for _ in range(steps):
        carry, _ = step(carry)
    return carry


@each_apply
@pytest.mark.parametrize("jitted", [True, False], ids=["scan", "eager"])
def test_a_thousand_thousandths_make_one(jitted, apply):
    """1.0 + 1000 * 0.001 = 2.0 with kahan, and 1.0 without it."""
    params, grads = jnp.ones(2, "bfloat16"), -jnp.ones(2)
    (plain, _), (kept, _) = (
        run(tx, params, grads, 1000, apply, jitted)
        for tx in (optax.sgd(0.001), mj.kahan(optax.sgd(0.001)))
    )
    np.testing.assert_array_equal(plain, 1)
    np.testing.assert_array_equal(kept, 2)
    assert kept.dtype == jnp.bfloat16


@each_dtype
def test_float32_is_followed_to_16_bits(dtype):
    """A random walk of 2,000 steps, each far below the last bit of the param."""
    tx = mj.kahan(optax.identity())
    start = jnp.asarray(np.random.default_rng(0).uniform(1, 2, 256), dtype)
    steps = 2e-4 * np.random.default_rng(1).normal(size=(2000, 256)) + 1e-4

    def step(carry, update):
        params, state = carry
        updates, state = tx.update(update, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = start, tx.init(start)
    steps = jnp.asarray(steps, "float32")
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, steps))(carry)
    wide = np.asarray(start, np.float64) + np.asarray(steps, np.float64).sum(0)
    compensated = np.asarray(params, np.float64) + np.asarray(state.compensation, np.float64)
    assert np.abs(compensated - wide).max() < 2e-3
    assert np.abs(np.asarray(start, np.float64) - wide).min() > 0.1


@each_apply
@each_dtype
def test_the_sum_is_a_number_of_16_bits(dtype, apply):
    """100,000 random pairs of all magnitudes: the sum needs no rounding, and nothing is lost."""
    rng = np.random.default_rng(0)
    n = 100_000
    low, high = (-60, 60) if dtype == "bfloat16" else (-12, 12)
    params = jnp.asarray(np.ldexp(rng.uniform(-1, 1, n), rng.integers(low, high, n)), dtype)
    wide = np.asarray(params, np.float32)
    near = -wide * (1 + np.ldexp(rng.uniform(-1, 1, n), rng.integers(-24, 0, n)))
    far = np.ldexp(rng.uniform(-1, 1, n), rng.integers(low, high, n))
    update = jnp.asarray(np.where(rng.random(n) < 0.3, near, far), "float32")
    tx = mj.kahan(optax.identity())
    updates, state = jax.jit(tx.update)(update, tx.init(params), params)
    assert updates.dtype == jnp.float32
    moved = apply(params, updates)
    # What apply_updates makes of the update itself, eager and jitted.
    wanted = (params.astype("float32") + update).astype(dtype)
    np.testing.assert_array_equal(moved, wanted)
    total = np.asarray(params, np.float32) + np.asarray(updates)
    finite = np.isfinite(np.asarray(wanted, np.float32))
    exact = total == np.asarray(wanted, np.float32)
    # If the update is much larger than the param, a float32 cannot hold the param's last bits.
    gone = np.abs(wide) < np.abs(total) * 2.0 ** (-15 if dtype == "bfloat16" else -12)
    assert exact[finite & ~gone].all()
    short = np.asarray(update, np.float64) + wide - np.asarray(wanted, np.float64)
    kept = np.asarray(state.compensation, np.float64)
    tolerance = 2.0**-8 * np.abs(short) + 2.0**-23 * np.abs(wide) + 1e-40
    tolerance += 2.0**-23 * np.abs(np.asarray(update, np.float64))
    assert (np.abs(kept - short) <= tolerance)[finite].all()


def in_numpy(param, compensation, update):
    """Returns new param and compensation: the recurrence in float32, rounded by ml_dtypes."""
    wide, wanted = np.float32(param), update + np.float32(compensation)
    with np.errstate(over="ignore", invalid="ignore"):
        moved = (wide + wanted).astype(param.dtype)
        short = wanted - (np.float32(moved) - wide)
    return moved, np.where(np.isfinite(short), short, 0).astype(compensation.dtype)


def last_bit(params):
    """Returns the distance to the next 16-bit number away from zero, as float32."""
    info = jnp.finfo(params.dtype)
    _, exponent = np.frexp(np.float32(params))
    bit = np.ldexp(np.float32(1), exponent - 1 - info.nmant)
    return np.maximum(bit, np.float32(info.smallest_subnormal))


def hard_to_round(dtype):
    """Returns params and updates: sums are ties, near ties, subnormal, too large, or the update."""
    info = jnp.finfo(dtype)
    mantissas = np.concatenate([1 + np.arange(64) * float(info.eps), np.arange(64) / 64])
    params = np.outer(2.0 ** np.array([-3, 0, 4, 9]), mantissas).ravel()
    if dtype == "float16":  # Float32 subnormals, as in bfloat16, become 0 on most hardware.
        params = np.concatenate([params, np.arange(2100) * 2.0**-24])
    params = np.asarray(np.concatenate([params, -params]), dtype)
    wide, half = np.float32(params), last_bit(params) / 2
    around = np.random.default_rng(0).uniform(-2, 2, wide.size)
    updates = [
        *(half * np.float32(k) for k in (-3, -2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2, 3)),
        *(sign * np.nextafter(half, np.float32(to)) for sign in (-1, 1) for to in (0, 1)),
        *(wide * np.float32(k) for k in (-1 - 2.0**-9, -1, -0.5, 2.0**-13)),
        *(wide * np.float32(2.0**k) for k in range(3, 30)),
        # Powers of two much larger than the param: update + param is inexact in float32.
        *(np.exp2(np.floor(np.log2(half)) + np.float32(k)) for k in range(18, 36)),
        np.float32(around * float(info.tiny)),
    ]
    params = np.tile(params, len(updates))
    # Half of the last bit above the largest number rounds to infinity, less does not.
    most = np.full(6, info.max, dtype)
    bit = last_bit(most)[0]
    beyond = [bit / 4, bit / 2, np.nextafter(bit / 2, np.float32(0)), bit, -bit, 0]
    params = np.concatenate([params, most])
    updates = np.concatenate([*updates, np.asarray(beyond, np.float32)])
    normal = (updates == 0) | (np.abs(updates) >= np.finfo("float32").tiny)
    return params[normal], updates[normal]


def with_pairs_of_casts_dropped(f, *args):
    """Returns f(*args) without casts to 16 bits and back, and the number of these casts.

    XLA may compile f this way (`xla_allow_excess_precision`). It does so for GPUs, not for CPUs.
    """

    def run(jaxpr, consts, args):
        known: dict[Any, Any] = {}
        before_cast: dict[Any, Any] = {}

        def read(atom):
            return atom.val if hasattr(atom, "val") else known[atom]

        known.update(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            inner = eqn.params.get("jaxpr")
            if inner is not None:
                results = run(inner.jaxpr, inner.consts, values)
            else:
                results = eqn.primitive.bind(*values, **eqn.params)
                results = results if eqn.primitive.multiple_results else [results]
            if eqn.primitive.name == "convert_element_type":
                (source,), (result,) = eqn.invars, eqn.outvars
                if result.aval.dtype.itemsize == 2 and source.aval.dtype == np.float32:
                    before_cast[result] = values[0]
                elif source in before_cast and result.aval.dtype == np.float32:
                    results = [before_cast[source]]
                    dropped.append(source)
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    dropped: list[Any] = []
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    results = run(closed.jaxpr, closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), results), len(dropped)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))  # Treats 0 and -0 as equal.


@each_apply
@each_dtype
@pytest.mark.parametrize("way", ["jit", "eager", "casts dropped"])
def test_every_rounding_is_that_of_numpy(way, dtype, apply):
    """Params and compensations are equal bit for bit, even if the compiler drops pairs of casts."""
    params, updates = hard_to_round(dtype)
    rng = np.random.default_rng(1)
    tx = mj.kahan(optax.identity())

    def step(params, compensation, updates):
        state = tx.init(params)._replace(compensation=compensation)
        updates, state = tx.update(updates, state, params)
        return apply(params, updates), state.compensation

    for size in (0, rng.uniform(-0.5, 0.5, params.size)):
        compensation = jnp.asarray(last_bit(params) * size, "bfloat16")
        args = jnp.asarray(params), compensation, jnp.asarray(updates)
        if way == "casts dropped":
            result, dropped = with_pairs_of_casts_dropped(step, *args)
            assert dropped
        else:
            result = (jax.jit(step) if way == "jit" else step)(*args)
        assert_same(result, in_numpy(params, np.asarray(compensation), updates))


@each_dtype
def test_every_step_of_a_scan_is_that_of_numpy(dtype):
    """100 steps of w <- (1 - 2^-10) w, with the gradient computed in the same program."""
    rng = np.random.default_rng(0)
    params = np.asarray(rng.uniform(-2, 2, 1000), dtype)
    tx = mj.kahan(optax.identity())

    def step(carry, scale):
        params, state = carry
        grads = jax.grad(lambda w: jnp.sum(w.astype("float32") ** 2) / 2)(params)
        updates, state = tx.update(scale * grads.astype("float32"), state, params)
        return (optax.apply_updates(params, updates), state), None

    scales = np.full(100, -(2.0**-10), "float32")  # A power of two, so the product is exact.
    carry = jnp.asarray(params), tx.init(jnp.asarray(params))
    (moved, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, scales))(carry)
    expected = params, np.zeros_like(params, dtype="bfloat16")
    for scale in scales:
        expected = in_numpy(*expected, scale * np.float32(expected[0]))
    assert_same((moved, state.compensation), expected)
    assert np.mean(np.asarray(moved) != params) > 0.9


# XLA's description of this GPU, as a compilation target.
H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TOPOLOGIES: dict[str, dict[str, str]] = {
    "libtpu": {"platform": "tpu", "topology_name": "v5e:2x2"},
    "jax_cuda12_plugin": {
        "platform": "cuda",
        "topology_name": "1x1x1",
        "topology": "1x1x1",
        "target_config": H100,
    },
}


@each_dtype
@each_apply
@pytest.mark.parametrize("compiler", TOPOLOGIES)
def test_a_step_is_one_kernel_that_rounds(compiler, apply, dtype, monkeypatch):
    """It moves 18 bytes per parameter: velocity 8, compensation 4, param 4, gradient 2.

    Needs the compiler, not the accelerator: `libtpu` or `jax-cuda12-plugin[with-cuda]`.
    """
    pytest.importorskip(compiler)
    from jax.experimental import topologies

    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        monkeypatch.setenv(name, value)
    device = topologies.get_topology_desc(**TOPOLOGIES[compiler]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    tx = mj.kahan(mj.momentum(0.1, 0.9))
    params = {"w": jax.ShapeDtypeStruct((8192, 4096), dtype)}
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, jax.eval_shape(tx.init, params), params),
    )

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply(params, updates), state

    compiled: Any = jax.jit(step, donate_argnums=(0, 1)).trace(*args).lower().compile()
    text = str(compiled.as_text())
    entry = text[text.index("ENTRY") :]
    assert len(re.findall(r"\[8192,4096\].* fusion\(", entry)) == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 4096
    if compiler == "libtpu":
        assert compiled.cost_analysis()["bytes accessed"] / (8192 * 4096) < 18.01
    assert text.count(" reduce-precision(") == 1


def test_wide_params_and_absent_updates_pass():
    """float32 params and missing updates pass unchanged; a float32 param has no compensation."""
    params = {
        "half": jnp.ones(3, "bfloat16"),
        "still": jnp.ones(2, "float16"),
        "wide": jnp.ones(2),
        "python": 1.0,
        "ids": jnp.arange(2),
        "none": None,
    }
    grads = {**jax.tree.map(jnp.ones_like, params), "still": None, "ids": None}
    tx = mj.kahan(mj.momentum(1e-3))
    state = start = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, state = update(grads, state, params)
        assert types(state) == types(start)
    plain, _ = mj.momentum(1e-3).update(grads, mj.momentum(1e-3).init(params))
    assert updates["still"] is None
    assert updates["ids"] is None
    assert updates["wide"].dtype == plain["wide"].dtype
    assert isinstance(state.compensation["wide"], optax.MaskedNode)
    assert not np.any(np.asarray(state.compensation["still"], np.float32))
    assert np.all(np.asarray(state.compensation["half"], np.float32) != 0)
    moved = mj.apply_updates(params, updates)
    assert types(moved) == types(jax.tree.map(jnp.asarray, params))
    assert types(jax.eval_shape(tx.init, params)) == types(start)


@pytest.mark.slow
def test_a_whole_equinox_model_as_params():
    """Its static leaves have no update and stay unchanged."""
    model = eqx.nn.MLP(2, 2, 8, 1, dtype="bfloat16", key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_array)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(2, "bfloat16")) ** 2))(model)
    tx = mj.kahan(mj.momentum(1e-3))
    start = tx.init(arrays)
    updates, state = tx.update(grads, start, model)
    assert types(state) == types(start)
    expected = tx.update(grads, start, arrays)
    for a, b in zip(jax.tree.leaves((updates, state)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    moved = eqx.apply_updates(model, updates)
    assert moved.activation is model.activation
    assert jnp.any(state.compensation.layers[0].weight != 0)


@pytest.mark.parametrize("absent", [None, optax.MaskedNode(), np.zeros((), jax.dtypes.float0)])
def test_what_is_not_an_array_and_has_no_update_is_left_alone(absent):
    """With an update, the error names the leaf."""
    tx = mj.kahan(optax.identity())
    params: Any = {"w": jnp.ones(2, "bfloat16"), "f": jnp.tanh}
    state = tx.init({**params, "f": None})
    updates, after = tx.update({"w": jnp.ones(2), "f": absent}, state, params)
    assert updates["f"] is absent or isinstance(updates["f"], type(absent))
    assert types(after) == types(state)
    with pytest.raises(TypeError, match=r"the param at \['f'\] is .*, not an array"):
        tx.update({"w": jnp.ones(2), "f": jnp.ones(2)}, state, params)


FIRST = np.array([True, False, False])
AGGMO = mj.aggmo(1e-3, (0.5, 0.9))
WHERE: dict[str, Any] = {
    "tree": (mj.momentum(1e-3), {"w": FIRST, "v": True, "wide": False}),
    "predicate": (mj.momentum(1e-3), lambda path: path[0].key != "w"),
    "all": (mj.momentum(1e-3), None),
    "aggmo, predicate": (AGGMO, lambda path: path[0].key != "w"),
    "aggmo, tree": (AGGMO, {"w": FIRST, "v": True, "wide": False}),
    "chain, masked": (
        optax.chain(
            optax.masked(mj.trace(0.9), {"w": True, "v": True, "wide": False}), optax.scale(-1e-3)
        ),
        {"w": FIRST, "v": True, "wide": False},
    ),
}


@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", WHERE)
def test_reset_velocity_clears_the_compensation(name, jitted):
    """Otherwise a pruned weight would grow again. Only the selected params are cleared."""
    inner, where = WHERE[name]
    tx = mj.kahan(inner)
    params = {"w": jnp.ones(3, "bfloat16"), "v": jnp.ones(2, "float16"), "wide": jnp.ones(2)}
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, tx.init(params), params)
    reset = functools.partial(mj.reset_velocity, where=where)
    after = (jax.jit(reset) if jitted else reset)(state)
    assert types(after) == types(state)
    kept = np.asarray(state.compensation["w"])
    expected = {"all": [0, 0, 0], "predicate": kept, "aggmo, predicate": kept}
    expected = expected.get(name, [0, *kept[1:]])
    np.testing.assert_array_equal(np.asarray(after.compensation["w"]), expected)
    np.testing.assert_array_equal(np.asarray(after.compensation["v"]), 0)
    assert np.all(kept != 0)
    assert isinstance(after.compensation["wide"], optax.MaskedNode)


AROUND: dict[str, Any] = {
    "lookahead": lambda: mj.kahan(optax.lookahead(mj.momentum(1e-3), 2, 0.5)),
    "flatten": lambda: mj.kahan(optax.flatten(mj.momentum(1e-3))),
    "split_real_and_imaginary": lambda: mj.kahan(
        optax.contrib.split_real_and_imaginary(mj.momentum(1e-3))
    ),
    "partition": lambda: mj.kahan(
        optax.partition({"a": mj.momentum(1e-3), "b": optax.sgd(1e-3)}, {"w": "a", "c": "b"})
    ),
    "several groups of several velocities": lambda: mj.kahan(
        optax.partition({"a": AGGMO, "b": mj.aggmo(1e-3, (0.0,))}, {"w": "a", "c": "b"})
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_reset_velocity_clears_compensations_of_params_that_are_not_like_the_velocity(name):
    """Covers two trees of params, one array of all, and no or several velocities per param."""
    tx = AROUND[name]()
    dtype = "complex64" if name == "split_real_and_imaginary" else "bfloat16"
    params: Any = {"w": jnp.ones(3, "bfloat16"), "c": jnp.ones(2, dtype)}
    grads = jax.tree.map(jnp.ones_like, params)
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    _, state = tx.update(grads, tx.init(params), params)
    if name == "lookahead":  # The slow params have not moved yet.
        state = state._replace(compensation=optax.LookaheadParams(*2 * [state.compensation.fast]))
    assert all(map(np.any, jax.tree.leaves(state.compensation)))
    assert not any(map(np.any, jax.tree.leaves(mj.reset_velocity(state).compensation)))
    if name == "flatten":
        with pytest.raises(ValueError, match="where must be a prefix of the velocity"):
            mj.reset_velocity(state, {"w": True, "c": False})
        return
    after = mj.reset_velocity(state, {"w": True, "c": False})
    for path, left in jax.tree_util.tree_leaves_with_path(after.compensation):
        assert bool(np.any(left)) == (path[-1].key == "c")
    assert types(after) == types(state)


def test_a_pruned_weight_stays_pruned():
    """Without the reset, the compensation and the velocity would move it."""
    tx = mj.kahan(mj.momentum(1e-3))
    params, zero = jnp.ones(2, "bfloat16"), jnp.zeros(2)
    _, state = tx.update(jnp.ones(2), tx.init(params), params)
    pruned = params.at[0].set(0)
    reset = mj.reset_velocity(state, jnp.array([True, False]))
    for given, expected in ((state, True), (reset, False)):
        updates, _ = tx.update(zero, given, pruned)
        moved = mj.apply_updates(pruned, updates)
        assert bool(moved[0] != 0) == expected


def test_a_scale_or_a_restart_leaves_the_compensation():
    """The compensation is a part of the params, which are not reset."""
    tx = mj.adaptive_restart(mj.kahan(mj.momentum(1e-3, 0.9)))
    params = jnp.ones(2, "bfloat16")
    _, state = tx.update(jnp.ones(2), tx.init(params), params)
    kept = state.inner_state.compensation
    half = mj.reset_velocity(state, scale=0.5)
    np.testing.assert_array_equal(half.inner_state.compensation, kept)
    np.testing.assert_array_equal(mj.reset_velocity(state).inner_state.compensation, 0)
    # The step went uphill: the velocity becomes 0, the compensation stays.
    _, state = tx.update(jnp.full(2, 1e-9), state, params + 0.5)
    np.testing.assert_allclose(mj.read_velocity(state), -1e-12, rtol=1e-5)
    np.testing.assert_array_equal(state.inner_state.compensation, kept)


def test_any_transformation_inside():
    """Covers Adam in a chain, extra arguments, a skipped bad step, and 8-bit velocities."""
    params = jnp.ones((64, 128), "bfloat16")
    grads = jnp.ones((64, 128), "bfloat16")  # Optax's Adam uses their dtype.
    adam = mj.kahan(optax.chain(optax.clip(0.5), optax.adam(1e-4)))
    assert float(run(adam, params, grads, 1000)[0][0, 0]) == pytest.approx(0.9, abs=0.01)
    tx = mj.kahan(optax.apply_if_finite(mj.momentum(1.0, 0.0, velocity_dtype="int8"), 3))
    _, state = tx.update(grads, tx.init(params), params, learning_rate=1e-3)
    assert np.all(np.asarray(state.compensation, np.float32) != 0)
    bad, after = tx.update(grads * np.inf, state, params, learning_rate=1e-3)
    np.testing.assert_array_equal(mj.apply_updates(params, bad), params)
    np.testing.assert_array_equal(after.compensation, state.compensation)
    assert mj.read_velocity(state).shape == params.shape


# The table of the docstring --------------------------------------------------------------

RATE = 0.14  # 0.1396484375 as a bfloat16.
LABELS = {"a": "a", "b": "b"}


def even(step, **_):
    return step % 2 == 0


def momentum(learning_rate: Any = RATE):
    return mj.momentum(learning_rate, 0.9)


def kept(learning_rate: Any = RATE):
    return mj.kahan(momentum(learning_rate))


def make_mesh():
    return jax.make_mesh((8,), ("data",), (AxisType.Auto,))


WRAPPERS: dict[str, Any] = {
    "MultiSteps": lambda make: optax.MultiSteps(make(), 2).gradient_transformation(),
    "adaptive_restart": lambda make: mj.adaptive_restart(make()),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(), 5),
    "chain": lambda make: optax.chain(optax.clip(6e-4), make(), optax.scale(0.5)),
    "chain, last": lambda make: optax.chain(optax.clip(6e-4), make()),
    "conditionally_mask": lambda make: optax.conditionally_mask(make(), even),
    "conditionally_transform": lambda make: optax.conditionally_transform(make(), even),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(
        learning_rate=RATE
    ),
    "lookahead": lambda make: optax.lookahead(make(), sync_period=5, slow_step_size=0.5),
    "masked": lambda make: optax.masked(make(), {"a": True, "b": False}),
    "partition": lambda make: optax.partition({"a": make(), "b": make()}, LABELS),
    "schedule_free": lambda make: optax.contrib.schedule_free(make(), RATE, b1=0.8),
    "sharding.zero1": lambda make: mj.sharding.zero1(make(), make_mesh()),
}
MULTI_STEPS_KEEPS_ITS_DTYPE = "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
# With kahan inside these, JAX refuses gradients of any other dtype.
NEED_FLOAT32 = ["apply_if_finite", "conditionally_mask", "conditionally_transform"]
# The params that the table marks as wrong with kahan inside.
WRONG = {
    "chain": "ab",
    "conditionally_transform": "ab",
    "lookahead": "ab",
    "masked": "b",
    "schedule_free": "ab",
}
STEPS = 400
RIGHT = 5e-4  # Above 400 roundings of the compensation, each at most 2^-18.
LAST_BIT = 2.0**-7  # Of a param between 1 and 2.


def gradients(name, dtype):
    """Each step is below half of the last bit, and their sum is many times the last bit."""
    rng = np.random.default_rng(1)
    grads = {k: rng.normal(size=(STEPS, 64), scale=3e-4) - 5e-4 for k in LABELS}
    if name == "adaptive_restart":
        turned = np.where(np.arange(STEPS) % 60 < 45, 1, -1)[:, None]
        grads = {k: v * turned for k, v in grads.items()}
    if name == "apply_if_finite":
        grads["a"][[50, 51, 200], 3] = np.nan, np.inf, -np.inf
    return {k: jnp.asarray(v, dtype) for k, v in grads.items()}


def trained(name, tx, dtype, grads):
    """Returns param + compensation after these steps, in float64, by the path of the param."""
    start = jnp.asarray(np.random.default_rng(0).uniform(1, 1.25, 64), "bfloat16")
    params: Any = dict.fromkeys(LABELS, start.astype(dtype))
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    if name == "MultiSteps":  # Before Optax 0.2.8, its sums have the params' dtype.
        grads = {k: v.astype(dtype) for k, v in grads.items()}
    if name == "sharding.zero1":
        params = jax.device_put(params, NamedSharding(make_mesh(), P()))

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, tx.init(params)
    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, grads))(carry)
    found = {path: np.asarray(w, np.float64) for path, w in leaves_with_path(params)}
    for node in jax.tree.leaves(state, is_leaf=has_compensation):
        if has_compensation(node):
            for path, compensation in leaves_with_path(node.compensation):
                # Inside lookahead, it belongs to the fast params, which are wrong anyway.
                if path in found:
                    found[path] += np.asarray(compensation, np.float64)
    return found


leaves_with_path = jax.tree_util.tree_leaves_with_path


def has_compensation(node):
    return type(node).__name__ == "KahanState"


@functools.cache
def reference(name, of_gradients, dtype="float32"):
    """Returns what the wrapper does without compensation."""
    return trained(name, WRAPPERS[name](momentum), dtype, gradients(name, of_gradients))


def largest(found, expected):
    return {
        jax.tree_util.keystr(path): np.abs(found[path] - expected[path]).max() for path in expected
    }


def test_each_row_of_the_table_is_tested():
    assert list(rows(mj.kahan)) == [name for name in WRAPPERS if "," not in name]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["inside", "around"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_kahan_and_wrappers(name, place):
    """Each row of the docstring's table: right means equal to float32 params."""
    inside = place == "inside"
    if inside and name == "MultiSteps" and not MULTI_STEPS_KEEPS_ITS_DTYPE:
        pytest.skip("before 0.2.8, the dtype of its sums becomes that of the updates")
    wrap = WRAPPERS[name]
    of_gradients = "float32" if inside and name in NEED_FLOAT32 else "bfloat16"
    grads = gradients(name, of_gradients)
    tx = wrap(kept) if inside else mj.kahan(wrap(momentum))
    expected = reference(name, of_gradients)
    found = largest(trained(name, tx, "bfloat16", grads), expected)
    # Without compensation, every param is wrong.
    without = largest(reference(name, of_gradients, "bfloat16"), expected)
    assert min(without.values()) > 5 * LAST_BIT
    tolerance = LAST_BIT if name in ("lookahead", "adaptive_restart") else RIGHT
    for path, error in found.items():
        if inside and path[-3] in WRONG.get(name, ""):
            assert error > 2 * LAST_BIT, path
        else:
            assert error < tolerance, path


@pytest.mark.parametrize("name", NEED_FLOAT32)
def test_inside_wrappers_that_branch_the_gradients_must_be_float32(name):
    """With kahan around the wrapper, bfloat16 gradients work: see the table above."""
    params = dict.fromkeys(LABELS, jnp.ones(64, "bfloat16"))
    tx = WRAPPERS[name](kept)
    with pytest.raises(TypeError, match="branches must have equal output types"):
        tx.update(params, tx.init(params), params)


def both_with_restarts(inner):
    return mj.adaptive_restart(mj.kahan(inner)), mj.kahan(mj.adaptive_restart(inner))


def test_no_restart_follows_a_step_in_which_no_param_changed():
    """Updates of 0.0001 do not change a bfloat16 1; a float32 restarts when the gradient turns."""
    expected = {
        "bfloat16": 1e-4 * (0.9**3 + 0.9**2 - 0.9 - 1),
        "float32": 1e-4 * (-0.9 - 1),
    }
    for tx in both_with_restarts(mj.momentum(0.01, 0.9)):
        for dtype, velocity in expected.items():
            params = jnp.ones(1, dtype)
            state = tx.init(params)
            for grad in [-0.01, -0.01, 0.01, 0.01]:
                updates, state = tx.update(jnp.full(1, grad), state, params)
                params = mj.apply_updates(params, updates)
            np.testing.assert_allclose(mj.read_velocity(state), velocity, rtol=1e-5)


def test_the_compensation_is_right_between_restarts():
    """Inside and around give equal results. The restarts follow the rounded params."""
    grads = gradients("adaptive_restart", "bfloat16")
    alone = mj.adaptive_restart(momentum())
    start: Any = dict.fromkeys(LABELS, jnp.asarray(np.linspace(1, 1.25, 64), "bfloat16"))

    def run(tx):
        def step(carry, grads):
            params, state, wide, beside = carry
            updates, beside = alone.update(grads, beside, params)
            wide = optax.apply_updates(wide, updates)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, wide, beside), None

        wide = jax.tree.map(lambda w: w.astype("float32"), start)
        carry = start, tx.init(start), wide, alone.init(start)
        return jax.jit(lambda carry: jax.lax.scan(step, carry, grads)[0])(carry)

    inside, around = (run(tx) for tx in both_with_restarts(momentum()))
    compensations = inside[1].inner_state.compensation, around[1].compensation
    for name in LABELS:
        assert_same(
            (inside[0][name], compensations[0][name]), (around[0][name], compensations[1][name])
        )
        compensated = np.asarray(inside[0][name], np.float64) + np.asarray(
            compensations[0][name], np.float64
        )
        np.testing.assert_allclose(compensated, inside[2][name], atol=RIGHT, rtol=0)


def test_inject_hyperparams_rounds_the_learning_rate():
    """It rounds to the dtype of the params, unless told otherwise."""
    grads = gradients("", "bfloat16")
    expected = trained("", momentum(float(jnp.bfloat16(RATE))), "float32", grads)
    for tx in (
        optax.inject_hyperparams(kept)(learning_rate=RATE),
        mj.kahan(optax.inject_hyperparams(momentum)(learning_rate=RATE)),
    ):
        found = trained("", tx, "bfloat16", grads)
        assert max(largest(found, expected).values()) < RIGHT
        exact = reference("inject_hyperparams", "bfloat16")
        assert all(abs(np.mean(found[path] - exact[path])) > 5e-4 for path in found)


def test_around_schedule_free_its_averages_are_float32():
    """They stay float32; averages of float32 params are unchanged."""
    tx = mj.kahan(WRAPPERS["schedule_free"](momentum))
    params = {"w": jnp.ones(2, "bfloat16"), "wide": jnp.ones(2)}
    start = tx.init(params)
    assert start.inner_state.z["w"].dtype == jnp.float32
    _, state = jax.jit(tx.update)(params, start, params)
    assert types(state) == types(start)
    wide = {"w": jnp.ones(2)}
    inner = WRAPPERS["schedule_free"](momentum)
    assert types(mj.kahan(inner).init(wide).inner_state) == types(inner.init(wide))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_compensation_is_sharded_like_its_param(axis_type):
    """Also if init is jitted. The numbers equal those on one device, and of each run of a vmap."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, P("d", "m"))
    whole = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), "bfloat16")
    params = jax.device_put(whole, sharding)
    tx = mj.kahan(optax.sgd(1e-3))
    for state in (tx.init(params), jax.jit(tx.init)(params)):
        updates, after = jax.jit(tx.update)(params, state, params)
        for leaf in (state.compensation, after.compensation, updates):
            assert leaf.sharding.is_equivalent_to(sharding, 2)
    _, expected = tx.update(whole, tx.init(whole), whole)
    np.testing.assert_array_equal(after.compensation, expected.compensation)
    mapped = jax.vmap(lambda w: tx.update(w, tx.init(w), w)[1])(jnp.stack([whole, -whole]))
    np.testing.assert_array_equal(mapped.compensation[0], expected.compensation)


def test_exports_for_every_platform_and_back():
    params = jnp.ones(4, "bfloat16")
    tx = mj.kahan(mj.momentum(1e-3))
    args = params, tx.init(params), params
    exported = export.export(jax.jit(tx.update), platforms=["cpu", "cuda", "rocm", "tpu"])(*args)
    read = export.deserialize(exported.serialize()).call(*args)
    assert types(read[1]) == types(args[1])
    np.testing.assert_array_equal(read[0], tx.update(*args)[0])


def test_averages_within_averages_are_float32():
    inner = optax.contrib.schedule_free(optax.sgd(0.1, 0.9), 0.1)
    tx = mj.kahan(optax.contrib.schedule_free(inner, 0.1))
    state = tx.init({"w": jnp.ones(2, "bfloat16")})
    for each in (state.inner_state, state.inner_state.base_optimizer_state):
        assert each.z["w"].dtype == jnp.float32


NARROW, WIDE = {"w": jnp.ones((2, 3), "bfloat16")}, {"w": jnp.ones((2, 3))}
OTHER_PARAMS: dict[str, Any] = {
    "none of bfloat16": (
        WIDE,
        NARROW,
        r"\['w'\] is bfloat16, .* a compensation, .* has none for it",
    ),
    "one of float32": (NARROW, WIDE, r"\['w'\] is float32, .* no compensation, .* has one for it"),
    "one of float8": (
        NARROW,
        {"w": jnp.ones((2, 3), "float8_e4m3fn")},
        r"\['w'\] is float8_e4m3fn, .* no compensation, .* has one for it",
    ),
    "a shape that would be broadcast": (
        {"w": jnp.ones((1, 3), "bfloat16")},
        NARROW,
        r"the param at \['w'\] has shape \(2, 3\), but the compensation there has shape \(1, 3\)",
    ),
    "another shape": (
        {"w": jnp.ones((3, 2), "bfloat16")},
        NARROW,
        r"the param at \['w'\] has shape \(2, 3\), but the compensation there has shape \(3, 2\)",
    ),
    "another tree": (
        {"w": NARROW["w"], "v": NARROW["w"]},
        NARROW,
        r"the updates and the compensation must be trees .*only in the compensation: \['v'\]",
    ),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", OTHER_PARAMS)
def test_a_state_of_other_params_is_refused(name, jitted):
    """Nothing is broadcast, left uncompensated, or rounded to another dtype."""
    of, params, message = OTHER_PARAMS[name]
    tx = mj.kahan(optax.scale(-1.0))
    update = jax.jit(tx.update) if jitted else tx.update
    with pytest.raises(ValueError, match=f"(?s){message}.*Call update with the params that init"):
        update(params, tx.init(of), params)
