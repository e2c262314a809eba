"""Ranges that components declare for their parameters, and how arguments are held against them.

A field ``epochs: Count = 30`` refuses 0, and does so before anything runs. Whatever a field declares, a float is
finite, a whole number at most ``LARGEST`` in size, and ``true`` no number.
"""

from typing import Annotated, Any, get_args

import pydantic
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

LARGEST = 1_000_000_000  # a whole number above this is a slip of the finger


def _number(value: object) -> object:
    if isinstance(value, bool):  # pydantic takes it for 1
        raise PydanticCustomError("number", "a number is expected")
    return value


Whole = Annotated[int, BeforeValidator(_number), Field(ge=0, le=LARGEST)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=1, le=LARGEST)]
Few = Annotated[int, BeforeValidator(_number), Field(ge=1, le=10_000)]  # of things that are in memory at once
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Level = Annotated[float, Field(gt=0, lt=1)]  # of a test or a bound
Fraction = Annotated[float, Field(ge=0, le=1)]
Radius = Annotated[float, Field(ge=0, le=1)]  # in linf, on the pixel scale


def convert(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` of a field asks for it, so that 1 is a float where a float is due.

    Raises:
        ValueError: another type, or outside the range; the message says what is expected.
    """
    if isinstance(value, bool) and not _holds(hint, bool):
        raise ValueError("true and false are not expected")
    try:
        adapter = pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(allow_inf_nan=False))
        converted = adapter.validate_python(value)
    except pydantic.ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].lower()) from None
    if isinstance(converted, int) and abs(converted) > LARGEST:
        raise ValueError(f"input should be at most {LARGEST:,} in size")
    return converted


def _holds(hint: Any, kind: type) -> bool:
    """Whether ``kind`` is among the types that ``hint`` joins."""
    return hint is kind or any(_holds(part, kind) for part in get_args(hint))
