"""The variables of Keras's SGD: what is read, what is written, and what is refused."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FC, fc

from momentum_jax.frameworks import dump_keras, keras_sgd, load_keras

KERAS = {
    "sgd/iteration": np.array(3),
    "sgd/learning_rate": np.array(0.5),
    "sgd/fc_kernel_momentum": np.ones(2),
}


REFUSED_OF_KERAS = {
    "of Adam": (
        {**KERAS, "adam/fc_kernel_velocity": np.ones(2)},
        "unknown variables: adam/fc_kernel_velocity",
    ),
    "of Lion": (
        {path.replace("sgd", "lion"): value for path, value in KERAS.items()},
        "unknown variables: lion/iteration, lion/learning_rate, lion/fc_kernel_momentum",
    ),
    "no iteration": (
        {"sgd/fc_kernel_momentum": np.ones(2)},
        "unknown variables: none; iterations: 0",
    ),
    "another shape": (
        {**KERAS, "sgd/fc_kernel_momentum": np.ones(3)},
        "has shape (2,), but the values to carry over have shape (3,)",
    ),
    "no momentum": (
        {"sgd/iteration": np.array(3)},
        "the shape of fc/kernel is not known",
    ),
}


@pytest.mark.parametrize("case", REFUSED_OF_KERAS)
def test_load_keras_refuses_what_does_not_match(case):
    """The message lists both sides."""
    variables, message = REFUSED_OF_KERAS[case]
    state = keras_sgd(0.5, 0.5).init(jnp.zeros(2))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_keras(
            state, variables, names=["fc/kernel"], to_params=lambda weights: weights["fc/kernel"]
        )


def test_an_optimizer_in_place_of_its_variables_is_refused(as_shipped):
    """The message says what to give."""
    with pytest.raises(TypeError, match=r"variables has object, .* Give optimizer\.variables"):
        load_keras(keras_sgd().init(FC), object(), names=[], to_params=fc)  # pyright: ignore


@pytest.mark.parametrize("variables", ["x", [np.ones(2)]])
def test_variables_without_paths_are_refused(as_shipped, variables):
    """The message says what to give."""
    with pytest.raises(TypeError, match=r"needs variables with a path\. Give optimizer\.variables"):
        load_keras(keras_sgd().init(FC), variables, names=[], to_params=fc)


def test_keras_without_momentum_keeps_its_iteration():
    """The state has no count."""
    variables = {"sgd/iteration": np.array(3), "sgd/learning_rate": np.array(0.5)}
    weights = {"w": np.zeros(2)}
    state = keras_sgd(0.5).init(jnp.zeros(2))
    arguments: Any = dict(names=weights, to_params=lambda weights: weights["w"])
    assert dump_keras(state, variables, **arguments) == variables
    assert load_keras(state, variables, **arguments) == state


class Variable:
    """A variable of Keras 2 (tf_keras): it has a name, but no path."""

    def __init__(self, name, value):
        self.name, self.value, self.shape = name, np.asarray(value), np.shape(value)

    def numpy(self):
        return self.value


class KerasTwo:
    """The attributes of a Keras 2 model and optimizer that the code in the message reads."""

    trainable_variables = (Variable("fc/kernel:0", np.zeros(2)),)
    iterations = Variable("iteration:0", 3)
    momentums = (Variable("SGD/m/fc/kernel:0", [1.0, 2.0]),)
    variables = (iterations, Variable("learning_rate:0", 0.5), *momentums)


@pytest.mark.parametrize("given", ["variables", "dict"])
def test_the_error_about_keras_2_contains_the_solution(as_shipped, given):
    """The code in the message runs."""
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
