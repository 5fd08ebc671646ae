"""What the study trains: a way to draw initial weights, a loss, and the data it is taken over."""

import dataclasses
import functools
import importlib.util
import inspect
import math
import random
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Something to train, as the functions and the data that training needs.

    Only `init` and `loss` are needed. A deterministic problem has no data, and its loss takes
    the params alone; with data, each step's loss is that of a batch of rows, and results are
    measured on `test`.

    Attributes:
      init: `init(key) -> params` draws initial weights.
      loss: `loss(params, batch) -> scalar`, to be minimized; `loss(params)` without data.
      metric: called like the loss and reported beside it; larger is better.
      data: a tree of arrays with one example a row; batches are drawn from it.
      test: the same for the examples that results are measured on; None means `data`.
      name: what the report calls the problem.
      metric_name: what the report calls the metric.
      worst: a final loss above it, or one that is not finite, counts as it; None means the
        run's own loss before training.
      solved_loss: a run is solved if its final loss is at most this ...
      solved_metric: ... and its final metric at least this. Where neither is given, a run is
        solved if it did not diverge.
      defaults: settings to start from, any of `learning_rate` (of plain gradient descent),
        `steps`, `batch_size` and `init_scales`.

    Raises:
      ValueError: a field that would have no effect, or data whose arrays differ in length.

    Example:
      >>> import jax
      >>> bowl = Problem(lambda key: jax.random.normal(key, (3,)), lambda w: w @ w / 2)
      >>> print(bowl.loss(bowl.init(jax.random.key(0))) > 0)
      True
    """

    init: Callable[[PRNGKeyArray], PyTree]
    loss: Callable[..., Float[Array, ""]]
    metric: Callable[..., Float[Array, ""]] | None = None
    data: PyTree = None
    _: dataclasses.KW_ONLY
    test: PyTree = None
    name: str = "problem"
    metric_name: str = "metric"
    worst: float | None = None
    solved_loss: float | None = None
    solved_metric: float | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Refuses what would be ignored."""
        if self.test is not None and self.data is None:
            raise ValueError("test examples need data to train on: give data too, or no test.")
        if self.solved_metric is not None and self.metric is None:
            raise ValueError(f"solved_metric={self.solved_metric} needs a metric: give one.")
        for field, rows in ("data", self.data), ("test", self.test):
            lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(rows)}
            if rows is not None and (len(lengths) != 1 or lengths & {(), (0,)}):
                raise ValueError(
                    f"{field} must hold arrays of one length, at least 1, one example a row, "
                    f"but their lengths are {sorted(sum(lengths, ())) or 'none'}."
                )
        known = {"learning_rate", "steps", "batch_size", "init_scales"}
        if unknown := set(self.defaults) - known:
            raise ValueError(f"defaults has {sorted(unknown)}, but may have {sorted(known)}.")


def find(text: str) -> Problem:
    """The problem of a name, or the one in a file of the user's own.

    Args:
      text: a key of `PROBLEMS`, or "path/to/file.py:object", where the object is a `Problem`
        or a function without arguments that returns one. The file is run as Python runs a
        script: its own folder is on the path while it is imported.

    Returns:
      The problem.

    Raises:
      ValueError: there is no such problem; the message is one line that says what there is.

    Example:
      >>> find("quadratic").name
      'quadratic'
    """
    if text in PROBLEMS:
        try:
            return PROBLEMS[text]()
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{text} needs a package: {in_one_line(error)}; pip install 'momentum_jax[study]'."
            ) from error
    path, colon, name = text.rpartition(":")
    if not colon or not path.endswith(".py"):
        hint = f"; for your own, {text}:object" if text.endswith(".py") else ""
        raise ValueError(
            f"no problem is called {text!r}: there are {', '.join(PROBLEMS)}, "
            f"and your own as path/to/file.py:object{hint}."
        )
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path!r} to take the problem {name!r} from.")
    module = _imported(Path(path).resolve())
    found = getattr(module, name, None)
    if found is None:
        offered = ", ".join(_offered(module)) or "no Problem, nor a function that makes one"
        raise ValueError(f"{path} has no {name!r}: it has {offered}.")
    made = found
    if callable(found) and not isinstance(found, type):
        try:
            made = found()
        except Exception as error:
            raise ValueError(f"{name}() of {path} fails: {in_one_line(error)}") from error
    if not isinstance(made, Problem):
        what = f"{name}()" if made is not found else name
        raise ValueError(
            f"{what} of {path} must be a momentum_jax.study Problem, or a function without "
            f"arguments that returns one, but is of type {type(made).__name__}."
        )
    return made


def check(problem: Problem) -> None:
    """Tries the functions of a problem on shapes alone: a mistake is said before the work.

    Raises:
      ValueError: a function that fails; params that are none, or no floats; a loss or a metric
        that is not one number.

    Example:
      >>> import jax
      >>> check(Problem(lambda key: jax.random.normal(key, (3,)), lambda w: w**2, name="bowl"))
      Traceback (most recent call last):
      ...
      ValueError: loss(params) of bowl must return one float, but returns shape (3,) of float32.
    """

    def shapes(call, function, *given):
        try:
            return jax.eval_shape(function, *given)
        except Exception as error:
            file = getattr(getattr(function, "__code__", None), "co_filename", None)
            lines = [
                f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file
            ]
            at = f" ({file}, line {lines[-1]})" if lines else ""
            raise ValueError(f"{call} of {problem.name} fails: {in_one_line(error)}{at}") from error

    params = shapes("init(key)", problem.init, jax.random.key(0))
    if not jax.tree.leaves(params):
        raise ValueError(f"init(key) of {problem.name} must return params, but returns {params}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"init(key) of {problem.name} must return floats, but is {leaf.dtype} at "
                f"params{jax.tree_util.keystr(path)}: numbers that are not trained belong into "
                "the loss."
            )
    for name, function in ("loss", problem.loss), ("metric", problem.metric):
        for examples in (problem.data, problem.test)[: 1 if problem.test is None else 2]:
            if function is None:
                continue
            given = () if problem.data is None else (examples,)
            call = f"{name}(params{', batch' if given else ''})"
            found = shapes(call, function, params, *given)
            shape: Any = getattr(found, "shape", None)
            dtype: Any = getattr(found, "dtype", None)
            if shape != () or not (name == "metric" or jnp.issubdtype(dtype, jnp.floating)):
                what = type(found).__name__ if dtype is None else f"shape {shape} of {dtype}"
                one = "one float" if name == "loss" else "one number"
                raise ValueError(f"{call} of {problem.name} must return {one}, but returns {what}.")


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_problem_in_{path.stem}", path)
    assert spec is not None  # a .py file always has one, and a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ValueError(f"{path} does not import: {in_one_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def in_one_line(error: BaseException) -> str:
    r"""What went wrong, for a message of one line.

    Example:
      >>> in_one_line(ValueError("so\nit is"))
      'ValueError: so it is'
    """
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300, placeholder=' ...')}"


def _offered(module: ModuleType) -> list[str]:
    """The Problems of a module and its own functions that need no arguments."""

    def fits(value):
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            parameters = inspect.signature(value).parameters.values()
            return all(p.default is not p.empty or p.kind in (2, 4) for p in parameters)
        return isinstance(value, Problem)

    return sorted(n for n, value in vars(module).items() if n[0] != "_" and fits(value))


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


class ConvNet(nn.Module):
    """Three strided convolutions of a series, each with a ReLU, and a linear read-out.

    Kernels are 5, 3 and 3 wide and move by 2. A convolution is written as a dense layer over
    windows: runs that are vmapped differ in their weights, and a batch of matrix products is
    many times faster on a CPU than a convolution in as many groups.
    """

    channels: int
    classes: int

    @nn.compact
    def __call__(
        self, x: Float[Array | np.ndarray, "*batch inputs"]
    ) -> Float[Array, "*batch classes"]:
        """The logits."""
        x = jnp.asarray(x)[..., None]
        for layer, width in enumerate((5, 3, 3), start=1):
            end = x.shape[-2] - width + 1
            windows = jnp.concatenate([x[..., i : end + i : 2, :] for i in range(width)], axis=-1)
            x = nn.relu(nn.Dense(self.channels, name=f"convolution_{layer}")(windows))
        return nn.Dense(self.classes, name="logits")(x.reshape(*x.shape[:-2], -1))


def _classification(model: nn.Module, data: PyTree, test: PyTree, **fields: Any) -> Problem:
    """Cross-entropy and accuracy of a model with ten classes; guessing costs ln 10."""

    def logits(params, batch):
        return cast(jax.Array, model.apply(params, batch["x"]))

    def loss(params, batch):
        each = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["y"])
        return each.mean()

    def accuracy(params, batch):
        return (logits(params, batch).argmax(-1) == batch["y"]).mean()

    return Problem(
        init=lambda key: model.init(key, jnp.zeros(data["x"].shape[1:])),
        loss=loss,
        metric=accuracy,
        data=data,
        test=test,
        metric_name="accuracy",
        worst=math.log(10),
        **fields,
    )


def digits(hidden: int = 32) -> Problem:
    """Handwritten digits: 1,797 real images of 8 x 8 pixels, a multilayer perceptron.

    Four fifths of the images are for training; each pixel is standardized with the mean and
    the deviation that it has there. Weights start LeCun normal, biases at 0.

    Args:
      hidden: how many hidden units.

    Returns:
      The problem; loss is cross-entropy in nats, metric is accuracy. A run is charged at most
      the loss of guessing, ln 10, and is solved if it gets half of the test images right.

    Example:
      >>> print(digits().data["x"].shape, digits().test["x"].shape)
      (1437, 64) (360, 64)

    Source:
      Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine
      Learning Repository, in the copy that scikit-learn ships.
    """
    # Imported here: they take a second, and no other problem needs them.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    images, labels = load_digits(return_X_y=True)
    rows = np.arange(len(labels))
    train, test = train_test_split(rows, test_size=0.2, stratify=labels, random_state=0)
    pixels = np.asarray(StandardScaler().fit(images[train]).transform(images), np.float32)

    def examples(rows):
        return {"x": pixels[rows], "y": np.asarray(labels, np.int32)[rows]}

    return _classification(
        MLP(hidden, classes=10),
        examples(train),
        examples(test),
        name="digits",
        solved_metric=0.5,
        defaults=dict(
            learning_rate=0.05, steps=200, batch_size=32, init_scales=(0.25, 0.5, 1.0, 2.0, 4.0)
        ),
    )


def mnist1d(channels: int = 16) -> Problem:
    """MNIST-1D: 4,000 + 1,000 generated series of 40 points, ten classes, a small conv net.

    Each series is one of ten templates, padded, scaled, shifted, sheared and blurred with
    noise. It is the authors' own dataset, generated by their own package in seconds, with
    nothing downloaded. The net is `ConvNet`; weights start LeCun normal, biases at 0.

    Args:
      channels: how many channels each of the three convolutions has.

    Returns:
      The problem; loss is cross-entropy in nats, metric is accuracy. A run is charged at most
      the loss of guessing, ln 10, and is solved if it gets half of the test series right:
      the authors report 32 % for a linear classifier and 94 % for a conv net.

    Example:
      >>> print(mnist1d().data["x"].shape, mnist1d().test["x"].shape)
      (4000, 40) (1000, 40)

    Source:
      Greydanus and Kobak (2024), Scaling Down Deep Learning with MNIST-1D.
    """
    data, test = _mnist1d_examples()
    return _classification(
        ConvNet(channels, classes=10),
        data,
        test,
        name="mnist1d",
        solved_metric=0.5,
        defaults=dict(learning_rate=0.1, steps=1000, batch_size=32, init_scales=(0.3, 1.0, 3.0)),
    )


@functools.cache
def _mnist1d_examples():
    # Imported here because it is slow to import, and only this problem needs it.
    from mnist1d.data import make_dataset

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset()  # reseeds the global generators of Python and NumPy
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    return tuple(
        {"x": np.asarray(made[x], np.float32), "y": np.asarray(made[y], np.int32)}
        for x, y in (("x", "y"), ("x_test", "y_test"))
    )


# How many rows of gradient noise a noisy problem has. Batches are drawn without repetition
# within an epoch, so noise is independent from step to step only as far as an epoch is long.
NOISE_ROWS = 4096


def _with_noise(loss, dimensions: int, noise: float) -> dict[str, Any]:
    """The fields loss, data and test: a loss whose gradient a batch shifts by its mean row.

    loss(w, batch) = loss(w) + w . mean(batch): rows come in pairs r, -r, so that their mean is
    exactly 0, and have deviation `noise` in each coordinate; the test row is 0.
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise={noise} must be finite and at least 0.")
    if noise == 0:
        return {"loss": loss}
    half = np.random.default_rng(0).normal(size=(NOISE_ROWS // 2, dimensions))
    half = np.float32(noise * half / np.sqrt((half**2).mean(axis=0)))
    pairs = np.stack([half, -half], axis=1).reshape(NOISE_ROWS, dimensions)
    return {
        "loss": lambda w, batch: loss(w) + w @ jnp.asarray(batch).mean(axis=0),
        "data": pairs,
        "test": np.zeros((1, dimensions), np.float32),
    }


def double_well(noise: float = 0.0) -> Problem:
    """Two params, two valleys of unequal depth, and a barrier: every height is known.

        f(x, y) = x^4 / 4 - x^3 / 12 - x^2 / 2 + x / 4 + 5 / 12 + y^2 / 2
        df/dx = (x + 1) (x - 1/4) (x - 1)

    | point | x | y | f |
    | --- | --- | --- | --- |
    | deep minimum | -1 | 0 | 0 |
    | barrier (saddle) | 1/4 | 0 | 1375/3072 = 0.448 |
    | shallow minimum | 1 | 0 | 1/3 |

    Weights start uniform in |x| <= 2, |y| <= 1/2: seven of sixteen in the shallow valley, and
    at x > 1.326, as 17 % of all do, high enough on its far wall to cross the barrier if little
    energy is lost; at half the scale none is that high. The curvature at |x| <= 2 is at most
    L = 12 (at x = -2). So for learning_rate <= 2 (1 - mu) / L, a run from rest that starts
    lower than the barrier stays in its valley.

    Args:
      noise: the deviation, in each coordinate, of the gradient noise of a batch of one; for a
        batch of n it is this over sqrt(n). 0 makes the problem deterministic, without data.

    Returns:
      The problem. A run is solved if its final loss is at most 0.3, which only the deep valley
      holds; it is charged at most the height of the barrier.

    Raises:
      ValueError: a noise that is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> print([round(float(double_well().loss(jnp.array([x, 0.0]))), 3) for x in (-1, 1)])
      [0.0, 0.333]
    """

    def loss(w):
        x, y = w
        return x**4 / 4 - x**3 / 12 - x**2 / 2 + x / 4 + 5 / 12 + y**2 / 2

    def init(key):
        return jax.random.uniform(key, (2,), minval=-1, maxval=1) * jnp.array([2.0, 0.5])

    return Problem(
        init=init,
        **_with_noise(loss, 2, noise),
        name="double well",
        worst=1375 / 3072,
        solved_loss=0.3,
        defaults=dict(learning_rate=0.016, steps=2000, init_scales=(0.5, 1.0, 2.0))
        | ({"batch_size": 1} if noise else {}),
    )


def quadratic(condition: float = 1000.0, dimensions: int = 20, noise: float = 0.0) -> Problem:
    """An ill-conditioned quadratic, where theory says exactly what momentum gains.

        f(w) = 1/2 sum_i c_i w_i^2,   c_i = condition^(-(i - 1) / (dimensions - 1))

    The curvatures c_i go from L = 1 to 1 / condition in equal ratios. They lie along the axes,
    which is no loss of generality: gradient descent, with momentum or without, does not see a
    rotation. Weights start normal with variance 1.

    Args:
      condition: the largest curvature over the smallest.
      dimensions: how many params.
      noise: the deviation, in each coordinate, of the gradient noise of a batch of one; for a
        batch of n it is this over sqrt(n). 0 makes the problem deterministic, without data.

    Returns:
      The problem. A run is solved if its final loss is at most a ten-thousandth of
      1/2 sum_i c_i, the mean loss of initial weights at scale 1; with noise, a hundredth.

    Raises:
      ValueError: a condition below 1, fewer than 2 dimensions, or a noise that is negative or
        not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> print(quadratic(condition=4.0, dimensions=2).loss(jnp.array([1.0, 2.0])))
      1.0
    """
    if not 1 <= condition < math.inf:
        raise ValueError(f"condition={condition} must be finite and at least 1.")
    if dimensions < 2:
        raise ValueError(f"dimensions={dimensions} must be at least 2.")
    curvatures = np.float32(np.geomspace(1, 1 / condition, dimensions))
    return Problem(
        init=lambda key: jax.random.normal(key, (dimensions,)),
        **_with_noise(lambda w: (curvatures * w**2).sum() / 2, dimensions, noise),
        name="quadratic",
        solved_loss=(1e-2 if noise else 1e-4) * float(curvatures.sum()) / 2,
        defaults=dict(learning_rate=1.0, steps=500, init_scales=(0.1, 1.0, 10.0))
        | ({"batch_size": 1} if noise else {}),
    )


# sqrt(1 - r^2) + r arcsin(r) = 1 + r^2 / 2 + r^4 / 24 + r^6 / 80 + ..., from r^4 on.
_SERIES = tuple(math.comb(2 * n, n) / (4**n * (2 * n + 1) * (2 * n + 2)) for n in range(1, 12))


@jax.custom_jvp
def _kernel_from_fourth_order(cosine):
    """(sqrt(1 - r^2) + r arcsin(r) - 1 - r^2 / 2) / (2 pi) at r = cosine, and even in it."""
    r = jnp.clip(cosine, -1, 1)
    square = r**2
    # Near 0 the closed form is a small difference of large numbers.
    series = square**2 * jnp.polyval(jnp.array(_SERIES[::-1], r.dtype), square)
    closed = jnp.sqrt((1 - r) * (1 + r)) + r * jnp.arcsin(r) - 1 - square / 2
    return jnp.where(square < 0.25, series, closed) / (2 * jnp.pi)


@_kernel_from_fourth_order.defjvp
def _(primals, tangents):
    # By hand because sqrt and arcsin each have an infinite slope at 1, and their sum has not;
    # clipped short of 1 because arcsin is differentiated again in a Hessian.
    (cosine,), (tangent,) = primals, tangents
    limit = 1 - jnp.finfo(cosine.dtype).epsneg
    r = jnp.clip(cosine, -limit, limit)
    return _kernel_from_fourth_order(cosine), (jnp.arcsin(r) - r) / (2 * jnp.pi) * tangent


def safran_shamir(units: int = 10) -> Problem:
    """A student network that learns a teacher of the same shape: minima that are not global.

    Student and teacher are sums of `units` ReLUs in as many dimensions; the teacher's weights
    are the unit vectors e_1 ... e_units. The loss is over all Gaussian inputs at once:

        f(W) = 1/2 E (sum_i relu(w_i . x) - sum_j relu(e_j . x))^2,   x ~ N(0, I)

    Its closed form rests on E relu(w . x) relu(v . x) = |w| |v| k(w . v / (|w| |v|)), with the
    arc-cosine kernel k(r) = (sqrt(1 - r^2) + (pi - arccos r) r) / (2 pi). Summed as it stands,
    numbers near 10 cancel to a loss near 0. So the terms of k in r^0, r^1 and r^2, being
    1 / (2 pi), r / 4 and r^2 / (4 pi), are summed as squares:

        2 f = (sum |w_i| - units)^2 / (2 pi) + |sum w_i - sum e_j|^2 / 4
              + |sum w_i w_i^T / |w_i| - I|^2 / (4 pi) + (the rest of k, at most 0.0113)

    which float32 resolves to about 1e-7. The global minimum is 0, at W = I up to the order of
    the units. Safran and Shamir prove that for 6 to 20 units there are local minima that are
    not global, and gradient descent ends in one more often the more units there are: from these
    initial weights in 1 % of runs for 6 units, 34 % for 10, 90 % for 20. Weights start normal
    with variance 1 / units (Xavier).

    Args:
      units: how many units, and dimensions; at least 2.

    Returns:
      The problem. A run is solved if its final loss is at most 1e-3, and otherwise ended in a
      spurious minimum or was not given the time to end: the lowest spurious minimum that
      gradient descent found has a loss of 0.0251 for 6 units, 0.0187 for 10 and 0.0113 for 20.
      A run is charged at most the loss of a student that says 0 always.

    Raises:
      ValueError: fewer than 2 units.

    Example:
      >>> import jax.numpy as jnp
      >>> print(safran_shamir(units=6).loss(jnp.eye(6)))
      0.0

    Source:
      Safran and Shamir (2018), Spurious Local Minima are Common in Two-Layer ReLU Neural
      Networks; the kernel is from Cho and Saul (2009), Kernel Methods for Deep Learning.
    """
    if units < 2:
        raise ValueError(f"units={units} must be at least 2.")

    def loss(w):
        with jax.default_matmul_precision("highest"):  # an accelerator's default has few bits
            return exactly(w)

    def exactly(w):
        square = (w**2).sum(axis=1)
        # A unit at exactly 0 has no direction and gets no gradient.
        alive = square > 0
        norm = jnp.where(alive, jnp.sqrt(jnp.where(alive, square, 1)), 0)
        direction = w / jnp.where(alive, norm, 1)[:, None]
        zeroth = (norm.sum() - units) ** 2 / (2 * jnp.pi)
        first = ((w.sum(axis=0) - 1) ** 2).sum() / 4
        second = ((w.T @ direction - jnp.eye(units)) ** 2).sum() / (4 * jnp.pi)
        student = norm @ _kernel_from_fourth_order(direction @ direction.T) @ norm
        between = (norm @ _kernel_from_fourth_order(direction)).sum()
        teacher = units * _kernel_from_fourth_order(jnp.ones(()))
        return (zeroth + first + second + (student - 2 * between + teacher)) / 2

    return Problem(
        init=lambda key: jax.random.normal(key, (units, units)) / math.sqrt(units),
        loss=loss,
        name=f"safran-shamir, {units} units",
        worst=(units / 2 + units * (units - 1) / (2 * math.pi)) / 2,
        solved_loss=1e-3,
        defaults=dict(learning_rate=2 / units, steps=300 * units, init_scales=(0.1, 1.0, 2.0)),
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "digits": digits,
    "mnist1d": mnist1d,
    "double-well": double_well,
    "safran-shamir": safran_shamir,
    "quadratic": quadratic,
}
