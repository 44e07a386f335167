"""From messages and images to what a language-model engine reads: our towers, reducer and projector, for all requests.

    front = Front(llava)
    prompt = await front.prepare([Message("user", (image, "What color is the bus?"))], reduce="TRIM:-1")

Images are read by threads; one further thread runs the model, for all requests that wait at that moment. What depends
on an image alone is kept by the image's content, what depends on the question as well by image, query and reduction, so
that nothing is found under a name that is not all of what it depends on. The reduction is an argument of each request:
the model's own (`set_token_reduction`) is not touched.

Shape letters: `L` positions of a prompt, `M` tokens of an image, `E` width of the language model, `C` crops.
"""

import asyncio
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import torch
from PIL import Image
from torch import Tensor

from llava.clock import StageClock
from llava.errors import InputError
from llava.generation import is_end_token
from llava.mm_utils import process_images
from llava.model.image_tokens import ImageTokens
from llava.model.multimodal_encoder.tower import ImageFeatures
from llava.model.token_reduction import TEXT, Need, Reduction, parse_reduction
from llava.picture import Picture
from llava.prompt import check_text, end_of_turn, find_template
from llava.serve.dialogue import Dialogue, read_dialogue
from llava.serve.dialogue import Message as Message
from llava.serve.engine import ImageUse, Prompt
from llava.serve.kept import Kept

if TYPE_CHECKING:
    from llava.assistant import Llava

MAX_THREADS = 8
Item = TypeVar("Item")


@dataclass(frozen=True)
class FrontStats:
    """What a front has done since it was made.

    Attributes:
        num_prompts: made.
        num_images: in these prompts.
        num_patches: of these images, before reduction.
        num_tokens: of these images, after reduction.
        token_hits: images whose tokens were there, for the same query and reduction.
        feature_hits: images of which the vision tower's output was there.
        misses: images that the vision tower encoded.
        num_entries: kept now.
        cache_bytes: of what is kept now.
        max_cache_bytes: the bound.
        seconds: by stage: "read" (hashes and pixel values, over all threads), "encode" (the vision tower), "reduce"
            (text tower, selection, projector) and "embed".
    """

    num_prompts: int = 0
    num_images: int = 0
    num_patches: int = 0
    num_tokens: int = 0
    token_hits: int = 0
    feature_hits: int = 0
    misses: int = 0
    num_entries: int = 0
    cache_bytes: int = 0
    max_cache_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Shown:
    """An image of a request. `image` is upright and RGB; `pixels` are None where they were not needed at first."""

    content: str
    image: Image.Image
    pixels: Tensor | None


@dataclass(frozen=True, eq=False)
class _Draft:
    """A request that waits for the model."""

    dialogue: Dialogue
    shown: tuple[_Shown, ...]
    reduction: Reduction

    @property
    def query(self) -> str | None:
        """What the image tokens depend on besides image and reduction: the query, where the reduction reads it."""
        before = self.reduction.before
        return self.dialogue.query if before is not None and TEXT in before.needs else None

    @property
    def needs(self) -> frozenset[Need]:
        """What the vision tower has to give besides the patches."""
        before = self.reduction.before
        return frozenset(need for need in before.needs if need.layer is not None) if before else frozenset()

    def name_features(self, shown: _Shown) -> tuple:
        return "features", shown.content, self.needs

    def name_tokens(self, shown: _Shown) -> tuple:
        return "tokens", shown.content, self.reduction.spec(), self.query


class Front:
    """Makes prompts for one model; all methods belong to one event loop but `check_reduce` and `stats`."""

    def __init__(self, llava: "Llava", *, cache_bytes: int = 2**30, max_batch: int = 16):
        """Take a loaded model.

        Args:
            llava: the model, its tokenizer, image processor and template.
            cache_bytes: bound of what is kept of images, on the model's device; 0: nothing.
            max_batch: requests whose work is done together, and images per pass of a tower, at most.

        Raises:
            InputError: the checkpoint's own reduction is one that cannot be served, or a bound is out of range.
        """
        if cache_bytes < 0 or max_batch < 1:
            raise InputError(f"cache_bytes {cache_bytes}, max_batch {max_batch}: expected 0 or more, and 1 or more")
        self._model, self._tokenizer = llava.model, llava.tokenizer
        self._image_processor = llava.image_processor
        self._template = find_template(llava.conv_mode, llava.tokenizer)
        self._own = Reduction(self._model.token_reducer, self._model.layer_reducer)
        end = end_of_turn(self._template)
        self._end = None if is_end_token(end, self._model, self._tokenizer) else end or None
        self._max_batch = max_batch
        self._kept: Kept[ImageFeatures | ImageTokens] = Kept(cache_bytes)
        self._readers = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="front-read")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="front-model")
        self._waiting: deque[tuple[_Draft, Future[Prompt]]] = deque()
        self._tower_lock = Lock()  # the tower's weights change when a reduction needs more of it
        self._count_lock = Lock()
        self._clock = StageClock(self._model.device)
        self._read_seconds = 0.0
        self._counts = dict.fromkeys(
            ("num_prompts", "num_images", "num_patches", "num_tokens", "token_hits", "feature_hits", "misses"), 0
        )
        self.check_reduce(None)

    # What is asked from outside -----------------------------------------------------------------------------------
    async def prepare(
        self, messages: Sequence[Message], reduce: str | None = None, *, query: str | None = None
    ) -> Prompt:
        """Make the prompt of a dialogue.

        Args:
            messages: see `dialogue.read_dialogue`.
            reduce: token reduction of this request, as in `Llava.from_pretrained`; "none": none; None: the model's own
                when the front was made.
            query: what the CLIP text tower reads, where it is not the last message's text: benchmarks leave out how to
                answer.

        Raises:
            InputError: as `check_reduce` and `read_dialogue`; an image that cannot be used; a prompt that leaves the
                model no position for an answer.
        """
        reduction = self._parse(reduce)
        loop = asyncio.get_running_loop()
        draft = await loop.run_in_executor(self._readers, self._draft, tuple(messages), reduction, query)
        future: Future[Prompt] = Future()
        self._waiting.append((draft, future))
        self._worker.submit(self._serve)
        return await asyncio.wrap_future(future)

    def check_reduce(self, spec: str | None) -> None:
        """Refuse a token reduction that cannot be served; arguments as for `prepare`.

        The first reduction that needs a text tower or deeper layers of the vision tower waits for their weights.

        Raises:
            InputError: it does not parse, needs what the tower does not have, works inside the language model, or keeps
                positions with gaps.
        """
        self._get_ready(self._parse(spec))

    def stats(self) -> FrontStats:
        """Return what was done so far."""
        with self._count_lock:
            seconds = {"read": self._read_seconds} | self._clock.seconds
            kept = self._kept
            return FrontStats(**self._counts, num_entries=len(kept), cache_bytes=kept.num_bytes,
                              max_cache_bytes=kept.max_bytes, seconds=seconds)  # fmt: skip

    async def close(self) -> None:
        """Finish what has been begun, and stop the threads."""
        for pool in (self._readers, self._worker):
            await asyncio.to_thread(pool.shutdown)

    # Reductions ---------------------------------------------------------------------------------------------------
    def _parse(self, spec: str | None) -> Reduction:
        if spec is not None and not isinstance(spec, str):
            raise InputError(f'reduce {spec!r}: expected a token reduction such as "TRIM:-1", or "none"')
        reduction = self._own if spec is None else parse_reduction(spec)
        where = "the checkpoint's token reduction" if spec is None else "reduce"
        if reduction.inside is not None:
            raise InputError(
                f"{where} {reduction.spec()}: {reduction.inside.spec_name} works inside the language model, which a "
                "server's engine runs as it is; use a method before it, such as TRIM:-1, or none"
            )
        if reduction.before is not None and reduction.before.position_ids == "original":
            raise InputError(
                f"{where} {reduction.spec()}: a server counts positions without gaps; use position_ids=packed"
            )
        return reduction

    def _get_ready(self, reduction: Reduction) -> None:
        """Let the tower read what the reduction needs, if it has not yet."""
        tower = self._model.get_vision_tower()
        if reduction.before is None or (tower.is_loaded and reduction.before.needs <= tower.needs):
            return
        with self._tower_lock:
            self._model.read_reduction(reduction.spec())

    # Reading, in several threads ----------------------------------------------------------------------------------
    def _draft(self, messages: tuple[Message, ...], reduction: Reduction, query: str | None = None) -> _Draft:
        """Do everything that needs no model: ids, hashes of images, pixel values of those that are new."""
        self._get_ready(reduction)
        use_im_start_end = getattr(self._model.config, "mm_use_im_start_end", False)
        dialogue = read_dialogue(messages, self._template, self._tokenizer, use_im_start_end)
        if query is not None:
            check_text(query)
            dialogue = replace(dialogue, query=query.strip())
        self._check_length(len(dialogue.input_ids))  # an image leaves at least one token
        start = time.perf_counter()
        bare = _Draft(dialogue, (), reduction)
        shown = tuple(self._read(image, bare) for image in dialogue.images)
        with self._count_lock:
            self._read_seconds += time.perf_counter() - start
        return _Draft(dialogue, shown, reduction)

    def _read(self, source: Image.Image, draft: _Draft) -> _Shown:
        image = Picture(source).load()
        content = hashlib.sha256(f"{image.width}x{image.height}:".encode())
        content.update(image.tobytes())
        shown = _Shown(content.hexdigest(), image, None)
        if self._kept.find(draft.name_tokens(shown)) or self._kept.find(draft.name_features(shown)):
            return shown
        return _Shown(shown.content, image, self._to_pixels(image))

    def _to_pixels(self, image: Image.Image) -> Tensor:
        """`float32[3, S, S]` or `float32[C, 3, S, S]`."""
        return torch.as_tensor(process_images([image], self._image_processor, self._model.config)[0])

    def _check_length(self, num_positions: int) -> None:
        limit = self._model.config.max_position_embeddings
        if num_positions >= limit:
            raise InputError(
                f"the prompt takes {num_positions} positions with its image tokens, the model has {limit}: shorten the "
                "messages, give fewer images or reduce them more"
            )

    # The model, in one thread -------------------------------------------------------------------------------------
    def _serve(self) -> None:
        """Make the prompts of all requests that wait, up to `max_batch`."""
        taken = []
        while self._waiting and len(taken) < self._max_batch:
            draft, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                taken.append((draft, future))
        try:
            made = self._make([draft for draft, _ in taken])
        except Exception:
            # One image may be what does not fit into memory: each for itself.
            made = [self._try_to_make(draft) for draft, _ in taken]
        for (_, future), prompt in zip(taken, made, strict=True):
            if isinstance(prompt, Exception):
                future.set_exception(prompt)
            else:
                future.set_result(prompt)

    def _try_to_make(self, draft: _Draft) -> Prompt | Exception:
        try:
            return self._make([draft])[0]
        except Exception as error:
            return error

    @torch.inference_mode()
    def _make(self, drafts: Sequence[_Draft]) -> list[Prompt | InputError]:
        """Make prompts; an error for each that is too long."""
        with self._tower_lock:
            tokens = self._reduce(drafts)
        with self._clock.stage("embed"):
            made = [self._embed(draft, [tokens[draft.name_tokens(shown)] for shown in draft.shown]) for draft in drafts]
        prompts = [prompt for prompt in made if isinstance(prompt, Prompt)]
        uses = [use for prompt in prompts for use in prompt.images]
        with self._count_lock:
            self._counts["num_prompts"] += len(prompts)
            self._counts["num_images"] += len(uses)
            self._counts["num_patches"] += sum(use.num_patches for use in uses)
            self._counts["num_tokens"] += sum(use.num_tokens for use in uses)
        return made

    def _embed(self, draft: _Draft, images: list[ImageTokens]) -> Prompt | InputError:
        input_ids = draft.dialogue.input_ids
        try:
            self._check_length(len(input_ids) + sum(image.num_tokens - 1 for image in images))
        except InputError as error:
            return error
        (embeds,) = self._model.embed_prompts(torch.tensor([input_ids]), image_tokens=images).embeds  # [L, E]
        uses = tuple(ImageUse(image.num_tokens, image.num_patches) for image in images)
        return Prompt(embeds, uses, _name_prompt(draft), self._end)

    def _reduce(self, drafts: Sequence[_Draft]) -> dict[tuple, ImageTokens]:
        """Find or make the tokens of all images, by name."""
        asked = [(draft, shown) for draft in drafts for shown in draft.shown]
        tokens = {draft.name_tokens(shown): self._kept.find(draft.name_tokens(shown)) for draft, shown in asked}
        # 1. Each image for each question once, and the features that they are made of.
        absent = {
            draft.name_tokens(shown): (draft, shown) for draft, shown in asked if not tokens[draft.name_tokens(shown)]
        }
        features = self._encode(list(absent.values()))
        with self._count_lock:
            self._counts["token_hits"] += len(asked) - len(absent)
        # 2. Those that are reduced in the same way go together.
        groups: dict[str | None, list[tuple[_Draft, _Shown]]] = {}
        for draft, shown in absent.values():
            groups.setdefault(draft.reduction.spec(), []).append((draft, shown))
        with self._clock.stage("reduce"):
            for group in groups.values():
                for part in _in_parts(group, self._max_batch):
                    made = self._model.make_image_tokens(
                        [features[draft.name_features(shown)] for draft, shown in part],
                        [draft.dialogue.query for draft, _ in part],
                        [shown.image.size for _, shown in part],
                        reduction=part[0][0].reduction,
                    )
                    for (draft, shown), image in zip(part, made, strict=True):
                        # A copy: what comes back are slices of one tensor, of which each would keep the whole.
                        own = ImageTokens(image.features.clone(), image.num_patches)
                        tokens[draft.name_tokens(shown)] = own
                        self._kept.keep(draft.name_tokens(shown), own, own.features.nbytes)
        return tokens

    def _encode(self, wanted: Sequence[tuple[_Draft, _Shown]]) -> dict[tuple, ImageFeatures]:
        """Find or make the features of images, by name."""
        features = {draft.name_features(shown): self._kept.find(draft.name_features(shown)) for draft, shown in wanted}
        groups: dict[frozenset[Need], dict[tuple, _Shown]] = {}
        for draft, shown in wanted:
            name = draft.name_features(shown)
            if features[name] is None:
                groups.setdefault(draft.needs, {})[name] = shown
        num_absent = sum(map(len, groups.values()))
        with self._count_lock:
            self._counts["misses"] += num_absent
            self._counts["feature_hits"] += len(wanted) - num_absent
        for needs, group in groups.items():
            for part in _in_parts(list(group.items()), self._max_batch):
                pixels = [self._to_pixels(shown.image) if shown.pixels is None else shown.pixels for _, shown in part]
                with self._clock.stage("encode"):
                    encoded = self._model.encode_patches(pixels, needs)
                for (name, _), image in zip(part, encoded, strict=True):
                    features[name] = own = _copy(image)
                    values = (own.patches, *own.intermediates.values())
                    self._kept.keep(name, own, sum(value.nbytes for value in values))
        return features


def _copy(features: ImageFeatures) -> ImageFeatures:
    """Copy out of the batch that an image was encoded in."""
    return ImageFeatures(
        features.patches.clone(), {need: value.clone() for need, value in features.intermediates.items()}
    )


def _in_parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _name_prompt(draft: _Draft) -> str:
    """Hash everything that the embeddings of a prompt depend on."""
    images = [(shown.content, draft.reduction.spec(), draft.query) for shown in draft.shown]
    return hashlib.sha256(json.dumps([draft.dialogue.input_ids, images]).encode()).hexdigest()
