"""The pocket model with wider attention heads, and the same answers: vLLM has no heads of 48 values on a CPU.

    python -m playground.shapes.wide_heads --out DIR
    python -m llava.serve.api --engine vllm --model-path DIR --device cpu        # docs/vllm.md

Each head gets values that are always zero. Rotary embeddings turn value i of a head's first half together with value i
of its second half, by an angle that falls with i / width: the old values keep their place in their half, and a larger
base of the angles gives them the angles that they had.
"""

import argparse
from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NAME = "llava-shapes-trim"
WIDTH = 64


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m playground.shapes.wide_heads", description="Write the pocket model with wider heads."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new checkpoint's folder")
    parser.add_argument("--source", type=Path, default=CHECKPOINTS / NAME, metavar="CKPT", help=f"(default: {NAME})")
    parser.add_argument("--width", type=int, default=WIDTH, metavar="N", help="of each head (default: %(default)s)")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from llava.errors import InputError, run_command
from llava.files import atomic_folder, read_json, write_bytes, write_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOWER_KEY = "mm_vision_tower"


def write_wide_heads(out: Path, source: Path = CHECKPOINTS / NAME, width: int = WIDTH) -> None:
    """Write a pocket checkpoint anew, in float32.

    Args:
        out: the folder, not there yet or empty.
        source: the checkpoint.
        width: of each head, an even number above the present one.

    Raises:
        InputError: the folder holds files, or the width is out of range.
    """
    config = read_json(source / CONFIG)
    narrow, heads, rope = config["head_dim"], config["num_attention_heads"], config["rope_parameters"]
    if width <= narrow or width % 2:
        raise InputError(f"width {width}: expected an even number above {narrow}, the width of the heads")
    config |= {"head_dim": width, "dtype": "float32", TOWER_KEY: str((source / config[TOWER_KEY]).resolve())}
    config["rope_parameters"] = rope | {"rope_theta": rope["rope_theta"] ** (width / narrow)}

    def widen(weight: Tensor) -> Tensor:
        """`[heads * narrow, E]` to `[heads * width, E]`."""
        halves = weight.unflatten(0, (heads, 2, narrow // 2))
        return pad(halves, (0, 0, 0, (width - narrow) // 2)).flatten(0, 2)

    weights = {name: weight.float() for name, weight in load_file(source / WEIGHTS).items()}
    for name, weight in weights.items():
        if name.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight")):
            weights[name] = widen(weight)
        elif name.endswith(".o_proj.weight"):
            weights[name] = widen(weight.T).T.contiguous()
        if name.endswith(".q_proj.weight"):
            weights[name] *= (width / narrow) ** 0.5  # attention divides by the root of the width
    with atomic_folder(out) as folder:
        for file in source.iterdir():
            if file.name not in (WEIGHTS, CONFIG):
                write_bytes(folder / file.name, file.read_bytes())
        write_json(folder / CONFIG, config)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def main() -> None:
    args = make_parser().parse_args()
    write_wide_heads(args.out, args.source, args.width)


if __name__ == "__main__":
    run_command(main)
