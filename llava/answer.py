"""The answer to one question, with what the model looked at: `llava.Answer`."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from llava.chat import describe_tokens
from llava.drawing import Drawing, Panel, Sight, TextLine, View, shrink
from llava.errors import InputError
from llava.image import to_data_url
from llava.model.image_tokens import ImageTokens
from llava.picture import Picture

if TYPE_CHECKING:
    from llava.model.language_model.causal import LlavaCausalLM

Grids = tuple[np.ndarray | None, ...]
"""A value per patch for each image: `[rows, cols]`, or `[C, rows, cols]` where an image has several crops; None where
the method has none."""


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to one question. In a notebook it shows itself, with the kept patches.

    Attributes:
        text: the answer.
        question: as it was asked; bytes that are not UTF-8 are replaced as for the model.
        num_tokens: visual tokens that the language model read, over all images.
        num_patches: visual tokens before reduction, over all images.
        kept: bool per image, the patches that the language model read; None where the method blends patches. With a
            method inside the language model, the patches that enter it.
        scores: float32 per image, the method's score of each patch; None where it has none.
        seconds: by stage: "read" (files to pixel values), "encode" (the vision tower), "reduce" (text tower, selection,
            projector), "generate". The device is drained around each. Of `ask_many`, where a stage works on many
            questions at once, an equal share of its time. A chat's later turns read and encode nothing.
    """

    text: str
    question: str
    num_tokens: int
    num_patches: int
    kept: Grids = field(repr=False)
    scores: Grids = field(repr=False)
    seconds: Mapping[str, float] = field(repr=False)
    _pictures: Sequence[Picture] = field(repr=False)
    _image_tokens: Sequence[ImageTokens] = field(repr=False)  # without their features
    _grid: tuple[int, int] = field(repr=False)
    _aspect_ratio: str | None = field(repr=False)
    _sight: Sight = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def describe_tokens(self) -> str:
        """Describe for a person how many of the visual tokens are read."""
        return describe_tokens(self.num_tokens, self.num_patches)

    def figure(self) -> Image.Image:
        """Draw question, answer, and of each image the kept patches and their scores.

        Raises:
            InputError: a file of `ask_many`, which keeps no copies of files, is not there any more.
        """
        return self._draw().image()

    def _draw(self) -> Drawing:
        pairs = zip(self._pictures, self._image_tokens, strict=True)
        views = [self._make_view(picture.load(), tokens) for picture, tokens in pairs]
        name, _, text = self.describe_tokens().partition(": ")
        return Drawing(views, self.question, [TextLine("answer", self.text), TextLine(name, text)])

    def _make_view(self, image: Image.Image, tokens: ImageTokens) -> View:
        shown, box = shrink(image, self._aspect_ratio, self._sight)
        if tokens.kept is None:  # blended patches: no single one is kept or dropped
            return View(shown, box)
        # Of several crops the first, the whole view, is drawn.
        kept, scores, centres = (
            None if values is None else values[0].reshape(self._grid).numpy()
            for values in (tokens.kept, tokens.scores, tokens.centres)
        )
        num_made = tokens.num_tokens - int(tokens.kept.sum())
        made = f" + {num_made} merged" if num_made and len(tokens.kept) == 1 else ""
        panels = [Panel(f"{kept.sum()} of {kept.size} patches kept{made}", kept, centres)]
        if scores is not None:
            panels.append(Panel("score per patch", kept, centres, scores=scores))
        return View(shown, box, panels)

    def save(self, path: str | Path) -> None:
        """Write the figure as a PNG, PDF or SVG, as the file's ending says.

        Raises:
            InputError: no path, another ending, or the file cannot be written.
        """
        if not isinstance(path, (str, PathLike)):
            raise InputError(f"path {path!r}: expected a file such as kept.png, not {type(path).__name__}")
        self._draw().write(Path(path).expanduser())

    def _repr_html_(self) -> str:
        """Return the answer as HTML that needs no other file."""
        text = f"<p>{html.escape(self.text)}</p><p><small>{html.escape(self.describe_tokens())}</small></p>"
        if not self._pictures:
            return text
        try:
            address = to_data_url(self.figure())
        except InputError as error:
            return f"{text}<p><small>{html.escape(str(error))}</small></p>"
        alt = html.escape(f"{self.question} {self.text}", quote=True)
        return f'{text}<img alt="{alt}" style="max-width: 100%" src="{address}">'


def make_answer(
    model: "LlavaCausalLM",
    text: str,
    question: str,
    pictures: Sequence[Picture],
    image_tokens: Sequence[ImageTokens],
    seconds: Mapping[str, float],
) -> Answer:
    """Put an answer together; of the image tokens only the choice is kept, not the features."""
    tower = model.get_vision_tower()
    grid = tower.grid
    chosen = tuple(_drop_features(tokens) for tokens in image_tokens)
    return Answer(
        text=text,
        question=question,
        num_tokens=sum(tokens.num_tokens for tokens in chosen),
        num_patches=sum(tokens.num_patches for tokens in chosen),
        kept=tuple(_to_grid(tokens.kept, grid) for tokens in chosen),
        scores=tuple(_to_grid(tokens.scores, grid) for tokens in chosen),
        seconds=dict(seconds),
        _pictures=tuple(pictures),
        _image_tokens=chosen,
        _grid=grid,
        _aspect_ratio=getattr(model.config, "image_aspect_ratio", None),
        _sight=Sight(tower.squeezes, tower.covered),
    )


def _drop_features(tokens: ImageTokens) -> ImageTokens:
    """Return the record on the CPU, with as many features of no width."""
    empty = torch.empty(tokens.num_tokens, 0)
    moved = {name: getattr(tokens, name) for name in ("kept", "scores", "centres")}
    return replace(
        tokens, features=empty, **{name: None if values is None else values.cpu() for name, values in moved.items()}
    )


def _to_grid(values: torch.Tensor | None, grid: tuple[int, int]) -> np.ndarray | None:
    """Shape `[C, N]` as `[rows, cols]`, or `[C, rows, cols]` for several crops."""
    if values is None:
        return None
    grids = values.reshape(len(values), *grid).numpy()
    return grids[0] if len(grids) == 1 else grids
