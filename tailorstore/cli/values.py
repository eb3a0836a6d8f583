"""Kinds of values that options take."""

import json
import math
import re
from collections.abc import Mapping
from datetime import timedelta
from fractions import Fraction
from typing import Any, Literal, cast

import click

from tailorstore.cli.secrets import is_secret_name
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.retention import KeepBest

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A length of time: ``90s``, ``15m``, ``24h``, ``7d``, ``2w``, or several together: ``1d12h``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:  # noqa: ANN401
        """Return the length of time."""
        if isinstance(value, timedelta):
            return value
        text = str(value).strip().lower()
        if text == "0":
            return timedelta(0)
        if not text or _DURATION.sub("", text):
            self.fail(
                f"{value!r} is no duration: write 90s, 15m, 24h, 7d, 2w, or several together, as 1d12h", param, ctx
            )
        seconds = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in _DURATION.findall(text))
        try:
            return timedelta(seconds=seconds)
        except OverflowError:
            self.fail(f"{value!r} is longer than a duration can be", param, ctx)


class Share(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A part of a whole: ``1/30``, ``3%`` or ``0.05``; above 0 and at most 1."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """Return the part as a number."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            found = Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except (ValueError, ZeroDivisionError):
            found = Fraction(0)
        if not 0 < found <= 1:
            self.fail(f"{value!r} is no part of a whole: write 1/30, 3% or 0.05, above 0 and at most 1", param, ctx)
        return float(found)


class Best(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A policy that keeps the best by a metric: ``loss``, ``loss:3`` or ``accuracy:3:max``."""

    name = "METRIC[:N[:min|max]]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> KeepBest:  # noqa: ANN401
        """Return the policy."""
        if isinstance(value, KeepBest):
            return value
        text, mode, count = str(value), "min", 1
        # From the right, as the name of a metric may hold a colon itself.
        head, _, last = text.rpartition(":")
        if head and last in ("min", "max"):
            text, mode = head, last
        head, _, last = text.rpartition(":")
        if head and last.isdecimal():
            text, count = head, int(last)
        if not text.strip(":"):
            self.fail(f"{value!r} names no metric: write METRIC, METRIC:N or METRIC:N:max", param, ctx)
        try:
            return KeepBest(text, count, cast("Literal['min', 'max']", mode))
        except InvalidInputError as error:
            self.fail(str(error), param, ctx)


class StorageOption(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """One storage option: ``NAME=VALUE``. Dots reach inside: ``client_kwargs.region_name=eu-1``."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:  # noqa: ANN401
        """Return name and value; the value's text is not repeated in messages, as it may be a secret."""
        if isinstance(value, tuple):
            return cast("tuple[str, Any]", value)
        name, equals, text = str(value).partition("=")
        if not equals or not name.strip(".") or ".." in name:
            self.fail("a storage option is NAME=VALUE, as in endpoint_url=http://localhost:9000", param, ctx)
        return name, _typed(name, text)


def _typed(name: str, text: str) -> Any:  # noqa: ANN401
    # A key of digits alone is a text all the same.
    if is_secret_name(name.rpartition(".")[2]) and not text.startswith(("{", "[")):
        return text
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(found, float) and not math.isfinite(found) else found


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted names into dictionaries within dictionaries.

    Examples:
        >>> nested({"key": "k", "client_kwargs.region_name": "eu-1"})
        {'key': 'k', 'client_kwargs': {'region_name': 'eu-1'}}
    """
    result: dict[str, Any] = {}
    for name, value in options.items():
        *path, last = name.split(".")
        inner = result
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                msg = f"storage option {name!r} reaches inside {part!r}, which has a value of its own"
                raise InvalidInputError(msg)
        inner[last] = value
    return result
