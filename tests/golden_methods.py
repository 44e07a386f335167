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
from llava.model.token_reduction.base import PROJECTED, cosines
from llava.model.token_reduction.cd_pruner import SMALLEST_RELEVANCE, find_relevance, pick_by_determinant
from llava.model.token_reduction.dart import find_pivots, take_least_similar
from llava.model.token_reduction.div_prune import pick_diverse
from llava.model.token_reduction.fast_v import keep_attended
from llava.model.token_reduction.layers import keep_top
from llava.model.token_reduction.prumerge import attend_as_one_head, find_dropped
from llava.model.token_reduction.pyramid_drop import rank_by_last_query
from llava.model.token_reduction.scope import pick_by_coverage
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
from llava.model.token_reduction.vis_pruner import choose_survivors

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


def check_visionzip(case: Case) -> bool:
    hidden, keys, attention = batched(case["hidden"], 3), batched(case["keys"], 4), batched(case["cls_attn"], 3)
    num_images, num_patches = hidden.shape[0], hidden.shape[1] - 1
    needs = {Need("cls_attention", -2): attention, Need("cls", -2): hidden[:, 0], Need("keys", -2): keys}
    tokens = VisualTokens(hidden[:, 1:], square(num_patches), intermediates=needs)
    reduced = parse_reducer(f"VisionZip:{case['dominant']},contextual={case['contextual']}")(tokens)
    found = torch.stack([row[order] for row, order in zip(reduced.features, reduced.order, strict=True)])
    expected = case["keep_idx_cls0"].reshape(num_images, -1)
    same_patches = [[0, *(place + 1 for place in row)] for row in kept_indices(reduced)] == np.sort(expected).tolist()
    return same_patches and is_close(found, batched(case["tokens"], 3), 1e-5)


def check_divprune(case: Case) -> bool:
    projected = batched(case["projected"], 3)
    num_images, num_patches, _ = projected.shape
    tokens = VisualTokens(
        numbered_patches(num_images, num_patches), square(num_patches), intermediates={PROJECTED: projected}
    )
    reducer = parse_reducer(f"DivPrune:{float(case['subset_ratio'])!r}")
    picks = pick_diverse(projected, reducer.count_kept(num_patches))
    return picks.tolist() == case["selection_order"].reshape(num_images, -1).tolist() and kept_indices(
        reducer(tokens)
    ) == expected_indices(case, num_images)


def check_cdpruner(case: Case) -> bool:
    projected, joint = batched(case["projected"], 3), batched(case["joint"], 3)
    num_images, num_patches, _ = projected.shape
    text = torch.tensor(case["text"]).expand(num_images, -1, -1)  # [I, rows, P]
    count, expected = int(case["budget"]), case["selection_order"].reshape(num_images, -1).tolist()
    relevance = find_relevance(joint, text)
    # The code scales over the whole batch; a batch of one is scaled as an image is.
    low, high = relevance.min(), relevance.max()
    picks = pick_by_determinant(cosines(projected), (relevance - low + SMALLEST_RELEVANCE) / (high - low), count)
    if num_images > 1:
        return picks.tolist() == expected
    tokens = VisualTokens(projected, square(num_patches), joint, text, {PROJECTED: projected})
    kept = kept_indices(parse_reducer(f"CDPruner:{count}")(tokens))
    return picks.tolist() == expected and kept == expected_indices(case, num_images)


def check_scope(case: Case) -> bool:
    patches, attention = batched(case["patches"], 3), batched(case["cls_attn"], 3)
    num_images, num_patches, _ = patches.shape
    # The code divides the budget by the number of images.
    count, alpha, combine = int(case["budget"]) // num_images, float(case["alpha"]), str(case["combine"])
    saliency = attention.sum(dim=1) ** alpha
    picks = pick_by_coverage(cosines(patches), saliency, count, adds=combine == "add")
    tokens = VisualTokens(patches, square(num_patches), intermediates={Need("cls_attention", -2): attention})
    kept = kept_indices(parse_reducer(f"SCOPE:{count},alpha={alpha!r},combine={combine}")(tokens))
    expected = case["selection_order"].reshape(num_images, -1).tolist()
    return picks.tolist() == expected and kept == expected_indices(case, num_images)


def check_vispruner(case: Case) -> bool:
    patches, attention = batched(case["patches"], 3), batched(case["cls_attn"], 3)
    num_images, num_patches, _ = patches.shape
    tokens = VisualTokens(patches, square(num_patches), intermediates={Need("cls_attention", -2): attention})
    ratio, count = float(case["important_ratio"]), int(case["budget"])
    kept = kept_indices(parse_reducer(f"VisPruner:{count},important_ratio={ratio!r}")(tokens))
    is_same = kept == expected_indices(case, num_images)
    if "selection_order" in case:
        order = attention.mean(dim=1).argsort(dim=1, descending=True, stable=True)
        important = int(count * ratio)
        survivors = choose_survivors(patches, order[:, important:], count - important)
        found = torch.cat([order[:, :important], survivors], dim=1)
        is_same &= found.tolist() == case["selection_order"].reshape(num_images, -1).tolist()
    return is_same


def check_prumerge(case: Case, name: str = "PruMerge") -> bool:
    patches, keys, query = batched(case["patches"], 3), batched(case["keys"], 3), batched(case["query_cls"], 2)
    num_images, num_patches, _ = patches.shape
    needs = {Need("keys", -1): keys[:, None], Need("cls_query", -1): query[:, None]}
    attention = attend_as_one_head(query[:, None], keys[:, None])
    # The code takes one ratio for a batch: for more than one image its count is a fixed budget.
    is_adaptive = bool(case["adaptive"]) and num_images == 1
    budget = "-1" if is_adaptive else repr(float(case["reduction_ratio"]))
    reducer = parse_reducer(f"{name}:{budget}")
    reduced = reducer(VisualTokens(patches, square(num_patches), intermediates=needs))
    count = int(num_patches * float(case["reduction_ratio"]) + 1e-9)
    orders = attention.argsort(dim=1, descending=True, stable=True)
    kept = [reducer.choose(order, count) for order in orders]
    dropped = [find_dropped(own, num_patches).tolist() for own in kept]
    return (
        [own.tolist() for own in kept] == case["keep_idx"].reshape(num_images, -1).tolist()
        and dropped == case["complement_idx"].reshape(num_images, -1).tolist()
        and reduced.lengths.tolist() == [len(kept[0]) + 1] * num_images
        and is_close(attention, batched(case["cls_attn"], 2), 1e-5)
        and is_close(reduced.features, batched(case["tokens"], 3), 1e-5)
    )


def check_prumergeplus(case: Case) -> bool:
    return check_prumerge(case, "PruMerge+")


def check_hiprune(case: Case) -> bool:
    # The maps from recorded queries and keys: the middle layer, then the deep one.
    queries, keys = batched(case["q"], 5), batched(case["k"], 5)  # [I, 2, H, N + 1, d]
    num_images, num_patches = queries.shape[0], queries.shape[3] - 1
    maps = (queries @ keys.transpose(-1, -2)).softmax(dim=-1)
    received = maps.mean(dim=(2, 3))[..., 1:]  # [I, 2, N]
    middle = int(case["object_layer"])
    needs = {Need("received", middle): received[:, 0], Need("received", -2): received[:, 1]}
    tokens = VisualTokens(numbered_patches(num_images, num_patches), square(num_patches), intermediates=needs)
    # The code divides the budget by the number of images.
    count = int(case["budget"]) // num_images
    spec = f"HiPrune:{count},alpha={float(case['alpha'])!r},object_layer={middle}"
    return kept_indices(parse_reducer(spec)(tokens)) == expected_indices(case, num_images)


def check_holov(case: Case) -> bool:
    projected, attention = batched(case["projected"], 3), batched(case["cls_attn"], 3)
    num_images, num_patches, _ = projected.shape
    needs = {PROJECTED: projected, Need("cls_attention", -2): attention}
    tokens = VisualTokens(numbered_patches(num_images, num_patches) + 1, square(num_patches), intermediates=needs)
    reduced = parse_reducer(f"HoloV:{case['budget']},crops={case['num_crops']}")(tokens)
    found = torch.stack([row[order] for row, order in zip(reduced.features[..., 0], reduced.order, strict=True)]) - 1
    blanks = (found < 0).sum(dim=1)
    return found.tolist() == batched(case["order_idx"], 2).tolist() and blanks.tolist() == reduced.num_blank.tolist()


# Inside the language model ------------------------------------------------------------------------------------------
def image_of(case: Case) -> slice:
    start = int(case["image_start"])
    return slice(start, start + int(case["image_len"]))


def check_fastv(case: Case) -> bool:
    attention, image = torch.tensor(case["attn_last"]), image_of(case)
    num_tokens = int(case["image_len"])
    method = parse_reduction(f"FastV:{1 - float(case['ratio'])!r},layer={case['K']}").inside
    kept = keep_attended(attention[:, image], method.counts(num_tokens, 32)[0])
    before, after = list(range(image.start)), list(range(image.stop, int(case["seq_len"])))
    positions = before + [image.start + place for place in kept.tolist()] + after
    return (
        kept.tolist() == case["keep_idx"].tolist()
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
        is_same &= is_close(found, scores, 1e-5) and top.tolist() == kept
        num_left = length - (len(found) - len(top))
        is_same &= positions[:num_left] == list(range(num_left))
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
    raters = find_raters(visual, text).nonzero().flatten().tolist()
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
        and kept.tolist() == case["keep_idx"].tolist()
    )
    dropped = torch.tensor([place for place in range(num_tokens) if place not in kept.tolist()])
    num_left = int(case["seq_len"]) - len(dropped)
    if is_plus:
        expected = [*range(image.start), *(image.start + place for place in kept.tolist())]
        return is_same and case["position_ids"].tolist()[: len(expected)] == expected
    merged = recycle(torch.tensor(case["hidden"])[image][dropped], scores[dropped], torch.tensor(case["density_noise"]))
    return (
        is_same
        and len(merged) == int(case["num_merged"]) == count_recycled(len(dropped))[1]
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
        and kept.tolist() == case["keep_idx"].tolist()
        and len(kept) == method.counts(num_tokens, 32)[0]
    )


def is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether values agree relative to the largest expected one."""
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())


CHECKS: dict[str, Callable[[Case], bool]] = {
    "cdpruner": check_cdpruner,
    "dart": check_dart,
    "divprune": check_divprune,
    "fastervlm": check_fastervlm,
    "fastv": check_fastv,
    "hiprune": check_hiprune,
    "holov": check_holov,
    "prumerge": check_prumerge,
    "prumergeplus": check_prumergeplus,
    "pyramiddrop": check_pyramiddrop,
    "scope": check_scope,
    "sparsevlm": check_sparsevlm,
    "visionzip": check_visionzip,
    "vispruner": check_vispruner,
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
