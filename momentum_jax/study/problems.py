"""What the study trains: a way to draw initial weights, a loss, and the data it is taken over."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and its data, as the functions that training needs.

    Attributes:
      name: what the report calls it.
      init: `init(key) -> params` draws initial weights.
      loss: `loss(params, batch) -> scalar`, to be minimized.
      metric: `metric(params, batch) -> scalar`, to be reported beside the loss.
      train: a tree of arrays with one example a row; batches are drawn from it.
      test: the same for the examples that the results are measured on.
      chance: the loss of guessing, the most that a run is charged with.
      passing: the least metric of a run that has not failed.

    Example:
      >>> import jax
      >>> from momentum_jax.study.problems import digits
      >>> problem = digits()
      >>> params = problem.init(jax.random.key(0))
      >>> print(problem.loss(params, problem.test) < 2 * problem.chance)
      True
    """

    name: str
    init: Callable[[PRNGKeyArray], PyTree]
    loss: Callable[[PyTree, PyTree], Float[Array, ""]]
    metric: Callable[[PyTree, PyTree], Float[Array, ""]]
    train: PyTree
    test: PyTree
    chance: float
    passing: float


class MLP(nn.Module):
    """A multilayer perceptron with one hidden layer of ReLU units."""

    hidden: int
    classes: int

    @nn.compact
    def __call__(
        self, x: Float[Array | np.ndarray, "*batch inputs"]
    ) -> Float[Array, "*batch classes"]:
        """The logits."""
        x = nn.relu(nn.Dense(self.hidden, name="hidden_layer")(x))
        return nn.Dense(self.classes, name="logits")(x)


def digits(hidden: int = 32) -> Problem:
    """Handwritten digits: 1,797 real images of 8 x 8 pixels, a multilayer perceptron.

    Four fifths of the images are for training; each pixel is standardized with the mean and
    the deviation that it has there. Weights start LeCun normal, biases at 0.

    Args:
      hidden: how many hidden units.

    Returns:
      The problem; loss is cross-entropy in nats, metric is accuracy; chance is ln 10, and a
      run that gets less than half of the test images right has failed.

    Source:
      Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine
      Learning Repository, in the copy that scikit-learn ships.
    """
    images, labels = load_digits(return_X_y=True)
    rows = np.arange(len(labels))
    train, test = train_test_split(rows, test_size=0.2, stratify=labels, random_state=0)
    pixels = np.asarray(StandardScaler().fit(images[train]).transform(images), np.float32)
    model = MLP(hidden, classes=10)

    def examples(rows):
        return {"x": pixels[rows], "y": np.asarray(labels, np.int32)[rows]}

    def logits(params, batch):
        return cast(jax.Array, model.apply(params, batch["x"]))

    def loss(params, batch):
        each = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["y"])
        return each.mean()

    def accuracy(params, batch):
        return (logits(params, batch).argmax(-1) == batch["y"]).mean()

    return Problem(
        name="digits",
        init=lambda key: model.init(key, jnp.zeros(64)),
        loss=loss,
        metric=accuracy,
        train=examples(train),
        test=examples(test),
        chance=float(np.log(10)),
        passing=0.5,
    )
