"""What a token reduction leaves of an image, patch by patch, before the language model and between its layers.

Of an image of several crops the first, the whole view, is looked at.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from llava.drawing import CROPPED, Panel, Sight, View, count_unseen, shrink
from llava.errors import InputError
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.image_tokens import CropMerge, ImageTokens, find_sources
from llava.model.language_model.causal import LlavaCausalLM
from llava.model.language_model.layer_reduction import ReducedCache, trace_image
from llava.model.multimodal_encoder.tower import ImageFeatures
from llava.model.token_reduction import CONFIG_KEY, Need, Reduction, TokenReducer
from llava.model.token_reduction.baselines import Pool
from llava.prompt import DEFAULT_CONV_MODE, check_text, query_of, recover_text, wrap_prompt
from llava.protocols import ImageProcessor


@dataclass(frozen=True)
class Case:
    """An image and a question, ready for every method that it was prepared for.

    Attributes:
        image: mode RGB.
        features: of the image, with what the methods need.
        question: the user's text.
        query: what the token reduction reads of it.
        ids: `int64[T]` the prompt, with one placeholder id.
    """

    image: Image.Image
    features: ImageFeatures
    question: str
    query: str
    ids: Tensor


@dataclass(frozen=True)
class Stage:
    """What layers of the language model read of an image.

    Attributes:
        first, after: the first of these layers, counted from 0, and the first one behind them.
        kept: `bool[N]` patches that they read as they are, on the CPU.
        num_made: tokens that they read besides, made of several patches.
        num_tokens: all that they read of the image, over all crops.
    """

    first: int
    after: int
    kept: Tensor
    num_made: int
    num_tokens: int


@dataclass(frozen=True)
class Look:
    """What a reduction leaves of one image for one prompt.

    Attributes:
        reduction: the methods.
        tokens: as the first layer reads them.
        sources: `int64[M_0]` the patch of each token, as `image_tokens.find_sources` says.
        stages: by rising layers; one where no method works inside the language model.
        cells: rows and columns that the patches are averaged to; None: they are not.
        sight: what the tower sees of the image.
    """

    reduction: Reduction
    tokens: ImageTokens
    sources: Tensor
    stages: tuple[Stage, ...]
    cells: tuple[int, int] | None = None
    sight: Sight = CROPPED

    def describe_tokens(self) -> str:
        """How many tokens the language model reads, for a person: `17 tokens`, or `17, then 8 tokens`."""
        counts = dict.fromkeys(str(stage.num_tokens) for stage in self.stages)
        return ", then ".join(counts) + " token" + "s" * (list(counts) != ["1"])

    @property
    def centres(self) -> Tensor | None:
        """`bool[N]` patches that merged tokens are made around, on the CPU, or None."""
        return None if self.tokens.centres is None else self.tokens.centres[0].cpu()


# -------------------------------------------------------------------------------------------------------------- looking
@contextmanager
def reduced_by(model: LlavaCausalLM, reduction: Reduction) -> Iterator[None]:
    """Let a model reduce in another way for a while.

    Raises:
        InputError: the model cannot serve the method; names its spec.
    """
    before, spec = Reduction(model.token_reducer, model.layer_reducer), getattr(model.config, CONFIG_KEY, None)
    if reduction != before:  # else there is nothing to warn of again
        try:
            model.set_token_reduction(reduction.spec())
        except InputError as error:
            raise InputError(f"{reduction.spec()}: {error}") from None
    try:
        yield
    finally:
        model.take_reduction(before)
        setattr(model.config, CONFIG_KEY, spec)


@torch.inference_mode()
def prepare(
    model: LlavaCausalLM,
    image_processor: ImageProcessor,
    image: Image.Image,
    question: str,
    reductions: Sequence[Reduction],
    conv_mode: str = DEFAULT_CONV_MODE,
) -> Case:
    """Encode an image once for several methods, and make the prompt.

    Args:
        model: its tokenizer is attached.
        image_processor: of its vision tower.
        image: mode RGB.
        question: the user's text.
        reductions: the methods.
        conv_mode: conversation template.

    Raises:
        InputError: the model cannot serve a method, or the question is one that no tokenizer takes.
    """
    needs: set[Need] = set()
    for reduction in reductions:
        with reduced_by(model, reduction):
            needs |= reduction.before.needs if reduction.before is not None else set()
    values = process_images([image], image_processor, model.config)
    (features,) = model.encode_patches(values, needs)
    return ask_else(model, Case(image, features, "", "", torch.empty(0)), question, conv_mode)


def ask_else(model: LlavaCausalLM, case: Case, question: str, conv_mode: str = DEFAULT_CONV_MODE) -> Case:
    """Put another question to a case's image, which is not encoded again.

    Raises:
        InputError: the question is one that no tokenizer takes.
    """
    question = recover_text(question)
    check_text(question)
    return replace(case, question=question, query=query_of(question), ids=make_ids(model, question, 1, conv_mode))


def make_ids(model: LlavaCausalLM, question: str, num_images: int, conv_mode: str) -> Tensor:
    """Make the prompt of a question about images: `int64[T]`, with a placeholder id for each."""
    use_im_start_end = getattr(model.config, "mm_use_im_start_end", False)
    prompt = wrap_prompt(question, num_images, conv_mode, use_im_start_end, model.tokenizer)
    return tokenizer_image_token(prompt, model.tokenizer, return_tensors="pt")


def look_at(model: LlavaCausalLM, case: Case, reduction: Reduction) -> Look:
    """Look at what a method leaves of a case that was prepared for it."""
    with reduced_by(model, reduction):
        (look,) = look_at_images(model, [case.features], [case.image.size], case.query, case.ids)
    return look


@torch.inference_mode()
def look_at_images(
    model: LlavaCausalLM,
    images: Sequence[ImageFeatures],
    sizes: Sequence[tuple[int, int]],
    query: str,
    ids: Tensor,
) -> list[Look]:
    """Look at what a model's reduction leaves of the images of one prompt.

    Args:
        model: reduces.
        images: encoded with what it needs, in the order of the placeholders.
        sizes: (width, height) of each in pixels.
        query: what the token reduction reads.
        ids: `int64[T]` the prompt, read where tokens leave inside the language model.

    Returns:
        One look per image.
    """
    reduction, tower = Reduction(model.token_reducer, model.layer_reducer), model.get_vision_tower()
    # 1. Before the language model.
    reduced = model.choose_tokens(list(images), [query] * len(images))
    tokens = model.project_chosen(reduced, list(sizes))
    merge = CropMerge.of_config(model.config, tower.image_size, None)
    sources = [find_sources(each, merge) for each in reduced]
    cells = [find_cells(reduction.before, tower.grid, len(each)) for each in sources]
    # 2. Inside it.
    cache = read_prompt(model, ids, tokens) if reduction.inside is not None else None
    looks = []
    for number, own in enumerate(zip(tokens, sources, strict=True)):
        stages = make_stages(model, cache, number, *own)
        looks.append(Look(reduction, *own, stages, cells[number], Sight(tower.squeezes, tower.covered)))
    return looks


def find_cells(reducer: TokenReducer | None, grid: tuple[int, int], num_tokens: int) -> tuple[int, int] | None:
    """Return the rows and columns that pooling has averaged an image's patches to; None for other methods."""
    parts = reducer.parts(grid) if isinstance(reducer, Pool) else ()
    return next((cells for part in parts if math.prod(cells := part.output_grid(grid)) == num_tokens), None)


def read_prompt(model: LlavaCausalLM, ids: Tensor, tokens: list[ImageTokens]) -> ReducedCache:
    """Let the language model read one prompt, `int64[T]`; the cache knows which image tokens have left."""
    batch = model.embed_prompts(ids[None], attention_mask=torch.ones_like(ids)[None], image_tokens=tokens)
    cache = model.make_cache(batch)
    model(
        inputs_embeds=batch.embeds, attention_mask=batch.attention_mask, past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    return cache


def make_stages(
    model: LlavaCausalLM, cache: ReducedCache | None, image: int, tokens: ImageTokens, sources: Tensor
) -> tuple[Stage, ...]:
    """Say for each stretch of layers which patches of an image its layers read.

    Args:
        model: has read the prompt.
        cache: of the prompt; None: no token leaves inside the language model.
        image: which of the prompt's images.
        tokens: of the image at the first layer.
        sources: `int64[M_0]` the patch of each token of the first crop.
    """
    num_patches = math.prod(model.get_vision_tower().grid)
    num_layers = model.config.num_hidden_layers
    spans, places = [(0, num_layers)], [torch.arange(tokens.num_tokens)]
    if cache is not None:
        spans = [(stretch.first, stretch.after) for stretch in cache.stretches]
        places = trace_image(cache, 0, image, tokens.num_tokens)
    stages = []
    for span, left in zip(spans, places, strict=True):
        own = left[left < len(sources)]  # of this crop, and merged ones
        patches = torch.where(own >= 0, sources[own.clamp(min=0)], own)
        kept = torch.zeros(num_patches, dtype=torch.bool)
        kept[patches[patches >= 0]] = True
        stages.append(Stage(*span, kept, int((patches < 0).sum()), len(left)))
    return tuple(stages)


# -------------------------------------------------------------------------------------------------------------- drawing
def make_view(image: Image.Image, look: Look, grid: tuple[int, int], aspect_ratio: str | None, name: str = "") -> View:
    """Put together what is drawn of a look: a panel for each stage that does not keep everything, and the scores.

    Args:
        image: mode RGB.
        look: of this image.
        grid: rows and columns of patches.
        aspect_ratio: the checkpoint's `image_aspect_ratio`.
        name: of the model or run; empty: the method's spec string.

    Raises:
        InputError: nothing is reduced.
    """
    before = look.reduction.before
    name = name or look.reduction.spec() or ""
    if look.reduction == Reduction():
        raise InputError("without a token reduction every patch is kept: there is nothing to draw beside the image")
    shown, box = shrink(image, aspect_ratio, look.sight)
    centres = None if look.centres is None else look.centres.reshape(grid).numpy()
    panels = []
    for stage in look.stages:
        is_first = stage.first == 0
        if is_first and len(look.stages) > 1 and stage.kept.all():
            continue
        kept = stage.kept.reshape(grid).numpy()
        cells = look.cells if is_first else None
        unseen = count_unseen(kept, shown.size, box)
        caption = f"{name}\n{describe_stage(look, stage)}" + f", {unseen} in the padding" * bool(unseen)
        # Pooling leaves no patch and drops none.
        panels.append(Panel(caption, kept if cells is None else ~kept, centres if is_first else None, cells))
        if is_first and look.tokens.scores is not None:
            scores = look.tokens.scores[0].reshape(grid).float().cpu().numpy()
            panels.append(Panel(f"{name}\n{before.scores_name or 'scores'}", kept, centres, scores=scores))
    return View(shown, box, panels)


def describe_stage(look: Look, stage: Stage) -> str:
    """Say in a line what layers read of an image."""
    num_kept, num_patches = int(stage.kept.sum()), len(stage.kept)
    has_stages = len(look.stages) > 1
    layers = (
        f"layers {stage.first} to {stage.after - 1}: " if stage.after - stage.first > 1 else f"layer {stage.first}: "
    )
    layers *= has_stages
    made = look.reduction.before.made_name if look.reduction.before is not None else ""
    if look.cells is not None and stage.first == 0:
        return f"{layers}{num_patches} patches averaged to {look.cells[0]} x {look.cells[1]}"
    if stage.num_made and not num_kept and look.centres is not None:
        return f"{layers}{stage.num_made} tokens: {made}"
    if stage.first > 0:
        made = f"{stage.num_made} merged"
    elif stage.num_made > 1:
        made = f"{stage.num_made}: {made}"
    return f"{layers}{num_kept} of {num_patches} patches kept" + f" + {made}" * bool(stage.num_made)
