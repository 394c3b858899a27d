"""Values of options: from text, of the type and in the range that a Config's annotation gives."""
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Literal

from common.option_names import check_choice
from engine.files import short_repr


@dataclass(frozen=True)
class AtLeast:
    limit: float


@dataclass(frozen=True)
class Above:
    limit: float


@dataclass(frozen=True)
class Between:
    """From low to high; exclude_high: high itself does not belong to the range."""
    low: float
    high: float
    exclude_high: bool = False


def split_type(annotation):
    """Splits an annotation into (type, limit, whether it allows None).

    The limit is a range, a tuple of choices, or None.

    PositiveInt | None      -> (int, AtLeast(1), True)
    Literal["rm", "gold"]   -> (str, ("rm", "gold"), False)
    """
    arguments = typing.get_args(annotation)
    optional = type(None) in arguments
    if optional:
        annotation = next(a for a in arguments if a is not type(None))
    if typing.get_origin(annotation) is Annotated:
        kind, limit = typing.get_args(annotation)
        return kind, limit, optional
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation), optional
    return annotation, None, optional


def convert(name, text, annotation):
    """Converts an option's text to its value, such as "3e-4" to 0.0003.

    Exits with one line if it has another type or is out of range.
    """
    kind, limit, optional = split_type(annotation)
    if optional and text == "None":
        return None
    if kind is str:
        return check_value(name, text, limit)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        number = float(text)
        if kind is int:
            if number != int(number):
                raise ValueError
            number = int(number)
    except (KeyError, ValueError, OverflowError):
        expected = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
        raise SystemExit(f"--{name}={short_repr(text)[1:-1]}: expected {expected}")
    return check_value(name, number, limit)


def check_value(name, value, limit):
    """Returns the value if it is one of its choices, or finite and in its range; else exits with one line."""
    if isinstance(limit, tuple):
        return check_choice(name, value, limit)
    if isinstance(value, float) and not math.isfinite(value):
        raise SystemExit(f"--{name}={value}: expected a finite number")
    if isinstance(limit, AtLeast) and value < limit.limit:
        raise SystemExit(f"--{name}={value}: expected at least {limit.limit}")
    if isinstance(limit, Above) and value <= limit.limit:
        raise SystemExit(f"--{name}={value}: expected a number above {limit.limit}")
    if isinstance(limit, Between):
        is_too_high = value > limit.high
        end = f"up to {limit.high}"
        if limit.exclude_high:
            is_too_high = value >= limit.high
            end = f"below {limit.high}"
        if value < limit.low or is_too_high:
            raise SystemExit(f"--{name}={value}: expected a number from {limit.low} {end}")
    return value
