"""The one colour scale of every heat map: lightness grows evenly with the weight, so that eyes of any kind read it.

The scale is a curve through Oklab (Ottosson, A perceptual color space for image processing, 2020): lightness rises in
a straight line while the hue turns from violet through red and orange to yellow.
"""

from functools import cache
from math import cos, pi, radians, sin
from typing import TypeAlias

Colour: TypeAlias = tuple[int, int, int]
"""Red, green, blue in 0..255, sRGB."""

LEVELS = 256
"""How many colours the scale has; the first is weight 0, the last 1."""


def level(weight: float) -> int:
    """Return which colour of the scale shows a weight; what lies outside [0, 1] has the colour of the nearest end."""
    return round(min(max(weight, 0.0), 1.0) * (LEVELS - 1))


def colour(weight: float) -> Colour:
    """Return the colour of a weight."""
    return scale()[level(weight)]


def ink(weight: float) -> Colour:
    """Return the colour, black or white, in which text on the colour of a weight is legible."""
    return (255, 255, 255) if level(weight) < 0.51 * LEVELS else (0, 0, 0)


@cache
def scale() -> tuple[Colour, ...]:
    """Return all colours, from that of weight 0 to that of weight 1."""
    return tuple(_point(index / (LEVELS - 1)) for index in range(LEVELS))


def _point(t: float) -> Colour:
    lightness = 0.20 + 0.76 * t
    chroma = 0.045 + 0.125 * sin(pi * t**0.85) + 0.05 * t
    hue = radians(285.0 + 182.0 * t)
    return _srgb(lightness, chroma * cos(hue), chroma * sin(hue))


def _srgb(lightness: float, a: float, b: float) -> Colour:
    """Convert from Oklab; the curve stays inside sRGB, so that nothing is clipped but rounding."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        _encoded(4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short),
        _encoded(-1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short),
        _encoded(-0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short),
    )


def _encoded(linear: float) -> int:
    linear = min(max(linear, 0.0), 1.0)
    encoded = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    return round(255 * encoded)
