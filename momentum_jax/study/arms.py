"""Defines an arm, one way to train: an optimizer with its settings, batch size and steps."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_jax as mj
from momentum_jax.theory import _formulas

# A number, or a sequence with one number per initial scale. A static setting is any hashable value.
Setting = Any


@dataclasses.dataclass(frozen=True, init=False)
class Arm:
    """One way to train: a function that makes a transformation, and its settings.

    An arm without a `learning_rate` is a family: a `Study` trains it at each learning rate of a
    grid. Arms that differ only in the values of traced settings share one compiled program.

    Attributes:
      name: the name of the arm in tables and pictures.
      make_transform: `make_transform(**settings)` returns any Optax transformation. If its
        update takes extra arguments, they are `value`, the loss of the batch, and `key`, a new
        random key for each step.
      settings: numbers, which are traced when the transformation is made. A setting can also be
        a sequence with one number for each initial scale.
      static: the names of the settings that are passed unchanged instead of traced. Each value
        then needs its own compiled program. A setting must be static if `make_transform` branches
        on it in Python, as `optax.warmup_cosine_decay_schedule` does.
      batch_size: examples per step, if the problem has data; default 32.
      restarts: number of random initial weights from which the arm starts, each with an equal
        part of the steps. The restart with the lowest final training loss counts.
      steps: steps per run; None means the number that the study sets.
      family: the name of the arm without its learning rate; by default its name.

    Raises:
      TypeError: a transformation instead of a function that makes one; a traced setting that is
        not a number; a static setting that is not hashable.
      ValueError: a count below 1; a static name that is not a setting.

    Example:
      >>> import optax
      >>> def warmup(peak, decay_steps):
      ...     return optax.sgd(optax.warmup_cosine_decay_schedule(0, peak, 5, decay_steps))
      >>> arm = Arm("warmup", warmup, peak=0.1, decay_steps=99, static=["peak", "decay_steps"])
      >>> arm.settings["decay_steps"]
      99
    """

    name: str
    make_transform: Callable[..., optax.GradientTransformation]
    settings: Mapping[str, Setting]
    static: tuple[str, ...]
    batch_size: int
    restarts: int
    steps: int | None
    family: str

    def __init__(
        self,
        name: str,
        make_transform: Callable[..., optax.GradientTransformation],
        *,
        batch_size: int = 32,
        restarts: int = 1,
        steps: int | None = None,
        static: Sequence[str] = (),
        family: str | None = None,
        **settings: Setting,
    ) -> None:
        """Checks the settings, which are given by name as for `make_transform`."""
        if not callable(make_transform):
            raise TypeError(
                f"make_transform={make_transform!r} of the arm {name!r} must be a function that "
                "returns an Optax transformation, such as momentum_jax.momentum."
            )
        for what, value in (("batch_size", batch_size), ("restarts", restarts), ("steps", steps)):
            if value is not None and value < 1:
                raise ValueError(f"{what}={value} of the arm {name!r} must be at least 1.")
        if unknown := set(static) - set(settings):
            raise ValueError(
                f"static={tuple(static)} of the arm {name!r} names {sorted(unknown)}, but must "
                f"name settings: the arm has {sorted(settings)}."
            )
        checked = {
            key: _static(name, key, value) if key in static else _numbers(name, key, value)
            for key, value in settings.items()
        }
        fields = dict(
            name=name,
            make_transform=make_transform,
            settings=checked,
            static=tuple(sorted(static)),
            batch_size=batch_size,
            restarts=restarts,
            steps=steps,
            family=name if family is None else family,
        )
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    def replaced(self, **changes: Any) -> "Arm":
        """Returns the same arm with some fields or settings replaced.

        Example:
          >>> baseline().replaced(name="small", learning_rate=0.1).settings["learning_rate"]
          0.1
        """
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "settings"
        }
        if self.family == self.name:
            del fields["family"]  # By default the family is the name, which may change.
        return Arm(**{**fields, **self.settings, **changes})

    def at(self, rate: float) -> "Arm":
        """Returns the arm of this family at an effective learning rate, learning_rate / (1 - mu).

        Args:
          rate: the effective learning rate. The arm's learning rate is rate * (1 - mu).

        Example:
          >>> with_momentum(["0.9"])[0].at(0.1).name
          'mu 0.9 at 0.01'
        """
        # Rounded so that rates that are equal up to rounding errors have the same name.
        learning_rate = float(f"{rate * one_minus_mu(self):.12g}")
        name = f"{self.name} at {learning_rate:.6g}"
        return self.replaced(name=name, family=self.name, learning_rate=learning_rate)

    @property
    def is_family(self) -> bool:
        """Whether the arm has no learning rate yet."""
        return "learning_rate" not in self.settings

    def settings_at(self, scale: int) -> dict[str, Any]:
        """Returns the settings at one initial scale.

        Args:
          scale: the index of the initial scale.

        Example:
          >>> Arm("a", mj.momentum, learning_rate=(0.1, 0.2), mu=0.9).settings_at(1)
          {'learning_rate': 0.2, 'mu': 0.9}
        """
        return {
            name: value[scale] if isinstance(value, tuple) and name not in self.static else value
            for name, value in self.settings.items()
        }


def _numbers(arm, name, value):
    """The value of a traced setting: a number, or a tuple of numbers."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.ndim > 1:
        raise TypeError(
            f"{name}={value!r} of the arm {arm!r} must be a number, or a sequence with one number "
            f"per initial scale. For any other value, give static=[{name!r}]."
        )
    return array.item() if array.ndim == 0 else tuple(array.tolist())


def _static(arm, name, value):
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{name}={value!r} of the arm {arm!r} is static and must be hashable: give a tuple "
            "instead of a list."
        ) from None
    return value


def one_minus_mu(arm: Arm) -> float:
    """Returns 1 - mu of an arm, the ratio of its learning rate to its effective learning rate.

    An arm without a setting `mu` counts as mu 0.

    Raises:
      ValueError: mu is 1 or more, so there is no effective learning rate.

    Example:
      >>> one_minus_mu(baseline())
      1.0
    """
    mu = arm.settings.get("mu", 0.0)
    if not isinstance(mu, (int, float)) or mu >= 1:
        raise ValueError(
            f"mu={mu} of the arm {arm.name!r} must be a number below 1, because the effective "
            "learning rate is learning_rate / (1 - mu): lower mu, or give the arm a learning_rate."
        )
    return float(_formulas.one_minus_mu(mu))


def effective_rate(arm: Arm) -> float | None:
    """Returns learning_rate / (1 - mu) of an arm; None if it is not one number.

    Example:
      >>> effective_rate(with_momentum(["0.9"])[0].at(0.1))
      0.1
    """
    rate, mu = arm.settings.get("learning_rate"), arm.settings.get("mu", 0.0)
    if not isinstance(rate, (int, float)) or not isinstance(mu, (int, float)) or mu >= 1:
        return None
    effective = _formulas.effective_learning_rate(rate, _formulas.one_minus_mu(mu))
    return float(f"{effective:.12g}")


def nesterov(learning_rate: Any, mu: Any) -> optax.GradientTransformationExtraArgs:
    """Makes `momentum_jax.momentum` with `nesterov=True`.

    Example:
      >>> tx = nesterov(0.5, 0.5)
      >>> print(tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0])
      [-0.75 -0.75]
    """
    return mj.momentum(learning_rate, mu, nesterov=True)


def noisy_descent(learning_rate: Any, noise: Any) -> optax.GradientTransformationExtraArgs:
    """Makes gradient descent with added noise. Control: does noise alone help?

        update = -learning_rate * (g + noise * |g| / sqrt(n) * z)        z standard normal

    Here n is the number of params, so with noise=1 the noise is about as long as the gradient.

    Args:
      learning_rate: a number.
      noise: the length of the noise divided by the length of the gradient.

    Returns:
      An Optax transformation without state. Its update needs the extra argument `key`.

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
        size = sum(leaf.size for leaf in jax.tree.leaves(updates))
        length = noise * jnp.asarray(optax.tree.norm(updates)) / jnp.sqrt(size)
        normal = optax.tree.random_like(extra_args["key"], updates)
        return jax.tree.map(lambda g, z: -learning_rate * (g + length * z), updates, normal), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def baseline(batch_size: int = 32) -> Arm:
    """Makes the baseline arm: plain gradient descent (mu 0), without a learning rate.

    Example:
      >>> baseline().settings
      {'mu': 0.0}
    """
    return Arm("mu 0", mj.momentum, batch_size=batch_size, mu=0.0)


def with_momentum(mus: Sequence[str], batch_size: int = 32) -> list[Arm]:
    """Makes an arm for each mu, without a learning rate.

    Args:
      mus: momentum coefficients as text: "0.9", or "nesterov-0.9" for Nesterov momentum.
      batch_size: examples per step.

    Example:
      >>> [arm.name for arm in with_momentum(["0.9", "nesterov-0.9"])]
      ['mu 0.9', 'Nesterov 0.9']
    """
    arms = []
    for text in mus:
        looks_ahead = text.startswith("nesterov-")
        mu = float(text.removeprefix("nesterov-"))
        name = f"{'Nesterov' if looks_ahead else 'mu'} {mu:.12g}"
        transform = nesterov if looks_ahead else mj.momentum
        arms.append(Arm(name, transform, batch_size=batch_size, mu=mu))
    return arms


def controls(learning_rate: float, batch_size: int = 32) -> list[Arm]:
    """Makes the two control arms, which use as many gradients but no momentum.

    They are the best of 4 restarts, and gradient descent with added noise.

    Args:
      learning_rate: their effective learning rate, which equals the learning rate at mu 0.
      batch_size: examples per step.

    Example:
      >>> [arm.name for arm in controls(0.1)]
      ['best of 4 restarts at 0.1', 'noise at 0.1']
    """
    return [
        Arm("best of 4 restarts", mj.momentum, batch_size=batch_size, restarts=4, mu=0.0).at(
            learning_rate
        ),
        Arm("noise", noisy_descent, batch_size=batch_size, noise=1.0).at(learning_rate),
    ]


def to_json(arm: Arm) -> dict[str, Any]:
    """Converts an arm for `json.dumps`; a function that cannot be imported by name becomes None.

    Example:
      >>> to_json(baseline())["make_transform"]
      'momentum_jax._momentum:momentum'
    """
    fields = {field.name: getattr(arm, field.name) for field in dataclasses.fields(arm)}
    fields["make_transform"] = _reference(arm.make_transform)
    for name in arm.static:
        if not _is_plain(arm.settings[name]):
            fields["make_transform"] = None
            fields["settings"] = {**fields["settings"], name: repr(arm.settings[name])}
    return fields


def from_json(fields: Mapping[str, Any]) -> Arm:
    """Makes the arm that `to_json` converted.

    Raises:
      ValueError: its function cannot be imported.

    Example:
      >>> from_json(to_json(baseline())) == baseline()
      True
    """
    fields = dict(fields)
    where, settings = fields.pop("make_transform"), fields.pop("settings")
    found = None if where is None else _imported(where)
    if found is None:
        raise ValueError(
            f"make_transform of the arm {fields['name']!r} cannot be imported by name: run the "
            "Study from Python, in the program that defines the function."
        )
    settings = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return Arm(make_transform=found, **fields, **settings)


def _reference(function):
    """The import path of a function, with keywords for a partial; None if there is none."""
    if isinstance(function, functools.partial):
        inner = _reference(function.func)
        if inner is None or function.args or not all(map(_is_plain, function.keywords.values())):
            return None
        return [inner, dict(function.keywords)]
    where = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    return where if _imported(where) is function else None


def _is_plain(value):
    return value is None or isinstance(value, (str, int, float))


def _imported(where):
    if isinstance(where, list):
        inner = _imported(where[0])
        return None if inner is None else functools.partial(inner, **where[1])
    module, _, name = where.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError):
        return None
