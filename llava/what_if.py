"""Where in the image an answer lies: dropped patches are given back block by block, and the question is asked again.

The tokens of the method stay as they are, and each dropped patch of the block goes before the first token of a later
patch. Inside the language model the method chooses as it does, but the block's patches never leave.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.drawing import Block
from llava.errors import InputError
from llava.generation import Generator
from llava.looks import Case, Look, look_at, reduced_by
from llava.model.image_tokens import MADE, ImageTokens, project
from llava.model.language_model.causal import LlavaCausalLM
from llava.model.token_reduction import Reduction
from llava.model.token_reduction.layers import LayerReducer, LayerView, Left
from llava.sampling import Sampling

BATCH = 16
"""Blocks that are tried at once."""
FULL = "full model"
"""Name of the model without a reduction, beside its answers."""
FULL_COLOR, OTHER_COLOR = "#2ca02c", "#ff7f0e"


@dataclass(frozen=True)
class Trial:
    """One block given back.

    Attributes:
        rows, cols: (first, after) of the patch grid.
        num_patches: dropped patches in it.
        answer: with them; the method's own where there are none.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    num_patches: int
    answer: str


@dataclass(frozen=True)
class WhatIf:
    """The answers of the full model, of a method, and of the method with each block.

    Attributes:
        look: what the method leaves.
        full: answer of the full model.
        own: answer of the method.
        trials: in raster order.
    """

    look: Look
    full: str
    own: str
    trials: Sequence[Trial]

    @property
    def is_lost(self) -> bool:
        """Whether the method's answer is another than the full model's."""
        return not is_same(self.own, self.full)

    def brings_back(self, trial: Trial) -> bool:
        """Whether a block returns the full model's answer where the method has lost it."""
        return self.is_lost and is_same(trial.answer, self.full)

    def blocks(self) -> list[Block]:
        """What is drawn over the image: blocks that bring the answer back, and those that lead to yet another."""
        blocks = []
        for trial in self.trials:
            changes = not is_same(trial.answer, self.own)
            color = (FULL_COLOR if self.brings_back(trial) else OTHER_COLOR) if changes else None
            blocks.append(Block(trial.rows, trial.cols, show(trial.answer) if trial.num_patches else "", color))
        return blocks

    def summary(self) -> str:
        """Say in a line what came out."""
        tried = [trial for trial in self.trials if trial.num_patches]
        if not self.is_lost:
            changed = sum(not is_same(trial.answer, self.own) for trial in tried)
            changes = f"{changed} of {len(tried)} blocks with dropped patches change it"
            return f"the answer is the full model's already; {changes}"
        found = sum(map(self.brings_back, tried))
        return f"{found} of {len(tried)} blocks with dropped patches bring the full model's answer back"


def is_same(answer: str, other: str) -> bool:
    """Whether two answers are the same but for case, white space and a full stop."""
    first, second = (" ".join(text.casefold().split()).rstrip(".") for text in (answer, other))
    return first == second


def show(answer: str) -> str:
    """An answer for a person."""
    return " ".join(answer.split()) or "(empty)"


def choose_block(grid: tuple[int, int], side: int | None) -> int:
    """Return the side of a block in patches: as given, else 4, of small grids a quarter of the shorter side.

    Raises:
        InputError: the grid has no such block.
    """
    shorter = min(grid)
    if side is None:
        return max(1, min(4, shorter // 4))
    if side > shorter:
        raise InputError(f"--block {side}: an image has {grid[0]} x {grid[1]} patches; use 1 to {shorter}")
    return side


def list_blocks(grid: tuple[int, int], side: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """List a grid's blocks in raster order, cut at the lower and right border: (first, after) of rows and columns."""
    for row in range(0, grid[0], side):
        for col in range(0, grid[1], side):
            yield (row, min(row + side, grid[0])), (col, min(col + side, grid[1]))


@torch.inference_mode()
def try_blocks(
    model: LlavaCausalLM, case: Case, reduction: Reduction, sampling: Sampling, side: int | None = None
) -> WhatIf:
    """Ask the full model, a method, and the method with each block of dropped patches.

    Args:
        model: its tokenizer is attached.
        case: prepared for the method.
        reduction: the method.
        sampling: how answers are searched for.
        side: of a block, in patches; None: see `choose_block`.

    Raises:
        InputError: there is no such block.
    """
    grid = model.get_vision_tower().grid
    side = choose_block(grid, side)
    full = ask(model, case, sampling, [look_at(model, case, Reduction()).tokens], Reduction())[0]
    look = look_at(model, case, reduction)
    own = ask(model, case, sampling, [look.tokens], reduction)[0]
    # 1. What each block gives back: patches that do not reach the last layer.
    dropped = ~look.stages[-1].kept.reshape(grid)
    marks = []
    for rows, cols in list_blocks(grid, side):
        block = torch.zeros(grid, dtype=torch.bool)
        block[slice(*rows), slice(*cols)] = dropped[slice(*rows), slice(*cols)]
        marks.append((rows, cols, block.flatten()))
    # 2. Prompts with them; a block without dropped patches changes nothing.
    projected = project(model.get_model().mm_projector, case.features.patches[0])  # [N, E]
    given = [give_back(look, projected, block) for _, _, block in marks if block.any()]
    answers = iter(ask_all(model, case, sampling, given, reduction))
    trials = [
        Trial(rows, cols, count, next(answers) if count else own)
        for rows, cols, block in marks
        for count in [int(block.sum())]
    ]
    return WhatIf(look, full, own, trials)


def give_back(look: Look, projected: Tensor, block: Tensor) -> tuple[ImageTokens, list[int]]:
    """Put dropped patches among a method's tokens.

    Args:
        look: what the method leaves.
        projected: `[N, E]` all patches of the first crop, as the language model reads them.
        block: `bool[N]` patches that shall be there.

    Returns:
        The image's tokens with those patches, and the places of all of the block's patches among them.
    """
    sources = look.sources.tolist()
    rows = list(range(len(sources)))
    num_tokens = look.tokens.num_tokens
    for patch in block.nonzero().flatten().tolist():
        if patch in sources:
            continue
        last = max((place for place, source in enumerate(sources) if source != MADE), default=len(sources) - 1)
        place = next((place for place, source in enumerate(sources) if source > patch), last + 1)
        sources.insert(place, patch)
        rows.insert(place, num_tokens + patch)
    rows += range(len(look.sources), num_tokens)  # other crops
    features = torch.cat([look.tokens.features, projected.to(look.tokens.features)])[rows]
    original = look.tokens.original
    if original is not None:  # a patch of the first crop stands at its own number
        original = replace(original, offsets=torch.cat([original.offsets, torch.arange(len(projected))])[rows])
    places = [place for place, source in enumerate(sources) if source != MADE and block[source]]
    return replace(look.tokens, features=features, original=original), places


def ask_all(
    model: LlavaCausalLM,
    case: Case,
    sampling: Sampling,
    given: Sequence[tuple[ImageTokens, list[int]]],
    reduction: Reduction,
) -> list[str]:
    """Answer with each of several lists of image tokens, the tokens at these places never leaving."""
    if reduction.inside is not None:
        return [
            ask(model, case, sampling, [tokens], reduction, Sparing(reduction.inside, places))[0]
            for tokens, places in given
        ]
    tokens = [each for each, _ in given]
    parts = [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]
    return [answer for part in parts for answer in ask(model, case, sampling, part, reduction)]


def ask(
    model: LlavaCausalLM,
    case: Case,
    sampling: Sampling,
    tokens: Sequence[ImageTokens],
    reduction: Reduction,
    inside: "LayerReducer | Sparing | None" = None,
) -> list[str]:
    """Answer a case with each of several lists of image tokens.

    Args:
        model: answers.
        case: the question.
        sampling: how answers are searched for.
        tokens: of the image, once for each answer.
        reduction: the method; what it does before the language model has been done.
        inside: in place of the reduction's method inside the language model.
    """
    with reduced_by(model, reduction):
        if inside is not None:
            model.layer_reducer = inside
        generator = Generator(model, model.tokenizer)
        return generator.answer([case.ids] * len(tokens), [[each] for each in tokens], sampling)


class Sparing:
    """A method inside the language model from which some tokens of an image are safe: for one prompt with one image."""

    def __init__(self, reducer: LayerReducer, places: Sequence[int]):
        """Take a method, and the places of the safe tokens among the image's at the first layer."""
        self._reducer = reducer
        self._places = list(places)
        self._is_safe = torch.empty(0)  # bool[M], of the tokens that are there
        self.layers = reducer.layers
        self.position_ids = reducer.position_ids

    def reduce(self, view: LayerView) -> Left:
        """Decide as the method does, and keep what is safe."""
        if view.layer == self.layers(view.num_layers)[0]:
            self._is_safe = torch.zeros(view.num_original, dtype=torch.bool, device=view.hidden.device)
            self._is_safe[self._places] = True
        left = self._reducer.reduce(view)
        kept = self._is_safe.index_fill(0, left.kept, True).nonzero().flatten()
        num_merged = 0 if left.merged is None else len(left.merged)
        self._is_safe = torch.nn.functional.pad(self._is_safe[kept], (0, num_merged))
        return replace(left, kept=kept)
