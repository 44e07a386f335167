"""Numbers recorded from the published code (tests/golden): our model gives the same, case by case."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.model.builder import load_pretrained_model

GOLDEN = Path(__file__).parents[1] / "golden"
DEVICE = os.environ.get("LLAVA_TEST_DEVICE", "cpu")
CORE = json.loads((GOLDEN / "core.json").read_text())
# Logits and features: float32 rounding, 1e-4 relative to the size of the recorded vector.
RELATIVE = 1e-4
CHECKPOINT = {"none": "", "auto": "-TRIM", "r025": "-TRIM-r025", "r05": "-TRIM-r05"}


def case_name(case: dict) -> str:
    return f"{case['tower']}-{case['cfg']}-{case['image']}-{case['text']}"


@cache
def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@cache
def load(tower: str, cfg: str, dtype: str = "float32"):
    _, model, _, _ = load_pretrained_model(f"llava-v1.5-tiny{tower}{CHECKPOINT[cfg]}", dtype=dtype, device=DEVICE)
    return model


def picture(case: dict) -> torch.Tensor:
    return torch.tensor(recorded(f"pixel_values_{case['tower']}")[case["image"]])[None]


def close(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    theirs = torch.tensor(theirs, device=ours.device).reshape(ours.shape)
    return bool((ours.float() - theirs).norm() <= RELATIVE * theirs.norm())


@pytest.mark.parametrize("case", CORE["cases"], ids=case_name)
def test_case_equals_the_published_code(case, checkpoints):
    model = load(case["tower"], case["cfg"])
    numbers = recorded(f"cases_{case['tower']}_{case['cfg']}")
    key = f"{case['image']}/{case['text']}"
    text = CORE["texts"][case["text"]]
    ids = torch.tensor(numbers[f"{key}/input_ids"]).reshape(1, -1)

    tokens = model.encode_images(picture(case), [text])[0]
    logits = model(input_ids=ids, images=picture(case), texts=[text]).logits[0, -1]
    answer = model.generate(ids, image_tokens=[tokens], texts=[text], max_new_tokens=16, do_sample=False)[0]

    assert tokens.num_tokens == case["actual_dims"][0]
    if case["cfg"] != "none":
        assert tokens.kept[0].nonzero().flatten().tolist() == numbers[f"{key}/indices"].reshape(-1).tolist()
    if f"{key}/projected" in numbers:
        assert close(tokens.features, numbers[f"{key}/projected"])
    assert close(logits.detach(), numbers[f"{key}/first_logits"])
    assert answer.tolist() == case["generated"]


@pytest.mark.parametrize("case", [c for c in CORE["cases"] if c["cfg"] != "none"], ids=case_name)
def test_scores_and_reduced_features_equal_the_published_code(case, checkpoints):
    model = load(case["tower"], case["cfg"])
    key = f"{case['image']}/{case['text']}"
    numbers = recorded(f"cases_{case['tower']}_{case['cfg']}")
    scores = recorded(f"sims_{case['tower']}")
    patches = model.encode_patches(picture(case))
    tower = model.get_vision_tower()
    joint, text = tower.project_to_joint(patches[0].patches), tower.embed_text([CORE["texts"][case["text"]]])

    from llava.model.image_tokens import reduce_patches

    reduced = reduce_patches(
        model.token_reducer, tower, model.get_model().mm_projector, patches, [CORE["texts"][case["text"]]]
    )[0]
    features = reduced.features[0, : reduced.lengths[0]]
    assert close(text[0], recorded(f"text_{case['tower']}")[f"{case['text']}/text_embeds"])
    assert close((joint @ text[0])[0], scores[f"{key}/sim"])
    assert close(reduced.scores[0], scores[f"{key}/prob"])
    assert close(features[-1], numbers[f"{key}/aggregated"])
    if f"{key}/reduced" in numbers:
        assert close(features, numbers[f"{key}/reduced"])


@pytest.mark.parametrize("tower", ["84", "336"])
def test_tower_features_equal_the_published_code(tower, checkpoints):
    model = load(tower, "auto")
    numbers = recorded(f"features_{tower}")
    for name, pixels in recorded(f"pixel_values_{tower}").items():
        if f"{name}/hidden_m2" not in numbers:
            continue
        patches = model.encode_patches(torch.tensor(pixels)[None])[0].patches
        assert close(patches[0], numbers[f"{name}/hidden_m2"][1:])
        joint = model.get_vision_tower().project_to_joint(patches)[0]
        assert close(joint, numbers[f"{name}/visual_projection"][-joint.shape[0] :])


def test_bfloat16_load_keeps_the_same_counts_in_at_least_95_percent_of_cases(checkpoints):
    cases = [case for case in CORE["cases"] if case["cfg"] != "none"]
    equal = 0
    for case in cases:
        model = load(case["tower"], case["cfg"], "bfloat16")
        tokens = model.encode_images(picture(case), [CORE["texts"][case["text"]]])[0]
        assert tokens.features.dtype == torch.bfloat16
        equal += int(tokens.kept.sum()) == case["k"]
    assert equal / len(cases) >= 0.95


def test_recovered_query_selects_what_the_given_text_selects(checkpoints):
    for case in CORE["cases"]:
        # Two texts hold what ids do not keep: white space at the ends, and "</s>" inside the question.
        if case["cfg"] != "auto" or case["text"] in ("spaces", "eot"):
            continue
        model = load(case["tower"], "auto")
        ids = recorded(f"cases_{case['tower']}_auto")[f"{case['image']}/{case['text']}/input_ids"]
        assert model.recover_queries(torch.tensor(ids).reshape(1, -1)) == [CORE["texts"][case["text"]]]
