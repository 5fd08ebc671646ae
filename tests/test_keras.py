"""The variables of Keras's SGD: what is read and what is written."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from momentum_jax.frameworks import dump_keras, keras_sgd, load_keras


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
