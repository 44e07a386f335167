"""Merge LoRA (or projector) weights into their base model, as a full checkpoint that needs no base any more.

`python scripts/merge_lora_weights.py --model-path LORA --model-base BASE --save-model-path FOLDER`
"""

import argparse

from llava.cli import DTYPES
from llava.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge LoRA or projector weights into their base model.")
    parser.add_argument("--model-path", required=True, help="folder or hub id of the LoRA or projector weights")
    parser.add_argument("--model-base", required=True, help="the model they were trained on")
    parser.add_argument("--save-model-path", required=True, help="new folder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the merged weights; default: the base's")
    arguments = parser.parse_args()
    from llava.model.consolidate import consolidate_ckpt  # torch, after the arguments are right

    consolidate_ckpt(arguments.model_path, arguments.save_model_path, arguments.model_base, arguments.dtype)


if __name__ == "__main__":
    run_command(main)
