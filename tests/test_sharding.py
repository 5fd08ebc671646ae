"""ZeRO-1: each device holds a shard of the state; numbers and params stay the same.

Run as a program, this file is one process of a job with several processes, or compiles for TPUs.
"""

import contextlib
import functools
import gc
import inspect
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from compiles import count_compiles
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import run_job
from tables import rows

import momentum_jax as mj

set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else getattr(jax.sharding, "use_mesh")  # noqa: B009

zero1: Any = mj.sharding.zero1

# The bias is not divisible. Along "model" the layers are sharded as in tensor parallelism.
SHAPES = {"bias": (3,), "hidden": (64, 32), "out": (32, 16)}
TENSOR_PARALLEL = {"bias": P(), "hidden": P(None, "model"), "out": P("model")}
REPLICATED = dict.fromkeys(SHAPES, P())
INNER: dict[str, Any] = {
    "momentum": mj.momentum(0.05, nesterov=True),
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3, weight_decay=0.1),
    "chain": optax.chain(optax.clip_by_global_norm(0.5), mj.trace(), optax.scale(-0.05)),
    "restart": mj.adaptive_restart(mj.momentum(0.05, mj.schedules.nesterov_convex())),
    "groups": optax.partition(
        {"slow": mj.aggmo(0.01), "fast": optax.MultiSteps(mj.qhm(0.1), 2)},  # pyright: ignore[reportArgumentType]
        {"bias": "fast", "hidden": "slow", "out": "fast"},
    ),
    "factored": optax.adafactor(1e-3, min_dim_size_to_factor=8),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = [(AUTO, "data"), (AUTO, "data, model"), (EXPLICIT, "data"), (EXPLICIT, "data, model")]


def make_mesh(axis_type=AUTO, names="data", devices=8):
    names = tuple(names.split(", "))
    shape = (devices,) if len(names) == 1 else (2, devices // 2)
    return jax.make_mesh(
        shape, names, axis_types=(axis_type,) * len(names), devices=jax.devices()[:devices]
    )


def make_params(mesh=None, shapes=SHAPES):
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=s, scale=0.1).astype(np.float32) for name, s in shapes.items()}
    if mesh is None:
        return params
    specs = TENSOR_PARALLEL if "model" in mesh.axis_names else REPLICATED
    return {name: jax.device_put(w, NamedSharding(mesh, specs[name])) for name, w in params.items()}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def make_batch(index, mesh=None):
    x = np.random.default_rng(index).normal(size=(16, 64)).astype(np.float32)
    if mesh is None:
        return x
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P("data")), lambda i: x[i])


def loss(params, x):
    def product(x, w):
        """On Explicit axes JAX needs the sharding of a sum over a sharded dimension."""
        if AxisType.Explicit not in jax.typeof(w).sharding.mesh.axis_types:
            return x @ w
        columns = jax.typeof(w).sharding.spec[1]
        return jnp.dot(x, w, out_sharding=P("data", columns))

    hidden = jnp.tanh(product(x, params["hidden"]))
    return jnp.mean((product(hidden, params["out"]) - 1) ** 2) + jnp.mean(params["bias"] ** 2)


def make_step(tx):
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return mj.apply_updates(params, updates), state

    return step


def train(tx, params, state, steps, mesh=None):
    """Returns the params and the state after these steps; the step must be traced once."""
    traces = []

    @jax.jit
    def step(*arguments):
        traces.append(1)
        return make_step(tx)(*arguments)

    for index in steps:
        params, state = step(params, state, make_batch(index, mesh))
        # The virtual devices of one CPU can hang with several programs in flight.
        jax.block_until_ready(params)
    assert len(traces) == 1
    return params, state


def assert_close(actual, expected, tolerance=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def assert_same_sharding(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


def bytes_by_device(tree):
    total = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device] += shard.data.nbytes
    return set(total.values())


@pytest.fixture(scope="module")
def unsharded():
    """Returns the result of 50 steps on one device, by the name of the transformation."""
    found = {}

    def result(name):
        if name not in found:
            params = jax.tree.map(jnp.asarray, make_params())
            found[name] = train(INNER[name], params, INNER[name].init(params), range(50))
        return found[name]

    return result


@pytest.mark.parametrize(
    ("name", "axis_type", "axes"),
    [(name, *MESHES[0]) for name in INNER if name != "adam"]
    + [("adamw", *MESHES[1]), ("momentum", *MESHES[2]), ("restart", *MESHES[3])],
)
def test_50_steps_equal_the_unsharded_run(name, axis_type, axes, unsharded):
    """They agree to 1e-6, every array keeps its sharding, and the step is traced once."""
    mesh = make_mesh(axis_type, axes)
    tx = zero1(INNER[name], mesh)
    with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
        params = make_params(mesh)
        state = tx.init(params)
        moved = train(tx, params, state, range(50), mesh)
    assert_same_sharding(moved, (params, state))
    assert_close(moved, unsharded(name))


def optimizers():
    """Returns a function for every optimizer of Optax, by its name.

    These are all functions whose first argument is a learning rate, and some combinations.
    """
    options: dict[str, dict[str, Any]] = {
        "adafactor": {"min_dim_size_to_factor": 4},
        "dpsgd": {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "key": 0},
        "galore": {"rank": 4},
        "lbfgs": {"linesearch": None},
        "noisy_sgd": {"key": 0},
        "optimistic_adam": {"optimism": 0.01},
    }
    adam = optax.adam(0.01)
    found: dict[str, Any] = {
        "apply_if_finite": lambda: optax.apply_if_finite(adam, 3),
        "backtracking": lambda: optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)
        ),
        "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), adam),
        "contrib.mechanize": lambda: optax.contrib.mechanize(adam),
        "contrib.normalize": lambda: optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
        "contrib.reduce_on_plateau": lambda: optax.chain(adam, optax.contrib.reduce_on_plateau()),
        "contrib.sam": lambda: optax.contrib.sam(
            optax.sgd(0.1),
            optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
            opaque_mode=True,
        ),
        "contrib.schedule_free": lambda: optax.contrib.schedule_free(adam, 0.01),
        "contrib.split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(adam),
        "flatten": lambda: optax.flatten(adam),
        "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(0.01),
        "lbfgs with its line search": lambda: optax.lbfgs(memory_size=3),
        "masked": lambda: optax.masked(adam, {"bias": True, "hidden": True, "out": False}),
        "MultiSteps": lambda: optax.MultiSteps(adam, 2).gradient_transformation(),
        "polyak_sgd": lambda: optax.polyak_sgd(),
        "two of one kind of noise": lambda: optax.chain(
            optax.add_noise(0.1, 0.5, key=jax.random.key(0)),
            optax.adafactor(0.01, min_dim_size_to_factor=4),
        ),
    }
    for module, prefix in ((optax, ""), (optax.contrib, "contrib.")):
        for name, make in vars(module).items():
            if name.startswith(("_", "scale_by_")) or not (name.islower() and callable(make)):
                continue
            parameters = inspect.signature(make).parameters
            if next(iter(parameters), None) == "learning_rate":
                given = options.get(name, {})
                if "key" in given and "key" not in parameters:
                    given = {"seed": 0} | {k: v for k, v in given.items() if k != "key"}
                found[prefix + name] = functools.partial(make, 0.01, **given)
    return found


OPTIMIZERS = optimizers()
# All others run on sharded arrays with the types of Explicit axes.
NEED_AUTO_AXES = {
    "adafactor",
    "contrib.dadapt_adamw",
    "contrib.galore",
    "contrib.mechanize",
    "contrib.momo",
    "contrib.momo_adam",
    "contrib.muon",
    "contrib.prodigy",
    "flatten",
    "lbfgs",
    "lbfgs with its line search",
    "sm3",
    "two of one kind of noise",
}
# Without LLVM's optimizations the tests take half as long.
FAST = {"xla_backend_optimization_level": 0}
SMALL = {"bias": (3,), "hidden": (16, 24), "out": (24, 8)}


def follow(name, tx, params, wrap=jax.jit):
    """Returns params, state and updates after three steps, which move each param to its half."""
    ends = {k: jnp.asarray(np.asarray(w) / 2 + 0.01) for k, w in make_params(shapes=SMALL).items()}

    def loss(params, *_):
        return sum(jnp.mean((w - ends[k]) ** 2) for k, w in params.items())

    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        extra: Any = {"value": value, "grad": grads, "value_fn": loss, "obj_fn": loss}
        extra |= {"loss": value, "grad_fn": lambda params, _: jax.grad(loss)(params)}
        if name == "contrib.sam":
            extra = {"grad_fn": extra["grad_fn"]}
        elif name == "backtracking" or "line search" in name:
            extra = {k: extra[k] for k in ("value", "grad", "value_fn")}
        if name == "contrib.dpsgd":  # One gradient per example.
            grads = jax.tree.map(lambda g: jnp.stack([g, 2 * g]), grads)
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
        return mj.apply_updates(params, updates), state, updates

    state, updates = tx.init(params), None
    like = params, state
    step = wrap(step, compiler_options=FAST)
    for _ in range(3):
        params, state, updates = step(params, state)
        jax.block_until_ready(params)
    return (params, state, updates), (*like, params)


@pytest.mark.filterwarnings("ignore:Specifying a key will be required")
@pytest.mark.filterwarnings("ignore:.* is deprecated")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("sgd", "contrib.momo") else pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
def test_every_optimizer_of_optax_has_the_numbers_of_one_device(name):
    """On Auto or on Explicit axes, in turn; on both if it needs Auto axes; shardings stay."""
    tx = OPTIMIZERS[name]()
    params = make_params(shapes=SMALL)
    expected, _ = follow(name, tx, jax.tree.map(jnp.asarray, params))
    in_turn = (AUTO, EXPLICIT)[list(OPTIMIZERS).index(name) % 2]
    for axis_type in (AUTO, EXPLICIT) if name in NEED_AUTO_AXES else (in_turn,):
        mesh = make_mesh(axis_type)
        with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
            params = make_params(mesh, SMALL)
            if axis_type is EXPLICIT and name in NEED_AUTO_AXES and not CAN_LEAVE_EXPLICIT:
                with pytest.raises(Exception, match=r"a mesh whose axes are AxisType\.Auto"):
                    follow(name, zero1(tx, mesh), params)
                continue
            result, like = follow(name, zero1(tx, mesh), params)
        assert_same_sharding(result, like)
        # A sum that is computed in parts differs by 1e-7, which the arithmetic amplifies.
        assert_close(floats(result), floats(expected), 1e-5)


# The table of the docstring --------------------------------------------------------------


def even(step, **_):
    return step % 2 == 0


def momentum(learning_rate: Any = 0.05):
    return mj.momentum(learning_rate, nesterov=True)


WRAPPERS: dict[str, Any] = {
    "MultiSteps": lambda make: optax.MultiSteps(make(), 2).gradient_transformation(),
    "adaptive_restart": lambda make: mj.adaptive_restart(make()),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(), 3),
    "chain": lambda make: optax.chain(
        optax.clip_by_global_norm(0.5), make(), optax.add_decayed_weights(-0.1)
    ),
    "conditionally_mask": lambda make: optax.conditionally_mask(make(), even),
    "conditionally_transform": lambda make: optax.conditionally_transform(make(), even),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(learning_rate=0.05),
    "kahan": lambda make: mj.kahan(make()),
    "lookahead": lambda make: optax.lookahead(make(), sync_period=2, slow_step_size=0.5),
    "masked": lambda make: optax.masked(make(), {"bias": True, "hidden": True, "out": False}),
    "partition": lambda make: optax.partition(
        {"one": make(), "other": make()}, {"bias": "one", "hidden": "one", "out": "other"}
    ),
    "schedule_free": lambda make: optax.contrib.schedule_free(make(), 0.05, b1=0.8),
}
# The arrays of a wrapper that are as large as the params.
OWN = {
    "MultiSteps": ".acc_grads",
    "adaptive_restart": ".previous_params",
    "kahan": ".compensation",
    "schedule_free": ".z",
}
PLACES = ("inside", "around")
# In an eager branch, zeros_like does not keep the sharding, with or without zero1.
NOT_EAGER = [("apply_if_finite", "inside"), ("conditionally_mask", "inside")]


def place_zero1(name, place, mesh):
    def split(learning_rate: Any = 0.05):
        return zero1(momentum(learning_rate), mesh)

    wrap = WRAPPERS[name]
    return wrap(split) if place == "inside" else zero1(wrap(momentum), mesh)


def start_of(name, mesh=None):
    """Returns the params, and the gradients of three steps in the same shardings."""
    params = make_params(mesh, SMALL)
    dtype = jnp.bfloat16 if name == "kahan" else jnp.float32
    params = {k: jnp.asarray(w).astype(dtype) for k, w in params.items()}
    grads = [jax.tree.map(lambda w, i=i: (i - 0.3) * w, params) for i in (1, 2, -3)]
    if name == "apply_if_finite":
        grads[1] = jax.tree.map(lambda w: w / 0, grads[1])
    return optax.LookaheadParams.init_synced(params) if name == "lookahead" else params, grads


def steps_of(tx, params, grads, wrap=jax.jit):
    """Returns the params, the state and the last updates."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return mj.apply_updates(params, updates), state, updates

    step, state, updates = wrap(step, compiler_options=FAST), tx.init(params), None
    for each in grads:
        params, state, updates = step(params, state, each)
        jax.block_until_ready(params)
    return params, state, updates


@functools.cache
def without_zero1(name, steps):
    params, grads = start_of(name)
    return steps_of(WRAPPERS[name](momentum), params, grads[:steps])


def test_each_row_of_the_table_is_tested():
    assert list(rows(zero1)) == list(WRAPPERS)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("axis_type", "axes"), [MESHES[0], MESHES[3]])
@pytest.mark.parametrize("name", WRAPPERS)
def test_zero1_and_wrappers(name, axis_type, axes, place):
    """Each row of the table in the docstring holds, eager and jitted."""
    mesh = make_mesh(axis_type, axes)
    tx = place_zero1(name, place, mesh)
    with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
        start, grads = start_of(name, mesh)
        if (name, place) == ("lookahead", "around"):
            with pytest.raises(ValueError, match=r"LookaheadParams.* Put zero1 inside"):
                tx.init(start)
            with pytest.raises(ValueError, match=r"LookaheadParams.* Put zero1 inside"):
                tx.update(grads[0], tx.init(grads[0]), start)
            return
        for steps, wrap in ((3, jax.jit), (2, lambda step, **_: step)):
            if steps == 2 and axis_type is EXPLICIT and (name, place) in NOT_EAGER:
                continue
            params, state, updates = steps_of(tx, start, grads[:steps], wrap)
            assert_close((params, state, updates), without_zero1(name, steps))
            assert_same_sharding((params, updates), (start, start))
            for path, leaf in jax.tree_util.tree_leaves_with_path(state):
                where = jax.tree_util.keystr(path)
                of_wrapper = place == "inside" and OWN.get(name, "none") in where
                is_split = leaf.ndim == 2 and not of_wrapper
                assert ("data" in str(getattr(leaf.sharding, "spec", ""))) == is_split, where
                assert leaf.ndim > 0 or leaf.sharding.is_fully_replicated


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager init", "jitted init"])
def test_around_or_with_a_jitted_init_a_step_is_compiled_once(jitted, place):
    """Otherwise the first step moves the counts of the wrapper to the mesh, and compiles again."""
    mesh = make_mesh()
    tx = place_zero1("inject_hyperparams", place, mesh)
    params, grads = start_of("inject_hyperparams", mesh)
    state = (jax.jit(tx.init) if jitted else tx.init)(params)
    step = jax.jit(tx.update)
    with count_compiles() as compiles:
        for each in grads:
            _, state = step(each, state, params)
    assert compiles.count == (1 if jitted or place == "around" else 2)


@pytest.mark.parametrize(
    "name", ["MultiSteps", "apply_if_finite", "conditionally_mask", "conditionally_transform"]
)
def test_wrappers_that_branch_need_gradients_sharded_as_the_params_are(name):
    """This is so inside, on Explicit axes. Around, gradients may have any sharding."""
    mesh = make_mesh(EXPLICIT)
    with set_mesh(mesh):
        params, (grads, *_) = start_of(name, mesh)
        grads = grads | {"hidden": jax.device_put(grads["hidden"], NamedSharding(mesh, P("data")))}
        inside, around = (place_zero1(name, place, mesh) for place in PLACES)
        updates, _ = jax.jit(around.update)(grads, around.init(params), params)
        assert_same_sharding(updates, params)
        if jax.__version_info__ < (0, 10):
            found, _ = jax.jit(inside.update)(grads, inside.init(params), params)
            assert_close(found, updates, 0)
            return
        with pytest.raises(TypeError, match="branches must have equal output types"):
            jax.jit(inside.update)(grads, inside.init(params), params)


def floats(tree):
    keys = jax.dtypes.prng_key
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x, tree
    )


# Older JAX has no public way to use Auto axes for a part of a program on Explicit axes.
CAN_LEAVE_EXPLICIT = hasattr(jax.sharding, "use_abstract_mesh")
needs_auto_axes = pytest.mark.skipif(not CAN_LEAVE_EXPLICIT, reason="JAX is too old")


@pytest.mark.slow
@needs_auto_axes
@pytest.mark.parametrize("name", ["adafactor", "sm3"])
def test_optimizers_that_need_auto_axes_run_on_explicit_ones_in_eager_steps(name):
    """Also with params that are sharded over another axis."""
    tx = OPTIMIZERS[name]()
    params = make_params(shapes=SMALL)
    expected, _ = follow(name, tx, jax.tree.map(jnp.asarray, params))
    for axes, wrap in (("data", lambda f, **_: f), ("data, model", jax.jit)):
        mesh = make_mesh(EXPLICIT, axes)
        with set_mesh(mesh):
            result, like = follow(name, zero1(tx, mesh), make_params(mesh, SMALL), wrap)
        assert_same_sharding(result, like)
        assert_close(result, expected, 1e-5)


@needs_auto_axes
@pytest.mark.parametrize("number", [jnp.float32, np.float32])
def test_a_learning_rate_may_be_an_array_on_the_mesh(number):
    """For example one made within set_mesh. This is refused if Auto axes are needed."""
    mesh = make_mesh(EXPLICIT)
    with set_mesh(mesh):
        params = make_params(mesh, SMALL)
        for name in ("sgd", "sm3"):
            tx = zero1(getattr(optax, name)(number(0.5)), mesh)
            state = tx.init(params)
            expected = contextlib.nullcontext()
            if name == "sm3" and number is jnp.float32:
                expected = pytest.raises(Exception, match=r"(?s)sharded.*Python or NumPy numbers")
            with expected:
                jax.jit(tx.update)(params, state, params)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_instance_is_freed_completely(axis_type, wrap):
    """Compiled programs keep what their functions refer to, and are freed with the instance."""

    class Referent:
        pass

    def use():
        referent, inner = Referent(), mj.momentum(0.1)
        mesh = make_mesh(axis_type)

        def init(params):
            assert referent
            return inner.init(params)

        tx = zero1(optax.GradientTransformation(init, inner.update), mesh)
        with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
            params = make_params(mesh, SMALL)
            wrap(tx.update)(params, wrap(tx.init)(params), params)
        return weakref.ref(referent)

    weak = use()
    gc.collect()
    assert weak() is None


@pytest.mark.parametrize(("axis_type", "axes"), MESHES)
@pytest.mark.parametrize(("name", "arrays"), [("momentum", 1), ("adam", 2), ("restart", 2)])
def test_each_device_holds_an_eighth_of_the_state(name, arrays, axis_type, axes):
    """Plus the count and the bias, which is not divisible; also with tensor-parallel params."""
    mesh = make_mesh(axis_type, axes)
    params = make_params(mesh)
    state = zero1(INNER[name], mesh).init(params)
    divided = sum(math.prod(shape) for shape in SHAPES.values() if len(shape) == 2)
    assert bytes_by_device(state) == {arrays * 4 * (divided // 8 + 3) + 4}


@pytest.mark.parametrize(("axis_type", "axes"), MESHES[1:3])
def test_eager_steps_equal_the_jitted_ones(axis_type, axes):
    mesh = make_mesh(axis_type, axes)
    params = make_params(mesh)
    tx = zero1(INNER["momentum"], mesh)
    state = tx.init(params)
    grads = jax.tree.map(lambda w: w + 1, params)
    eager, jitted = (wrap(tx.update)(grads, state, params) for wrap in (lambda f: f, jax.jit))
    assert_close(eager, jitted, 1e-7)
    for result in (eager, jitted):
        assert_same_sharding(result, (params, state))


def arrays_in(compiled):
    """Returns the shapes of all arrays in a compiled program, except its arguments."""
    return [
        tuple(map(int, dims.split(",")))
        for line in compiled.as_text().splitlines()
        if "parameter(" not in line
        for dims in re.findall(r"= f32\[([\d,]+)\]", line)
    ]


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize(("axis_type", "axes"), MESHES)
def test_jitted_init_never_holds_a_whole_array_of_the_state(name, axis_type, axes):
    """Checked in the compiled program, and in bytes. Eager init is such a program too."""
    mesh = make_mesh(axis_type, axes)
    params = make_params(mesh)
    tx = zero1(INNER[name], mesh)
    with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
        compiled: Any = jax.jit(tx.init).lower(params).compile()
        state = jax.jit(tx.init)(params)
    # On Auto axes jit hides that the rows of `out` are sharded over "model": "data" is used alone.
    slices = {
        "hidden": 64 * 32 // 8,
        "out": 32 * 16 // (2 if (axis_type, axes) == (AUTO, "data, model") else 8),
    }
    assert max(map(math.prod, arrays_in(compiled))) == max(slices.values())
    assert compiled.memory_analysis().temp_size_in_bytes == 0
    values = sum(slices.values()) + 3
    assert bytes_by_device(state) == {4 * values * (1 if name == "momentum" else 2) + 4}


def collectives(compiled):
    """Returns (kind, shape) of each collective operation of a compiled program, sorted."""
    found = re.findall(
        r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text()
    )
    return sorted(
        (kind, tuple(map(int, dims.split(","))) if dims else ())
        for result, kind in found
        for dims in re.findall(r"f32\[([\d,]*)\]", result)
    )


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [("momentum", AUTO), ("momentum", EXPLICIT), ("chain", AUTO), ("adamw", EXPLICIT)],
)
def test_the_program_gathers_the_updates_and_nothing_else(name, axis_type):
    """There is one all-gather per sharded param, for any number of state arrays.

    XLA for CPU has no pass that combines all-reduce and slice into one reduce-scatter, as for TPU.
    """
    mesh = make_mesh(axis_type)
    tx = zero1(INNER[name], mesh)
    with set_mesh(mesh):
        params = make_params(mesh)
        arguments = params, tx.init(params), make_batch(0, mesh)
        compiled = jax.jit(make_step(tx)).lower(*arguments).compile()
    found = collectives(compiled)
    gathered = [shape for kind, shape in found if kind == "all-gather"]
    assert sorted(map(sorted, gathered)) == [[16, 32], [32, 64]]
    summed = [shape for kind, shape in found if kind in ("all-reduce", "reduce-scatter")]
    assert sorted(sorted(shape) for shape in summed if shape)[-2:] == [[16, 32], [32, 64]]
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce", "reduce-scatter"}


def bytes_moved(compiled):
    """Returns the bytes of the float32 arrays in collectives, by kind of collective.

    XLA for TPU writes a reduce-scatter as an all-reduce in a separate function. A gather that
    overlaps other work appears several times, in the same channel.
    """
    found, function = {}, ""
    for line in compiled.as_text().splitlines():
        if line.endswith("{"):
            function = line.split()[0]
        match = re.search(r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", line)
        if match:
            kind = "reduce-scatter" if "all-reduce-scatter" in function else match[2]
            sizes = [
                4 * math.prod(map(int, dims.split(","))) if dims else 4
                for dims in re.findall(r"f32\[([\d,]*)\]", match[1])
            ]
            channel: Any = re.search(r"channel_id=(\d+)", line)
            found[channel[1] if channel else line] = kind, sum(sizes)
    return {
        kind: sum(size for each, size in found.values() if each == kind)
        for kind, _ in found.values()
    }


def program_of_the_guide(tx, mesh, split, shapes):
    """Returns the compiled step of `docs/devices.md`; the devices of the mesh need not exist."""

    def place(shape, spec, dtype: Any = np.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def objective(params, x, y):
        prediction = jnp.tanh(x @ params["hidden"]) @ params["out"] + params["bias"]
        return jnp.mean((prediction - y) ** 2)

    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(objective)(params, x, y), state, params)
        return mj.apply_updates(params, updates), state

    params = {name: place(shape, P()) for name, shape in shapes.items()}
    state = jax.eval_shape(tx.init, params)
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, P()), state)
    if split:
        shardings = jax.jit(tx.init).lower(params).compile().output_shardings
    state = jax.tree.map(lambda x, s: place(x.shape, s.spec, x.dtype), state, shardings)
    batch = (place((128, shapes[k][i]), P("data")) for k, i in (("hidden", 0), ("bias", 0)))
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, *batch).compile()


GUIDE = {"hidden": (32, 64), "out": (64, 8), "bias": (8,)}


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 10), reason="other programs, other bytes"
)
def test_the_traffic_is_that_of_the_guide():
    """The rows of its table hold: bytes in all-reduces, bytes in all-gathers."""
    inner: dict[str, Any] = {
        "no `zero1`": mj.momentum(0.1),
        "`mj.momentum`": mj.momentum(0.1),
        '`mj.momentum`, `velocity_dtype="int8"`': mj.momentum(0.1, velocity_dtype="int8"),
        "`optax.adam`": optax.adam(0.1),
        "`optax.clip_by_global_norm`, `optax.adam`": optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(0.1)
        ),
        "`optax.lamb`": optax.lamb(0.1),
        "`optax.adafactor`": optax.adafactor(0.1, min_dim_size_to_factor=8),
        "`optax.sm3`": optax.sm3(0.1),
        "`optax.lbfgs`": optax.lbfgs(0.1, linesearch=None),
        "`optax.contrib.prodigy`": optax.contrib.prodigy(0.1),
        "`optax.contrib.muon`": optax.contrib.muon(0.1),
    }
    page = (pathlib.Path(__file__).parents[1] / "docs" / "devices.md").read_text()
    rows = re.findall(r"^\| (.*?) \| ([\d,]+) \| ([\d,]+) \|$", page, re.M)
    assert [row[0] for row in rows] == list(inner)
    mesh = make_mesh()
    for name, summed, gathered in rows:
        split = name != "no `zero1`"
        tx = zero1(inner[name], mesh) if split else inner[name]
        found = bytes_moved(program_of_the_guide(tx, mesh, split, GUIDE))
        expected = {"all-reduce": summed, "all-gather": gathered}
        assert found == {k: int(v.replace(",", "")) for k, v in expected.items() if v != "0"}, name


def print_traffic_on_tpus():
    """Prints the traffic of programs that are compiled for eight TPUs, without TPUs."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(AUTO,))
    shapes = {"hidden": (1024, 2048), "out": (2048, 1024), "bias": (1024,)}
    tx = mj.momentum(0.1)
    programs = (
        program_of_the_guide(tx, mesh, False, shapes),
        program_of_the_guide(zero1(tx, mesh), mesh, True, shapes),
    )
    print(json.dumps([bytes_moved(program) for program in programs]))


def test_tpus_use_reduce_scatter():
    """Needs only the compiler: `pip install libtpu`, in the version that jax[tpu] requires."""
    pytest.importorskip("libtpu")
    alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "XLA_FLAGS": ""}
    alone |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    printed = subprocess.run(
        [sys.executable, __file__, "tpu"], env=os.environ | alone, capture_output=True, text=True
    )
    assert printed.returncode == 0, printed.stderr
    plain, split = json.loads(printed.stdout)
    matrices, bias = 4 * 2 * 1024 * 2048, 4 * 1024
    assert plain == {"all-reduce": matrices + bias}
    assert split == {
        "reduce-scatter": matrices,
        "all-reduce": bias,
        "all-gather": matrices + bias,
    }


def test_a_value_may_be_held_in_two_shardings():
    """The update of optax.trace is its state: replicated as an update, sharded as the state."""
    mesh = make_mesh()
    tx = zero1(optax.trace(0.9), mesh)
    params = make_params(mesh)
    state = tx.init(params)
    result = jax.jit(tx.update)(params, state, params)
    assert_same_sharding(result, (params, state))


@pytest.mark.parametrize(("axis_type", "axes"), MESHES)
def test_a_whole_run_in_one_program_leaves_every_array_where_it_was(axis_type, axes):
    """The params are carried by the loop, so only the step determines their shardings."""
    mesh = make_mesh(axis_type, axes)
    tx = zero1(mj.momentum(0.1), mesh)
    params = make_params(mesh)
    state = tx.init(params)
    batch = make_batch(0, mesh)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            return make_step(tx)(params, state, batch), None

        return jax.lax.scan(step, (params, state), None, length=3)[0]

    with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
        assert_same_sharding(run(params, state), (params, state))


def test_init_from_abstract_params():
    """Their shardings are visible inside jit too."""
    mesh = make_mesh(AUTO, "data, model")
    params = make_params(mesh)
    for inner in (INNER["momentum"], INNER["adam"]):
        tx = zero1(inner, mesh)
        state = tx.init(params)
        for other in (
            tx.init(abstract(params)),
            jax.jit(lambda tx=tx: tx.init(abstract(params)))(),
        ):
            assert_close(other, state, 0)
            assert_same_sharding(other, state)


def test_what_is_sharded_over_the_axis_already_stays():
    """Replicated params and one that is sharded over the axis."""
    mesh = make_mesh()
    params = make_params(mesh)
    params["out"] = jax.device_put(params["out"], NamedSharding(mesh, P(None, "data")))
    tx = zero1(mj.momentum(0.1), mesh)
    state = tx.init(params)
    assert state.velocity["out"].sharding == params["out"].sharding
    assert mj.sharding.unsharded_params(params, mesh) == {"['bias']": (3,)}
    assert_same_sharding(jax.jit(tx.update)(params, state, params), (params, state))


@pytest.mark.slow
@pytest.mark.parametrize(("axis_type", "axes"), [MESHES[0], MESHES[3]])
def test_velocities_of_8_bits_are_split_with_their_scales(axis_type, axes):
    """After 50 steps with gradients of both signs, params and state equal those of one device."""
    mesh = make_mesh(axis_type, axes)
    shapes = {"bias": (3,), "hidden": (64, 256), "out": (256, 64)}
    inner = mj.adaptive_restart(mj.momentum(0.05, velocity_dtype="int8"))

    def run(tx, params, state):
        def step(carry, index):
            params, state = carry
            grads = jax.tree.map(lambda w: (index % 5 - 1) * w, whole)
            updates, state = tx.update(grads, state, params)
            return (mj.apply_updates(params, updates), state), None

        whole = params
        return jax.jit(lambda *carry: jax.lax.scan(step, carry, jnp.arange(50.0))[0])(params, state)

    with set_mesh(mesh) if axis_type is EXPLICIT else contextlib.nullcontext():
        params, tx = make_params(mesh, shapes), zero1(inner, mesh)
        state = tx.init(params)
        moved = run(tx, params, state)
        read = mj.read_velocity(moved[1])
    assert_same_sharding(moved, (params, state))
    inner_state: Any = state.inner_state
    # 1 + 1/16 bytes per parameter, for an eighth of the parameters.
    eighth = 64 * 256 // 8
    assert bytes_by_device(inner_state.velocity["hidden"]) == {eighth}
    assert bytes_by_device(inner_state.scales["hidden"]) == {eighth // 16}
    params = jax.tree.map(jnp.asarray, make_params(shapes=shapes))
    expected = run(inner, params, inner.init(params))
    assert_close(moved[0], expected[0])
    assert_close(moved[1], expected[1], 1e-7)
    assert_close(read, mj.read_velocity(expected[1]))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
@pytest.mark.parametrize(
    ("shape", "axis"), [((1001, 31), "data"), ((4097, 8), "data"), ((63, 151), "model")]
)
def test_scales_of_8_bits_may_be_split_where_codes_cannot_be(axis_type, shape, axis):
    """And codes where scales cannot be. The numbers equal those of one device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    inner = mj.adaptive_restart(mj.momentum(0.05, velocity_dtype="int8"))
    whole = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def run(tx, params):
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
        updates, state = jax.jit(tx.update)(params, state, params)
        return updates, mj.read_velocity(state)

    found = run(zero1(inner, mesh, axis), jax.device_put(whole, NamedSharding(mesh, P())))
    # Depending on the shape of a shard, the compiler may fuse a product and a sum.
    for a, b in zip(found, run(inner, whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_params_without_a_gradient_are_left_alone():
    mesh = make_mesh()
    params = make_params(mesh)
    tx = zero1(mj.momentum(0.5), mesh)
    state = tx.init(params)
    for wrap in (lambda f: f, jax.jit):
        grads: Any = {**params, "hidden": None, "bias": optax.MaskedNode()}
        updates, moved = wrap(tx.update)(grads, state, params)
        assert updates["hidden"] is None
        assert updates["bias"] == optax.MaskedNode()
        assert_close(moved.velocity["hidden"], state.velocity["hidden"], 0)
        assert_same_sharding(moved, state)


def test_params_and_gradients_from_the_host():
    """Numbers and NumPy arrays count as replicated."""
    mesh = make_mesh()
    params = {"gain": 2.0, "kernel": np.ones((8, 2), np.float32)}
    tx = zero1(optax.adamw(0.1), mesh)
    state: Any = tx.init(params)
    updates, state = tx.update(params, state, params)
    assert bytes_by_device(state[0].mu["kernel"]) == {8}
    assert updates["kernel"].sharding.is_fully_replicated
    assert_close(updates, optax.adamw(0.1).update(params, optax.adamw(0.1).init(params), params)[0])


def test_params_that_nothing_divides_are_listed_and_strict_refuses_them():
    mesh = make_mesh()
    params = {"a": {"gain": 1.0}, "b": np.zeros((3, 5)), "c": np.zeros((3, 16)), "d": np.zeros(0)}
    expected = {"['a']['gain']": (), "['b']": (3, 5), "['d']": (0,)}
    assert mj.sharding.unsharded_params(params, mesh) == expected
    tx = zero1(mj.momentum(0.1), mesh, strict=True)
    message = r"\['a'\]\['gain'\] \(\), \['b'\] \(3, 5\), \['d'\] \(0,\).*strict=False"
    with pytest.raises(ValueError, match=message):
        tx.init(params)
    assert tx.init({"c": params["c"]}).count == 0


def test_the_sharding_of_the_param_is_applied_first():
    """6 rows over 2 devices leave 3, which is not divisible by 4: the columns are sharded."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AUTO,) * 2)
    param = jax.device_put(np.zeros((6, 8), np.float32), NamedSharding(mesh, P("model")))
    state = zero1(mj.momentum(0.1), mesh).init(param)
    assert state.velocity.sharding.spec == P("model", "data")


@pytest.mark.usefixtures("as_shipped")
def test_arrays_that_are_not_on_the_mesh_are_refused_with_the_way_out():
    mesh = make_mesh()
    tx = zero1(mj.momentum(0.1), mesh)
    params = make_params(mesh)
    state = tx.init(params)
    elsewhere = params | {"out": jnp.ones((32, 16))}
    with pytest.raises(ValueError, match=r"\['out'\] is not on the mesh .*device_put"):
        tx.init(elsewhere)
    with pytest.raises(ValueError, match=r"\['out'\] is not on the mesh .*device_put"):
        tx.update(params, state, elsewhere)
    restored = jax.tree.map(np.asarray, state)
    with pytest.raises(ValueError, match=r"the state at \.velocity\['bias'\] is not on the mesh"):
        tx.update(params, restored, params)
    on_one = jax.tree.map(jnp.asarray, restored)
    with pytest.raises(ValueError, match=r"init\(params\) as its target"):
        tx.update(params, on_one, params)
    mapped = jax.shard_map(tx.update, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="Leave shard_map for the loss and its gradient"):
        jax.jit(mapped)(params, state, params)


def test_optax_tree_map_params_finds_what_is_split():
    mesh = make_mesh()
    params = make_params(mesh)
    tx = zero1(optax.adam(0.1), mesh)
    map_params: Any = optax.tree_utils.tree_map_params
    moved = map_params(tx, lambda v: v + 2, tx.init(params))
    assert float(moved[0].nu["out"].max()) == 2
    assert int(moved[0].count) == 0


STOP, END = 6, 12


def job(coordinator, processes, index, folder):
    """Runs one of several processes, which train and write a checkpoint together."""
    jax.distributed.initialize(coordinator, int(processes), int(index))
    assert jax.device_count() == 2 * jax.local_device_count() == 4
    mesh = make_mesh(devices=4)
    tx = zero1(INNER["chain"], mesh)
    params = make_params(mesh)
    reached = train(tx, params, tx.init(params), range(STOP), mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder) / "checkpoint", reached)
        checkpointer.wait_until_finished()
    whole = jax.tree.leaves(multihost_utils.process_allgather(reached, tiled=True))
    if index == "0":
        np.savez(pathlib.Path(folder) / "whole.npz", *whole)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_restored_on_other_devices(tmp_path):
    """From four devices to two or eight: restored bit by bit, and trained on as without a break."""
    run_job(__file__, str(tmp_path))
    inner = INNER["chain"]
    params = jax.tree.map(jnp.asarray, make_params())
    expected: Any = train(inner, params, inner.init(params), range(STOP))
    with np.load(tmp_path / "whole.npz") as whole:
        reached = jax.tree.unflatten(jax.tree.structure(expected), whole.values())
    assert_close(reached, expected)
    unbroken = train(inner, expected[0], expected[1], range(STOP, END))
    for devices in (2, 8):
        mesh = make_mesh(devices=devices)
        tx = zero1(inner, mesh)
        params = make_params(mesh)
        target = params, tx.init(params)
        with ocp.StandardCheckpointer() as checkpointer:
            restored: Any = checkpointer.restore(tmp_path / "checkpoint", target)
        assert_same_sharding(restored, target)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(reached), strict=True):
            assert np.asarray(a).tobytes() == b.tobytes()
        assert_close(train(tx, restored[0], restored[1], range(STOP, END), mesh), unbroken)


if __name__ == "__main__":
    if sys.argv[1:] == ["tpu"]:
        print_traffic_on_tpus()
    else:
        job(*sys.argv[1:])
