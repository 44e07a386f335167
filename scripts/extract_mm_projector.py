"""Take the projector out of a full checkpoint: the `mm_projector.bin` from which a finetuning can start.

`python scripts/extract_mm_projector.py --model-path CHECKPOINT --output mm_projector.bin`
"""

import argparse

from llava.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint's projector to a file of its own.")
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--output", required=True, help="the file (.bin), or a folder for it")
    arguments = parser.parse_args()
    from llava.model.consolidate import extract_projector  # torch, after the arguments are right

    extract_projector(arguments.model_path, arguments.output)


if __name__ == "__main__":
    run_command(main)
