"""A checkpoint as one object that answers questions about images: `llava.Llava`.

    model = Llava.from_pretrained("liuhaotian/llava-v1.5-7b", reduce="TRIM:-1")
    answer = model.ask("bus.jpg", "What color is the bus?")

`ask` and `chat` are a `ChatSession` each, as in `llava.eval.run_llava`; `ask_many` is the evaluation's loop. Both give
the same answers. docs/python.md shows what to do with it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from transformers import TextStreamer

from llava.answer import Answer, make_answer
from llava.chat import ChatSession, read_question
from llava.cli import DTYPES, ModelSpec, guess_template
from llava.errors import InputError
from llava.eval.benchmark import Question
from llava.eval.predict import Predictor, Settings, choose_unit_size, plan_units
from llava.model.token_reduction import CONFIG_KEY
from llava.picture import Picture, Snapshots, to_pictures
from llava.prompt import DEFAULT_CONV_MODE, check_conv_mode, end_of_turn, find_template, place_images, recover_text
from llava.protocols import ImageProcessor, Tokenizer
from llava.sampling import Sampling

if TYPE_CHECKING:
    from llava.model.language_model.causal import LlavaCausalLM

Stream = bool | Callable[[str], object]
"""True: the answer is written to standard output as it comes. A function: it is called with each new piece of text."""


class UnansweredError(InputError):
    """Some of many questions could not be answered.

    Attributes:
        answers: of every question, in order; None where there is none.
        reasons: why, by the number of the question.
    """

    def __init__(self, reasons: Mapping[int, str], answers: list[Answer | None]):
        first = min(reasons)
        more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        super().__init__(
            f"pairs[{first}]: {reasons[first]}{more}; the other {len(answers) - len(reasons)} answers are in this "
            "error's `answers`"
        )
        self.answers = answers
        self.reasons = dict(reasons)


# -------------------------------------------------------------------------------------------------------------- object
class Llava:
    """A model that answers questions about images.

    Images are a path, an http(s) address, a Pillow image, a NumPy array (`uint8[height, width, channels]`), a tensor
    (`[channels, height, width]`, uint8, or floats in [0, 1]), a list of these, or None for a question about no image.
    Every method takes the settings of `llava.sampling.Sampling` by name (`temperature`, `top_p`, `num_beams`,
    `max_new_tokens`, `seed`); without any the search is greedy.

    Attributes:
        model: the `LlavaCausalLM`, of the checkpoint's language model.
        tokenizer: its tokenizer.
        image_processor: its vision tower's image processor.
        conv_mode: name of the conversation template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: "LlavaCausalLM",
        image_processor: ImageProcessor,
        conv_mode: str = DEFAULT_CONV_MODE,
        spec: ModelSpec | None = None,
    ):
        """Take the first three results of `load_pretrained_model`; `from_pretrained` loads them.

        Args:
            tokenizer: of the model.
            model: loaded.
            image_processor: of its vision tower.
            conv_mode: conversation template.
            spec: how the model was loaded; targets such as "TRIM:flops=0.35" are found for it.

        Raises:
            InputError: there is no such template.
        """
        find_template(conv_mode, tokenizer)
        self.tokenizer = tokenizer
        self.model = model
        self.image_processor = image_processor
        self.conv_mode = conv_mode
        self._spec = spec

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike,
        *,
        reduce: str | None = None,
        base: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        tower_dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        load_8bit: bool = False,
        load_4bit: bool = False,
        calibrated: str | os.PathLike | None = None,
        conv_mode: str | None = None,
    ) -> "Llava":
        """Load a checkpoint in LLaVA's layout.

        Args:
            checkpoint: folder or hub id.
            reduce: token reduction, such as "TRIM:-1"; "none": none; None: what the checkpoint's config.json says.
            base: base model of a LoRA or projector-only checkpoint.
            device: "cpu", "cuda", "cuda:1", ...; None: the accelerator if there is one, else the CPU.
            dtype: "float16", "bfloat16" or "float32"; None: float16 on an accelerator, float32 on the CPU.
            tower_dtype: of the vision and text towers; None: float32, as in LLaVA.
            attn_implementation: attention of the language model: "sdpa", "eager", "flash_attention_2", ...
            load_8bit: quantise the language model to 8 bit.
            load_4bit: quantise it to 4 bit.
            calibrated: the fence of `reduce="TRIM:avg=64"`, a file of `llava.calibrate`.
            conv_mode: conversation template; None: the one that training stored, else by the checkpoint's name.

        Raises:
            InputError: one line for everything that is not as it should be.
        """
        # 1. All that can be refused before torch looks at a weight.
        _check_reduce(reduce)
        if conv_mode is not None:
            check_conv_mode(conv_mode)
        path = _to_path("checkpoint", checkpoint)
        spec = ModelSpec(
            path=path,
            base=None if base is None else _to_path("base", base),
            reduce=reduce,
            device=None if device is None else str(device),
            dtype=_to_dtype_name("dtype", dtype),
            tower_dtype=_to_dtype_name("tower_dtype", tower_dtype),
            attn_implementation=attn_implementation,
            load_8bit=load_8bit,
            load_4bit=load_4bit,
            calibrated=_to_file("calibrated", calibrated),
        )
        # 2. Load, and find the template.
        tokenizer, model, image_processor = spec.load()
        return cls(tokenizer, model, image_processor, conv_mode or guess_template(path, model.config)[0], spec)

    def __repr__(self) -> str:
        name = "" if self._spec is None else f"{self._spec.path!r}, "
        return f"Llava({name}reduce={self.reduce!r}, conv_mode={self.conv_mode!r}, device={str(self.model.device)!r})"

    # Token reduction -------------------------------------------------------------------------------------------
    @property
    def reduce(self) -> str:
        """The token reduction, as `from_pretrained` takes it; "none" for none."""
        return getattr(self.model.config, CONFIG_KEY, None) or "none"

    def set_token_reduction(self, reduce: str, calibrated: str | os.PathLike | None = None) -> None:
        """Reduce in another way from the next question on.

        A chat that is open goes on where the new reduction looks at nothing else of the vision tower than the old one;
        for others `chat.show(images)` begins anew.

        Args:
            reduce: as in `from_pretrained`; "none": none.
            calibrated: as in `from_pretrained`.

        Raises:
            InputError: not a token reduction, or one that needs what the vision tower does not have.
        """
        if reduce is None:
            raise InputError('reduce None: expected a token reduction such as "TRIM:-1", or "none" for none')
        _check_reduce(reduce)
        if self._spec is not None:
            spec = replace(self._spec, reduce=reduce, calibrated=_to_file("calibrated", calibrated))
            reduce = spec.resolve().reduce
        self.model.set_token_reduction(reduce)

    # Questions -------------------------------------------------------------------------------------------------
    def ask(self, images: object, question: str, *, stream: Stream = False, **sampling: object) -> Answer:
        """Ask one question.

        Args:
            images: what it is about; see the class.
            question: the user's text. One `<image>` per image may show where each goes, else the images come first.
            stream: show the answer as it comes; see `Stream`.
            **sampling: see the class.

        Raises:
            InputError: one line that says what is wrong with an image, the question or a setting.
        """
        settings = make_sampling(sampling)
        streamer = _make_streamer(self.tokenizer, stream, settings)
        read_question(question)
        return self.chat(images).answer(question, settings, streamer)

    def chat(self, images: object = None) -> "Chat":
        """Begin a dialogue about images (see the class), which stay in view.

        Raises:
            InputError: an image cannot be read.
        """
        return Chat(self, images)

    def ask_many(
        self,
        pairs: Iterable[tuple[object, str]],
        *,
        batch_size: int | None = None,
        progress: bool = True,
        **sampling: object,
    ) -> list[Answer]:
        """Ask many questions, in batches; greedily, the answers are those of `ask`.

        Each image is encoded once, however many questions it has: name it by the same path, or give the same object.

        Args:
            pairs: (images, question) each, as for `ask`. Images in memory are copied as their pair is taken: a
                generator may yield the same buffer again, with another image in it.
            batch_size: questions that the language model reads at once; None: as many as memory allows.
            progress: whether a bar on standard error counts the answers.
            **sampling: see the class; what is drawn with a temperature depends on the batch.

        Returns:
            The answers, in the order of the questions.

        Raises:
            InputError: a type, an empty question or a missing file, found before the first question is answered.
            UnansweredError: questions could not be answered, such as `pairs[3]: image a.png: ...`; all others were,
                and the error has their answers.
        """
        # 1. What is wrong with a pair is told before any work.
        is_number = isinstance(batch_size, int) and not isinstance(batch_size, bool)
        if batch_size is not None and (not is_number or batch_size < 1):
            raise InputError(f"batch_size {batch_size!r}: expected a whole number from 1 on, or None")
        end = end_of_turn(find_template(self.conv_mode, self.tokenizer))
        settings = Settings("llava", make_sampling(sampling), self.conv_mode, batch_size, end=end)
        asked = list(_read_pairs(pairs))
        # 2. The loop of the evaluation: units in which equal images meet, batches of like length.
        answers: list[Answer | None] = [None] * len(asked)
        reasons: dict[int, str] = {}
        parts = (self.model, self.tokenizer, self.image_processor)
        with (
            torch.inference_mode(),
            closing(Predictor(*parts, settings)) as predictor,
            tqdm(total=len(asked), desc="questions", unit="q", disable=not progress) as bar,
        ):
            for answered, faults in predictor.run(plan_units(asked, choose_unit_size(self.model))):
                reasons |= {fault.question.id: fault.reason for fault in faults}
                for each in answered:
                    text, images = each.question.prompt, each.question.images
                    answer = make_answer(self.model, each.text, text, images, each.image_tokens, each.seconds)
                    answers[each.question.id] = answer
                bar.update(len(answered) + len(faults))
        if reasons:
            raise UnansweredError(reasons, answers)
        return answers


class Chat:
    """A dialogue: the images stay in view, and each question is asked after the turns before it.

    Attributes:
        turns: the answers so far, in order.
    """

    def __init__(self, owner: Llava, images: object = None):
        """Begin; `Llava.chat` does."""
        self._owner = owner
        self._session = ChatSession(owner.model, owner.tokenizer, owner.image_processor, owner.conv_mode)
        self.show(images)

    def show(self, images: object) -> None:
        """Replace the images in view (see `Llava`), and begin a new dialogue.

        Raises:
            InputError: an image cannot be read; the dialogue is as it was before.
        """
        self._session.show(to_pictures(images))
        self._pictures = tuple(map(Picture, self._session.images))
        self.turns: list[Answer] = []

    def ask(self, question: str, *, stream: Stream = False, **sampling: object) -> Answer:
        """Ask the next question; arguments as for `Llava.ask`. After an error the dialogue is as it was before."""
        settings = make_sampling(sampling)
        return self.answer(question, settings, _make_streamer(self._owner.tokenizer, stream, settings))

    def answer(self, question: str, sampling: Sampling, streamer: TextStreamer | None = None) -> Answer:
        """Ask the next question with settings and a streamer that are objects already."""
        turn = self._session.ask(question, sampling, streamer)
        pictures, model = self._pictures, self._owner.model
        answer = make_answer(model, turn.text, recover_text(question), pictures, turn.image_tokens, turn.seconds)
        self.turns.append(answer)
        return answer


# ------------------------------------------------------------------------------------------------------ what was given
def make_sampling(settings: Mapping[str, object]) -> Sampling:
    """Read the settings of a search from keyword arguments.

    Raises:
        InputError: one that is unknown, of another type or out of range, or that needs a temperature.
    """
    known = [each.name for each in fields(Sampling)]
    for name in settings:
        if name not in known:
            raise InputError(f"there is no setting {name}: expected {', '.join(known)}")
    if settings.get("top_p") not in (None, 1) and "temperature" not in settings:
        raise InputError(f"top_p {settings['top_p']!r}: nothing is drawn without temperature=; give one as well")
    return Sampling(**settings)


def _read_pairs(pairs: object) -> Iterator[Question]:
    """Read and check `ask_many`'s pairs, each as it is when its turn comes: a generator may reuse its buffer."""
    if isinstance(pairs, (str, Mapping)) or not isinstance(pairs, Iterable):
        raise InputError(f"pairs: expected a list of (images, question), not {type(pairs).__name__}")
    snapshots = Snapshots(is_frozen=isinstance(pairs, (list, tuple)))
    for number, pair in enumerate(pairs):
        question = _to_question(number, pair)
        yield replace(question, images=tuple(map(snapshots.take, question.images)))


def _to_question(number: int, pair: object) -> Question:
    """Read and check one of `ask_many`'s pairs."""
    try:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"expected (images, question), not {type(pair).__name__}")
        images = to_pictures(pair[0])
        text, query = read_question(pair[1])
        place_images(text, len(images))
    except InputError as error:
        raise InputError(f"pairs[{number}]: {error}") from None
    return Question(id=number, prompt=text, query=query, images=images)


def _check_reduce(reduce: object) -> None:
    if reduce is not None and not isinstance(reduce, str):
        raise InputError(
            f'reduce {reduce!r}: expected a token reduction such as "TRIM:-1", not {type(reduce).__name__}'
        )


def _to_path(name: str, value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{name} {value!r}: expected a folder or a hub id, not {type(value).__name__}")
    return str(Path(value).expanduser()) if str(value).startswith("~") else str(value)


def _to_file(name: str, value: object) -> Path | None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{name} {value!r}: expected a file, not {type(value).__name__}")
    return None if value is None else Path(value).expanduser()


def _to_dtype_name(name: str, dtype: object) -> str | None:
    found = None if dtype is None else str(dtype).removeprefix("torch.")
    if found not in (None, *DTYPES):
        raise InputError(f"{name} {found}: expected {', '.join(DTYPES)}")
    return found


# ----------------------------------------------------------------------------------------------------------- streaming
class _PieceStreamer(TextStreamer):
    """Hands the text on, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, take: Callable[[str], object]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._take(text)


def _make_streamer(tokenizer: Tokenizer, stream: Stream, sampling: Sampling) -> TextStreamer | None:
    if stream is False:
        return None
    if sampling.num_beams > 1:
        raise InputError("an answer of a beam search is known at its end only: leave out stream or num_beams")
    if stream is True:
        return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if not callable(stream):
        raise InputError(f"stream {stream!r}: expected True, False or a function of a text")
    return _PieceStreamer(tokenizer, stream)
