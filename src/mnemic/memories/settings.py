"""Settings of a config: plain values (numbers, text, lists of them), each of the type it is declared with."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The type of every setting."""
    found = get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def defaults(cls: type) -> dict[str, Any]:
    """The default of every setting that has one."""
    found = {}
    for each in dataclasses.fields(cls):
        if each.default is not dataclasses.MISSING:
            found[each.name] = each.default
        elif each.default_factory is not dataclasses.MISSING:
            found[each.name] = each.default_factory()
    return found


def is_a(value: object, hint: Any) -> bool:
    """Whether a plain value is of a setting's type."""
    if get_origin(hint) in (Union, UnionType):
        return any(is_a(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(is_a(each, get_args(hint)[0]) for each in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType]
    return type(value) is hint


def readable(hint: Any) -> str:
    """A setting's type in words."""
    if get_origin(hint) in (Union, UnionType, Literal):
        return " or ".join("None" if each is NoneType else readable(each) for each in get_args(hint))
    return hint.__name__ if isinstance(hint, type) else repr(hint)
