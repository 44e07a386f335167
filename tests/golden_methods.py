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

from llava.model.token_reduction import Need, ReducedTokens, VisualTokens, parse_reducer

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


CHECKS: dict[str, Callable[[Case], bool]] = {
    "fastervlm": check_fastervlm,
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
