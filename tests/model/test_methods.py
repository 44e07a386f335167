"""Other authors' methods: the patches that their own code keeps (tests/golden/methods)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llava.model.token_reduction import Need, VisualTokens, parse_reducer

METHODS = Path(__file__).parents[1] / "golden" / "methods"


def read_cases(method: str) -> list[dict[str, np.ndarray]]:
    """Each robust case of a method, its shared input included."""
    with np.load(METHODS / f"{method}_a.npz") as file:
        arrays = {tuple(key.split("/")): file[key] for key in file.files if key != "meta"}
    cases = []
    for name in sorted({group for group, _ in arrays if group.startswith("case")}):
        shared = f"in{arrays[name, 'input']}"
        case = {key: value for group in (shared, name) for (own, key), value in arrays.items() if own == group}
        if case["robust"]:
            cases.append(case | {"name": name})
    return cases


FASTERVLM = read_cases("fastervlm")


def test_all_recorded_cases_are_robust():
    assert len(FASTERVLM) == 11


@pytest.mark.parametrize("case", FASTERVLM, ids=lambda case: case["name"])
def test_fastervlm_keeps_the_patches_that_the_authors_code_keeps(case):
    attention = torch.tensor(case["cls_attn"])
    attention = attention if attention.dim() == 3 else attention[None]  # [I, H, N]
    num_images, _, num_patches = attention.shape
    side = int(num_patches**0.5)
    patches = torch.arange(num_patches, dtype=torch.float32).expand(num_images, -1)[..., None]
    tokens = VisualTokens(patches, (side, side), intermediates={Need("cls_attention", -2): attention})
    reduced = parse_reducer(f"FasterVLM:{case['budget']}")(tokens)
    expected = torch.tensor(case["keep_idx"]).reshape(num_images, -1)
    assert reduced.features[..., 0].long().tolist() == expected.tolist()
    assert reduced.lengths.tolist() == [int(case["budget"])] * num_images
    assert [row.nonzero().flatten().tolist() for row in reduced.kept] == expected.tolist()
