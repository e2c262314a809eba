"""The numbers that a search computes in, by name; :mod:`bench.numerics` is what makes them."""

from typing import Literal

Numerics = Literal["plain", "fast"]

COARSE = "bfloat16"  # rounds so much that a verdict near a boundary needs another look
