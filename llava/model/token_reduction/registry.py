"""From the config string to a reducer: the table of names and the parser.

Spec: `name[:budget][,option=value]...`, for example `TRIM:-1`, `TextSim+:0.25`, `TRIM:-1,similarity=direct`. A method
inside the language model is written in the same way, and may stand behind one that works before it, as in
`TRIM:-1|FastV:0.5,layer=2`. A target, such as `TRIM:flops=0.35`, is a budget that must be found before it can be used.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, replace

from llava.errors import InputError
from llava.model.token_reduction.base import BUDGET_RULE, Budget, Method, TokenReducer
from llava.model.token_reduction.baselines import Pool, RandomChoice
from llava.model.token_reduction.cd_pruner import CDPruner
from llava.model.token_reduction.dart import DART
from llava.model.token_reduction.div_prune import DivPrune
from llava.model.token_reduction.fast_v import FastV
from llava.model.token_reduction.faster_vlm import FasterVLM
from llava.model.token_reduction.hi_prune import HiPrune
from llava.model.token_reduction.holo_v import HoloV
from llava.model.token_reduction.layers import LayerReducer
from llava.model.token_reduction.prumerge import PruMerge, PruMergePlus
from llava.model.token_reduction.pyramid_drop import PyramidDrop
from llava.model.token_reduction.ranges import Range, cut_ranges
from llava.model.token_reduction.scope import SCOPE
from llava.model.token_reduction.sparse_vlm import SparseVLM, SparseVLMPlus
from llava.model.token_reduction.trim import TextSim, TextSimPlus, Trim
from llava.model.token_reduction.vis_pruner import VisPruner
from llava.model.token_reduction.vision_zip import VisionZip

CONFIG_KEY = "mm_vision_token_reduce_func"

# Every entry point, the parser's messages and the contract test take the methods from this table.
REDUCERS: dict[str, type[TokenReducer]] = {
    reducer.spec_name: reducer
    for reducer in (
        *(Trim, TextSim, TextSimPlus, VisionZip, FasterVLM, VisPruner, DivPrune, CDPruner, SCOPE, HiPrune, HoloV),
        *(PruMerge, PruMergePlus, RandomChoice, Pool),
    )
}


LAYER_REDUCERS: dict[str, type[LayerReducer]] = {
    reducer.spec_name: reducer for reducer in (FastV, PyramidDrop, SparseVLM, SparseVLMPlus, DART)
}
"""The methods inside the language model."""

SEPARATOR = "|"


def methods_without_cls() -> list[str]:
    """Name the methods before the language model that serve a vision tower without CLS, such as SigLIP."""
    return [name for name, method in REDUCERS.items() if not any(need.reads_cls for need in method().needs)]


@dataclass(frozen=True)
class Reduction:
    """What a spec string asks for.

    Attributes:
        before: the method before the language model, or None.
        inside: the method inside the language model, or None.
    """

    before: TokenReducer | None = None
    inside: LayerReducer | None = None

    def at_budget(self, num_tokens: int) -> "Reduction":
        """The same at a setting of so many tokens; of two methods the one before the language model gets the budget."""
        if self.before is not None:
            return replace(self, before=self.before.at_budget(num_tokens))
        return self if self.inside is None else replace(self, inside=self.inside.at_budget(num_tokens))

    def spec(self) -> str | None:
        """The spec string that parses back to the same reduction; None for none."""
        return SEPARATOR.join(part.spec() for part in (self.before, self.inside) if part is not None) or None


def parse_reduction(spec: str | None) -> Reduction:
    """Read a spec string.

    Args:
        spec: one method before the language model, one inside it, or one of each with "|" between, in this order; each
            `name[:budget][,option=value]...`. None, "" and "none" mean no reduction. Names are case-sensitive.

    Raises:
        InputError: for an unknown name, option or value; the line names what is known and the closest match.
    """
    if spec is None or (isinstance(spec, str) and spec.strip().lower() in ("", "none")):
        return Reduction()
    if not isinstance(spec, str):
        raise InputError(f'{CONFIG_KEY}: {spec!r} is not a string; use for example "TRIM:-1", or null for no reduction')
    _refuse_ranges(spec)
    methods = [_parse_method(part, spec) for part in spec.split(SEPARATOR)]
    before = [method for method in methods if isinstance(method, TokenReducer)]
    inside = [method for method in methods if isinstance(method, LayerReducer)]
    if len(before) > 1 or len(inside) > 1 or methods != before + inside:
        raise InputError(
            f'{CONFIG_KEY}: "{spec}": use at most one method before the language model ({", ".join(REDUCERS)}), then '
            f"at most one inside it ({', '.join(LAYER_REDUCERS)})"
        )
    return Reduction(*(before or [None]), *(inside or [None]))


def _refuse_ranges(spec: str) -> None:
    # Options of methods inside the language model are no numbers to draw: their own parsers say what they are.
    parts = [
        each.partition(",")[0] if each.partition(":")[0].strip() in LAYER_REDUCERS else each
        for each in spec.split(SEPARATOR)
    ]
    try:
        pieces = cut_ranges(SEPARATOR.join(parts))
    except InputError as error:
        raise InputError(name_spec(error, spec)) from None
    if len(pieces) > 1:
        one = "".join(piece.middle if isinstance(piece, Range) else piece for piece in cut_ranges(spec))
        raise InputError(f'{CONFIG_KEY}: "{spec}": only training draws from a range; give one number, as in "{one}"')


def name_spec(error: InputError, spec: str | None) -> str:
    """Return the line of an error about a spec string, which names it."""
    return str(error) if str(error).startswith(CONFIG_KEY) else f'{CONFIG_KEY}: "{spec}": {error}'


def parse_reducer(spec: str | None) -> TokenReducer | None:
    """Read a spec string that names no method inside the language model.

    Returns:
        The method, or None for no reduction.

    Raises:
        InputError: as `parse_reduction`, and for a method inside the language model.
    """
    reduction = parse_reduction(spec)
    if reduction.inside is not None:
        raise InputError(f'{CONFIG_KEY}: "{spec}": {reduction.inside.spec_name} works inside the language model')
    return reduction.before


@dataclass(frozen=True)
class Target:
    """What a budget shall reach, for a method before or inside the language model.

    Attributes:
        kind: "avg", the mean number of patches that the method's own rule keeps; "flops", the share of the FLOPs of the
            model without reduction; "ms", milliseconds of an answer.
        value: patches from 1 on, a share in (0, 1], or milliseconds above 0.
        method: with its options; the budget is still open.
    """

    kind: str
    value: float
    method: Method

    def __str__(self) -> str:
        """The spec string, `read_target` of which is equal."""
        name, _, options = self.method.spec().partition(",")
        value = repr(self.value).removesuffix(".0")
        return f"{name.partition(':')[0]}:{self.kind}={value}" + ("," + options if options else "")


UNRESOLVED = {
    "flops": "a share of FLOPs becomes a count of patches at the shapes of a checkpoint: commands take it by --reduce, "
    "and `python -m llava.efficiency --model-path CKPT --reduce {} --count-only` prints the spec",
    "ms": "milliseconds have to be measured: `python -m llava.efficiency --model-path CKPT --reduce {}` does that, and "
    "prints the spec for its machine",
}
"""Why such a target is no budget yet."""


def read_target(spec: str | None) -> Target | None:
    """Read a spec string whose budget has to be found first; None where it holds no such target.

    Raises:
        InputError: as `parse_reduction`, and for a value out of range.
    """
    if not isinstance(spec, str) or SEPARATOR in spec:
        return None
    head, comma, options = spec.partition(",")
    name, _, budget = head.partition(":")
    kind, equals, value = (part.strip() for part in budget.partition("="))
    if not equals or kind not in ("avg", *UNRESOLVED):
        return None
    method = _parse_method(name + comma + options, spec)
    try:
        if kind != "avg":
            return Target(kind, _to_share_or_time(kind, value), method)
        mixes_counts = method.takes_average or not method.has_automatic_budget
        return None if mixes_counts else Target(kind, _to_budget(budget, spec).value, method)
    except InputError as error:
        raise InputError(f'{CONFIG_KEY}: "{spec}": {error}') from None


def _to_share_or_time(kind: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= (1 if kind == "flops" else math.inf) or value == math.inf:
        what = "a share of FLOPs in (0, 1]" if kind == "flops" else "milliseconds above 0"
        raise InputError(f'{kind}= is followed by {what}, not "{text}"')
    return value


def _parse_method(text: str, spec: str) -> Method:
    """Build one method; `spec` is the whole string, for messages."""
    head, *settings = [part.strip() for part in text.split(",")]
    name, colon, budget_text = (part.strip() for part in head.partition(":"))
    table: dict[str, type[Method]] = REDUCERS | LAYER_REDUCERS
    if name not in table:
        raise InputError(f'{CONFIG_KEY}: unknown token reducer "{name}" in "{spec}"{_suggest(name, list(table))}')
    options: dict[str, object] = {}
    known = {option.name: option for option in fields(table[name]) if option.name != "budget"}
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or key not in known:
            raise InputError(f'{CONFIG_KEY}: {name} has no option "{setting}" in "{spec}"{_suggest(key, list(known))}')
        if key in options:
            raise InputError(f'{CONFIG_KEY}: option "{key}" is given twice in "{spec}"')
        options[key] = _to_option(known[key], value, spec)
    try:
        if colon:
            options["budget"] = _to_budget(budget_text, spec)
        return table[name](**options)
    except InputError as error:
        raise InputError(f'{CONFIG_KEY}: "{spec}": {error}') from None


def _to_budget(text: str, spec: str) -> Budget:
    kind, equals, value = (part.strip() for part in text.partition("="))
    if equals and kind in UNRESOLVED:
        _to_share_or_time(kind, value)
        if SEPARATOR in spec:
            raise InputError(
                f"{kind}= is for one method alone: find its budget without the other, then put them together"
            )
        raise InputError(UNRESOLVED[kind].format(spec))
    is_average = bool(equals) and kind == "avg"
    return Budget(_to_number(value if is_average else text), is_average)


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
