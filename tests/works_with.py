"""Trains through other libraries, for the tests and for the table in docs/works_with.md.

One cell runs a few steps through a library, with one transformation and velocity dtype, and the
same steps in a plain jitted Optax loop on the same gradients. The gradients are integers, whose
sums are exact in any order, so the results can be compared bit for bit.
"""

import functools
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_jax

mj: Any = momentum_jax  # Avoids casts: Optax types its trees too widely.

INPUTS, OUTPUTS, BATCH, STEPS = 128, 32, 4, 3  # int8 needs 4096 values: 128 * 32.
# The name in Flax 0.11 is pure.
as_pure: Any = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure

VELOCITY_DTYPES = (None, "bfloat16", "int8")
TRANSFORMATIONS: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda dtype: mj.momentum(0.25, 0.5, velocity_dtype=dtype),
    "nesterov": lambda dtype: mj.momentum(0.25, 0.5, nesterov=True, velocity_dtype=dtype),
    "trace": lambda dtype: optax.chain(
        mj.trace(0.5, velocity_dtype=dtype), optax.scale_by_learning_rate(0.25)
    ),
    "qhm": lambda dtype: mj.qhm(0.25, 0.5, 0.5, velocity_dtype=dtype),
    "aggmo": lambda dtype: mj.aggmo(0.25, (0.0, 0.5), velocity_dtype=dtype),
    "adaptive_restart": lambda dtype: mj.adaptive_restart(
        mj.momentum(0.25, 0.5, velocity_dtype=dtype)
    ),
    "kahan": lambda dtype: mj.kahan(mj.momentum(0.25, 0.5, velocity_dtype=dtype)),
}


def params_dtype(transformation):
    """Returns the dtype of the params: bfloat16 for `kahan`, otherwise float32."""
    return jnp.bfloat16 if transformation == "kahan" else jnp.float32


# The model and its gradients. ------------------------------------------------------------


def whole(shape, seed, largest):
    return np.random.default_rng(seed).integers(-largest, largest + 1, shape).astype(np.float32)


def start(dtype, layers=()) -> dict[str, Any]:
    """Returns the bias and the kernel of a linear model, or of stacked layers.

    In bfloat16 the values have so many digits that adding an integer rounds.
    """
    parts = 1024 if dtype == jnp.bfloat16 else 32
    arrays = {
        "bias": whole((*layers, OUTPUTS), 7, parts) / parts,
        "kernel": whole((*layers, INPUTS, OUTPUTS), 8, parts) / parts,
    }
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def batches(dtype, seed=0):
    """Returns inputs and targets of each step; small in bfloat16, so products add exactly."""
    largest = 2 if dtype == jnp.bfloat16 else 16
    return [
        tuple(
            jnp.asarray(whole((BATCH, size), 100 * seed + 10 * j + i, largest), dtype)
            for j, size in enumerate((INPUTS, OUTPUTS))
        )
        for i in range(STEPS)
    ]


def gradients(dtype) -> list[Any]:
    """Returns the gradients of the linear loss in each step."""
    return [linear_grads(*batch) for batch in batches(dtype)]


def stacked(trees):
    """Stacks trees of arrays along a new first axis."""
    return jax.tree.map(lambda *each: jnp.asarray(np.stack(each)), *trees)


def linear_loss(y, target):
    """Returns a loss whose gradient, inputs.T @ targets, does not depend on the params."""
    return jnp.sum((y * target).astype(jnp.float32))


@jax.jit
def linear_grads(x, target):
    return {"bias": target.sum(0), "kernel": x.T @ target}


# For each value of the params: the steepness of the valley, and the position of its floor.
STEEP = {
    "bias": np.abs(whole(OUTPUTS, 9, 255)),
    "kernel": np.abs(whole((INPUTS, OUTPUTS), 10, 255)),
}
FLOOR = jax.tree.map(lambda w, steep: np.asarray(w) - 0.3 * steep, start(jnp.float32), STEEP)


def valley(params, args=None):
    """Returns the loss for clients that minimise one function. Its gradient is +- STEEP.

    The params cross the floor in the second of 3 steps, so that adaptive_restart restarts.
    """
    del args
    return sum(
        jnp.sum(STEEP[name] * jnp.abs(w.astype(jnp.float32) - FLOOR[name]))
        for name, w in params.items()
    )


valley_grads = jax.jit(jax.grad(valley))


class Trained(NamedTuple):
    """The result of training with a client.

    Attributes:
      params: the trained params; leaves are in the order of the plain loop.
      state: the state of the transformation.
      expected: params and state of the plain loop.
    """

    params: Any
    state: Any
    expected: tuple[Any, Any]


@functools.partial(jax.jit, static_argnums=0)
def plain_step(tx: Any, params, state, grads) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def plain_loop(tx: Any, params, grads_of_steps) -> Any:
    """Returns params and state after steps with these gradients, or functions of the params."""
    state = tx.init(params)
    for grads in grads_of_steps:
        grads = grads(params) if callable(grads) else grads
        params, state = plain_step(tx, params, state, grads)
    return params, state


@functools.cache
def make(transformation, velocity_dtype) -> Any:
    """Makes a transformation. Cached, so that the plain step is compiled once."""
    return TRANSFORMATIONS[transformation](velocity_dtype)


@functools.cache
def expected(transformation, velocity_dtype, problem="linear") -> Any:
    dtype = params_dtype(transformation)
    tx = make(transformation, velocity_dtype)
    steps = gradients(dtype)
    return plain_loop(tx, start(dtype), steps if problem == "linear" else STEPS * [valley_grads])


# The clients. ----------------------------------------------------------------------------


class Cell(NamedTuple):
    """What a client trains with."""

    transformation: str
    velocity_dtype: Any
    folder: Path  # Empty.

    @property
    def tx(self) -> Any:
        return make(self.transformation, self.velocity_dtype)

    @property
    def dtype(self) -> Any:
        return params_dtype(self.transformation)

    def expected(self, problem="linear") -> Any:
        return expected(self.transformation, self.velocity_dtype, problem)


CLIENTS: dict[str, Callable[[Cell], Trained]] = {}


def client(name):
    def register(train):
        CLIENTS[name] = train
        return train

    return register


def given(value):
    """Returns an initializer that returns this value."""
    return lambda key, shape, dtype=None: jnp.asarray(value, dtype)


def nnx_linear(dtype, rngs=None) -> Any:
    first = start(dtype)
    return nnx.Linear(
        INPUTS,
        OUTPUTS,
        kernel_init=given(first["kernel"]),
        bias_init=given(first["bias"]),
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs or nnx.Rngs(0),
    )


def nnx_step(model: Any, optimizer: Any, x, target):
    grads = nnx.grad(lambda model: linear_loss(model(x), target))(model)
    optimizer.update(model, grads)


def values(module, *filters) -> Any:
    state: Any = nnx.state(module, *filters)
    return nnx.to_pure_dict(state)


def nnx_result(model, optimizer, expected, wrt=nnx.Param) -> Trained:
    return Trained(values(model, wrt), as_pure(optimizer.opt_state), expected)


@client("Flax NNX, `nnx.jit`")
def train_nnx(cell: Cell) -> Trained:
    model = nnx_linear(cell.dtype)
    optimizer = nnx.Optimizer(model, cell.tx, wrt=nnx.Param)
    step = nnx.jit(nnx_step)
    for batch in batches(cell.dtype):
        step(model, optimizer, *batch)
    return nnx_result(model, optimizer, cell.expected())


@client("Flax NNX, `nnx.scan` over steps")
def train_nnx_scan(cell: Cell) -> Trained:
    model = nnx_linear(cell.dtype)
    optimizer = nnx.Optimizer(model, cell.tx, wrt=nnx.Param)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    def steps(carry, x, target):
        model, optimizer = carry
        nnx_step(model, optimizer, x, target)
        return carry

    xs, targets = stacked(batches(cell.dtype))
    steps((model, optimizer), xs, targets)
    return nnx_result(model, optimizer, cell.expected())


LAYERS = 2


class Stack(nnx.Module):
    """Stacked layers applied by nnx.scan; each layer gets the same inputs in a different order."""

    def __init__(self, dtype):
        first = start(dtype, (LAYERS,))

        @nnx.vmap(in_axes=0, out_axes=0)
        def create(kernel, bias):
            return nnx.Linear(
                INPUTS,
                OUTPUTS,
                kernel_init=given(kernel),
                bias_init=given(bias),
                dtype=dtype,
                param_dtype=dtype,
                rngs=nnx.Rngs(0),
            )

        self.layers = create(first["kernel"], first["bias"])

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def forward(x, layer):
            return jnp.roll(x, 1, axis=1), layer(x)

        return forward(x, self.layers)[1]


@client("Flax NNX, `nnx.scan` over layers")
def train_nnx_layers(cell: Cell) -> Trained:
    model = Stack(cell.dtype)
    optimizer = nnx.Optimizer(model, cell.tx, wrt=nnx.Param)
    step = nnx.jit(nnx_step)
    for batch in batches(cell.dtype):
        step(model, optimizer, *batch)

    def grads(x, target):
        return stacked([linear_grads(np.roll(x, i, axis=1), target) for i in range(LAYERS)])

    steps = [grads(*batch) for batch in batches(cell.dtype)]
    return nnx_result(model, optimizer, plain_loop(cell.tx, start(cell.dtype, (LAYERS,)), steps))


@client("Flax NNX, `nnx.vmap` over models")
def train_nnx_vmap(cell: Cell) -> Trained:
    members = range(2)

    @nnx.vmap(in_axes=0, out_axes=0)
    def create(key):
        model = nnx_linear(cell.dtype, nnx.Rngs(key))
        return model, nnx.Optimizer(model, cell.tx, wrt=nnx.Param)

    model, optimizer = create(jax.random.split(jax.random.key(0), len(members)))
    step = nnx.jit(nnx.vmap(nnx_step))
    own = [batches(cell.dtype, member) for member in members]
    for each in zip(*own, strict=True):
        step(model, optimizer, *stacked(each))
    alone = [
        plain_loop(cell.tx, start(cell.dtype), [linear_grads(*batch) for batch in each])
        for each in own
    ]
    return nnx_result(model, optimizer, stacked(alone))


@client("Flax NNX, `optax.partition`")
def train_nnx_partition(cell: Cell) -> Trained:
    """Trains the kernel and freezes the bias."""

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "trained" if "kernel" in jax.tree_util.keystr(path) else "frozen",
            params,
        )

    def wrap(tx):
        return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)

    model = nnx_linear(cell.dtype)
    optimizer = nnx.Optimizer(model, wrap(cell.tx), wrt=nnx.Param)
    step = nnx.jit(nnx_step)
    for batch in batches(cell.dtype):
        step(model, optimizer, *batch)
    steps = [linear_grads(*batch) for batch in batches(cell.dtype)]
    return nnx_result(model, optimizer, plain_loop(wrap(cell.tx), start(cell.dtype), steps))


@client("Flax NNX, LoRA")
def train_nnx_lora(cell: Cell) -> Trained:
    """The adapter alone has gradients and a state. The plain loop is given the same gradients."""
    rank = OUTPUTS
    model = nnx.LoRA(
        INPUTS,
        rank,
        OUTPUTS,
        base_module=nnx_linear(cell.dtype),
        b_initializer=nnx.initializers.lecun_normal(),
        dtype=cell.dtype,
        param_dtype=cell.dtype,
        rngs=nnx.Rngs(0),
    )
    optimizer: Any = nnx.Optimizer(model, cell.tx, wrt=nnx.LoRAParam)
    base, first = values(model, nnx.Not(nnx.LoRAParam)), values(model, nnx.LoRAParam)
    adapter: Any = nnx.DiffState(0, nnx.LoRAParam)

    @nnx.jit
    def differentiate(model, x, target):
        return nnx.grad(lambda model: linear_loss(model(x), target), argnums=adapter)(model)

    update, found = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads)), []
    for batch in batches(cell.dtype):
        grads = differentiate(model, *batch)
        found.append(nnx.to_pure_dict(grads))
        update(model, optimizer, grads)
    assert bits(values(model, nnx.Not(nnx.LoRAParam))) == bits(base)
    return nnx_result(model, optimizer, plain_loop(cell.tx, first, found), nnx.LoRAParam)


def make_mesh(shape, names):
    devices = jax.devices()[: int(np.prod(shape))]
    axis_types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=axis_types, devices=devices)


@client("Flax Linen, boxed params")
def train_linen(cell: Cell) -> Trained:
    """Trains params in nn.Partitioned, sharded by nn.get_sharding, in a TrainState."""
    mesh, first = make_mesh((2, 2), ("data", "model")), start(cell.dtype)
    network = nn.Dense(
        OUTPUTS,
        dtype=cell.dtype,
        param_dtype=cell.dtype,
        kernel_init=nn.with_partitioning(given(first["kernel"]), ("data", "model")),
        bias_init=given(first["bias"]),
    )

    def create(key):
        params = network.init(key, batches(cell.dtype)[0][0])["params"]
        return TrainState.create(apply_fn=network.apply, params=params, tx=cell.tx)

    shardings = nn.get_sharding(jax.eval_shape(create, jax.random.key(0)), mesh)
    train_state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))

    @jax.jit
    def step(train_state, x, target):
        def loss(params):
            return linear_loss(network.apply({"params": params}, x), target)

        return train_state.apply_gradients(grads=jax.grad(loss)(train_state.params))

    for batch in batches(cell.dtype):
        train_state = step(train_state, *batch)
    sharding = NamedSharding(mesh, P("data", "model"))
    boxed = jax.tree.leaves(train_state.opt_state, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    split = [x.value for x in boxed if isinstance(x, nn.Partitioned)]
    assert split
    assert all(x.sharding.is_equivalent_to(sharding, 2) for x in split)
    params, state = map(nn.meta.unbox, (train_state.params, train_state.opt_state))
    return Trained(params, state, cell.expected())


class Linear(eqx.Module):
    bias: jax.Array
    kernel: jax.Array
    name: str

    def __call__(self, x):
        return x @ self.kernel + self.bias


@client("Equinox")
def train_equinox(cell: Cell) -> Trained:
    model, tx = Linear(**start(cell.dtype), name="linear"), cell.tx
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, x, target):
        grads = eqx.filter_grad(lambda model: linear_loss(model(x), target))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.combine(mj.apply_updates(params, updates), model), state

    for batch in batches(cell.dtype):
        model, state = step(model, state, *batch)
    assert model.name == "linear"
    return Trained(eqx.filter(model, eqx.is_inexact_array), state, cell.expected())


@client("Haiku")
def train_haiku(cell: Cell) -> Trained:
    hk, first, tx = pytest.importorskip("haiku"), start(cell.dtype), cell.tx
    # Haiku uses the dtype of the inputs.
    network = hk.without_apply_rng(
        hk.transform(
            lambda x: hk.Linear(
                OUTPUTS, w_init=given(first["kernel"]), b_init=given(first["bias"])
            )(x)
        )
    )
    (x, _), *_ = batches(cell.dtype)
    params = network.init(jax.random.key(0), x)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, target):
        grads = jax.grad(lambda params: linear_loss(network.apply(params, x), target))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches(cell.dtype):
        params, state = step(params, state, *batch)
    return Trained(params, state, cell.expected())


@client("Orbax, on fewer devices")
def train_orbax(cell: Cell) -> Trained:
    """Saves params and state from 8 devices, restores them on 2, and makes the last step there."""
    params, tx = start(cell.dtype), cell.tx
    steps = [linear_grads(*batch) for batch in batches(cell.dtype)]
    params, state = plain_loop(tx, params, steps[:-1])

    def sharded(tree, devices):
        """Shards matrices over the devices and replicates everything else."""
        mesh = make_mesh((devices,), ("data",))
        return jax.tree.map(
            lambda x: NamedSharding(mesh, P("data") if x.shape == (INPUTS, OUTPUTS) else P()), tree
        )

    saved = (params, state)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), saved, sharded(saved, 2)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(cell.folder / "step", jax.device_put(saved, sharded(saved, 8)))
        checkpointer.wait_until_finished()
        params, state = checkpointer.restore(cell.folder / "step", target)

    params, state = plain_step(tx, params, state, steps[-1])
    assert len(params["kernel"].sharding.device_set) == 2
    return Trained(params, state, cell.expected())


@client("Optimistix, `OptaxMinimiser`")
def train_optimistix(cell: Cell) -> Trained:
    optx = pytest.importorskip("optimistix")
    solver = optx.OptaxMinimiser(cell.tx, rtol=0, atol=0)
    solution = optx.minimise(valley, solver, start(cell.dtype), max_steps=STEPS, throw=False)
    return Trained(solution.value, solution.state.opt_state, cell.expected("valley"))


@client("NumPyro, `SVI`")
def train_numpyro(cell: Cell) -> Trained:
    numpyro, first = pytest.importorskip("numpyro"), start(cell.dtype)

    def guide(x, target):
        del x, target
        numpyro.param("bias", first["bias"])
        numpyro.param("kernel", first["kernel"])

    def model(x, target):
        bias, kernel = numpyro.param("bias"), numpyro.param("kernel")
        numpyro.factor("loss", -linear_loss(x @ kernel + bias, target))

    optimizer = numpyro.optim.optax_to_numpyro(cell.tx)
    svi = numpyro.infer.SVI(model, guide, optimizer, numpyro.infer.Trace_ELBO())
    svi_state = svi.init(jax.random.key(0), *batches(cell.dtype)[0])
    step = jax.jit(svi.update)
    for batch in batches(cell.dtype):
        svi_state, _ = step(svi_state, *batch)
    _, (_, state) = svi_state.optim_state
    return Trained(svi.get_params(svi_state), state, cell.expected())


# The expected results. -------------------------------------------------------------------


class Refusal(NamedTuple):
    """What a client does not support.

    Attributes:
      error: the type of the error.
      match: a pattern that matches a part of its message.
      cell: the text of the table's cell.
      applies: whether the installed version of the client refuses it.
    """

    error: type[Exception]
    match: str
    cell: str
    applies: bool = True


REFUSED = {
    ("Optimistix, `OptaxMinimiser`", "kahan"): Refusal(
        ValueError,
        "`body_fun` must have the same input and output structure",
        "[refused](#optimistix)",
    ),
} | {
    ("Flax NNX, `optax.partition`", transformation): Refusal(
        TypeError,
        "tuple indices must be integers",
        "yes, [Flax 0.12](#flax-nnx)",
        applies=version("flax").startswith("0.11."),
    )
    for transformation in TRANSFORMATIONS
}


NNX = [name for name in CLIENTS if name.startswith("Flax NNX")]
OTHERS = [name for name in CLIENTS if name not in NNX]


def table():
    """Returns the table of the page."""
    lines = [
        "| library | " + " | ".join(f"`{name}`" for name in TRANSFORMATIONS) + " |",
        "| --- " * (1 + len(TRANSFORMATIONS)) + "|",
    ]
    for name in CLIENTS:
        refused = [REFUSED.get((name, transformation)) for transformation in TRANSFORMATIONS]
        cells = [one.cell if one else "yes" for one in refused]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bits(tree):
    return [(np.shape(x), x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def check(name, cell: Cell):
    """Checks that a client trains like the plain loop, bit for bit, or fails as expected."""
    refused = REFUSED.get((name, cell.transformation))
    if refused and refused.applies:
        with pytest.raises(refused.error, match=refused.match):
            CLIENTS[name](cell)
        return
    trained = CLIENTS[name](cell)
    params, state = trained.expected
    assert bits(trained.params) == bits(params)
    assert bits(trained.state) == bits(state)
    # Velocities are found in what the client makes of the state.
    read, plain = (jax.eval_shape(mj.read_velocity, each) for each in (trained.state, state))
    assert [x.shape for x in jax.tree.leaves(read)] == [x.shape for x in jax.tree.leaves(plain)]
