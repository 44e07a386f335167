"""The recorded cases (tests/golden) on the accelerator, and batches against single samples, in each precision."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.files import read_json
from llava.generation import GreedyDecoder
from llava.model.builder import DTYPES, load_pretrained_model
from scripts.gpu.parts import Figures, Scale, Steps

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
CHECKPOINTS = {"none": "", "auto": "-TRIM", "r025": "-TRIM-r025", "r05": "-TRIM-r05"}
# Of the language model and of the towers, which LLaVA runs in float32.
PRECISIONS = (("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
NEW_TOKENS = 16
BATCH_SIZE = 8
REHEARSED = 16
"""A rehearsal takes every sixteenth case."""


def make_steps(scale: Scale, out: Path) -> Steps:
    steps = {}
    for dtype, tower in PRECISIONS[:: 3 if scale.is_rehearsal else 1]:
        name = dtype if tower == "float32" else f"{dtype}, towers {tower}"
        steps[f"cases, {name}"] = partial(compare_cases, scale, dtype, tower)
        steps[f"batches of {BATCH_SIZE}, {name}"] = partial(compare_batches, scale, dtype, tower)
    return steps


def compare_cases(scale: Scale, dtype: str, tower_dtype: str) -> Figures:
    """Compare kept patches, answers and logits with the recorded ones, case by case."""
    found = {"cases": 0, "kept_equal": 0, "kept_differ_by": 0, "ids_equal": 0, "logit_error": 0.0}
    with exact_float32(), inside(GOLDEN / "checkpoints"), torch.inference_mode():
        for case in list_cases(scale):
            model = load(case["tower"], case["cfg"], dtype, tower_dtype, scale.device)
            numbers = recorded(f"cases_{case['tower']}_{case['cfg']}")
            key, text = f"{case['image']}/{case['text']}", texts()[case["text"]]
            ids = torch.tensor(numbers[f"{key}/input_ids"]).reshape(1, -1)
            tokens = model.encode_images(pixels(case), [text])[0]
            logits = model(input_ids=ids, images=pixels(case), texts=[text]).logits[0, -1]
            answer = model.generate(ids, image_tokens=[tokens], max_new_tokens=NEW_TOKENS, do_sample=False)[0]

            theirs = torch.tensor(numbers[f"{key}/first_logits"]).flatten()
            error = (logits.float().cpu() - theirs).norm() / theirs.norm()
            missed = 0
            if case["cfg"] != "none":
                kept = set(tokens.kept[0].nonzero().flatten().tolist())
                missed = len(kept ^ set(numbers[f"{key}/indices"].flatten().tolist()))
            found["cases"] += 1
            found["kept_equal"] += missed == 0
            found["kept_differ_by"] = max(found["kept_differ_by"], missed)
            found["ids_equal"] += answer.tolist() == case["generated"]
            found["logit_error"] = max(found["logit_error"], float(error))
    return found


def compare_batches(scale: Scale, dtype: str, tower_dtype: str) -> Figures:
    """Compare what samples give in batches with what each gives alone."""
    cases = [case for case in list_cases(scale) if case["tower"] == "84" and case["cfg"] in ("auto", "none")]
    found = {"cases": 0, "kept_equal": 0, "ids_equal": 0}
    with exact_float32(), inside(GOLDEN / "checkpoints"), torch.inference_mode():
        for start in range(0, len(cases), BATCH_SIZE):
            batch = cases[start : start + BATCH_SIZE]
            model = load("84", "auto", dtype, tower_dtype, scale.device)
            prompts = [
                torch.tensor(recorded(f"cases_84_{case['cfg']}")[f"{case['image']}/{case['text']}/input_ids"]).flatten()
                for case in batch
            ]
            queries = [texts()[case["text"]] for case in batch]
            images = [pixels(case)[0] for case in batch]
            together = model.encode_images(images, queries)
            alone = [model.encode_images([image], [query])[0] for image, query in zip(images, queries, strict=True)]
            decoder = GreedyDecoder(model)
            answers = decoder.decode(prompts, [(tokens,) for tokens in together], NEW_TOKENS)
            singles = [
                decoder.decode([prompt], [(own,)], NEW_TOKENS)[0] for prompt, own in zip(prompts, alone, strict=True)
            ]
            found["cases"] += len(batch)
            found["kept_equal"] += sum(torch.equal(a.kept, b.kept) for a, b in zip(together, alone, strict=True))
            found["ids_equal"] += sum(a == b for a, b in zip(answers, singles, strict=True))
    return found


def list_cases(scale: Scale) -> list[dict[str, Any]]:
    return core()["cases"][:: REHEARSED if scale.is_rehearsal else 1]


def texts() -> dict[str, str]:
    return core()["texts"]


@cache
def core() -> dict[str, Any]:
    return read_json(GOLDEN / "core.json")


@cache
def recorded(name: str) -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def pixels(case: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(recorded(f"pixel_values_{case['tower']}")[case["image"]])[None]


@cache
def load(tower: str, cfg: str, dtype: str, tower_dtype: str, device: torch.device) -> Any:
    """Load a recorded checkpoint; they are tiny, so all stay."""
    path = f"llava-v1.5-tiny{tower}{CHECKPOINTS[cfg]}"
    options = {"dtype": DTYPES[dtype], "tower_dtype": DTYPES[tower_dtype]}
    # A numbered device: everything on one.
    return load_pretrained_model(path, device=str(device) if device.type == "cpu" else f"{device.type}:0", **options)[1]


@contextmanager
def exact_float32() -> Iterator[None]:
    """Switch off the rounding of float32 products that cuDNN does by default (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder: the checkpoints name their towers relative to it."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
