"""Arms are what they are named, and contrasts equal what they say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_jax as mj
from momentum_jax.study import Arm
from momentum_jax.study import arms as make

no_function: Any = "momentum"


def test_contrasts_equal_the_rate_or_the_effective_rate():
    group = [make.plain(), *make.with_momentum(["0.9", "0.99", "nesterov-0.9"])]
    for arm in make.same_rate(group, 0.05):
        assert arm.settings["learning_rate"] == 0.05
        assert arm.name.endswith("at 0.05")
    same = make.same_effective_rate(group, 0.05)
    for arm in same:
        settings: Any = arm.settings
        rate, mu = settings["learning_rate"], settings["mu"]
        assert rate / (1 - mu) == pytest.approx(0.05)
    assert [arm.settings["mu"] for arm in same] == [0, 0.9, 0.99, 0.9]
    assert [arm.make_transform is make.nesterov for arm in same] == [False] * 3 + [True]
    assert [arm.name for arm in same][::3] == ["mu 0 at 0.05", "Nesterov 0.9 at 0.005"]


def test_without_friction_there_is_no_effective_rate():
    with pytest.raises(ValueError, match=r"mu=1\.0 of the arm 'endless' must be a number below 1"):
        make.same_effective_rate([Arm("endless", mj.momentum, mu=1.0)], 0.1)


def test_an_arm_is_renamed_with_all_that_it_has():
    arm = Arm("a", mj.momentum, batch_size=8, tries=4, mu=0.5).with_settings("b", mu=0.25)
    assert (arm.name, arm.batch_size, arm.tries, arm.settings) == ("b", 8, 4, {"mu": 0.25})


def test_the_noise_is_as_long_as_it_says_and_its_mean_is_the_gradient():
    tx = make.noisy_descent(0.5, noise=2.0)
    grads = {"a": jnp.full((50, 40), 3.0), "b": jnp.full(500, -1.0)}
    keys = jax.random.split(jax.random.key(0), 200)
    updates, _ = jax.vmap(lambda key: tx.update(grads, optax.EmptyState(), key=key))(keys)
    noise = jax.tree.map(lambda u, g: u / -0.5 - g, updates, grads)
    lengths = jax.vmap(optax.tree.norm)(noise)
    expected = 2 * float(optax.tree.norm(grads))
    np.testing.assert_allclose(lengths, expected, rtol=0.1)
    mean = jax.tree.map(lambda x: x.mean(), noise)
    assert abs(mean["a"]) < 0.1
    assert abs(mean["b"]) < 0.1


@pytest.mark.parametrize(
    ("make_arm", "error", "message"),
    [
        (lambda: Arm("a", no_function), TypeError, "must be a function that makes an Optax"),
        (lambda: Arm("a", mj.momentum, batch_size=0), ValueError, "batch_size=0 of the arm 'a'"),
        (lambda: Arm("a", mj.momentum, tries=0), ValueError, "tries=0 of the arm 'a'"),
    ],
)
@pytest.mark.usefixtures("as_shipped")
def test_refusals(make_arm, error, message):
    with pytest.raises(error, match=message):
        make_arm()


@pytest.mark.parametrize("setting", [True, np.array([True, False]), np.ones((1, 1))])
def test_a_setting_that_is_no_number_is_refused_with_the_remedy(setting):
    odd: Any = setting
    with pytest.raises(TypeError, match=r"rate=.* of the arm 'a' must be a number.*partial"):
        Arm("a", mj.momentum, rate=odd)


def test_settings_may_come_from_numpy_and_jax():
    values: Any = {"a": np.float32(0.5), "b": jnp.ones(2), "c": [1.0, 2.0], "d": np.array([0.5])}
    assert Arm("a", mj.momentum, **values).settings == {
        "a": 0.5, "b": (1.0, 1.0), "c": (1.0, 2.0), "d": (0.5,)
    }  # fmt: skip


def test_rates_that_differ_have_different_names():
    (one,), (other,) = (make.same_rate([make.plain()], rate) for rate in (0.1, 0.1001))
    assert one.name != other.name
    assert make.same_effective_rate(make.with_momentum(["0.99"]), 0.1)[0].name.endswith(" at 0.001")
