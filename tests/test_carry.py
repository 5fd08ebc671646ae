"""Training that starts in PyTorch, Keras or Optax and continues here, and the reverse."""

import copy
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import PARAMS, rate, run
from golden.record import float64, import_keras

import momentum_jax as mj
from momentum_jax.frameworks import (
    dump_keras,
    dump_optax,
    dump_torch,
    keras_sgd,
    load_keras,
    load_optax,
    load_torch,
    optax_sgd,
    torch_hyperparameters,
    torch_labels,
    torch_sgd,
)

HALF = 30  # steps in the framework, and as many here


TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def factor(count):
    """Factor of the learning rate: it rises for 20 steps, then drops twice."""
    return (
        jnp.minimum(1.0, 0.05 * (count + 1))
        * jnp.where(count < 35, 1.0, 0.3)
        * jnp.where(count < 50, 1.0, 0.3)
    )


def batches(dtype):
    """Images and targets for all steps."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((2 * HALF, 8, 2, 6, 6)).astype(dtype)
    targets = generator.standard_normal((2 * HALF, 8, 3)).astype(dtype)
    return images, targets


GROUPS = [
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.0, "dampening": 0.2},
]


class TorchTraining:
    """A small convolutional net with normalization, a frozen layer and two parameter groups."""

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
        # In the optimizer's order, which differs from the model's.
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
    """What a user writes: kernels are transposed, layers are renamed."""

    def conv(name):
        return {
            "kernel": np.transpose(weights[f"{name}.weight"], (2, 3, 1, 0)),
            "bias": weights[f"{name}.bias"],
        }

    head = np.reshape(weights["5.weight"], (3, 4, 4, 4))  # the channels were flattened first
    return {
        "frozen": conv("0"),
        "conv": conv("1"),
        "norm": {"scale": weights["2.weight"], "bias": weights["2.bias"]},
        "head": (np.transpose(head, (2, 3, 1, 0)), weights["5.bias"]),
    }


def to_torch(params):
    """The inverse of `from_torch`, written by hand."""

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
    """The same net, for images with the channels last."""

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
    """Trains here with the given batches."""

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda params: ((forward(params, x) - y) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return mj.apply_updates(params, updates), state

    for x, y in zip(images, targets, strict=True):
        params, state = step(params, state, x, y)
    return params, state


def transformation_like(state_dict, names):
    """`optax.partition` with two groups, each with its schedule, and a frozen layer."""
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


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("oracle", ["torch"], indirect=True)
def test_training_moves_from_pytorch_and_back(oracle, dtype):
    """30 steps in the framework and 30 here equal 60 in the framework, and so does the reverse."""
    images, targets = batches(dtype)
    first, second = slice(HALF), slice(HALF, None)
    there = TorchTraining(dtype)
    start, fresh = there.as_arrays(), copy.deepcopy(there.optimizer.state_dict())
    there.train(images[first], targets[first])
    state_dict = copy.deepcopy(there.optimizer.state_dict())
    params = jax.tree.map(jnp.asarray, from_torch(there.as_arrays()))
    there.train(images[second], targets[second])
    expected = there.as_arrays()
    assert np.max(np.abs(expected["1.weight"] - start["1.weight"])) > 0.05  # it has learned
    np.testing.assert_array_equal(expected["0.weight"], start["0.weight"])

    tx = transformation_like(state_dict, there.weights)
    state = load_torch(
        tx.init(params), state_dict, names=there.weights, to_params=from_torch, count=HALF
    )
    moved, _ = train(tx, params, state, images[second], targets[second])
    check_near(to_torch(moved), {name: expected[name] for name in to_torch(moved)}, dtype)

    params = jax.tree.map(jnp.asarray, from_torch(start))
    params, state = train(tx, params, tx.init(params), images[first], targets[first])
    back = TorchTraining(dtype)
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


@pytest.mark.slow
@pytest.mark.parametrize("oracle", ["torch"], indirect=True)
def test_a_torch_state_dict_with_bfloat16_buffers_and_names(oracle):
    """Buffers are read exactly, and the names in it are compared with `names`."""
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


class KerasTraining:
    """A similar net in Keras: a frozen layer, no decay of biases and normalization."""

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
        """Nested params, with the dense kernel transposed."""
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

    def train_here(self, tx, params, state, images, targets):
        """Trains here with the given batches."""

        @jax.jit
        def step(params, state, x, y):
            weights = list(self.from_params(params).values())
            grads = dict(zip(self.weights, self.gradients(weights, x, y), strict=True))
            updates, state = tx.update(self.to_params(grads), state, params)
            return mj.apply_updates(params, updates), state

        for x, y in zip(images, targets, strict=True):
            params, state = step(params, state, np.transpose(x, (0, 2, 3, 1)), y)
        return params, state


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("oracle", ["keras"], indirect=True)
def test_training_moves_from_keras_and_back(oracle, dtype, request):
    """30 steps in the framework and 30 here equal 60 in the framework, and so does the reverse."""
    keras = import_keras()
    assert keras.__name__ == oracle
    if dtype == "float64":
        within = float64(keras)
        within.__enter__()
        request.addfinalizer(lambda: within.__exit__(None, None, None))
    images, targets = batches(dtype)
    first, second = slice(HALF), slice(HALF, None)
    there = KerasTraining()
    start = there.as_arrays()
    there.train(images[first], targets[first], 0)
    variables = {v.path: np.asarray(v).copy() for v in there.optimizer.variables}
    params = jax.tree.map(jnp.asarray, there.to_params(there.as_arrays()))
    there.train(images[second], targets[second], HALF)
    expected = there.as_arrays()
    kernel = next(path for path in expected if path.endswith("kernel"))
    assert np.max(np.abs(expected[kernel] - start[kernel])) > 0.05  # it has learned

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
    moved, _ = there.train_here(tx, params, state, images[second], targets[second])
    check_near(there.from_params(moved), expected, dtype)

    params = jax.tree.map(jnp.asarray, there.to_params(start))
    params, state = there.train_here(tx, params, tx.init(params), images[first], targets[first])
    back = KerasTraining()
    # A second model has other names, because Keras numbers its layers.
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
def test_training_moves_from_optax_and_back(case):
    """Also if the trace is inside a chain or a partition."""
    theirs, ours = OPTAX[case]
    expected, end = run(theirs, theirs.init(PARAMS), 12)
    params, state = run(theirs, theirs.init(PARAMS), 6)
    moved, there = run(ours, load_optax(ours.init(PARAMS), state), 6, 6, params)
    jax.tree.map(np.testing.assert_allclose, moved, expected)
    back = dump_optax(theirs.init(PARAMS), there)
    assert jax.tree.structure(back) == jax.tree.structure(end)
    jax.tree.map(np.testing.assert_allclose, back, end)
