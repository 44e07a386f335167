"""The evaluation loop against a plain loop: the pocket model, and 7B shapes with random weights."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava.efficiency.estimate import PUBLISHED_KEPT_RATIO, fix_kept
from llava.eval.benchmark import LOADER_MAX_NEW_TOKENS
from llava.model.builder import DTYPES, load_pretrained_model, load_tokenizer
from llava.model.token_reduction import parse_reducer
from playground.shapes.sentence import UNANSWERABLE_HINT
from scripts.bench import side_by_side
from scripts.bench.eval_loop import compare
from scripts.gpu.parts import REDUCTIONS, Figures, Scale, Steps

FEW_IMAGES = 4
"""Images that the plain loop gets of 7B's: it takes the longest by far."""
ENDING_SHARE = 3
"""Every third token ends an answer of the model with random weights: answers of a few tokens, of different lengths."""
MAX_NEW_TOKENS = 16
"""Its limit: such a model may repeat one token for ever."""


def make_steps(scale: Scale, out: Path) -> Steps:
    images, dtypes = (1, ("float32",)) if scale.is_rehearsal else (20, ("float32", "bfloat16"))
    steps = {}
    for num_images, per_image in ((images, 18), (4 * images, 1)):
        ending = f"{per_image} question{'s' * (per_image > 1)} per image"
        for dtype in dtypes:
            steps[f"pocket model, {dtype}, {ending}"] = partial(ask_pocket, scale, dtype, num_images, per_image)
        for reduction in REDUCTIONS:
            name = f"{scale.source.name} with random weights, bfloat16, {reduction}, {ending}"
            steps[name] = partial(ask_random, scale, reduction, num_images, per_image)
    return steps


def ask_pocket(scale: Scale, dtype: str, num_images: int, questions_per_image: int) -> Figures:
    loaded = load_pretrained_model(str(side_by_side.CHECKPOINT), device=str(scale.device), dtype=DTYPES[dtype])
    return ask(scale, *loaded[:3], num_images, questions_per_image)


def ask_random(scale: Scale, reduction: str, num_images: int, questions_per_image: int) -> Figures:
    """Ask a model with random weights, whose answers are those of a model that answers in a few tokens."""
    model, image_processor = scale.build(torch.bfloat16)
    tokenizer = load_tokenizer(str(side_by_side.CHECKPOINT))
    # It reads and writes with the pocket model's vocabulary, which is the beginning of its own.
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = 0
    model.generation_config.eos_token_id = list(range(2, len(tokenizer), ENDING_SHARE))
    model.generation_config.pad_token_id = 0
    num_patches = model.get_vision_tower().num_patches
    model.token_reducer = fix_kept(parse_reducer(reduction), num_patches, PUBLISHED_KEPT_RATIO)
    few = FEW_IMAGES if questions_per_image > 1 else num_images
    limits = {"few_images": few, "max_new_tokens": MAX_NEW_TOKENS}
    return ask(scale, tokenizer, model, image_processor, num_images, questions_per_image, **limits)


def ask(
    scale: Scale,
    tokenizer: Any,
    model: Any,
    image_processor: Any,
    num_images: int,
    questions_per_image: int,
    *,
    few_images: int | None = None,
    max_new_tokens: int = LOADER_MAX_NEW_TOKENS,
) -> Figures:
    """Ask both ways: questions per second and their ratio."""
    hint = UNANSWERABLE_HINT if questions_per_image == 1 else ""
    with tempfile.TemporaryDirectory() as folder:
        questions = side_by_side.draw_questions(Path(folder), num_images, questions_per_image, hint)
        few = questions[: (few_images or num_images) * questions_per_image]
        rounds = 1 if scale.is_rehearsal else 3
        found = compare(model, tokenizer, image_processor, questions, few, rounds=rounds, max_new_tokens=max_new_tokens)
    return {
        "questions": found.counts,
        "per_second": {name: vars(rate) for name, rate in found.per_second().items()},
        "ratio": vars(found.ratio()),
        "same_answers": [found.num_same, len(few)],
    }
