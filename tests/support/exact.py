"""IEEE 754 by exact fractions and integers: an oracle that shares nothing with the package.

Numbers are bit patterns. Slow, and written from `docs/directions.md`, "Arithmetic" and "Rounding".
"""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """A binary format: stored bits of the significand, of the exponent, and of the whole."""

    mantissa: int
    exponent: int

    @property
    def sign(self) -> int:
        return 1 << (self.mantissa + self.exponent)

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def smallest(self) -> int:
        """The exponent of the smallest normal number."""
        return 2 - (1 << (self.exponent - 1))


FORMATS = {"float32": Format(23, 8), "bfloat16": Format(7, 8), "float16": Format(10, 5)}
FLOAT32 = FORMATS["float32"]


def value(bits: int, form: Format = FLOAT32) -> Fraction:
    """The number with these bits; they must be finite."""
    magnitude = bits & (form.sign - 1)
    assert magnitude < form.infinity
    exponent, mantissa = divmod(magnitude, 1 << form.mantissa)
    if exponent:
        mantissa += 1 << form.mantissa
    power = max(exponent, 1) - 1 + form.smallest - form.mantissa
    number = mantissa * Fraction(2) ** power
    return -number if bits & form.sign else number


def is_finite(bits: int, form: Format = FLOAT32) -> bool:
    return bits & (form.sign - 1) < form.infinity


def rounded(
    number: Fraction, form: Format, *, noise: int | None = None, negative_zero: bool = False
) -> int:
    """The bits of a number: to nearest, ties to even, or stochastically with 16 bits of noise."""
    if number == 0:
        return form.sign if negative_zero else 0
    magnitude = abs(number)
    power = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** power > magnitude:
        power -= 1
    power = max(power, form.smallest)
    places = magnitude / Fraction(2) ** (power - form.mantissa)
    kept = places.numerator // places.denominator
    rest = places - kept
    if noise is None:
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and kept % 2 == 1)
    else:
        cut = rest.numerator * 65536 // rest.denominator
        up = cut + noise >= 65536
    bits = min(((power - form.smallest) << form.mantissa) + kept + up, form.infinity)
    return bits | (form.sign if number < 0 else 0)


def product(a: int, b: int) -> int:
    """RNE(a · b) of finite float32 bits."""
    return rounded(value(a) * value(b), FLOAT32, negative_zero=bool((a ^ b) >> 31))


def total(a: int, b: int) -> int:
    """RNE(a + b) of float32 bits; b is finite."""
    if not is_finite(a):
        return a
    return rounded(value(a) + value(b), FLOAT32, negative_zero=bool((a & b) >> 31))


def converted(bits: int, source: Format, target: Format, noise: int | None = None) -> int:
    """A number of one format in another; infinities pass."""
    negative = bool(bits & source.sign)
    if not is_finite(bits, source):
        assert bits & (source.sign - 1) == source.infinity, "NaN has no bits of its own"
        return target.infinity | (target.sign if negative else 0)
    return rounded(value(bits, source), target, noise=noise, negative_zero=negative)


def accumulated(
    weight: int,
    form: Format,
    decay: int,
    steps: list[tuple[int, int]],
    target: Format,
    noise: int | None = None,
) -> int:
    """round(RNE(decay · weight) + RNE(c · z) + …) at one coordinate.

    Args:
        weight: bits in `form`, no NaN.
        decay: float32 bits, positive.
        steps: the float32 bits of (c, z), in ledger order.
        noise: of the stochastic rounding, None for nearest; without effect in float32.
    """
    acc = converted(weight, form, FLOAT32)
    if is_finite(acc):
        acc = product(decay, acc)
    for c, z in steps:
        acc = total(acc, product(c, z))
    return converted(acc, FLOAT32, target, None if target is FLOAT32 else noise)
