"""From questions to answers: the one loop that asks a model, and a whole run around it.

`answer_questions` is the loop: load images -> reduce -> batches -> generate -> append. Each image and each query is
encoded once, the reduction is made once per question, and the language model gets batches of sequences of like length,
while the next images are read. An answer is the same whatever else is in its batch; batches only save time. A question
that cannot be asked is reported and does not stop the others.

`make_answers` is a run: it joins or starts the run on disk, loads the model only if something is left to answer, asks,
and closes the run.

Shape letters: `S` samples, `T` prompt ids, `P` width of the joint space.
"""

import ctypes
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from llava.cli import LoadedModel, ModelSpec
from llava.errors import InputError
from llava.eval.benchmark import LOADER_MAX_NEW_TOKENS, ImageSource, Question, Row, index_questions, row_key
from llava.eval.features import EncodedImage, FeatureCache, FeatureStore, QueryCache, apply_in_parts
from llava.eval.identity import identify_images, identify_model, identify_questions
from llava.eval.predictions import PredictionStore, check_workers, make_row, name_questions
from llava.files import explain_errors
from llava.generation import Generator
from llava.mm_utils import tokenize_prompts
from llava.model.token_reduction import parse_reduction
from llava.prompt import DEFAULT_CONV_MODE, choose_conv_mode, find_template, wrap_prompt
from llava.protocols import ImageProcessor, ImageTokens, Tokenizer, VisionLanguageModel
from llava.sampling import Sampling

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

CACHED_IMAGES = 64
REDUCTION_BATCH = 64
"""Images reduced at once, each for its question."""

# How much is done at once; answers do not depend on any of it.
MAX_ROWS = 128
MAX_ROWS_ON_CPU = 64
ACCELERATOR_SHARE = 0.5
CPU_SHARE = 0.125
ASSUMED_MEMORY = 8 * 2**30
"""Bytes of memory of a machine that does not tell how much it has."""
UNIT_BYTES = 2**31
MIN_UNIT, MAX_UNIT = 64, 512
MIN_SHARED_UNIT = 8
UNITS_PER_WORKER = 4
"""Where several workers share a small benchmark, units are small enough that each worker gets about this many, of
`MIN_SHARED_UNIT` questions at least."""
ANYRES_CROPS = 5
"""A whole view and four tiles, as LLaVA-1.6's canvases have it."""


@dataclass(frozen=True)
class Settings:
    """How questions are asked.

    Attributes:
        model_id: name of the checkpoint in the answers file.
        sampling: how answers are searched for; with a temperature they differ from run to run.
        conv_mode: conversation template.
        batch_size: questions that the language model reads at once; None: as many as memory allows (`choose_limits`).
        cached_images: encoded images kept from one unit of work to the next.
        num_workers: workers that share the questions.
        end: text that ends an answer besides the tokens that the checkpoint names, as a dialogue's template has it;
            None: none, as in the released evaluation.
    """

    model_id: str
    sampling: Sampling = field(default_factory=partial(Sampling, max_new_tokens=LOADER_MAX_NEW_TOKENS))
    conv_mode: str = DEFAULT_CONV_MODE
    batch_size: int | None = None
    cached_images: int = CACHED_IMAGES
    num_workers: int = 1
    end: str | None = None


@dataclass(frozen=True)
class Fault:
    """A question that got no answer, and why."""

    question: Question
    reason: str


class Sink(Protocol):
    """Where answers go, and who else is answering; `predictions.PredictionStore` is the one on disk."""

    key_fields: Sequence[str]
    done: Collection[str]

    def claim(self, unit: int) -> bool:
        """Take a unit of work, unless somebody else has it."""

    def refresh(self) -> None:
        """Bring `done` up to date with what others have answered."""

    def append(self, rows: Sequence[Row]) -> None:
        """Take answers in."""


# ------------------------------------------------------------------------------------------------------------- the loop
def answer_questions(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    image_processor: ImageProcessor,
    questions: Sequence[Question],
    sink: Sink,
    settings: Settings,
    store: FeatureStore | None = None,
) -> list[Fault]:
    """Ask every question that has no answer yet. On the CPU the process keeps freed memory from then on.

    Args:
        model: a `LlavaCausalLM`, or another with the methods of the protocol.
        tokenizer: of the language model.
        image_processor: of the vision tower.
        questions: all of them, answered or not: all workers plan from the same list.
        sink: takes the answers batch by batch.
        settings: how to ask.
        store: images that are encoded already, for several reductions.

    Returns:
        The questions that this call could not answer.
    """
    # 1. Plan: records that cannot be asked are faults; the others become units in which equal images meet.
    faults = [Fault(question, question.fault) for question in questions if question.fault]
    sound = [question for question in questions if not question.fault]
    units = plan_units(sound, choose_unit_size(model), settings.num_workers)
    keys = [row_key(question.head(), sink.key_fields) for question in sound]
    if model.device.type == "cpu":
        keep_freed_memory()
    with (
        torch.inference_mode(),
        closing(Predictor(model, tokenizer, image_processor, settings, store)) as predictor,
        tqdm(total=len(questions), desc=settings.model_id, unit="q", smoothing=0.05) as progress,
    ):

        def claim() -> Iterator[list[Question]]:
            for todo in claim_units(units, sink):
                progress.update(sum(key in sink.done for key in keys) - progress.n)
                yield todo

        # 2. Take the units that no other worker has, and put the answers of a batch on the disk before the next one.
        for answered, failed in predictor.run(claim()):
            sink.append([make_row(each.question, each.text, settings.model_id, each.metadata) for each in answered])
            faults += failed
            progress.update(len(answered))
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


@dataclass(frozen=True)
class Answered:
    """A question with its answer.

    Attributes:
        question: what was asked.
        text: the answer.
        image_tokens: one record per image.
        num_positions: positions that the language model read.
        seconds: by stage; where a stage works on many questions at once, each has an equal share of its time.
    """

    question: Question
    text: str
    image_tokens: tuple[ImageTokens, ...]
    num_positions: int
    seconds: Mapping[str, float]

    @property
    def metadata(self) -> dict[str, int]:
        """Visual tokens of the question after and before reduction, over all its images."""
        return {
            "num_tokens": sum(image.num_tokens for image in self.image_tokens),
            "num_patches": sum(image.num_patches for image in self.image_tokens),
        }


@dataclass(frozen=True)
class Prepared:
    """A question ready for the language model.

    Attributes:
        question: what is asked.
        input_ids: int64[T] prompt with a sentinel per image.
        image_tokens: one record per image.
        seconds: this question's share of the time that preparing took, by stage.
    """

    question: Question
    input_ids: Tensor
    image_tokens: tuple[ImageTokens, ...]
    seconds: Mapping[str, float]

    @property
    def length(self) -> int:
        """Positions that the language model reads."""
        return len(self.input_ids) - len(self.image_tokens) + sum(image.num_tokens for image in self.image_tokens)


class Predictor:
    """The steps of the loop with what stays between them: settings, encoded images, embedded queries, prefixes."""

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        settings: Settings,
        store: FeatureStore | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.features = FeatureCache(model, image_processor, settings.cached_images, store)
        self.clock = self.features.clock
        self.queries = QueryCache(model)
        self.generator = Generator(model, tokenizer)
        self.limits = choose_limits(model, settings.batch_size)
        self.conv_mode = choose_conv_mode(settings.conv_mode, settings.model_id)
        find_template(self.conv_mode, tokenizer)  # one that the tokenizer has not is no fault of a question

    def announce(self, questions: Sequence[Question]) -> None:
        """Read the images of the questions that come next."""
        self.features.announce(image for question in questions for image in question.images)

    def close(self) -> None:
        """Stop reading images."""
        self.features.close()

    def run(self, units: Iterable[list[Question]]) -> Iterator[tuple[list[Answered], list[Fault]]]:
        """Answer units of work.

        Args:
            units: questions that are prepared together.

        Yields:
            Batch by batch the answers, and the faults of the batch; those of the preparation come first.
        """
        # 1. Threads read the images of the next unit meanwhile.
        for todo in look_ahead(units, self.announce):
            # 2. Prompts and image tokens of the unit: encode each image once, reduce it for each question.
            prepared, faults = self.prepare(todo)
            if faults:
                yield [], faults
            # 3. Batches of sequences of like length, as large as memory allows.
            for batch in self.make_batches(prepared):
                # 4. Generate.
                yield self.answer(batch)

    def prepare(self, questions: Sequence[Question]) -> tuple[list[Prepared], list[Fault]]:
        """Make prompts and image tokens; report the questions for which that is impossible."""
        encoded, unreadable = self.features.encode(image for question in questions for image in question.images)
        asked: list[Question] = []
        prompts: list[str] = []
        faults: list[Fault] = []
        for question in questions:
            broken = [unreadable[image] for image in question.images if image in unreadable]
            try:
                if broken:
                    raise InputError(broken[0])
                prompts.append(self.wrap(question))
                asked.append(question)
            except InputError as error:
                faults.append(Fault(question, str(error)))
        input_ids = map(torch.tensor, tokenize_prompts(prompts, self.tokenizer))
        with self.clock.stage("reduce"):
            image_tokens = self.reduce(asked, encoded)
        seconds = _share(self.clock.take(), len(asked))
        rows = zip(asked, input_ids, image_tokens, strict=True)
        return [Prepared(*each, seconds) for each in rows], faults

    def wrap(self, question: Question) -> str:
        use_im_start_end = getattr(self.model.config, "mm_use_im_start_end", False)
        return wrap_prompt(question.prompt, len(question.images), self.conv_mode, use_im_start_end, self.tokenizer)

    def reduce(
        self, questions: Sequence[Question], encoded: dict[ImageSource, EncodedImage]
    ) -> list[tuple[ImageTokens, ...]]:
        """Choose the image tokens of each question, for its own query."""
        embeds = self.queries.embed([question.query for question in questions for _ in question.images])
        # A reduction that reads no query makes the same of an image for every question: once.
        queries = {question.query: "" if embeds is None else question.query for question in questions}
        pairs = [[(image, queries[question.query]) for image in question.images] for question in questions]
        distinct = list(dict.fromkeys(pair for own in pairs for pair in own))

        def reduce_some(some: Sequence[tuple[ImageSource, str]]) -> list[ImageTokens]:
            return self.model.make_image_tokens(
                [encoded[image].features for image, _ in some],
                [query for _, query in some],
                image_sizes=[encoded[image].size for image, _ in some],
                text_embeds=None if embeds is None else torch.stack([embeds[query] for _, query in some]),  # [I, P]
            )

        tokens = dict(zip(distinct, apply_in_parts(reduce_some, distinct, REDUCTION_BATCH), strict=True))
        return [tuple(tokens[pair] for pair in own) for own in pairs]

    def make_batches(self, prepared: Sequence[Prepared]) -> list[list[Prepared]]:
        """Cut a unit into batches of like length; questions about one image together, where it can be read once."""
        sampling, group = self.settings.sampling, None
        if self.generator.shares_images([item.image_tokens for item in prepared], sampling):
            order = {id(item.image_tokens[0]): number for number, item in reversed(list(enumerate(prepared)))}

            def group(item: Prepared) -> int:
                return order[id(item.image_tokens[0])]

        return batch_by_length(prepared, lambda item: item.length + sampling.max_new_tokens, self.limits.allow, group)

    def answer(self, batch: Sequence[Prepared]) -> tuple[list[Answered], list[Fault]]:
        """Answer a batch in one call; if that fails, its halves, so that only the guilty question is lost."""
        try:
            with self.clock.stage("generate"):
                texts = self.generator.answer(
                    [item.input_ids for item in batch],
                    [item.image_tokens for item in batch],
                    self.settings.sampling,
                    end=self.settings.end,
                )
        except (InputError, torch.OutOfMemoryError) as error:
            reason = " ".join(str(error).split())
        else:
            seconds = _share(self.clock.take(), len(batch))
            pairs = zip(batch, texts, strict=True)
            return [
                Answered(item.question, text, item.image_tokens, item.length, {**item.seconds, **seconds})
                for item, text in pairs
            ], []
        # Outside the handler, so that the failed call's tensors are gone before the next one.
        if len(batch) == 1:
            return [], [Fault(batch[0].question, reason)]
        middle = len(batch) // 2
        answered, faults = self.answer(batch[:middle])
        more_answered, more_faults = self.answer(batch[middle:])
        return answered + more_answered, faults + more_faults


def _share(seconds: Mapping[str, float], num_questions: int) -> dict[str, float]:
    return {stage: value / max(1, num_questions) for stage, value in seconds.items()}


# ------------------------------------------------------------------------------------------------ which together
def plan_units(questions: Sequence[Question], limit: int, num_workers: int = 1) -> list[list[Question]]:
    """Cut questions into units of work, the same for every worker, whatever its batch size.

    Args:
        questions: in question order.
        limit: questions of a unit at most: enough to sort by length and to meet an image again, few enough to hold
            in memory (`choose_unit_size`).
        num_workers: workers that share the units.

    Returns:
        Units of half the limit to the limit, the last may be smaller. Questions about the same images are together,
        within one unit if they fit; groups come in the order in which they first appear.
    """
    if num_workers > 1:
        fair_share = -(-len(questions) // (num_workers * UNITS_PER_WORKER))
        limit = min(limit, max(MIN_SHARED_UNIT, fair_share))
    groups: dict[tuple[ImageSource, ...], list[Question]] = {}
    for question in questions:
        groups.setdefault(question.images, []).append(question)
    units: list[list[Question]] = []
    for group in groups.values():
        if not units or (len(units[-1]) + len(group) > limit and 2 * len(units[-1]) >= limit):
            units.append([])
        for question in group:
            if len(units[-1]) == limit:
                units.append([])
            units[-1].append(question)
    return units


def batch_by_length(
    items: Sequence[Item],
    length: Callable[[Item], int],
    allow: Callable[[int, int], bool],
    group: Callable[[Item], int] | None = None,
) -> list[list[Item]]:
    """Cut items into batches of like length; of equally long ones the earlier comes first.

    Args:
        items: in any order.
        length: of an item.
        allow: whether a batch may hold this number of items of up to this length.
        group: number of an item's group. Groups then come in the order of their numbers, and length counts only within
            a group; a batch may hold several, and a group may be cut.
    """
    batches: list[list[Item]] = []
    longest = 0
    for item in sorted(items, key=lambda item: (group(item) if group else 0, length(item))):
        longest = max(longest, length(item))
        if not batches or not allow(len(batches[-1]) + 1, longest):
            batches.append([])
            longest = length(item)
        batches[-1].append(item)
    return batches


# ----------------------------------------------------------------------------------------------------- how much at once
@dataclass(frozen=True)
class BatchLimits:
    """What one batch of the language model may hold.

    Attributes:
        rows: questions.
        positions: questions times the positions of the longest, new tokens included; None: any.
    """

    rows: int
    positions: int | None = None

    def allow(self, num_rows: int, longest: int) -> bool:
        """Whether this number of questions of up to `longest` positions fits; a single one always does."""
        if num_rows == 1:
            return True
        return num_rows <= self.rows and (self.positions is None or num_rows * longest <= self.positions)


def choose_limits(model: VisionLanguageModel, batch_size: int | None) -> BatchLimits:
    """Turn `--batch-size` into limits: a number is taken as it is; None (auto) follows from shapes and memory.

    On an accelerator up to 128 questions, as long as their KV cache, at full answer length, and one layer's activations
    fit into half of the free memory. On the CPU up to 64, where more gain little, and an eighth of the machine's
    memory: nothing reports a shortage there before the process is killed.
    """
    if batch_size is not None:
        return BatchLimits(batch_size)
    rows = MAX_ROWS_ON_CPU if model.device.type == "cpu" else MAX_ROWS
    return BatchLimits(rows, max(1, int(usable_bytes(model.device) / position_bytes(model))))


def position_bytes(model: VisionLanguageModel) -> int:
    """Estimate the memory that one position of one question takes: KV cache, and activations of one layer."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads)
    activations = 6 * config.hidden_size + 3 * config.intermediate_size
    return (cache + activations) * model.dtype.itemsize


def usable_bytes(device: torch.device) -> float:
    """Return how much of the memory a batch may take."""
    if device.type != "cpu":
        try:
            return ACCELERATOR_SHARE * torch.accelerator.get_memory_info(device)[0]
        except (RuntimeError, NotImplementedError):
            pass  # a backend that cannot report it
    if not hasattr(os, "sysconf"):  # Windows
        return CPU_SHARE * ASSUMED_MEMORY
    return CPU_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_unit_size(model: VisionLanguageModel) -> int:
    """Choose how many questions are prepared together, patches and image tokens of all in memory.

    All workers of a run must find the same number: it depends on the checkpoint alone, not on memory or batch size.
    """
    config = model.config
    crops = ANYRES_CROPS if getattr(config, "image_aspect_ratio", None) == "anyres" else 1
    each = model.get_vision_tower().num_patches * crops * (4 * config.mm_hidden_size + 4 * config.hidden_size)
    return min(MAX_UNIT, max(MIN_UNIT, UNIT_BYTES // each))


# Names and values of <malloc.h> of glibc (man 3 mallopt).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT_BYTES = 2**30
GROWTH_BYTES = 2**26


def keep_freed_memory() -> bool:
    """Let the process keep up to a GiB of freed memory for its next tensors, from now on.

    By default glibc hands the memory of large tensors back as soon as they are gone, and the system clears every page
    anew for the next ones: thousands of page faults per pass of a language model on the CPU, a quarter of the time of a
    batch of short prompts. The process then stays near its peak size instead of shrinking between batches.

    Returns:
        Whether the C library has such a setting (glibc has).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc; on Windows there is no library without a name
        return False
    settings = {M_MMAP_THRESHOLD: KEPT_BYTES, M_TRIM_THRESHOLD: KEPT_BYTES, M_TOP_PAD: GROWTH_BYTES}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


# ------------------------------------------------------------------------------------------------------ a whole run
@dataclass(frozen=True)
class Outcome:
    """How a run ended, seen from one worker.

    Attributes:
        faults: questions that this worker could not answer.
        missing: questions without an answer when the file was written; None if other workers are still at it.
    """

    faults: list[Fault]
    missing: list[Question] | None

    @property
    def complete(self) -> bool:
        """Whether this worker leaves nothing undone."""
        return not self.faults and not self.missing

    def describe(self, answers_file: Path) -> list[str]:
        """Describe what went wrong and what was done, in lines for a person."""
        lines = [f"question {fault.question.id}: {fault.reason}" for fault in self.faults]
        if self.missing is None:
            lines.append(f"done here; another worker will finish {answers_file}")
        elif self.missing:
            lines.append(f"{answers_file} lacks {len(self.missing)} answers: question {name_questions(self.missing)}")
        return lines


def make_answers(
    spec: ModelSpec,
    questions: Sequence[Question],
    answers_file: Path,
    settings: Settings,
    key_fields: Sequence[str],
    *,
    limit: int | None = None,
    worker: int = 0,
    notify: Callable[[str], None],
    load: Callable[[], LoadedModel] | None = None,
    store: FeatureStore | None = None,
) -> Outcome:
    """Answer questions into a file.

    Args:
        spec: the model.
        questions: all questions of the file.
        answers_file: where the answers go.
        settings: how to ask.
        key_fields: columns that together name a question.
        limit: answer only this number of questions, from the start.
        worker: number of this worker, where several processes share the questions.
        notify: is given, in one line each, what a person should know while the run goes on.
        load: gives the model that `spec` describes, loaded already; None: it is loaded if something is left to ask.
        store: images that are encoded already, for several reductions.

    Raises:
        InputError: two questions cannot be told apart, the model cannot be loaded, or the file cannot be written or
            is in use by another worker of this number.
    """
    load = load or spec.load
    check_workers(settings.num_workers)
    index_questions(questions, key_fields)
    spec = spec.resolve()
    run = describe_run(spec, questions, settings, key_fields)

    def ask(loaded: LoadedModel, asked: list[Question], sink: Sink, model_id: str) -> list[Fault]:
        tokenizer, model, image_processor = loaded
        own = replace(settings, model_id=model_id)
        return answer_questions(model, tokenizer, image_processor, asked, sink, own, store)

    return keep_answers(
        run, questions, answers_file, key_fields, limit=limit, worker=worker, notify=notify, load=load, ask=ask
    )


def keep_answers(
    run: Mapping[str, object],
    questions: Sequence[Question],
    answers_file: Path,
    key_fields: Sequence[str],
    *,
    limit: int | None,
    worker: int,
    notify: Callable[[str], None],
    load: Callable[[], Loaded],
    ask: Callable[[Loaded, list[Question], Sink, str], list[Fault]],
) -> Outcome:
    """Join or start a run on disk, ask what is left, and close it; other arguments as for `make_answers`.

    Args:
        run: everything that all answers depend on, `model_id` among it.
        load: gives what `ask` asks; called only if something is left to ask, or old answers would be moved aside.
        ask: asks all questions that the sink does not have yet, under this name of the model.

    Raises:
        InputError: the file cannot be written or is in use by another worker of this number.
    """
    asked = list(questions[:limit])
    with explain_errors("write", answers_file):
        answers_file.parent.mkdir(parents=True, exist_ok=True)
    # 1. What the answers depend on. A run that goes on may have nothing left to do; a fresh one moves old answers aside
    # once its model is loaded.
    images = identify_images(asked, key_fields)
    answers = PredictionStore(answers_file, key_fields, worker)
    loaded = None if answers.holds(run, images) else load()
    moved = answers.open(run, images)
    if moved:
        others = f" ({', '.join(answers.changes)})" if answers.changes else ""
        notify(f"{answers_file} held answers of a run with other settings; they are now {moved}{others}")
    # 2. What is left.
    unanswered = [question for question in asked if row_key(question.head(), key_fields) not in answers.done]
    if len(unanswered) < len(asked):
        notify(f"{len(asked) - len(unanswered)} of {len(asked)} questions are answered already")
    faults = [Fault(question, question.fault) for question in unanswered if question.fault]
    # 3. Ask, and put the parts of all workers together if this is the last one.
    if len(faults) < len(unanswered):
        faults = ask(load() if loaded is None else loaded, asked, answers, str(answers.run["model_id"]))
    return Outcome(faults, answers.finish(questions, asked))


OPTIONAL = ("load_8bit", "load_4bit", "calibrated", "budget")
"""What a run's description holds only where it is set."""


def describe_run(
    spec: ModelSpec, questions: Sequence[Question], settings: Settings, key_fields: Sequence[str]
) -> dict[str, object]:
    """List everything that all answers depend on; answers of a different list are not mixed with these.

    Images are not part of it: each counts for the questions about it.
    """
    loading = {name: value for name, value in asdict(spec).items() if value or name not in OPTIONAL}
    if spec.reduce is not None:  # TRIM:0.50 is TRIM:0.5
        loading["reduce"] = parse_reduction(spec.reduce).spec() or "none"
    device = spec.device.split(":")[0] if spec.device else "auto"
    return {
        **loading,
        "device": device if spec.dtype is None else "any",
        **identify_model(spec),
        "questions": identify_questions(questions, key_fields),
        "model_id": settings.model_id,
        "conv_mode": choose_conv_mode(settings.conv_mode, settings.model_id),
        **asdict(settings.sampling),
    }
