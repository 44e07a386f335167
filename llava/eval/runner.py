"""The one loop that asks a model the questions of a benchmark.

Each picture and each query is encoded once, the reduction is made once per question in batches of its own, and the
language model gets batches of sequences of like length, while the next unit's pictures are read. An answer is the
same whatever stands beside it in the batch; batches only save time. A question that cannot be asked is reported and
does not stop the others.

Shape letters: `S` samples, `T` prompt ids.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from llava.errors import InputError
from llava.eval.allocator import keep_freed_memory
from llava.eval.answers import make_row
from llava.eval.batching import batch_by_length, plan_units
from llava.eval.benchmark import LOADER_MAX_NEW_TOKENS, ImageSource, Question, Row, row_key
from llava.eval.features import EncodedImage, FeatureCache, QueryCache, apply_in_parts
from llava.eval.sizing import choose_limits, choose_unit_size
from llava.generation import GreedyDecoder, is_plain, pad_left, share_pictures
from llava.mm_utils import tokenize_prompts
from llava.prompt import DEFAULT_CONV_MODE, choose_conv_mode, wrap_prompt

CACHED_IMAGES = 64
REDUCTION_BATCH = 64
"""Pictures reduced at once, each for its question."""


@dataclass(frozen=True)
class Settings:
    """How questions are asked.

    Attributes:
        model_id: name of the checkpoint in the answers file.
        conv_mode: conversation template.
        max_new_tokens: length limit of an answer.
        temperature: 0 is greedy; above, answers are drawn at random and differ from run to run.
        top_p: nucleus of the random draw; None: all tokens.
        num_beams: width of beam search; 1 is none.
        batch_size: questions that the language model reads at once; None: as many as memory allows (`sizing`).
        cached_images: encoded pictures kept from one unit of work to the next.
        num_workers: workers that share the questions.
    """

    model_id: str
    conv_mode: str = DEFAULT_CONV_MODE
    max_new_tokens: int = LOADER_MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    batch_size: int | None = None
    cached_images: int = CACHED_IMAGES
    num_workers: int = 1


@dataclass(frozen=True)
class Fault:
    """A question that got no answer, and why."""

    question: Question
    reason: str


class Sink(Protocol):
    """Where answers go, and who else is answering; `store.AnswerStore` is the one on disk."""

    key_fields: Sequence[str]
    done: Collection[str]

    def claim(self, unit: int) -> bool:
        """Take a unit of work, unless somebody else has it."""

    def refresh(self) -> None:
        """Bring `done` up to date with what others have answered."""

    def append(self, rows: Sequence[Row]) -> None:
        """Take answers in."""


@dataclass(frozen=True)
class Prepared:
    """A question ready for `generate`.

    Attributes:
        question: what is asked.
        input_ids: int64[T] prompt with a sentinel per image.
        image_tokens: one record per image (`llava.model.image_tokens.ImageTokens`).
    """

    question: Question
    input_ids: Tensor
    image_tokens: tuple[Any, ...]

    @property
    def length(self) -> int:
        """Positions that the language model reads."""
        return len(self.input_ids) - len(self.image_tokens) + sum(image.num_tokens for image in self.image_tokens)

    @property
    def metadata(self) -> dict[str, int]:
        """Visual tokens of the question after and before reduction, over all its images."""
        return {
            "num_tokens": sum(image.num_tokens for image in self.image_tokens),
            "num_patches": sum(image.num_patches for image in self.image_tokens),
        }


def answer_questions(
    model: Any, tokenizer: Any, image_processor: Any, questions: Sequence[Question], sink: Sink, settings: Settings
) -> list[Fault]:
    """Ask every question that has no answer yet. On the CPU the process keeps freed memory from then on (`allocator`).

    Args:
        model: `LlavaLlamaForCausalLM` (or another with its `encode_patches`, `embed_queries`, `make_image_tokens`,
            `generate`).
        tokenizer: of the language model.
        image_processor: of the vision tower.
        questions: all of them, answered or not: all workers plan from the same list.
        sink: takes the answers batch by batch.
        settings: how to ask.

    Returns:
        The questions that this call could not answer.
    """
    faults = [Fault(question, question.fault) for question in questions if question.fault]
    sound = [question for question in questions if not question.fault]
    units = plan_units(sound, choose_unit_size(model), settings.num_workers)
    keys = [row_key(question.head(), sink.key_fields) for question in sound]
    if model.device.type == "cpu":
        keep_freed_memory()
    with (
        closing(Asker(model, tokenizer, image_processor, settings)) as asker,
        tqdm(total=len(questions), desc=settings.model_id, unit="q", smoothing=0.05) as progress,
    ):
        for todo in look_ahead(claim_units(units, sink), asker.announce):
            progress.update(sum(key in sink.done for key in keys) - progress.n)
            for rows, failed in asker.answer(todo):
                sink.append(rows)
                faults += failed
                progress.update(len(rows))
    return faults


def claim_units(units: Sequence[Sequence[Question]], sink: Sink) -> Iterator[list[Question]]:
    """Yield the unanswered questions of each unit that nobody else works on.

    Units that others hold are tried once more in the end: their worker may have died.
    """
    held = []
    for second_look in (False, True):
        for number, unit in enumerate(units):
            if second_look and number not in held:
                continue
            if not sink.claim(number):
                held.append(number)
                continue
            sink.refresh()
            todo = [question for question in unit if row_key(question.head(), sink.key_fields) not in sink.done]
            if todo:
                yield todo


def look_ahead(units: Iterable[list[Question]], announce: Callable[[list[Question]], None]) -> Iterator[list[Question]]:
    """Yield units, each after the next one has been announced."""
    present = None
    for following in units:
        announce(following)
        if present is not None:
            yield present
        present = following
    if present is not None:
        yield present


class Asker:
    """A loaded model with what stays between units: settings, encoded pictures and queries."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, settings: Settings):
        """Take the parts; see `answer_questions`."""
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.features = FeatureCache(model, image_processor, settings.cached_images)
        self.queries = QueryCache(model)
        self.limits = choose_limits(model, settings.batch_size)
        is_greedy = settings.temperature <= 0 and settings.num_beams == 1 and is_plain(model)
        self.decoder = GreedyDecoder(model) if is_greedy else None
        self.conv_mode = choose_conv_mode(settings.conv_mode, settings.model_id)

    def announce(self, questions: Sequence[Question]) -> None:
        """Say which questions come next, so that their pictures are read meanwhile."""
        self.features.announce(picture for question in questions for picture in question.images)

    def close(self) -> None:
        """Stop reading pictures."""
        self.features.close()

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[list[Row], list[Fault]]]:
        """Answer questions that belong together, batch by batch, with what failed in each."""
        prepared, faults = self.prepare(questions)
        yield [], faults
        limit = self.settings.max_new_tokens
        group = None
        if self.decoder and share_pictures([item.image_tokens for item in prepared]):
            order = {id(item.image_tokens[0]): number for number, item in reversed(list(enumerate(prepared)))}

            def group(item: Prepared) -> int:
                return order[id(item.image_tokens[0])]

        for batch in batch_by_length(prepared, lambda item: item.length + limit, self.limits.allow, group):
            yield self.answer_batch(batch)

    def prepare(self, questions: Sequence[Question]) -> tuple[list[Prepared], list[Fault]]:
        """Make prompts and image tokens; report the questions for which that is impossible."""
        encoded, unreadable = self.features.encode(path for item in questions for path in item.images)
        asked: list[Question] = []
        prompts: list[str] = []
        faults: list[Fault] = []
        for question in questions:
            broken = [unreadable[path] for path in question.images if path in unreadable]
            try:
                if broken:
                    raise InputError(broken[0])
                prompts.append(self.wrap(question))
                asked.append(question)
            except InputError as error:
                faults.append(Fault(question, str(error)))
        input_ids = map(torch.tensor, tokenize_prompts(prompts, self.tokenizer))
        return self.reduce(list(zip(asked, input_ids, strict=True)), encoded), faults

    def wrap(self, question: Question) -> str:
        """Make the prompt of a question."""
        use_im_start_end = getattr(self.model.config, "mm_use_im_start_end", False)
        return wrap_prompt(question.prompt, len(question.images), self.conv_mode, use_im_start_end)

    def reduce(self, asked: Sequence[tuple[Question, Tensor]], encoded: Mapping[Any, EncodedImage]) -> list[Prepared]:
        """Choose the image tokens of some questions, each for its own query."""
        embeds = self.queries.embed([question.query for question, _ in asked for _ in question.images])
        # What reads no question makes the same of a picture for all of them, once.
        queries = {question.query: "" if embeds is None else question.query for question, _ in asked}
        pairs = [(path, queries[question.query]) for question, _ in asked for path in question.images]
        distinct = list(dict.fromkeys(pairs))

        def reduce_some(some: Sequence[tuple[ImageSource, str]]) -> list[Any]:
            return self.model.make_image_tokens(
                [encoded[path].patches for path, _ in some],
                [query for _, query in some],
                image_sizes=[encoded[path].size for path, _ in some],
                text_embeds=None if embeds is None else torch.stack([embeds[query] for _, query in some]),
            )

        tokens = dict(zip(distinct, apply_in_parts(reduce_some, distinct, REDUCTION_BATCH), strict=True))
        return [
            Prepared(question, input_ids, tuple(tokens[path, queries[question.query]] for path in question.images))
            for question, input_ids in asked
        ]

    def answer_batch(self, batch: Sequence[Prepared]) -> tuple[list[Row], list[Fault]]:
        """Answer a batch in one call; if that fails, its halves, so that only the guilty question is lost."""
        try:
            texts = self.generate(batch)
        except (InputError, torch.OutOfMemoryError) as error:
            reason = " ".join(str(error).split())
        else:
            name = self.settings.model_id
            return [
                make_row(item.question, text, name, item.metadata) for item, text in zip(batch, texts, strict=True)
            ], []
        # Outside the handler, so that the failed call's tensors are gone before the next one.
        if len(batch) == 1:
            return [], [Fault(batch[0].question, reason)]
        middle = len(batch) // 2
        rows, faults = self.answer_batch(batch[:middle])
        more_rows, more_faults = self.answer_batch(batch[middle:])
        return rows + more_rows, faults + more_faults

    def generate(self, batch: Sequence[Prepared]) -> list[str]:
        """Return the answers to a batch, without special tokens and surrounding white space."""
        settings = self.settings
        image_tokens = [item.image_tokens for item in batch]
        # A prompt beyond the model's positions is for `generate` to refuse.
        if self.decoder and max(item.length for item in batch) < self.model.config.max_position_embeddings:
            output_ids = self.decoder.decode([item.input_ids for item in batch], image_tokens, settings.max_new_tokens)
        else:
            in_order = [image for own in image_tokens for image in own]
            output_ids = self._generate_by_rule([item.input_ids for item in batch], in_order)
        return [text.strip() for text in self.tokenizer.batch_decode(output_ids, skip_special_tokens=True)]

    def _generate_by_rule(self, prompts: Sequence[Tensor], image_tokens: list[Any]) -> Tensor:
        """Decode as transformers does, with samples, beams and what the checkpoint's generation config adds."""
        input_ids, attention_mask = pad_left(prompts)
        device = self.model.device
        settings = self.settings
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.temperature > 0 else {}
        return self.model.generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            image_tokens=image_tokens,
            do_sample=settings.temperature > 0,
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            use_cache=True,
            **sampling,
        )
