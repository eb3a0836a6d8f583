"""Strategies by name, as the shell and config files give them. Nothing that is read is ever run."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields

from tailorstore.domain.errors import MaskError
from tailorstore.domain.mask import Strategy
from tailorstore.domain.strategies.budget import Budget
from tailorstore.domain.strategies.checks import known_names
from tailorstore.domain.strategies.composing import (
    Anchor,
    Intersection,
    LightRest,
    MaxAge,
    StrategyBase,
    Union,
    given_arguments,
    name_of,
)
from tailorstore.domain.strategies.measured import Threshold, TopK
from tailorstore.domain.strategies.schedules import All, Filter, Light, Parity, RoundRobin, Staggered

STRATEGIES: Mapping[str, type[StrategyBase]] = {
    name_of(strategy): strategy
    for strategy in (
        All,
        Light,
        Parity,
        Filter,
        RoundRobin,
        Staggered,
        TopK,
        Threshold,
        Budget,
        Union,
        Intersection,
        MaxAge,
        Anchor,
        LightRest,
    )
}
"""Every strategy by its name in texts and config files."""

_OPERATORS = {name_of(Union): "|", name_of(Intersection): "&"}
_MOST_CHARACTERS = 10_000
_MOST_NESTED = 100


def parse_strategy(text: str) -> Strategy:
    """Return the strategy that a text describes: calls of strategies' names, their methods, ``|``, ``&``, literals.

    A name alone is a call without arguments. ``max_age(parity(), commits=5)`` is ``parity().max_age(commits=5)``.

    Raises:
        MaskError: says what is wrong and, of an unknown name, which are nearest.

    Examples:
        >>> parse_strategy("budget('2GB', by='importance').max_age(commits=5)").inner.bytes_per_commit
        2000000000
        >>> str(parse_strategy("max_age(top_k(8) | parity, commits=5).anchor(20)"))
        '(top_k(k=8) | parity()).max_age(commits=5).anchor(every=20)'
    """
    if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
        msg = f"a strategy is a text of at most {_MOST_CHARACTERS} characters, as 'parity()'; not {str(text)[:40]!r}"
        raise MaskError(msg)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        msg = (
            f"{text!r} is no strategy: {getattr(error, 'msg', error)}; write as in \"top_k(8, by='drift') | parity()\""
        )
        raise MaskError(msg) from None
    return _strategy(tree.body, text, 0)


def strategy_from_config(config: Mapping[str, object] | str) -> Strategy:
    """Return the strategy that a mapping from TOML, JSON or YAML describes, or a text.

    The key ``strategy`` has its name, the others its arguments; a strategy within one is a mapping or a text again.

    Raises:
        MaskError: says what is wrong and, of an unknown name, which are nearest.

    Examples:
        >>> str(strategy_from_config({"strategy": "max_age", "inner": {"strategy": "parity"}, "commits": 5}))
        'parity().max_age(commits=5)'
    """
    return _from_config(config, 0)


def config_of(strategy: Strategy) -> dict[str, object]:
    """Return the mapping that :func:`strategy_from_config` makes an equal strategy of.

    Raises:
        MaskError: it is, or holds, a strategy that is none of :data:`STRATEGIES`.

    Examples:
        >>> config_of(Parity("odd").max_age(commits=5))
        {'strategy': 'max_age', 'inner': {'strategy': 'parity', 'start': 'odd'}, 'commits': 5}
    """
    if not isinstance(strategy, StrategyBase):
        msg = f"{strategy!r} has no name to be configured by; {known_names(type(strategy).__name__, STRATEGIES)}"
        raise MaskError(msg)
    config: dict[str, object] = {"strategy": name_of(type(strategy))}
    for name, value in given_arguments(strategy).items():
        config[name] = config_of(value) if isinstance(value, Strategy) else value
    return config


def signature_of(name: str) -> str:
    """Return how a strategy is written, with the defaults of its arguments.

    Raises:
        MaskError: no such strategy; has the nearest names.

    Examples:
        >>> signature_of("top_k"), signature_of("anchor"), signature_of("union")
        ("top_k(k, by='drift', aged=True)", 'STRATEGY.anchor(every)', 'STRATEGY | STRATEGY')
    """
    known = _fields(name)
    strategies = [field for field in known if field.type is Strategy]
    if name in _OPERATORS:
        return f" {_OPERATORS[name]} ".join("STRATEGY" for _ in strategies)
    arguments = ", ".join(
        field.name if field.default is MISSING else f"{field.name}={field.default!r}"
        for field in known
        if field not in strategies
    )
    return f"{'STRATEGY.' if strategies else ''}{name}({arguments})"


def _from_config(config: object, depth: int) -> Strategy:
    if isinstance(config, str):
        return parse_strategy(config)
    if not isinstance(config, Mapping) or not isinstance(config.get("strategy"), str):
        msg = f"{config!r} describes no strategy: write its name under 'strategy', and its arguments beside it"
        raise MaskError(msg)
    _check_depth(depth)
    name = config["strategy"]
    inner = {field.name for field in _fields(name) if field.type is Strategy}
    given = {
        key: _from_config(value, depth + 1) if key in inner else value
        for key, value in config.items()
        if key != "strategy"
    }
    return _build(name, [], given)


def _strategy(node: ast.expr, text: str, depth: int) -> Strategy:
    _check_depth(depth)
    match node:
        case ast.Name(id=name):
            return _build(name, [], {})
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union(_strategy(left, text, depth + 1), _strategy(right, text, depth + 1))
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return Intersection(_strategy(left, text, depth + 1), _strategy(right, text, depth + 1))
        case ast.Call(func=ast.Name(id=name), args=args):
            receiver: list[object] = []
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=args):
            if not any(field.type is Strategy for field in _fields(name)):
                msg = f"{name!r} does not follow a strategy in {text!r}; join strategies by | or &"
                raise MaskError(msg)
            receiver = [_strategy(value, text, depth + 1)]
        case _:
            part = ast.get_source_segment(text.strip(), node) or text
            msg = f"{part!r} is no strategy; {known_names(part, STRATEGIES)}"
            raise MaskError(msg)
    given: dict[str, object] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            msg = f"** has no meaning in the strategy {text!r}; write the arguments out"
            raise MaskError(msg)
        if keyword.arg in given:
            msg = f"{keyword.arg} is given twice in the strategy {text!r}"
            raise MaskError(msg)
        given[keyword.arg] = _argument(keyword.value, text, depth + 1)
    return _build(name, receiver + [_argument(arg, text, depth + 1) for arg in args], given)


def _argument(node: ast.expr, text: str, depth: int) -> object:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=name) if name not in STRATEGIES:
            msg = f"{name!r} stands bare in the strategy {text!r}; write texts in quotes: {name!r}"
            raise MaskError(msg)
        case _:
            return _strategy(node, text, depth)


def _fields(name: str) -> list["Field[object]"]:
    if name not in STRATEGIES:
        msg = f"unknown strategy {name!r}; {known_names(name, STRATEGIES)}"
        raise MaskError(msg)
    return [field for field in fields(STRATEGIES[name]) if field.init]  # type: ignore[arg-type]


def _build(name: str, args: Sequence[object], given: Mapping[str, object]) -> Strategy:
    known = _fields(name)
    names = [field.name for field in known]
    if len(args) > len(known):
        msg = f"{name}: {len(args)} arguments are too many; it takes {', '.join(names) or 'none'}"
        raise MaskError(msg)
    arguments = dict(zip(names, args, strict=False))
    for key, value in given.items():
        if key not in names:
            msg = f"{name} has no argument {key!r}; {known_names(key, names)}" if names else f"{name} has no arguments"
            raise MaskError(msg)
        if key in arguments:
            msg = f"{name}: {key} is given twice"
            raise MaskError(msg)
        arguments[key] = value
    missing = [field.name for field in known if field.default is MISSING and field.name not in arguments]
    if missing:
        msg = f"{name} needs {' and '.join(missing)}"
        raise MaskError(msg)
    return STRATEGIES[name](**arguments)


def _check_depth(depth: int) -> None:
    if depth > _MOST_NESTED:
        msg = f"strategies within strategies more than {_MOST_NESTED} deep"
        raise MaskError(msg)
