"""State of plain values as JSON and back: numbers, texts, lists, and mappings with keys of any of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.errors import UsageError

_PAIRS = "#pairs"  # stands for a mapping whose keys are not all texts, or are this one


def encode(name: str, value: Any) -> Any:
    """What JSON keeps of a `state_dict()`.

    Raises:
        UsageError: it holds something else; names it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [encode(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        strange = next((key for key in value if not (key is None or isinstance(key, bool | int | float | str))), None)
        if strange is not None:
            raise UsageError(f"{name} has a {type(strange).__name__} as key, which a checkpoint can't keep.")
        if all(isinstance(key, str) for key in value) and _PAIRS not in value:
            return {key: encode(f"{name}.{key}", item) for key, item in value.items()}
        return {_PAIRS: [[encode(name, key), encode(f"{name}.{key}", item)] for key, item in value.items()]}
    raise UsageError(
        f"{name} holds a {type(value).__name__}, which a checkpoint can't keep: extra objects are of numbers, texts, "
        "lists and mappings; what has tensors belongs into the model."
    )


def decode(value: Any) -> Any:
    """What `encode` was given, with lists for tuples.

    Raises:
        UsageError: it is not of `encode`.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_PAIRS}:
            return dict(_pair(item) for item in _list(value[_PAIRS]))
        return {key: decode(item) for key, item in value.items()}
    return value


def _pair(value: Any) -> tuple[Any, Any]:
    pair = _list(value)
    if len(pair) != 2 or isinstance(pair[0], list | dict):
        raise UsageError("a saved mapping has something else than pairs of a key and a value.")
    return pair[0], decode(pair[1])


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError("a saved mapping is no list of pairs.")
    return value
