"""Numbers as a report shows them."""

import math

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figure(value: float) -> str:
    """A number in few characters: 3.1e-6."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "NaN"
    if 0.01 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else spaced(round(value))
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def spaced(value: int) -> str:
    """A whole number, thousands apart."""
    return f"{value:,}".replace(",", " ")


def percent(part: float) -> str:
    """A part as percent; from ten times on, how many times."""
    return f"{part:.3%}" if part < 0.01 else f"{part:.0%}" if part < 10 else f"{figure(part)} times"


def power_of_ten(exponent: int) -> str:
    """10 to the power of `exponent`, such as 10⁻⁴."""
    return {0: "1", 1: "10", 2: "100"}.get(exponent, "10" + str(exponent).translate(SUPERSCRIPTS))
