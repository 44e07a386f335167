"""Check and measure on a GPU: `bash scripts/gpu.sh OUT [PART ...]`.

    parity     the recorded cases in float32, float16 and bfloat16: kept patches and ids; batches against single samples
    stages     LLaVA-1.5-7B with random weights, stage by stage: batch sizes, precisions, attention, compiled decoding
    methods    every method at 192, 128, 64 and 32 tokens, on the same model
    loop       the evaluation loop against a plain loop
    serve      the server under load, beside the plain loop
    training   steps of LoRA training, with and without token reduction
    tests      the tests that run on any device

Each part takes at most eight minutes, writes OUT/PART.json after every step, and goes on where it was; a part that is
complete is skipped. Without PART all are run. `python -m scripts.gpu.report OUT` prints the figures as Markdown.
"""
# ruff: noqa: T201

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

from llava.errors import InputError, run_command
from llava.files import make_folder

PARTS = ("parity", "stages", "methods", "loop", "serve", "training", "tests")
EXIT_AGAIN = 3
"""Exit code when a part stopped because its time was up."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bash scripts/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the figures")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="try the parts on the CPU, with a tiny model")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        raise InputError(f'part "{unknown[0]}" is unknown: use {", ".join(PARTS)}')
    from scripts.gpu.parts import Scale, read_part, run_part

    scale = Scale.choose(args.rehearse)
    out = make_folder(args.out.resolve())
    codes = []
    for part in args.parts or PARTS:
        if (read_part(out / f"{part}.json") or {}).get("complete"):
            print(f"{part}: complete")
        elif len(args.parts) == 1:
            steps = importlib.import_module(f"scripts.gpu.{part}").make_steps(scale, out)
            codes.append(0 if run_part(part, steps, scale, out) else EXIT_AGAIN)
        else:
            # A process of its own: its memory is free afterwards, and a crash stops no other part.
            command = [sys.executable, "-m", "scripts.gpu", str(out), part, *["--rehearse"] * args.rehearse]
            codes.append(subprocess.run(command, check=False).returncode)
    sys.exit(max(map(abs, codes), default=0))


if __name__ == "__main__":
    run_command(main)
