"""Exact fractions to floats, and bounds that rounding must not cross."""

import math
from fractions import Fraction

BELOW_1, ABOVE_1 = math.nextafter(1, 0), math.nextafter(1, 2)


def below_1(x: float) -> float:
    """Returns `x`, whose exact value is below 1, or the largest float below 1 if it was rounded up.

    Example:
      >>> below_1(1.0)
      0.9999999999999999
    """
    return min(x, BELOW_1)


def to_float(exact: Fraction) -> float:
    """Returns the nearest float; infinite beyond the largest float.

    Example:
      >>> to_float(Fraction(1, 4)), to_float(Fraction(10) ** 400)
      (0.25, inf)
    """
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def square_root(square: Fraction) -> Fraction:
    """Returns the square root of a fraction, accurate to 120 bits.

    Example:
      >>> square_root(Fraction(9, 4))
      Fraction(3, 2)
    """
    product = square.numerator * square.denominator
    shift = max(0, 128 - product.bit_length() // 2)
    return Fraction(math.isqrt(product << 2 * shift), square.denominator << shift)
