"""What is compared: arms, each a way to train, and the contrasts that set them side by side."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_jax as mj

# A number, or one for each initial scale.
Setting = jax.typing.ArrayLike | Sequence[float]


@dataclasses.dataclass(frozen=True, init=False)
class Arm:
    """One way to train: a transform and its settings.

    Arms that differ in the values of settings alone share one compiled program.

    Attributes:
      name: what tables and pictures call it.
      make_transform: `make_transform(**settings)` returns an Optax transformation, any. Its
        update is given the extra arguments `value`, the loss of the batch, and `key`, a random
        key of its own for each step, if it takes extra arguments.
      settings: numbers, traced when the transform is made; in place of a number, a sequence
        with one for each initial scale.
      batch_size: how many examples a step sees, where the problem has data.
      tries: from how many initial weights it starts, each time with an equal part of the
        steps; what counts is the try that ends with the lowest training loss.

    Example:
      >>> import momentum_jax as mj
      >>> Arm("heavy", mj.momentum, learning_rate=0.01, mu=0.9).settings["mu"]
      0.9
    """

    name: str
    make_transform: Callable[..., optax.GradientTransformation]
    settings: Mapping[str, Setting]
    batch_size: int
    tries: int

    def __init__(
        self,
        name: str,
        make_transform: Callable[..., optax.GradientTransformation],
        *,
        batch_size: int = 32,
        tries: int = 1,
        **settings: Setting,
    ) -> None:
        """Settings are given by name, as to `make_transform`.

        Raises:
          TypeError: a transform instead of a function that makes it; a setting that is no number.
          ValueError: a batch_size or tries below 1.
        """
        if not callable(make_transform):
            raise TypeError(
                f"make_transform={make_transform!r} of the arm {name!r} must be a function that "
                "makes an Optax transformation from the settings, such as momentum_jax.momentum."
            )
        for what, value in (("batch_size", batch_size), ("tries", tries)):
            if value < 1:
                raise ValueError(f"{what}={value} of the arm {name!r} must be at least 1.")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "make_transform", make_transform)
        settings = {key: _numbers(name, key, value) for key, value in settings.items()}
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "batch_size", batch_size)
        object.__setattr__(self, "tries", tries)

    def with_settings(self, name: str, **settings: Setting) -> "Arm":
        """The same arm under another name, with some of its settings replaced."""
        return Arm(
            name,
            self.make_transform,
            batch_size=self.batch_size,
            tries=self.tries,
            **{**self.settings, **settings},
        )


def _numbers(arm, name, value):
    """A number, or a tuple of them."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.ndim > 1:
        raise TypeError(
            f"{name}={value!r} of the arm {arm!r} must be a number, or a sequence with one for "
            "each initial scale. What is not a number is part of the transform: give "
            f"functools.partial(make_transform, {name}=...)."
        )
    return array.item() if array.ndim == 0 else tuple(array.tolist())


nesterov = functools.partial(mj.momentum, nesterov=True)


def noisy_descent(learning_rate: Any, noise: Any) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with noise: what if it is no velocity that helps, but being shaken?

        update = -learning_rate * (g + noise * |g| / sqrt(n) * z)        z standard normal

    so that with a noise of 1 the noise is as long as the gradient, over all n params.

    Args:
      learning_rate: a number.
      noise: the length of the noise over that of the gradient.

    Returns:
      An Optax transformation without state; its update needs the extra argument `key`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = noisy_descent(0.5, noise=0.0)
      >>> print(tx.update(jnp.ones(2), tx.init(jnp.ones(2)), key=jax.random.key(0))[0])
      [-0.5 -0.5]
    """

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        key = extra_args["key"]
        size = sum(leaf.size for leaf in jax.tree.leaves(updates))
        length = noise * jnp.asarray(optax.tree.norm(updates)) / jnp.sqrt(size)
        shaken = optax.tree.random_like(key, updates)
        return jax.tree.map(lambda g, z: -learning_rate * (g + length * z), updates, shaken), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def plain(batch_size: int = 32) -> Arm:
    """Gradient descent, against which the others are compared.

    Example:
      >>> plain().settings
      {'mu': 0.0}
    """
    return Arm("mu 0", mj.momentum, batch_size=batch_size, mu=0.0)


def with_momentum(mus: Sequence[str], batch_size: int = 32) -> list[Arm]:
    """An arm for each mu, still without a learning rate: "0.9", or "nesterov-0.9".

    Example:
      >>> [arm.name for arm in with_momentum(["0.9", "nesterov-0.9"])]
      ['mu 0.9', 'Nesterov 0.9']
    """
    arms = []
    for text in mus:
        looks_ahead = text.startswith("nesterov-")
        mu = float(text.removeprefix("nesterov-"))
        name = f"{'Nesterov' if looks_ahead else 'mu'} {mu:g}"
        transform = nesterov if looks_ahead else mj.momentum
        arms.append(Arm(name, transform, batch_size=batch_size, mu=mu))
    return arms


def controls(batch_size: int = 32) -> list[Arm]:
    """Two things one can do instead, at no more gradients: start again, and shake.

    Example:
      >>> [arm.name for arm in controls()]
      ['mu 0, best of 4 starts', 'mu 0 with noise']
    """
    return [
        Arm("mu 0, best of 4 starts", mj.momentum, batch_size=batch_size, tries=4, mu=0.0),
        Arm("mu 0 with noise", noisy_descent, batch_size=batch_size, noise=1.0),
    ]


def same_rate(arms: Sequence[Arm], learning_rate: float) -> list[Arm]:
    """Each arm at one learning rate: what happens on switching momentum on.

    Example:
      >>> [arm.name for arm in same_rate(with_momentum(["0.9"]), 0.1)]
      ['mu 0.9 at 0.1']
    """
    return [_at(arm, learning_rate) for arm in arms]


def same_effective_rate(arms: Sequence[Arm], learning_rate: float) -> list[Arm]:
    """Each arm at one learning_rate / (1 - mu): how far a gradient moves the params in the end.

    What is left when momentum's longer strides are taken away.

    Example:
      >>> [arm.name for arm in same_effective_rate(with_momentum(["0.9"]), 0.1)]
      ['mu 0.9 at 0.01']
    """
    return [_at(arm, learning_rate * friction(arm)) for arm in arms]


def friction(arm: Arm) -> float:
    """1 - mu, or 1 for an arm without a mu.

    Example:
      >>> friction(plain())
      1.0
    """
    mu = arm.settings.get("mu", 0.0)
    if not isinstance(mu, (int, float)) or mu >= 1:
        raise ValueError(
            f"mu={mu} of the arm {arm.name!r} must be a number below 1: there is no effective "
            "learning rate, learning_rate / (1 - mu), without friction."
        )
    return 1.0 - mu


def _at(arm, learning_rate):
    return arm.with_settings(f"{arm.name} at {learning_rate:.6g}", learning_rate=learning_rate)
