"""The published training entry point: `python llava/train/train_mem.py`, or this path behind a launcher.

Same as `llava.train.train`, with the memory-saving attention wherever its package and hardware are there.
"""

import sys
from pathlib import Path


def main() -> None:
    """Run training as a command."""
    from transformers.utils import is_flash_attn_2_available

    from llava.train.engine import leave_engine
    from llava.train.train import train

    train(attn_implementation="flash_attention_2" if is_flash_attn_2_available() else "sdpa")
    leave_engine()


if __name__ == "__main__":
    # Run by path, Python looks for modules beside this file; the package's parent folder is meant.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from llava.errors import run_command

    run_command(main)
