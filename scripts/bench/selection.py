"""The cost of choosing tokens: selection and text tower, compared with the vision tower.

Selection is everything between patches and projector: joint projection, dot products, quartiles, sorting, gathering,
the mean, and the wait for the counts.

    python -m scripts.bench.selection --batch-size 16
"""
# ruff: noqa: T201

import torch

from llava.efficiency.timing import time_in_turns
from llava.errors import run_command
from scripts.bench import side_by_side


def main() -> None:
    parser = side_by_side.make_parser(__doc__)
    side_by_side.add_machine_options(parser)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--reduce", default="TRIM:-1")
    args = parser.parse_args()
    model, _ = side_by_side.build_model(args)
    model.set_token_reduction(args.reduce)
    side = model.get_vision_tower().image_size
    device = model.device
    pixels = torch.randn(args.batch_size, 3, side, side, device=device)
    queries = [f"Is there a thing with the number {row} in the image?" for row in range(args.batch_size)]
    with torch.inference_mode():
        patches, text = model.encode_patches(pixels), model.embed_queries(queries)
        seconds = time_in_turns(
            {
                "vision tower": lambda: model.encode_patches(pixels),
                "text tower, all queries": lambda: model.embed_queries(queries),
                "text tower, one query": lambda: model.embed_queries(queries[:1] * args.batch_size),
                "selection": lambda: model.choose_tokens(patches, queries, text),
            },
            repeats=args.rounds,
            device=device,
        )
    print(f"{args.reduce}, {model.get_vision_tower().num_patches} patches, batch {args.batch_size}, {args.dtype}")
    side_by_side.tell_times(seconds)
    ratio = side_by_side.tell_ratio("selection over vision tower", seconds["selection"], seconds["vision tower"])
    side_by_side.write_figures({"options": {k: str(v) for k, v in vars(args).items()}, "seconds": seconds}
                               | {"ratio": ratio}, args.json)  # fmt: skip


if __name__ == "__main__":
    run_command(main)
