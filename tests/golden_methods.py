"""Compare the methods with answers of their authors' own code: `python -m tests.golden_methods DIR`.

DIR holds one npz file per method and set, as tests/golden/methods describes. Each robust case is given to the
registered reducer, or to the selection function of a method inside the language model; a line per file says how many
agree.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from llava.model.language_model.layer_reduction import SampleView
from llava.model.token_reduction import Need, ReducedTokens, VisualTokens, parse_reducer, parse_reduction
from llava.model.token_reduction.dart import find_pivots, take_least_similar
from llava.model.token_reduction.fast_v import keep_attended
from llava.model.token_reduction.layers import keep_top
from llava.model.token_reduction.pyramid_drop import rank_by_last_query
from llava.model.token_reduction.sparse_vlm import (
    PLUS_TARGETS,
    TARGETS,
    count_recycled,
    find_raters,
    rate,
    rate_plus,
    recycle,
    rotary_weights,
)

Case = dict[str, np.ndarray]
METHODS = Path(__file__).parent / "golden" / "methods"


def read_cases(path: Path) -> Iterator[tuple[str, Case]]:
    """Each case of a file with its name, its shared input included."""
    with np.load(path) as file:
        arrays = {tuple(key.split("/", 1)): file[key] for key in file.files if key != "meta"}
    for name in sorted({group for group, _ in arrays if group.startswith("case")}):
        groups = (f"in{arrays[name, 'input']}", name)
        yield name, {key: values for group in groups for (own, key), values in arrays.items() if own == group}


def batched(values: np.ndarray, dims: int) -> Tensor:
    """A recorded array with its leading axis of images, which single cases lack; dims counts it."""
    tensor = torch.tensor(values)
    return tensor if tensor.dim() == dims else tensor[None]


def numbered_patches(num_images: int, num_patches: int) -> Tensor:
    """Patches `[I, N, 1]` that hold their own number, for methods that look at something else."""
    return torch.arange(num_patches, dtype=torch.float32).expand(num_images, -1)[..., None]


def square(num_patches: int) -> tuple[int, int]:
    side = round(num_patches**0.5)
    return side, side


def kept_indices(reduced: ReducedTokens) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in reduced.kept]


def expected_indices(case: Case, num_images: int) -> list[list[int]]:
    return case["keep_idx"].reshape(num_images, -1).tolist()


def check_fastervlm(case: Case) -> bool:
    attention = batched(case["cls_attn"], 3)  # [I, H, N]
    num_images, _, num_patches = attention.shape
    patches = numbered_patches(num_images, num_patches)
    tokens = VisualTokens(patches, square(num_patches), intermediates={Need("cls_attention", -2): attention})
    reduced = parse_reducer(f"FasterVLM:{case['budget']}")(tokens)
    expected = expected_indices(case, num_images)
    return reduced.features[..., 0].long().tolist() == expected and kept_indices(reduced) == expected


# Inside the language model ------------------------------------------------------------------------------------------
def image_of(case: Case) -> slice:
    start = int(case["image_start"])
    return slice(start, start + int(case["image_len"]))


def places(kept: Tensor) -> list[int]:
    return kept.nonzero().flatten().tolist()


def check_fastv(case: Case) -> bool:
    attention, image = torch.tensor(case["attn_last"]), image_of(case)
    num_tokens = int(case["image_len"])
    method = parse_reduction(f"FastV:{1 - float(case['ratio'])!r},layer={case['K']}").inside
    kept = keep_attended(attention[:, image], method.counts(num_tokens, 32)[0])
    before, after = list(range(image.start)), list(range(image.stop, int(case["seq_len"])))
    positions = before + [image.start + place for place in places(kept)] + after
    return (
        places(kept) == case["keep_idx"].tolist()
        and positions == case["keep_positions"].tolist()
        and (positions == case["position_ids"].tolist()) == (method.position_ids == "original")
    )


def check_pyramiddrop(case: Case) -> bool:
    """The query and key of a real decoder layer, with the recorded weights."""
    model = make_decoder(case)
    image, ratio = image_of(case), float(case["ratios"][int(case["stage"]) + 1])
    length = int(case["prompt_len_text"]) + int(case["image_len"])
    is_same = True
    for hidden, scores, kept, positions in zip(
        batched(case["hidden"], 3),
        batched(case["scores"], 2),
        case["keep_idx"].reshape(-1, case["keep_idx"].shape[-1]).tolist(),
        case["new_position_ids"].reshape(-1, case["new_position_ids"].shape[-1]).tolist(),
        strict=True,
    ):
        # The padding on the right is left out.
        rows = torch.arange(length)
        view = SampleView(model, None, 0, 0, hidden, hidden[:length], rows, rows, image, [], hidden, image, [])
        found = rank_by_last_query(view.next_attention([length - 1])[:, 0, image])
        top = keep_top(found, int(int(case["image_len_original"]) * ratio))
        is_same &= is_close(found, scores, 1e-5) and places(top) == kept
        is_same &= positions[: length - int((~top).sum())] == list(range(length - int((~top).sum())))
    return is_same and parse_reduction("PyramidDrop").inside.position_ids == "packed"


def make_decoder(case: Case) -> LlamaModel:
    """One decoder layer with the recorded projections and norm."""
    width = case["w_q"].shape[0]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=int(case["num_heads"]),
        rms_norm_eps=float(case["norm_eps"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(case["rope_base"])},
        vocab_size=3,
    )
    model = LlamaModel(config).eval().requires_grad_(False)
    layer = model.layers[0]
    for name in ("q", "k"):
        getattr(layer.self_attn, f"{name}_proj").weight.copy_(torch.tensor(case[f"w_{name}"]))
    layer.input_layernorm.weight.copy_(torch.tensor(case["norm_weight"]))
    return model


def check_sparsevlm(case: Case) -> bool:
    is_plus = str(case["version"]) == "2_0"
    visual, text = torch.tensor(case["embeds_visual"]), torch.tensor(case["embeds_text"])
    image, num_tokens = image_of(case), int(case["image_len"])
    # 1. Raters.
    raters = places(find_raters(visual, text))
    # 2. Scores.
    attention = torch.tensor(case["attn_text_rows"])[:, raters]
    if attention.shape[-1] != num_tokens:
        attention = attention[:, :, image]
    if is_plus:
        frequencies = 10000.0 ** -(torch.arange(0, int(case["head_dim"]), 2) / int(case["head_dim"]))
        rows = torch.tensor(raters) + image.stop
        scores = rate_plus(attention, rotary_weights(rows, torch.arange(image.start, image.stop), frequencies))
    else:
        scores = rate(attention)
    # 3. Selection, and what is merged.
    targets = dict(PLUS_TARGETS if is_plus else TARGETS)[int(case["retain"])]
    kept = keep_top(scores, min(targets[{2: 0, 6: 1, 15: 2}[int(case["layer"])]], num_tokens - 1))
    is_same = (
        raters == case["rater_text_idx"].tolist()
        and is_close(scores, torch.tensor(case["scores"]), 2e-3 if is_plus else 1e-5)
        and places(kept) == case["keep_idx"].tolist()
    )
    num_left = int(case["seq_len"]) - int((~kept).sum())
    if is_plus:
        expected = [*range(image.start), *(image.start + place for place in places(kept))]
        return is_same and case["position_ids"].tolist()[: len(expected)] == expected
    merged = recycle(torch.tensor(case["hidden"])[image][~kept], scores[~kept], torch.tensor(case["density_noise"]))
    return (
        is_same
        and len(merged) == int(case["num_merged"]) == count_recycled(int((~kept).sum()))[1]
        and is_close(merged, torch.tensor(case["merged"]), 1e-5)
        and case["position_ids"].tolist() == list(range(num_left + len(merged)))
    )


def check_dart(case: Case) -> bool:
    image, num_tokens = image_of(case), int(case["image_len"])
    budget = int(case["max_num_trunction"])
    budget_text = repr(1 - float(case["reduction_ratio"])) if budget < 0 else str(budget)
    method = parse_reduction(
        f"DART:{budget_text},pivot_image={case['pivot_image']},pivot_text={case['pivot_text']}"
    ).inside
    keys = torch.tensor(case["keys"])
    found = find_pivots(keys, image, range(image.stop, keys.shape[1]), method.pivot_image, method.pivot_text)
    visits = list(set(found[0]).union(found[1]))
    kept = take_least_similar(torch.tensor(case["state"]), image, found[0], visits, method.quota(num_tokens))
    return (
        found == (case["image_pivots"].tolist(), case["text_pivots"].tolist())
        and visits == case["pivot_visit_order"].tolist()
        and places(kept) == case["keep_idx"].tolist()
        and int(kept.sum()) == method.counts(num_tokens, 32)[0]
    )


def is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether values agree relative to the largest expected one."""
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())


CHECKS: dict[str, Callable[[Case], bool]] = {
    "dart": check_dart,
    "fastervlm": check_fastervlm,
    "fastv": check_fastv,
    "pyramiddrop": check_pyramiddrop,
    "sparsevlm": check_sparsevlm,
}
"""By the method's name in the files' names: whether ours gives the recorded answer to a case."""


def count_agreements(path: Path) -> tuple[list[str], list[str]]:
    """Names of the robust cases of a file that agree, and of those that do not.

    Raises:
        SystemExit: the file is of no known method.
    """
    method = path.stem.rsplit("_", 1)[0]
    if method not in CHECKS:
        sys.exit(f"error: {path}: no method {method}; known: {', '.join(CHECKS)}")
    agreed, missed = [], []
    for name, case in read_cases(path):
        if case["robust"]:
            (agreed if CHECKS[method](case) else missed).append(name)
    return agreed, missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=METHODS, help="holds METHOD_SET.npz files")
    paths = sorted(parser.parse_args().folder.glob("*.npz"))
    num_missed = 0
    for path in paths:
        agreed, missed = count_agreements(path)
        num_missed += len(missed)
        sys.stdout.write(" ".join([path.stem, f"{len(agreed)}/{len(agreed) + len(missed)}", *missed]) + "\n")
    if not paths:
        sys.exit("error: the folder holds no npz file")
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
