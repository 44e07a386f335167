"""What the page shows of a question, without the page: the answer as it comes, its pictures, its time and its FLOPs.

`llava.serve.demo` draws the page. It asks an `Answerer`: `PageModel`, a checkpoint in this process, or
`page_endpoint.Endpoint`, a server.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import TextStreamer

from llava.answer_cost import count_answer, read_counted_shape
from llava.assistant import Llava
from llava.chat import read_question
from llava.conversation import get_model_name_from_path
from llava.drawing import Panel, draw_panel, find_threshold
from llava.errors import InputError
from llava.image import load_image
from llava.looks import Look, look_at, make_ids, make_view, prepare, reduced_by
from llava.model.token_reduction import LAYER_REDUCERS, REDUCERS, Budget, Reduction, parse_reduction
from llava.protocols import Tokenizer
from llava.sampling import Sampling

if TYPE_CHECKING:
    from llava.model.language_model.causal import LlavaCausalLM

NONE = "none"
"""Spec string of no reduction."""


@dataclass(frozen=True)
class Drawn:
    """One picture of an answer.

    Attributes:
        title: what it shows.
        text: about it.
        image: mode RGB.
        is_map: whether it shows kept patches; else scores.
    """

    title: str
    text: str
    image: Image.Image
    is_map: bool


@dataclass(frozen=True, eq=False)
class Result:
    """One answer with all that is known of it.

    Attributes:
        spec: the token reduction; "none" for none.
        text: the answer.
        tokens: image tokens that the language model read, for a person: `14`, or `64, then 16`.
        num_tokens: those at its first layer; None: a server did not say.
        num_patches: patches of the vision tower; None: a server did not say.
        new_tokens: tokens of the answer, its end included; None: a server did not say.
        first_seconds: from the question to the first token of the answer, everything included.
        seconds: to its end.
        stages: seconds by stage, as `llava.Answer` has them; empty: not known.
        flops: from the vision tower to the last token; None: not counted.
        note: why something is missing, in a sentence; may be empty.
        kept: `bool[N]` patches that the last layer read as they are; None: no method, or a server.
        pictures: of the kept patches and of the scores; none without a method.
    """

    spec: str
    text: str
    tokens: str
    num_tokens: int | None
    num_patches: int | None
    new_tokens: int | None
    first_seconds: float
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    flops: int | None = None
    note: str = ""
    kept: np.ndarray | None = None
    pictures: tuple[Drawn, ...] = ()


class Answerer(Protocol):
    """What the page asks.

    Attributes:
        title: what it is, in a line.
        methods: entries of the page's list, names or whole spec strings, and whether the method has a rule of its own
            for its budget.
        num_patches: N, the largest budget.
    """

    title: str
    methods: Mapping[str, bool]
    num_patches: int

    def ask(self, image: Path, question: str, spec: str) -> Iterator[str | Result]:
        """Answer a question.

        Args:
            image: a file.
            question: the user's text.
            spec: token reduction; "none" for none.

        Yields:
            The answer so far, each time it grows, and the result at the end.

        Raises:
            InputError: the image cannot be read, nothing is asked, or the method cannot be served.
        """


def takes_budget(method: str) -> bool:
    """Whether an entry of the page's list is a method's name; a whole spec string has its budget."""
    return method in REDUCERS or method in LAYER_REDUCERS


def make_spec(method: str, count: int, num_patches: int, is_automatic: bool) -> str:
    """Write the spec string of a choice on the page.

    Args:
        method: an entry of `Answerer.methods`.
        count: patches to keep, 1 to N.
        num_patches: N.
        is_automatic: the method's own rule decides instead.

    Raises:
        InputError: the method cannot keep so many.
    """
    if not takes_budget(method):
        return method
    budget = Budget(-1) if is_automatic else Budget.of_count(count, num_patches)
    return parse_reduction(f"{method}:{budget}").spec() or NONE


def list_methods() -> dict[str, bool]:
    """Map the name of every method to whether it has a rule for its budget; those before the language model first."""
    return {name: method.has_automatic_budget for name, method in (REDUCERS | LAYER_REDUCERS).items()}


class PageModel:
    """A checkpoint in this process; see `Answerer`. One question at a time is answered, others wait."""

    def __init__(self, llava: Llava, path: str, max_new_tokens: int = 512):
        """Find out what the model can do.

        Args:
            llava: the model.
            path: of its checkpoint, for the shapes that FLOPs are counted at.
            max_new_tokens: length limit of an answer.
        """
        self._llava = llava
        self._sampling = Sampling(max_new_tokens=max_new_tokens)
        self._lock = Lock()
        self._shape, self._uncounted = read_counted_shape(path)
        tower = llava.model.get_vision_tower()
        self.num_patches = tower.grid[0] * tower.grid[1]
        self.title = f"{get_model_name_from_path(path)}, {self.num_patches} patches per image, on {llava.model.device}"
        self.methods = {name: has_rule for name, has_rule in list_methods().items() if self._can_serve(name)}
        if llava.reduce != NONE:  # first: as a name, or as a spec string with everything that it says
            own = parse_reduction(llava.reduce).spec()
            by_name = {
                make_spec(name, 1, self.num_patches, True): name for name, rules in self.methods.items() if rules
            }
            first = by_name.get(own, own)
            self.methods = {first: first in by_name.values(), **self.methods}

    def _can_serve(self, name: str) -> bool:
        try:
            with reduced_by(self._llava.model, parse_reduction(name)):
                return True
        except InputError:
            return False

    def ask(self, image: Path, question: str, spec: str) -> Iterator[str | Result]:
        """Answer a question; see `Answerer`."""
        read_question(question)
        opened, reduction = load_image(str(image), upright=True), parse_reduction(spec)
        return stream(lambda put: self._ask(opened, question, reduction, put))

    def _ask(self, image: Image.Image, question: str, reduction: Reduction, put: Callable[[str], object]) -> Result:
        model = self._llava.model
        with self._lock, reduced_by(model, reduction):
            # 1. The answer, timed.
            streamer = _TimedStreamer(self._llava.tokenizer, put)
            answer = self._llava.chat(image).answer(question, self._sampling, streamer)
            seconds = time.perf_counter() - streamer.start
            # 2. What the method left, looked at once more: the time above is that of an answer without pictures.
            ids = make_ids(model, question, 1, self._llava.conv_mode)
            look, pictures = None, ()
            if reduction != Reduction():
                parts = (image, question, [reduction], self._llava.conv_mode)
                look = look_at(model, prepare(model, self._llava.image_processor, *parts), reduction)
                pictures = draw_look(image, look, model)
        # 3. What it took.
        flops = None
        if self._shape is not None:
            work = (answer.num_tokens, len(ids) - 1, streamer.num_tokens)
            flops = count_answer(self._shape, reduction, *work)
        return Result(
            spec=reduction.spec() or NONE,
            text=answer.text,
            tokens=str(answer.num_tokens) if look is None else look.describe_tokens().partition(" token")[0],
            num_tokens=answer.num_tokens,
            num_patches=answer.num_patches,
            new_tokens=streamer.num_tokens,
            first_seconds=streamer.first_seconds,
            seconds=seconds,
            stages=answer.seconds,
            flops=flops,
            note=self._uncounted,
            kept=None if look is None else look.stages[-1].kept.numpy(),
            pictures=pictures,
        )


def draw_look(image: Image.Image, look: Look, model: "LlavaCausalLM") -> tuple[Drawn, ...]:
    """Draw what a method leaves of an image: the panels of `llava.visualize`, each alone.

    Args:
        image: mode RGB.
        look: of this image.
        model: that was looked at.
    """
    grid = model.get_vision_tower().grid
    view = make_view(image, look, grid, getattr(model.config, "image_aspect_ratio", None))
    # The page sets the captions beside the pictures, as large as its text; the method's name stands there already.
    return tuple(
        Drawn(
            "Kept patches" if panel.scores is None else "Scores",
            panel.caption.partition("\n")[2] + describe_threshold(panel),
            draw_panel(view, replace(panel, caption="")),
            panel.scores is None,
        )
        for panel in view.panels
    )


def describe_threshold(panel: Panel) -> str:
    """Say from which score on patches are kept; empty where scores alone do not tell."""
    threshold = None if panel.scores is None else find_threshold(panel.scores, panel.kept)
    return "" if threshold is None else f"; kept from {threshold:.3g} on (red line)"


# ----------------------------------------------------------------------------------------------------------- streaming
class _TimedStreamer(TextStreamer):
    """Hands the text on piece by piece, counts the tokens, and notes when the first one came."""

    def __init__(self, tokenizer: Tokenizer, put: Callable[[str], object]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._put = put
        self.start = time.perf_counter()
        self.first_seconds = 0.0
        self.num_tokens = 0

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            if self.num_tokens == 0:
                self.first_seconds = time.perf_counter() - self.start
            self.num_tokens += value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._put(text)


class _Stopped(Exception):
    """Nobody reads the answer any more."""


def stream(work: Callable[[Callable[[str], None]], Result]) -> Iterator[str | Result]:
    """Run work that hands on pieces of text; yield the text so far each time it grows, then the result.

    Closing the iterator stops the work at its next piece.

    Args:
        work: is called in a thread with the function that takes the pieces.

    Raises:
        Exception: what the work raises.
    """
    items: SimpleQueue[str | Result | Exception] = SimpleQueue()
    is_left = Event()

    def put(piece: str) -> None:
        if is_left.is_set():
            raise _Stopped
        items.put(piece)

    def run() -> None:
        try:
            items.put(work(put))
        except Exception as error:  # is raised where the items are read
            items.put(error)

    Thread(target=run, daemon=True).start()
    text = ""
    try:
        while not isinstance(item := items.get(), Result):
            if isinstance(item, Exception):
                raise item
            text += item
            yield text
        yield item
    finally:
        is_left.set()
