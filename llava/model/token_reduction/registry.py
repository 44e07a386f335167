"""From the config string to a reducer: the table of names and the parser.

Spec: `name[:budget][,option=value]...`, for example `TRIM:-1`, `TextSim+:0.25`, `TRIM:-1,similarity=direct`.
"""

import difflib
from collections.abc import Callable
from dataclasses import Field, fields

from llava.errors import InputError
from llava.model.token_reduction.base import BUDGET_RULE, Budget, TokenReducer
from llava.model.token_reduction.baselines import Pool, RandomChoice
from llava.model.token_reduction.faster_vlm import FasterVLM
from llava.model.token_reduction.trim import TextSim, TextSimPlus, Trim

CONFIG_KEY = "mm_vision_token_reduce_func"

# Every entry point, the parser's messages and the contract test take the methods from this table.
REDUCERS: dict[str, type[TokenReducer]] = {
    reducer.spec_name: reducer for reducer in (Trim, TextSim, TextSimPlus, FasterVLM, RandomChoice, Pool)
}


def parse_reducer(spec: str | None) -> TokenReducer | None:
    """Build the reducer that a spec string names.

    Args:
        spec: `name[:budget][,option=value]...`; None, "" and "none" mean no reduction. Names are case-sensitive.

    Returns:
        The reducer, or None for no reduction.

    Raises:
        InputError: for an unknown name, option or value; the line names what is known and the closest match.
    """
    if spec is None or (isinstance(spec, str) and spec.strip().lower() in ("", "none")):
        return None
    if not isinstance(spec, str):
        raise InputError(f'{CONFIG_KEY}: {spec!r} is not a string; use for example "TRIM:-1", or null for no reduction')
    head, *settings = [part.strip() for part in spec.split(",")]
    name, colon, budget_text = (part.strip() for part in head.partition(":"))
    if name not in REDUCERS:
        raise InputError(f'{CONFIG_KEY}: unknown token reducer "{name}" in "{spec}"{_suggest(name, list(REDUCERS))}')
    options: dict[str, object] = {}
    known = {option.name: option for option in fields(REDUCERS[name]) if option.name != "budget"}
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or key not in known:
            raise InputError(f'{CONFIG_KEY}: {name} has no option "{setting}" in "{spec}"{_suggest(key, list(known))}')
        if key in options:
            raise InputError(f'{CONFIG_KEY}: option "{key}" is given twice in "{spec}"')
        options[key] = _to_option(known[key], value, spec)
    try:
        if colon:
            options["budget"] = Budget(_to_number(budget_text))
        return REDUCERS[name](**options)
    except InputError as error:
        raise InputError(f'{CONFIG_KEY}: "{spec}": {error}') from None


def _to_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f'"{text}" is not a budget: use {BUDGET_RULE}') from None


def _to_bool(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _to_option(option: Field, text: str, spec: str) -> object:
    convert: Callable[[str], object] = _to_bool if option.type is bool else option.type
    try:
        return convert(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number", bool: "true or false"}[option.type]
        raise InputError(f'{CONFIG_KEY}: "{spec}": {option.name} must be {kind}, not "{text}"') from None


def _suggest(name: str, known: list[str]) -> str:
    lowered = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    hint = f'; did you mean "{lowered[close[0]]}"?' if close else ""
    return f"{hint}; known: {', '.join(known)}"
