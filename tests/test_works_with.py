"""Training through other libraries: each client, with each transformation and velocity dtype.

One cell is a few steps through a client, compared to the bit with a plain jitted Optax loop on the
same gradients. The gradients are whole numbers, which are summed exactly in any order. The table of
docs/works_with.md is made of the same registry.
"""

import functools
import json
import re
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
from benchmarks import clients

mj: Any = momentum_jax  # Optax's trees are of too many types to compute with.
PAGE = Path(__file__).parents[1] / "docs" / "works_with.md"

INPUTS, OUTPUTS, BATCH, STEPS = 128, 32, 4, 3  # int8 needs 4096 values: 128 * 32.
# Flax 0.11 calls it pure.
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
    "keep_residual": lambda dtype: mj.keep_residual(mj.momentum(0.25, 0.5, velocity_dtype=dtype)),
}


def params_dtype(transformation):
    """keep_residual is for params of 16 bits."""
    return jnp.bfloat16 if transformation == "keep_residual" else jnp.float32


# What is trained. ------------------------------------------------------------------------


def whole(shape, seed, largest):
    return np.random.default_rng(seed).integers(-largest, largest + 1, shape).astype(np.float32)


def start(dtype, layers=()) -> dict[str, Any]:
    """The bias and the kernel of a linear model, or of a stack of them."""
    arrays = {
        "bias": whole((*layers, OUTPUTS), 7, 32) / 32,
        "kernel": whole((*layers, INPUTS, OUTPUTS), 8, 32) / 32,
    }
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def batches(dtype, seed=0):
    """Inputs and targets of each step; in 16 bits so small that sums of their products fit."""
    largest = 2 if dtype == jnp.bfloat16 else 16
    return [
        tuple(
            jnp.asarray(whole((BATCH, size), 100 * seed + 10 * j + i, largest), dtype)
            for j, size in enumerate((INPUTS, OUTPUTS))
        )
        for i in range(STEPS)
    ]


def stacked(trees):
    """Trees of arrays, stacked along a new first axis."""
    return jax.tree.map(lambda *each: jnp.asarray(np.stack(each)), *trees)


def linear_loss(y, target):
    """Its gradient, inputs.T @ targets, does not depend on the params."""
    return jnp.sum((y * target).astype(jnp.float32))


@jax.jit
def linear_grads(x, target):
    return {"bias": target.sum(0), "kernel": x.T @ target}


# Of each value of the params: how steep the valley is, and where its floor is.
STEEP = {
    "bias": np.abs(whole(OUTPUTS, 9, 255)),
    "kernel": np.abs(whole((INPUTS, OUTPUTS), 10, 255)),
}
FLOOR = jax.tree.map(lambda w, steep: np.asarray(w) - 0.3 * steep, start(jnp.float32), STEEP)


def valley(params, args=None):
    """For clients that minimise one function: its gradient is plus or minus the steepness.

    The params reach the floor in the second of 3 steps, so that adaptive_restart restarts.
    """
    del args
    return sum(
        jnp.sum(STEEP[name] * jnp.abs(w.astype(jnp.float32) - FLOOR[name]))
        for name, w in params.items()
    )


valley_grads = jax.jit(jax.grad(valley))


class Trained(NamedTuple):
    """What a client is left with.

    Attributes:
      params: their leaves are in the order of the plain loop.
      state: that of the transformation.
      expected: both, of the plain loop.
    """

    params: Any
    state: Any
    expected: tuple[Any, Any]


@functools.partial(jax.jit, static_argnums=0)
def plain_step(tx: Any, params, state, grads) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def plain_loop(tx: Any, params, grads_of_steps) -> Any:
    """The params and the state after steps with these gradients, or functions of the params."""
    state = tx.init(params)
    for grads in grads_of_steps:
        grads = grads(params) if callable(grads) else grads
        params, state = plain_step(tx, params, state, grads)
    return params, state


@functools.cache
def make(transformation, velocity_dtype) -> Any:
    """The same one each time, so that the plain step is compiled once."""
    return TRANSFORMATIONS[transformation](velocity_dtype)


@functools.cache
def expected(transformation, velocity_dtype, problem="linear") -> Any:
    dtype = params_dtype(transformation)
    tx = make(transformation, velocity_dtype)
    steps: Any = [linear_grads(*batch) for batch in batches(dtype)]
    return plain_loop(tx, start(dtype), steps if problem == "linear" else STEPS * [valley_grads])


# The clients. ----------------------------------------------------------------------------


class Cell(NamedTuple):
    """What a client is to train with."""

    transformation: str
    velocity_dtype: Any
    folder: Path  # An empty one.

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
    """An initializer that returns this value."""
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
    """Stacked layers that nnx.scan applies, each to the same inputs in another order."""

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
    """The kernel is trained, the bias is not."""

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
    """Params in nn.Partitioned, sharded by nn.get_sharding, in a TrainState."""
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
    # Of the inputs' dtype.
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
    """Sharded over 8 devices, saved, and restored on 2, where the last step is made."""
    params, tx = start(cell.dtype), cell.tx
    steps = [linear_grads(*batch) for batch in batches(cell.dtype)]
    params, state = plain_loop(tx, params, steps[:-1])

    def sharded(tree, devices):
        """Matrices are split over the devices, all else is on each of them."""
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


# The tests. ------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """What a client does not do.

    Attributes:
      error: the type of the error, and match a part of what it says.
      cell: what the table says.
      applies: whether the installed version refuses it.
    """

    error: type[Exception]
    match: str
    cell: str
    applies: bool = True


REFUSED = {
    ("Optimistix, `OptaxMinimiser`", "keep_residual"): Refusal(
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


def table():
    """The table of the page."""
    lines = [
        "| through | " + " | ".join(f"`{name}`" for name in TRANSFORMATIONS) + " |",
        "| --- " * (1 + len(TRANSFORMATIONS)) + "|",
    ]
    for name in CLIENTS:
        refused = [REFUSED.get((name, transformation)) for transformation in TRANSFORMATIONS]
        cells = [one.cell if one else "yes" for one in refused]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bits(tree):
    return [(np.shape(x), x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("velocity_dtype", VELOCITY_DTYPES, ids=str)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("name", CLIENTS)
def test_c6_a_client_trains_as_a_plain_loop(name, transformation, velocity_dtype, tmp_path):
    cell = Cell(transformation, velocity_dtype, tmp_path)
    refused = REFUSED.get((name, transformation))
    if refused and refused.applies:
        with pytest.raises(refused.error, match=refused.match):
            CLIENTS[name](cell)
        return
    trained = CLIENTS[name](cell)
    params, state = trained.expected
    assert bits(trained.params) == bits(params)
    assert bits(trained.state) == bits(state)
    # Velocities are found in what the client makes of the state.
    read, read_plain = (jax.eval_shape(mj.read_velocity, x) for x in (trained.state, state))
    assert [x.shape for x in jax.tree.leaves(read)] == [
        x.shape for x in jax.tree.leaves(read_plain)
    ]


def test_the_cells_differ():
    """Each transformation and each dtype ends elsewhere, so that none passes for another."""
    ends = {
        (name, dtype): bits(expected(name, dtype)[0])
        for name in TRANSFORMATIONS
        for dtype in VELOCITY_DTYPES
        if name not in ("trace", "keep_residual")
    }
    for cell, end in ends.items():
        assert [other for other in ends if ends[other] == end] == [cell]
    # At a constant learning rate it does not matter on which side of the velocity it is.
    assert bits(expected("trace", None)[0]) == ends["momentum", None]
    restarted, going_on = (expected(n, None, "valley")[0] for n in ("adaptive_restart", "momentum"))
    assert bits(restarted) != bits(going_on)


def test_equinox_own_apply_updates_widens_params_of_16_bits():
    """Why the row of Equinox uses another one: it adds, and does not round to the param's dtype."""
    params = Linear(**start(jnp.bfloat16), name="linear")
    params = eqx.filter(params, eqx.is_inexact_array)
    tx = mj.keep_residual(mj.momentum(0.25))
    updates, _ = tx.update(params, tx.init(params), params)
    assert eqx.apply_updates(params, updates).kernel.dtype == jnp.float32
    assert mj.apply_updates(params, updates).kernel.dtype == jnp.bfloat16


def test_optimistix_does_not_find_a_traced_learning_rate_if_it_differentiates():
    """It looks for arrays in the closures of a transformation, and finds those of Optax alone."""
    optx = pytest.importorskip("optimistix")

    def grads(make):
        def solve(learning_rate, target):
            solver = optx.OptaxMinimiser(make(learning_rate), rtol=1e-6, atol=1e-6)
            distance = lambda y, args: jnp.sum((y - args) ** 2)  # noqa: E731
            return optx.minimise(distance, solver, jnp.zeros(2), target).value.sum()

        return jax.jit(jax.grad(solve, argnums=1))(0.1, jnp.array([1.0, 2.0]))

    with pytest.raises(TypeError, match=r"No constant handler for type|not a valid JAX type"):
        grads(lambda learning_rate: mj.momentum(learning_rate, 0.5))
    found = grads(lambda rate: optax.chain(mj.trace(0.5), optax.scale_by_learning_rate(rate)))
    np.testing.assert_allclose(found, 1.0)


# The page. -------------------------------------------------------------------------------


def test_the_table_of_the_page_is_that_of_the_tests():
    assert table() in PAGE.read_text()
    assert len(re.findall(r"^\| \w.* \|$", PAGE.read_text(), re.MULTILINE)) == len(CLIENTS) + 1


PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS, ids=[str(i) for i in range(len(PROGRAMS))])
def test_a_program_of_the_page_prints_what_its_comments_say(program, capsys):
    for name in re.findall(r"^import (haiku|optimistix|numpyro)\b", program, re.MULTILINE):
        pytest.importorskip(name)
    exec(program, {})
    said = re.findall(r"^print\(.*\)  # (.+)$", program, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said


def test_what_was_tested_by_hand_has_every_client_and_is_what_the_page_says():
    """Each cell of benchmarks/results/clients.json is "ok", or says why not."""
    results = json.loads(clients.RESULT.read_text())
    assert results.keys() == clients.CLIENTS.keys()
    for distribution, of in results.items():
        assert of["cells"].keys() == clients.TRANSFORMATIONS.keys()
        # The page says that all are as they should be.
        assert set(of["cells"].values()) == {"ok"}
        assert {"python", "jax", "optax", distribution} == of["versions"].keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", of["date"])


def sum_of_squares(tx):
    """A client that needs nothing to be installed."""
    params = start = {"w": jnp.asarray(whole((INPUTS, OUTPUTS), 3, 8))}
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = plain_step(tx, params, state, params)
    return start, params


@pytest.mark.parametrize("name", clients.TRANSFORMATIONS)
def test_the_script_finds_what_is_wrong(name, monkeypatch):
    """Right params are ok; other params, other dtypes and errors are not."""
    by_sgd = clients.changes(sum_of_squares(optax.sgd(clients.LEARNING_RATE, clients.MU)))
    assert clients.cell(sum_of_squares, name, by_sgd) == "ok"

    def raises(tx):
        raise TypeError("no such thing")

    assert clients.cell(raises, name, by_sgd) == "refused: TypeError: no such thing"
    still = clients.cell(sum_of_squares, name, [0 * x for x in by_sgd])
    assert still == "error: params that are not finite, or did not move"
    if name.endswith("float32"):
        assert "apart from optax.sgd" in clients.cell(sum_of_squares, name, [2 * by_sgd[0]])
    monkeypatch.setitem(clients.TRANSFORMATIONS, name, lambda: optax.sgd(0.01))
    assert "no velocity is" in clients.cell(sum_of_squares, name, by_sgd)
    cast = optax.stateless(lambda updates, params: updates)._replace(
        init=lambda params: jnp.zeros((), jnp.bfloat16),
        update=lambda updates, state, params=None: (updates, jnp.zeros((), jnp.float32)),
    )
    monkeypatch.setitem(clients.TRANSFORMATIONS, name, lambda: cast)
    assert clients.cell(sum_of_squares, name, by_sgd) == "error: the state changes its dtypes"
