"""LLaVA's training entry point: `python llava/train/train_mem.py`, or this path behind a launcher.

The same as `llava.train.train`, with flash attention wherever its package is installed.
"""

import sys
from pathlib import Path


def main() -> None:
    """Run training as a command."""
    from llava.train import stopping
    from llava.train.flags import begin_command

    # Signals, `--help` and mistyped flags are answered before the imports below, which take seconds.
    stopping.install()
    begin_command()
    from transformers.utils import is_flash_attn_2_available

    from llava.train.train import main as train

    train(attn_implementation="flash_attention_2" if is_flash_attn_2_available() else "sdpa")


if __name__ == "__main__":
    # Run by path, Python looks for modules in this file's folder; put the repository root in its place.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from llava.errors import run_command

    run_command(main)
