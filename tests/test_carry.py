"""Running jobs carried over from PyTorch and Keras, and back, and between our two forms."""

import copy
import importlib
import re
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden.record import float64, import_keras
from processes import run_job

import momentum_jax as mj
from momentum_jax.frameworks import (
    dump_keras,
    dump_optax,
    dump_torch,
    keras_sgd,
    load_keras,
    load_optax,
    load_torch,
    momentum_from_trace,
    optax_sgd,
    torch_hyperparameters,
    torch_labels,
    torch_sgd,
    trace_from_momentum,
)

HALF = 30  # steps there, and as many here
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def factor(count):
    """Of the learning rate: up for 20 steps, then down twice."""
    return (
        jnp.minimum(1.0, 0.05 * (count + 1))
        * jnp.where(count < 35, 1.0, 0.3)
        * jnp.where(count < 50, 1.0, 0.3)
    )


def batches(dtype):
    """Images and what is to be told of them, for all steps."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((2 * HALF, 8, 2, 6, 6)).astype(dtype)
    targets = generator.standard_normal((2 * HALF, 8, 3)).astype(dtype)
    return images, targets


# PyTorch. --------------------------------------------------------------------------------

GROUPS = [
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.0, "dampening": 0.2},
]


class TorchJob:
    """A small convolutional net: normalized, its first layer frozen, in two parameter groups."""

    def __init__(self, dtype):
        torch = self.torch = importlib.import_module("torch")
        torch.manual_seed(0)
        nn = torch.nn
        self.model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),  # frozen
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64, 3),
        ).to(getattr(torch, dtype))
        self.model[0].requires_grad_(False)
        weights = dict(self.model.named_parameters())
        kernels = [w for w in weights.values() if w.ndim > 1]
        others = [w for w in weights.values() if w.ndim == 1]
        self.optimizer = torch.optim.SGD(
            [{"params": kernels, **GROUPS[0]}, {"params": others, **GROUPS[1]}], lr=1.0
        )
        order = {id(w): name for name, w in weights.items()}
        # In the optimizer's order, which is not that of the model.
        self.weights = {order[id(w)]: w for w in kernels + others}
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda count: float(factor(count))
        )

    def train(self, images, targets):
        for x, y in zip(images, targets, strict=True):
            self.optimizer.zero_grad()
            error = self.model(self.torch.tensor(x)) - self.torch.tensor(y)
            (error**2).mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def as_arrays(self):
        return {name: w.detach().numpy().copy() for name, w in self.weights.items()}

    def take(self, weights):
        with self.torch.no_grad():
            for name, w in self.weights.items():
                w.copy_(self.torch.tensor(weights[name]))


def from_torch(weights):
    """As a user writes it: kernels transposed, layers renamed."""

    def conv(name):
        return {
            "kernel": np.transpose(weights[f"{name}.weight"], (2, 3, 1, 0)),
            "bias": weights[f"{name}.bias"],
        }

    head = np.reshape(weights["5.weight"], (3, 4, 4, 4))  # flattened channels first
    return {
        "frozen": conv("0"),
        "conv": conv("1"),
        "norm": {"scale": weights["2.weight"], "bias": weights["2.bias"]},
        "head": (np.transpose(head, (2, 3, 1, 0)), weights["5.bias"]),
    }


def to_torch(params):
    """The way back, by hand, for the weights themselves."""

    def conv(layer):
        return np.transpose(layer["kernel"], (3, 2, 0, 1))

    kernel, bias = params["head"]
    weights = {
        "0.weight": conv(params["frozen"]),
        "0.bias": params["frozen"]["bias"],
        "1.weight": conv(params["conv"]),
        "1.bias": params["conv"]["bias"],
        "2.weight": params["norm"]["scale"],
        "2.bias": params["norm"]["bias"],
        "5.weight": np.reshape(np.transpose(kernel, (3, 2, 0, 1)), (3, 64)),
        "5.bias": bias,
    }
    return {name: np.array(w) for name, w in weights.items()}


def forward(params, images):
    """The same net on images with the channels last."""

    def conv(layer, x, padding):
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x + layer["bias"]

    x = conv(params["frozen"], jnp.transpose(images, (0, 2, 3, 1)), "SAME")
    x = conv(params["conv"], x, "VALID")
    x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
    x = jnp.tanh(x * params["norm"]["scale"] + params["norm"]["bias"])
    kernel, bias = params["head"]
    return jnp.einsum("nhwc,hwco->no", x, kernel) + bias


def train(tx, params, state, images, targets):
    """The steps that are left, here."""

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda params: ((forward(params, x) - y) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return mj.apply_updates(params, updates), state

    for x, y in zip(images, targets, strict=True):
        params, state = step(params, state, x, y)
    return params, state


def transformation_like(state_dict, names):
    """`optax.partition` over the two groups, each with its schedule, the first layer frozen."""
    settings = [torch_hyperparameters(state_dict, group=i) for i in range(len(GROUPS))]

    def scheduled(i):
        lr = GROUPS[i]["lr"]
        return torch_sgd(**{**settings[i], "lr": lambda count: lr * factor(count)})

    labels: Any = torch_labels(state_dict, names=names, to_params=from_torch)
    assert labels["conv"] == {"kernel": "group_0", "bias": "group_1"}
    labels["frozen"] = {"kernel": "frozen", "bias": "frozen"}
    return optax.partition(
        {"group_0": scheduled(0), "group_1": scheduled(1), "frozen": optax.set_to_zero()}, labels
    )


def check_near(got, expected, dtype):
    got, expected = (jax.tree.leaves(tree) for tree in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("oracle", ["torch"], indirect=True)
def test_a_job_of_pytorch_goes_on_here_and_back(oracle, dtype):
    """30 steps there and 30 here equal 60 there; so do 30 here and 30 there."""
    images, targets = batches(dtype)
    first, second = slice(HALF), slice(HALF, None)
    there = TorchJob(dtype)
    start, fresh = there.as_arrays(), copy.deepcopy(there.optimizer.state_dict())
    there.train(images[first], targets[first])
    state_dict = copy.deepcopy(there.optimizer.state_dict())
    params = jax.tree.map(jnp.asarray, from_torch(there.as_arrays()))
    there.train(images[second], targets[second])
    expected = there.as_arrays()
    assert np.max(np.abs(expected["1.weight"] - start["1.weight"])) > 0.05  # it learnt
    np.testing.assert_array_equal(expected["0.weight"], start["0.weight"])

    tx = transformation_like(state_dict, there.weights)
    state = load_torch(
        tx.init(params), state_dict, names=there.weights, to_params=from_torch, count=HALF
    )
    moved, _ = train(tx, params, state, images[second], targets[second])
    check_near(to_torch(moved), {name: expected[name] for name in to_torch(moved)}, dtype)

    params = jax.tree.map(jnp.asarray, from_torch(start))
    params, state = train(tx, params, tx.init(params), images[first], targets[first])
    back = TorchJob(dtype)
    back.take(to_torch(params))
    dumped = dump_torch(
        state,
        fresh,
        names=back.weights,
        to_params=from_torch,
        to_tensor=back.torch.from_numpy,
    )
    back.optimizer.load_state_dict(dumped)
    back.scheduler.last_epoch = HALF
    for group, lr in zip(back.optimizer.param_groups, back.scheduler.base_lrs, strict=True):
        group["lr"] = lr * float(factor(HALF))
    back.train(images[second], targets[second])
    check_near(back.as_arrays(), expected, dtype)


@pytest.mark.parametrize("oracle", ["torch"], indirect=True)
def test_a_state_dict_of_bfloat16_and_of_named_params(oracle):
    """Its buffers are read exactly, and its own names are compared with those given."""
    torch = importlib.import_module(oracle)
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([("w", w)], lr=0.5, momentum=0.5)
    w.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    optimizer.step()
    state_dict = optimizer.state_dict()
    tx = torch_sgd(**torch_hyperparameters(state_dict))

    def load(name):
        return load_torch(
            tx.init({name: jnp.ones(3, jnp.bfloat16)}),
            state_dict,
            names=[name],
            to_params=lambda weights: weights,
        )

    np.testing.assert_array_equal(load("w")[0].trace["w"], [1, 2, 3])
    with pytest.raises(ValueError, match="the optimizer's own names are w, but names has u"):
        load("u")


# Keras. ----------------------------------------------------------------------------------


class KerasJob:
    """The like in Keras: its first layer frozen, no decay of biases and normalization."""

    def __init__(self):
        keras = self.keras = import_keras()
        keras.utils.set_random_seed(0)
        layers = keras.layers
        self.model = keras.Sequential(
            [
                layers.Input((6, 6, 2)),
                layers.Conv2D(3, 3, padding="same", trainable=False),
                layers.Conv2D(4, 3),
                layers.BatchNormalization(),
                layers.Activation("tanh"),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
        self.weights = {w.path: w for w in self.model.trainable_variables}
        self.optimizer = keras.optimizers.SGD(1.0, momentum=0.9, nesterov=True, weight_decay=0.1)
        self.optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        self.optimizer.build(self.model.trainable_variables)
        frozen = [w.value for w in self.model.non_trainable_variables]

        @jax.jit
        def gradients(weights, x, y):
            def loss(weights):
                predicted, _ = self.model.stateless_call(weights, frozen, x, training=True)
                return ((predicted - y) ** 2).mean()

            return jax.grad(loss)(weights)

        self.gradients = gradients

    def train(self, images, targets, start):
        for count, (x, y) in enumerate(zip(images, targets, strict=True), start):
            self.optimizer.learning_rate.assign(0.05 * float(factor(count)))
            weights = [w.value for w in self.weights.values()]
            grads = self.gradients(weights, np.transpose(x, (0, 2, 3, 1)), y)
            self.optimizer.apply(grads, list(self.weights.values()))

    def as_arrays(self):
        return {path: np.asarray(w).copy() for path, w in self.weights.items()}

    def take(self, weights):
        for path, w in self.weights.items():
            w.assign(weights[path])

    def to_params(self, weights):
        """Nested, and the dense kernel transposed."""
        params: Any = {}
        for path, w in weights.items():
            *layers, leaf = path.split("/")
            params.setdefault("/".join(layers), {})[leaf] = w.T if w.ndim == 2 else w
        return params

    def from_params(self, params):
        weights = {}
        for path in self.weights:
            *layers, leaf = path.split("/")
            w = params["/".join(layers)][leaf]
            weights[path] = w.T if w.ndim == 2 else w
        return weights

    def go_on(self, tx, params, state, images, targets):
        """The steps that are left, in our loop."""

        @jax.jit
        def step(params, state, x, y):
            weights = list(self.from_params(params).values())
            grads = dict(zip(self.weights, self.gradients(weights, x, y), strict=True))
            updates, state = tx.update(self.to_params(grads), state, params)
            return mj.apply_updates(params, updates), state

        for x, y in zip(images, targets, strict=True):
            params, state = step(params, state, np.transpose(x, (0, 2, 3, 1)), y)
        return params, state


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("oracle", ["keras"], indirect=True)
def test_a_job_of_keras_goes_on_here_and_back(oracle, dtype, request):
    """30 steps there and 30 here equal 60 there; so do 30 here and 30 there."""
    keras = import_keras()
    assert keras.__name__ == oracle
    if dtype == "float64":
        within = float64(keras)
        within.__enter__()
        request.addfinalizer(lambda: within.__exit__(None, None, None))
    images, targets = batches(dtype)
    first, second = slice(HALF), slice(HALF, None)
    there = KerasJob()
    start = there.as_arrays()
    there.train(images[first], targets[first], 0)
    variables = {v.path: np.asarray(v).copy() for v in there.optimizer.variables}
    params = jax.tree.map(jnp.asarray, there.to_params(there.as_arrays()))
    there.train(images[second], targets[second], HALF)
    expected = there.as_arrays()
    kernel = next(path for path in expected if path.endswith("kernel"))
    assert np.max(np.abs(expected[kernel] - start[kernel])) > 0.05  # it learnt

    def rate(count):
        return 0.05 * factor(count)

    labels = jax.tree.map(lambda w: "decay" if w.ndim > 1 else "none", params)
    tx = optax.partition(
        {
            "decay": keras_sgd(rate, 0.9, nesterov=True, weight_decay=0.1),
            "none": keras_sgd(rate, 0.9, nesterov=True),
        },
        labels,
    )
    names = list(there.weights)
    state = load_keras(tx.init(params), variables, names=names, to_params=there.to_params)
    moved, _ = there.go_on(tx, params, state, images[second], targets[second])
    check_near(there.from_params(moved), expected, dtype)

    params = jax.tree.map(jnp.asarray, there.to_params(start))
    params, state = there.go_on(tx, params, tx.init(params), images[first], targets[first])
    back = KerasJob()
    # A second model has other names: its layers are counted on.
    rename = dict(zip(back.weights, there.weights, strict=True))
    carried = there.from_params(params)
    back.take({path: np.asarray(carried[rename[path]]) for path in back.weights})
    values = dump_keras(
        state,
        back.optimizer.variables,
        names=back.weights,
        to_params=lambda weights: there.to_params({rename[p]: w for p, w in weights.items()}),
    )
    for variable in back.optimizer.variables:
        variable.assign(values[variable.path])
    assert int(back.optimizer.iterations) == HALF
    back.train(images[second], targets[second], HALF)
    for path, w in back.as_arrays().items():
        check_near(w, expected[rename[path]], dtype)


# Optax, and inside and outside. ----------------------------------------------------------

PARAMS = {"a": np.array([1.0, -2.0], np.float32), "b": np.array([[3.0]], np.float32)}


def run(tx, state, steps, start=0, params=PARAMS):
    """So many steps of a quadratic under a force that changes with time."""
    params = jax.tree.map(jnp.asarray, params)
    for count in range(start, start + steps):
        force = np.float32(np.cos(count))
        grads = jax.tree.map(lambda w, force=force: w + force, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def rate(count):
    """Up and down."""
    return jnp.where(count % 3 == 0, 0.25, 0.125)


OPTAX = {
    "sgd": (optax.sgd(rate, 0.5), optax_sgd(rate, 0.5)),
    "chain": (
        optax.chain(optax.clip(1.0), optax.sgd(rate, 0.5)),
        optax.chain(optax.clip(1.0), optax_sgd(rate, 0.5)),
    ),
    "partition": (
        optax.partition({1: optax.sgd(rate, 0.5), 2: optax.sgd(0.5, 0.25)}, {"a": 1, "b": 2}),
        optax.partition({1: optax_sgd(rate, 0.5), 2: optax_sgd(0.5, 0.25)}, {"a": 1, "b": 2}),
    ),
}


@pytest.mark.parametrize("case", OPTAX)
def test_a_job_of_optax_goes_on_here_and_back(case):
    """Wherever the trace is."""
    theirs, ours = OPTAX[case]
    expected, end = run(theirs, theirs.init(PARAMS), 12)
    params, state = run(theirs, theirs.init(PARAMS), 6)
    moved, there = run(ours, load_optax(ours.init(PARAMS), state), 6, 6, params)
    jax.tree.map(np.testing.assert_allclose, moved, expected)
    back = dump_optax(theirs.init(PARAMS), there)
    assert jax.tree.structure(back) == jax.tree.structure(end)
    jax.tree.map(np.testing.assert_allclose, back, end)


def test_inside_and_outside_go_on_as_each_other():
    """At a constant learning rate, both ways; the count comes along."""
    inside, outside = mj.momentum(0.25, 0.5), optax_sgd(0.25, 0.5)
    kinds = (mj.MomentumState, mj.TraceState)
    expected, _ = run(inside, inside.init(PARAMS), 12)
    for source, target, convert in (
        (inside, outside, trace_from_momentum),
        (outside, inside, momentum_from_trace),
    ):
        params, state = run(source, source.init(PARAMS), 6)
        state = convert(target.init(PARAMS), state, learning_rate=0.25)
        moved, after = run(target, state, 6, 6, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, expected)
        assert {
            int(part.count)
            for part in jax.tree.leaves(after, is_leaf=lambda node: isinstance(node, kinds))
            if isinstance(part, kinds)
        } == {12}


def test_inside_and_outside_at_learning_rate_0_is_refused():
    """There v is 0 whatever m was."""
    tx = mj.momentum(0.25)
    for convert in (momentum_from_trace, trace_from_momentum):
        with pytest.raises(ValueError, match="learning_rate=0 says nothing of the velocity"):
            convert(tx.init(PARAMS), tx.init(PARAMS), learning_rate=0.0)


# What does not fit. ----------------------------------------------------------------------

SETTINGS = dict(lr=0.5, momentum=0.5, dampening=0, weight_decay=0, nesterov=False, maximize=False)
WEIGHTS = {"fc.weight": np.zeros((2, 3)), "fc.bias": np.zeros(2)}
BUFFERS = [np.arange(6.0).reshape(2, 3), np.array([6.0, 7.0])]


def a_state_dict(buffers=(0, 1), **settings):
    """As PyTorch saves it, with these buffers."""
    return {
        "state": {i: {"momentum_buffer": BUFFERS[i]} for i in buffers},
        "param_groups": [{**SETTINGS, **settings, "params": [0, 1]}],
    }


def fc(weights):
    return {"kernel": weights["fc.weight"].T, "bias": weights["fc.bias"]}


FC = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}


def load(state_dict=None, names=tuple(WEIGHTS), to_params=fc, params=FC, tx=None, **kwargs):
    tx = torch_sgd(0.5, 0.5) if tx is None else tx
    state_dict = a_state_dict() if state_dict is None else state_dict
    return load_torch(tx.init(params), state_dict, names=names, to_params=to_params, **kwargs)


def test_load_torch_fills_velocity_and_count():
    """Without a count, that a step was taken; with one, that one, in all schedules."""
    state: Any = load()[0]
    np.testing.assert_array_equal(state.trace["kernel"], BUFFERS[0].T)
    np.testing.assert_array_equal(state.trace["bias"], BUFFERS[1])
    assert (int(state.count), state.count.dtype) == (1, np.int32)
    assert int(load(a_state_dict([]), names=WEIGHTS)[0].count) == 0
    momentum, schedule = load(tx=torch_sgd(rate, 0.5), count=7)
    assert int(momentum.count) == int(schedule.count) == 7


def test_load_torch_keeps_dtype_and_sharding():
    """Of the state that it is given."""
    mesh = jax.make_mesh((8,), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    buffer = np.arange(64.0).reshape(8, 8)
    state_dict = a_state_dict([])
    state_dict["state"] = {0: {"momentum_buffer": buffer}}
    state_dict["param_groups"][0]["params"] = [0]
    tx = torch_sgd(0.5, 0.5)
    w = jax.device_put(np.zeros((8, 8), np.float32), sharding)
    state: Any = load_torch(tx.init(w), state_dict, names=["w"], to_params=lambda ws: ws["w"].T)
    velocity = state[0].trace
    assert velocity.sharding == sharding
    assert velocity.dtype == np.float32
    np.testing.assert_array_equal(velocity, buffer.T)


def test_a_missing_buffer_is_a_velocity_at_rest():
    """Of a param that never had a gradient, if its shape is known."""
    state: Any = load(a_state_dict([1]), names=WEIGHTS)[0]
    np.testing.assert_array_equal(state.trace["kernel"], np.zeros((3, 2)))
    np.testing.assert_array_equal(state.trace["bias"], BUFFERS[1])
    dumped = dump_torch((state,), a_state_dict([]), names=WEIGHTS, to_params=fc)
    np.testing.assert_array_equal(dumped["state"][1]["momentum_buffer"], BUFFERS[1])


def test_before_the_first_step_nothing_is_dumped():
    """So that PyTorch's first step is still its first."""
    state = torch_sgd(0.5, 0.5).init(FC)
    dumped = dump_torch(state, a_state_dict(), names=list(WEIGHTS), to_params=fc)
    assert dumped["state"] == {}
    assert dumped["param_groups"] == a_state_dict()["param_groups"]


def test_a_param_that_is_frozen_here_needs_no_buffer():
    """Masked here, without a buffer there; with one, it would be lost."""
    tx = optax.masked(torch_sgd(0.5, 0.5), {"kernel": False, "bias": True})
    state: Any = load(a_state_dict([1]), names=WEIGHTS, tx=tx)
    np.testing.assert_array_equal(state.inner_state[0].trace["bias"], BUFFERS[1])
    with pytest.raises(ValueError, match=r"only in what is carried over: \['kernel'\]"):
        load(tx=tx)
    dumped = dump_torch(state, a_state_dict([]), names=WEIGHTS, to_params=fc)
    assert list(dumped["state"]) == [1]


def doubled(weights):
    return jax.tree.map(lambda w: 2 * w, fc(weights))


def shifted(weights):
    return jax.tree.map(lambda w: w + 1, fc(weights))


def tied(weights):
    return {**fc(weights), "kernel": np.broadcast_to(weights["fc.weight"][:1].T, (3, 2))}


REFUSED = {
    "a whole checkpoint": (
        dict(state_dict={"model": {}, "optimizer": a_state_dict()}),
        "must be what optimizer.state_dict() returned",
    ),
    "of Adam": (
        dict(state_dict={"state": {}, "param_groups": [{"lr": 1, "betas": (0, 0), "params": []}]}),
        "is not of torch.optim.SGD",
    ),
    "too few names": (dict(names=["fc.weight"]), "the optimizer has 2 params, but names has 1"),
    "equal names": (dict(names=["fc.bias", "fc.bias"]), "these repeat: ['fc.bias']"),
    "names in another order": (
        dict(names=list(WEIGHTS)[::-1]),
        "the velocity ['bias'] has shape (2,), but what is carried over to it has shape (2, 3)",
    ),
    "weights in another order": (
        dict(names=dict(reversed(WEIGHTS.items()))),
        "the weight fc.bias has shape (2,), but its momentum has shape (2, 3)",
    ),
    "a name that to_params does not know": (
        dict(names=["fc.weight", "bias"]),
        "to_params asked for 'fc.bias', but was given bias, fc.weight",
    ),
    "other params": (
        dict(params={"kernel": FC["kernel"]}),
        "only in the state: none; only in what is carried over: ['bias']",
    ),
    "params of another shape": (
        dict(params={**FC, "kernel": jnp.zeros((2, 3))}),
        "the velocity ['kernel'] has shape (2, 3), but what is carried over to it has shape (3, 2)",
    ),
    "no velocity here": (
        dict(tx=torch_sgd(0.5)),
        "the state has no velocity to carry anything over to",
    ),
    "a count of 0": (dict(count=0), "count=0, but there is a velocity"),
    "to_params that scales": (dict(to_params=doubled), "does more than move values"),
    "to_params that adds": (dict(to_params=shifted), "does more than move values"),
    "to_params that repeats": (dict(to_params=tied), "does more than move values to ['kernel']"),
    "a missing buffer of unknown shape": (
        dict(state_dict=a_state_dict([1])),
        "the shape of fc.weight is not known",
    ),
    "a missing buffer and dampening": (
        dict(state_dict=a_state_dict([1], dampening=0.5), names=WEIGHTS),
        "there is no momentum buffer of fc.weight, and its group has dampening",
    ),
    "a schedule and no count": (
        dict(tx=torch_sgd(rate, 0.5)),
        "Give it: count=... (last_epoch of a scheduler that steps once a batch)",
    ),
    "a negative count": (dict(count=-1), "count=-1 must be the number of steps taken"),
    "a buffer of integers": (
        dict(
            state_dict={
                **a_state_dict([]),
                "state": {i: {"momentum_buffer": np.ones(2, int)} for i in (0, 1)},
            }
        ),
        "the momentum buffer of fc.weight is int64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    """With both sides listed, and nothing is loaded by half."""
    arguments, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        load(**arguments)


def test_groups_that_differ_are_told_how():
    """The error is code that works."""
    state_dict = a_state_dict()
    settings = state_dict["param_groups"][0]
    state_dict["param_groups"] = [
        {**settings, "params": [0]},
        {**settings, "params": [1], "momentum": 0.25},
    ]
    with pytest.raises(ValueError, match="the 2 parameter groups differ in momentum") as error:
        torch_hyperparameters(state_dict)
    _, code = str(error.value).split("\n", 1)
    scope: dict[str, Any] = dict(
        globals(), state_dict=state_dict, names=list(WEIGHTS), to_params=fc
    )
    exec("if True:\n" + code, scope)
    state = load(state_dict, tx=scope["tx"])
    updates, _ = scope["tx"].update(jax.tree.map(jnp.zeros_like, FC), state, FC)
    np.testing.assert_array_equal(updates["kernel"], -0.5 * 0.5 * BUFFERS[0].T)
    np.testing.assert_array_equal(updates["bias"], -0.5 * 0.25 * BUFFERS[1])
    with pytest.raises(ValueError, match="group=2 must be at least 0 and below 2"):
        torch_hyperparameters(state_dict, group=2)


def test_a_param_of_two_groups_has_no_label():
    """Weights that are joined to one param cannot have two settings."""
    state_dict = a_state_dict()
    settings = state_dict["param_groups"][0]
    state_dict["param_groups"] = [{**settings, "params": [i]} for i in (0, 1)]
    with pytest.raises(ValueError, match=r"made of weights of the parameter groups \[0, 1\]"):
        torch_labels(
            state_dict,
            names=WEIGHTS,
            to_params=lambda weights: np.concatenate([w.ravel() for w in weights.values()]),
        )


def test_joined_and_split_weights_are_carried_over_and_back():
    """Three projections become one, and one becomes two."""
    weights = {"q": np.zeros((2, 2)), "k": np.zeros((2, 2)), "both": np.zeros(6)}

    def to_params(weights):
        return {
            "qk": np.concatenate([weights["q"], weights["k"]], axis=1),
            "halves": list(np.split(weights["both"], 2)),
        }

    buffers = {name: np.random.default_rng(0).normal(size=w.shape) for name, w in weights.items()}
    state_dict = {
        "state": {i: {"momentum_buffer": b} for i, b in enumerate(buffers.values())},
        "param_groups": [{**SETTINGS, "params": [0, 1, 2]}],
    }
    params = jax.tree.map(jnp.asarray, to_params(weights))
    tx = torch_sgd(0.5, 0.5)
    state: Any = load_torch(tx.init(params), state_dict, names=list(weights), to_params=to_params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        state[0].trace,
        to_params(buffers),
    )
    dumped = dump_torch(state, state_dict, names=list(weights), to_params=to_params)
    for i, buffer in enumerate(buffers.values()):
        np.testing.assert_allclose(dumped["state"][i]["momentum_buffer"], buffer, rtol=1e-6)


KERAS = {
    "sgd/iteration": np.array(3),
    "sgd/learning_rate": np.array(0.5),
    "sgd/fc_kernel_momentum": np.ones(2),
}
REFUSED_OF_KERAS = {
    "of Adam": ({**KERAS, "adam/fc_kernel_velocity": np.ones(2)}, "not adam/fc_kernel_velocity"),
    "of Lion": (
        {path.replace("sgd", "lion"): value for path, value in KERAS.items()},
        "are not those of Keras' SGD",
    ),
    "no iteration": ({"sgd/fc_kernel_momentum": np.ones(2)}, "it has one iteration, here 0"),
    "another shape": (
        {**KERAS, "sgd/fc_kernel_momentum": np.ones(3)},
        "has shape (2,), but what is carried over to it has shape (3,)",
    ),
    "no momentum": (
        {"sgd/iteration": np.array(3)},
        "the shape of fc/kernel is not known",
    ),
}


@pytest.mark.parametrize("case", REFUSED_OF_KERAS)
def test_what_does_not_fit_of_keras_is_refused(case):
    """With the names on both sides."""
    variables, message = REFUSED_OF_KERAS[case]
    state = keras_sgd(0.5, 0.5).init(jnp.zeros(2))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_keras(
            state, variables, names=["fc/kernel"], to_params=lambda weights: weights["fc/kernel"]
        )


def test_keras_optimizer_itself_is_refused(as_shipped):
    """With what to give."""
    with pytest.raises(TypeError, match=r"give optimizer\.variables"):
        load_keras(keras_sgd().init(FC), object(), names=[], to_params=fc)  # pyright: ignore


def test_keras_without_momentum_keeps_its_iteration():
    """Nothing here has counted."""
    variables = {"sgd/iteration": np.array(3), "sgd/learning_rate": np.array(0.5)}
    weights = {"w": np.zeros(2)}
    state = keras_sgd(0.5).init(jnp.zeros(2))
    arguments: Any = dict(names=weights, to_params=lambda weights: weights["w"])
    assert dump_keras(state, variables, **arguments) == variables
    assert load_keras(state, variables, **arguments) == state


def injected(make, **options):
    return optax.inject_hyperparams(make)(**options)


@pytest.mark.parametrize(
    ("tx", "rate"),
    [
        (injected(torch_sgd, lr=0.5, momentum=0.5), 0.5),
        (injected(torch_sgd, lr=rate, momentum=0.5), 0.125),
        (optax.chain(injected(torch_sgd, lr=rate, momentum=0.5), optax.identity()), 0.125),
    ],
    ids=["constants", "schedule", "chain"],
)
def test_a_job_goes_on_under_inject_hyperparams(tx, rate):
    """Velocity and schedules are filled within it, and its step is jitted."""
    count = None if rate == 0.5 else 7
    state = load(tx=tx, count=count)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, FC), state, FC)
    np.testing.assert_allclose(updates["kernel"], -rate * 0.5 * BUFFERS[0].T, rtol=1e-6)


def test_a_job_goes_on_in_an_nnx_optimizer():
    """Whose state holds each array in a variable."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, torch_sgd(0.5, 0.5), wrt=nnx.Param)
    before = np.asarray(model.kernel[...])
    optimizer.opt_state = load_torch(
        optimizer.opt_state, a_state_dict(), names=list(WEIGHTS), to_params=fc
    )
    grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    moved = np.asarray(model.kernel[...]) - before
    np.testing.assert_allclose(moved, -0.25 * BUFFERS[0].T, rtol=1e-5)


def test_a_state_of_numpy_arrays_is_filled():
    """As pickle and flax.serialization give it."""
    tx = torch_sgd(0.5, 0.5)
    state = jax.tree.map(np.asarray, tx.init(FC))
    filled: Any = load_torch(state, a_state_dict(), names=list(WEIGHTS), to_params=fc)[0]
    np.testing.assert_array_equal(filled.trace["bias"], BUFFERS[1])


# Each wrapper of Optax' that remembers more than a velocity, and what its error says.
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
KERAS_OF_FC = {
    "sgd/iteration": np.array(3),
    "sgd/fc.weight_momentum": BUFFERS[0],
    "sgd/fc.bias_momentum": BUFFERS[1],
}
# Each function: the transformation within the state that it reads and within the one that it
# fills, None where that is another framework's, and the call.
CARRIED = {
    "load_torch": (
        None,
        torch_sgd(0.5, 0.5),
        lambda _, target: load_torch(target, a_state_dict(), names=list(WEIGHTS), to_params=fc),
    ),
    "load_keras": (
        None,
        keras_sgd(0.5, 0.5),
        lambda _, target: load_keras(target, KERAS_OF_FC, names=list(WEIGHTS), to_params=fc),
    ),
    "load_optax": (
        optax.sgd(0.5, 0.5),
        optax_sgd(0.5, 0.5),
        lambda source, target: load_optax(target, source),
    ),
    "dump_torch": (
        torch_sgd(0.5, 0.5),
        None,
        lambda source, _: dump_torch(source, a_state_dict(), names=list(WEIGHTS), to_params=fc),
    ),
    "dump_keras": (
        keras_sgd(0.5, 0.5),
        None,
        lambda source, _: dump_keras(source, KERAS_OF_FC, names=list(WEIGHTS), to_params=fc),
    ),
    "dump_optax": (
        optax_sgd(0.5, 0.5),
        optax.sgd(0.5, 0.5),
        lambda source, target: dump_optax(target, source),
    ),
    "momentum_from_trace": (
        mj.trace(0.5),
        mj.momentum(0.5, 0.5),
        lambda source, target: momentum_from_trace(target, source, learning_rate=0.5),
    ),
    "trace_from_momentum": (
        mj.momentum(0.5, 0.5),
        mj.trace(0.5),
        lambda source, target: trace_from_momentum(target, source, learning_rate=0.5),
    ),
}


def begun(case, tx):
    """The first state of a wrapper, and that in the midst of what it gathers."""
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


@pytest.mark.parametrize("function", CARRIED)
@pytest.mark.parametrize("case", REMEMBERED)
def test_what_a_wrapper_remembers_is_not_dropped(function, case):
    """Neither from the state that is read nor from the one that is filled."""
    reads, fills, carry = CARRIED[function]
    source = None if reads is None else reads.init(FC)
    target: Any = None if fills is None else fills.init(FC)
    carry(source, target)  # As it should be.
    if reads is not None:
        first, later = begun(case, reads)
        carry(first, target)
        with pytest.raises(ValueError, match=re.escape(REMEMBERED[case][1])):
            carry(later, target)
    if fills is not None:
        first, later = begun(case, fills)
        carry(source, first)
        with pytest.raises(ValueError, match=re.escape(REMEMBERED[case][1])):
            carry(source, later)


@pytest.mark.parametrize("function", [name for name in CARRIED if not name.startswith("load")])
def test_what_rounding_has_kept_is_not_dropped(function):
    """The remedy is what keeps it, or makes params of float32."""
    reads, fills, carry = CARRIED[function]
    target: Any = None if fills is None else fills.init(FC)
    tx = mj.kahan(reads)
    state: Any
    params = jax.tree.map(lambda w: jnp.ones_like(w, jnp.bfloat16), FC)
    carry(tx.init(params), target)
    grads = jax.tree.map(lambda w: jnp.full(w.shape, 0.001), FC)
    _, state = tx.update(grads, tx.init(params), params)
    with pytest.raises(ValueError, match=r"kahan has updates of \['bias'\], \['kernel'\]"):
        carry(state, target)
    carry(state.inner_state, target)


def test_projected_momentum_is_refused():
    """Its shapes need not differ from those of the params."""
    if not hasattr(optax.contrib, "GaLoreState"):
        pytest.skip("this Optax has no galore")
    source = optax.contrib.GaLoreState(jnp.array(1), optax.sgd(0.5, 0.5).init(FC), ())
    with pytest.raises(ValueError, match=r"optax\.contrib\.galore has taken 1 steps"):
        load_optax(optax_sgd(0.5, 0.5).init(FC), source)


def test_between_the_steps_of_multisteps_nothing_is_gathered():
    """The job goes on there and here, and its count with it."""
    theirs = optax.MultiSteps(optax.sgd(rate, 0.5), 2).gradient_transformation()
    ours = optax.MultiSteps(optax_sgd(rate, 0.5), 2).gradient_transformation()
    end: Any
    expected, end = run(theirs, theirs.init(PARAMS), 12)
    params, state = run(theirs, theirs.init(PARAMS), 6)
    there: Any = load_optax(ours.init(PARAMS), state)
    assert int(there.gradient_step) == 3
    moved, there = run(ours, there, 6, 6, params)
    jax.tree.map(np.testing.assert_allclose, moved, expected)
    back = dump_optax(theirs.init(PARAMS), there)
    assert int(back.gradient_step) == 6
    end = end._replace(acc_grads=back.acc_grads)  # What a step has used is not read again.
    jax.tree.map(np.testing.assert_allclose, back, end)


def always(step, **extra):
    del step, extra
    return True


COUNTED = {
    "MultiSteps": lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(),
    "conditionally_transform": lambda inner: optax.conditionally_transform(inner, always),
    "conditionally_mask": lambda inner: optax.conditionally_mask(inner, always),
    "add_noise": lambda inner: optax.chain(optax.add_noise(0.0, 0.5, 0), inner),
    "scale_by_schedule": lambda inner: optax.chain(inner, optax.scale_by_schedule(rate)),
    "inject_hyperparams": lambda inner: injected(
        lambda factor: optax.chain(inner, optax.scale(factor)), factor=rate
    ),
    "both": lambda inner: optax.conditionally_transform(
        optax.MultiSteps(optax.conditionally_mask(inner, always), 2).gradient_transformation(),
        always,
    ),
}


def counts_of(state):
    """All counts in a state, by the ends of their paths."""
    return {
        jax.tree_util.keystr(path): int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if getattr(path[-1], "name", None) in ("count", "step", "gradient_step")
    }


@pytest.mark.parametrize("case", [case for case in COUNTED if case != "both"])
def test_every_count_is_set(case):
    """Whatever follows it, in each function that fills a state."""
    tx = COUNTED[case](torch_sgd(0.5, 0.5))
    filled = load(tx=tx, count=7)
    assert len(counts_of(filled)) >= 2
    assert set(counts_of(filled).values()) == {7}
    back = dump_optax(COUNTED[case](optax.sgd(0.5, 0.5)).init(FC), filled)
    assert set(counts_of(back).values()) == {7}
    assert set(counts_of(load_optax(tx.init(FC), back)).values()) == {7}
    inside = COUNTED[case](mj.momentum(0.5, 0.5)).init(FC)
    inside = momentum_from_trace(inside, filled, learning_rate=0.5)
    assert set(counts_of(inside).values()) == {7}
    dumped = dump_keras(inside, KERAS_OF_FC, names=list(WEIGHTS), to_params=fc)
    assert dumped["sgd/iteration"] == 7
    # And without one, not guessed where a schedule must follow it.
    if case == "MultiSteps":
        assert set(counts_of(load(tx=tx)).values()) == {1}
    else:
        with pytest.raises(ValueError, match="a schedule that continues"):
            load(tx=tx)


def test_steps_and_gradients_are_not_counted_as_one():
    """One count cannot be right within MultiSteps and outside it."""
    tx = COUNTED["both"](torch_sgd(0.5, 0.5))
    with pytest.raises(ValueError, match=r"counts steps within optax\.MultiSteps and gradients"):
        load(tx=tx, count=7)
    assert set(counts_of(load(a_state_dict([]), WEIGHTS, tx=tx, count=0)).values()) == {0}


def test_counts_that_differ_are_refused_by_name():
    """A schedule that began later than the velocity."""
    trace, schedule = load(tx=torch_sgd(rate, 0.5), count=7)
    state = (trace, schedule._replace(count=jnp.array(2)))
    message = r"\[2, 7\] steps, not alike \(TraceState.count 7, ScaleByScheduleState.count 2\)"
    with pytest.raises(ValueError, match=message):
        dump_optax(optax.sgd(rate, 0.5).init(FC), state)
    with pytest.raises(ValueError, match=message):
        momentum_from_trace(mj.momentum(0.5).init(FC), state, learning_rate=0.5)


def test_a_count_that_does_not_fit_is_refused():
    """Or it would go on as a negative one."""
    with pytest.raises(ValueError, match="count=2147483648 must be at most 2147483647"):
        load(count=2**31)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", CARRIED)
def test_values_that_are_not_finite_are_refused(function, bad):
    """With the name, how many there are, and the remedy."""
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
            load_torch(target, {**a_state_dict(), "state": buffers}, **arguments)
    else:
        variables = {**KERAS_OF_FC, "sgd/fc.weight_momentum": buffer}
        with pytest.raises(ValueError, match=message):
            load_keras(target, variables, **arguments)


def test_values_that_are_not_finite_once_stored_are_refused():
    """Too large for the dtype, or at the learning rate."""
    params = jax.tree.map(lambda w: w.astype(jnp.float16), FC)
    tx = optax.chain(optax.trace(0.5, accumulator_dtype=jnp.float16))
    state = (mj.TraceState(jnp.array(1), jax.tree.map(lambda w: w.at[...].set(1e6), FC)),)
    with pytest.raises(ValueError, match=r"has 2 of 2 values .* too large for float16"):
        dump_optax(tx.init(params), state)
    variables = {
        path: value.astype(np.float16) if "momentum" in path else value
        for path, value in KERAS_OF_FC.items()
    }
    inside = (mj.MomentumState(*state[0]),)
    with pytest.raises(ValueError, match=r"momentum of fc\.weight has 6 of 6 .* float16"):
        dump_keras(inside, variables, names=list(WEIGHTS), to_params=fc)
    with pytest.raises(ValueError, match="too large for float32"):
        trace_from_momentum(mj.trace(0.5).init(FC), inside, learning_rate=1e-35)


@pytest.mark.parametrize("copies", [False, True])
def test_carrying_over_takes_at_most_16_bytes_per_value(copies):
    """Beside the arguments: NumPy's arrays, at their peak."""
    shapes = {"a": (1000, 700), "b": (500, 300, 2), "c": (1, 100_000)}
    generator = np.random.default_rng(0)
    buffers = [generator.standard_normal(shape, np.float32) for shape in shapes.values()]
    total = sum(buffer.size for buffer in buffers)

    def to_params(weights):
        return {name: np.ascontiguousarray(w.T) if copies else w.T for name, w in weights.items()}

    arguments: Any = dict(names=list(shapes), to_params=to_params)
    state_dict = {
        "state": {i: {"momentum_buffer": b} for i, b in enumerate(buffers)},
        "param_groups": [{**SETTINGS, "params": [0, 1, 2]}],
    }
    tx = torch_sgd(0.5, 0.5)
    weights = dict(zip(shapes, buffers, strict=True))
    state = tx.init(jax.tree.map(jnp.zeros_like, to_params(weights)))

    def peak(carry):
        carry()  # What is compiled and imported is no array.
        tracemalloc.start()
        try:
            result = carry()
            return tracemalloc.get_traced_memory()[1] / total, result
        finally:
            tracemalloc.stop()

    loading, state = peak(lambda: load_torch(state, state_dict, **arguments))
    dumping, dumped = peak(lambda: dump_torch(state, state_dict, **arguments))
    for i, buffer in enumerate(buffers):
        np.testing.assert_array_equal(dumped["state"][i]["momentum_buffer"], buffer)
    # In small chunks, whose temporaries are of one size whatever the weights.
    assert loading < 16
    assert dumping < 16


def test_routes_of_more_than_a_chunk_are_exact():
    """Joined from weights of several sizes, an empty one, and more than two bytes of numbers."""
    weights = {"a": np.zeros((300, 250)), "empty": np.zeros((0, 3)), "b": np.zeros(70_001)}

    def to_params(weights):
        joined = np.concatenate([weights["b"][::-1], weights["a"].T.ravel()])
        return {"first": joined[:100_000], "rest": joined[100_000:], "empty": weights["empty"]}

    generator = np.random.default_rng(0)
    buffers = {n: generator.standard_normal(w.shape).astype("f") for n, w in weights.items()}
    state_dict = {
        "state": {i: {"momentum_buffer": b} for i, b in enumerate(buffers.values())},
        "param_groups": [{**SETTINGS, "params": [0, 1, 2]}],
    }
    arguments: Any = dict(names=list(weights), to_params=to_params)
    tx = torch_sgd(0.5, 0.5)
    state: Any = tx.init(jax.tree.map(jnp.asarray, to_params(weights)))
    state = load_torch(state, state_dict, **arguments)
    jax.tree.map(np.testing.assert_array_equal, state[0].trace, to_params(buffers))
    dumped = dump_torch(state, state_dict, **arguments)["state"]
    for i, buffer in enumerate(buffers.values()):
        np.testing.assert_array_equal(dumped[i]["momentum_buffer"], buffer)


def in_place(weights):
    weights["fc.weight"] *= -1
    return fc(weights)


def by_size(weights):
    swap = weights["fc.bias"][0] > weights["fc.bias"][1]
    return {**fc(weights), "bias": weights["fc.bias"][::-1] if swap else weights["fc.bias"]}


def sometimes(weights):
    params = fc(weights)
    return params if weights["fc.bias"][0] < weights["fc.bias"][1] else {"kernel": params["kernel"]}


@pytest.mark.parametrize(
    "to_params",
    [in_place, by_size, sometimes, lambda weights: jax.tree.map(np.abs, fc(weights))],
)
def test_to_params_that_depends_on_values_is_refused(to_params):
    """Even if it moves whole numbers above 0 rightly."""
    with pytest.raises(ValueError, match="does more than move values"):
        load(to_params=to_params)


def test_an_error_of_to_params_says_where_it_was():
    """With its own type and text."""
    with pytest.raises(AttributeError, match="permute") as error:
        load(to_params=lambda weights: weights["fc.weight"].permute(1, 0))
    assert "called with NumPy arrays by name" in error.value.__notes__[0]


def test_two_velocities_of_one_param_are_refused():
    """In a chain of two there is no telling which is meant."""
    tx = optax.chain(mj.trace(0.5), mj.trace(0.25))
    with pytest.raises(ValueError, match="the state holds two velocities of the param"):
        load(tx=tx)


def test_an_optax_state_of_other_params_is_refused():
    """With the paths on both sides."""
    state = optax.sgd(0.5, 0.5).init({"x": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"only in the state: \['a'\], \['b'\]; only in .*\['x'\]"):
        load_optax(optax_sgd(0.5, 0.5).init(PARAMS), state)


def test_a_state_without_velocity_is_no_job_of_pytorch():
    """Else PyTorch would go on from rest, and nobody would know."""
    with pytest.raises(ValueError, match=r"no velocity, but the optimizer .* has momentum=0\.5"):
        dump_torch(optax.adam(0.1).init(FC), a_state_dict(), names=WEIGHTS, to_params=fc)


def test_an_optax_state_without_velocity_is_refused():
    """With the params that have one here."""
    state = optax_sgd(0.1, 0.9).init(FC)
    with pytest.raises(ValueError, match="no velocity in what is carried over, but in the state"):
        load_optax(state, optax.adam(0.1).init(FC))


def test_one_name_is_no_list_of_names(as_shipped):
    """Or its letters would be names."""
    with pytest.raises(TypeError, match=r"names='fc' must be a list of names, here \['fc'\]"):
        load_torch(torch_sgd(0.1, 0.9).init(FC), a_state_dict(), names="fc", to_params=fc)


@pytest.mark.parametrize("variables", ["x", [np.ones(2)]])
def test_variables_without_paths_are_refused(as_shipped, variables):
    """With what to give."""
    with pytest.raises(TypeError, match=r"has no path: give optimizer\.variables"):
        load_keras(keras_sgd().init(FC), variables, names=[], to_params=fc)


class Variable:
    """A variable of Keras 2, as tf_keras makes them: with a name, without a path."""

    def __init__(self, name, value):
        self.name, self.value, self.shape = name, np.asarray(value), np.shape(value)

    def numpy(self):
        return self.value


class KerasTwo:
    """What the remedy reads of a model and its optimizer of Keras 2."""

    trainable_variables = (Variable("fc/kernel:0", np.zeros(2)),)
    iterations = Variable("iteration:0", 3)
    momentums = (Variable("SGD/m/fc/kernel:0", [1.0, 2.0]),)
    variables = (iterations, Variable("learning_rate:0", 0.5), *momentums)


@pytest.mark.parametrize("given", ["variables", "dict"])
def test_variables_of_keras_2_are_told_how(as_shipped, given):
    """The error is code that works."""
    variables: Any = KerasTwo.variables
    if given == "dict":
        variables = {variable.name: variable.value for variable in variables}
    state = keras_sgd(0.5, 0.5).init(jnp.zeros(2))
    arguments: Any = dict(names=["fc/kernel"], to_params=lambda weights: weights["fc/kernel"])
    kind = ValueError if given == "dict" else TypeError
    with pytest.raises(kind, match=r"iteration:0 has a name of Keras 2 \(tf_keras\)") as error:
        load_keras(state, variables, **arguments)
    _, code = str(error.value).split("\n", 1)
    scope: dict[str, Any] = {"model": KerasTwo, "optimizer": KerasTwo}
    exec("if True:\n" + code, scope)
    arguments["names"] = scope["weights"]
    filled: Any = load_keras(state, scope["variables"], **arguments)
    assert int(filled.count) == 3
    np.testing.assert_array_equal(filled.velocity, [1, 2])


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
    # In 8 bits the values up to 100 are at most 1.2 apart, and some are rounded twice.
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
        # Between one process and several: through the host.
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


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_states_that_are_sharded_over_several_processes(axis_type, tmp_path):
    """Each keeps its shardings, and from state to state nothing is gathered."""
    (tmp_path / "job.py").write_text(JOB)
    for printed in run_job(tmp_path / "job.py", axis_type, timeout=240):
        assert printed.splitlines()[-1] == "done"


def test_last_params_of_adaptive_restart_go_on():
    """Or the first step would be decided by a movement that was none."""
    params: Any = {"w": jnp.ones(3)}
    scale = optax.scale_by_learning_rate(0.25)
    outside: Any = mj.adaptive_restart(optax.chain(mj.trace(0.5), scale))
    inside: Any = mj.adaptive_restart(mj.momentum(0.25, 0.5))
    state = outside.init(params)
    for _ in range(2):
        updates, state = outside.update({"w": jnp.array([1.0, -2.0, 0.5])}, state, params)
        params = optax.apply_updates(params, updates)
    carried = momentum_from_trace(inside.init(params), state, learning_rate=0.25)
    assert np.any(carried.previous_params["w"] != params["w"])
    back = trace_from_momentum(outside.init(params), carried, learning_rate=0.25)
    for each in (carried, back):
        np.testing.assert_array_equal(each.previous_params["w"], state.previous_params["w"])
    for sign in (1.0, -1.0):  # One goes on, the other turns.
        grads = {"w": sign * jnp.array([1.0, -2.0, 0.5])}
        expected, _ = outside.update(grads, state, params)
        found, _ = inside.update(grads, carried, params)
        np.testing.assert_array_equal(found["w"], expected["w"])


def test_a_complex_velocity_does_not_go_into_a_real_one():
    """Its imaginary part would be lost."""
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
    held = mj.MomentumState(jnp.int32(1), {"kernel": jnp.ones(2, "complex64")})
    variables = {"sgd/iteration": np.array(0), "sgd/kernel_momentum": np.zeros(2, "f")}
    with pytest.raises(
        TypeError, match="the velocity of kernel is complex64, but Keras' is float32"
    ):
        dump_keras(held, variables, names=["kernel"], to_params=lambda weights: weights)


def test_states_that_were_stacked_are_carried():
    """By vmap: each member has its count, and all are read."""
    params = jnp.ones((4, 3))
    ours = optax.chain(mj.trace(0.9), optax.scale_by_learning_rate(lambda count: 0.1))
    theirs = optax.sgd(lambda count: 0.1, 0.9)
    grads = jnp.arange(12.0).reshape(4, 3)

    def stepped(tx) -> Any:
        state = jax.vmap(tx.init)(params)
        for _ in range(3):
            _, state = jax.vmap(tx.update)(grads, state)
        return state

    loaded = load_optax(jax.vmap(ours.init)(params), stepped(theirs))
    expected = stepped(ours)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-6)
    dumped = dump_optax(jax.vmap(theirs.init)(params), expected)
    for a, b in zip(jax.tree.leaves(dumped), jax.tree.leaves(stepped(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    apart = (expected[0]._replace(count=jnp.array([3, 3, 2, 3])), expected[1])
    with pytest.raises(ValueError, match=r"have counted \[2, 3\] steps, not alike"):
        dump_optax(jax.vmap(theirs.init)(params), apart)


def test_only_velocities_and_counts_are_carried():
    """A learning rate that is injected in the new state stays what it is."""
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
