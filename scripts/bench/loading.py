"""Peak memory while a checkpoint loads, relative to the size of its weights.

Writes a checkpoint with random weights to a temporary folder and loads it in new processes, in the dtype it was saved
in and in another. Reports memory twice: the process's own, and with the mapped pages of the weight files, which the
system can reclaim at any time. Every weight is read before the peak is taken.

    python -m scripts.bench.loading --size mid
"""
# ruff: noqa: T201

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from scripts.bench import side_by_side

CHILD = "--load"


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__)
    side_by_side.add_machine_options(parser)
    return parser


if __name__ == "__main__" and sys.argv[1:2] != [CHILD]:  # before torch is imported, which takes seconds
    make_parser().parse_args()

from llava.efficiency.memory import peak_resident_bytes, release_memory, resident_bytes
from llava.efficiency.timing import Spread
from llava.errors import InputError, run_command

MEGABYTE = 1e6
SAMPLE_SECONDS = 0.002
NUMBERS_PER_PAGE = 1024  # a page of 4 KiB holds at least this many numbers


def write_checkpoint(args: Any, folder: Path) -> Path:
    """Write a LLaVA checkpoint and its CLIP, both with random weights; returns the checkpoint's folder."""
    model, image_processor = side_by_side.build_model(args)
    side_by_side.write_clip(model, image_processor, side_by_side.SIZES[args.size][1], folder / "clip")
    model.config.mm_vision_tower = str(folder / "clip")
    checkpoint = folder / "llava"
    model.save_pretrained(checkpoint)
    side_by_side.copy_tokenizer(checkpoint)
    return checkpoint


def load_and_tell(checkpoint: str, dtype: str) -> None:
    """Load a checkpoint in this process and print the memory it took, as JSON."""
    from llava.model.builder import load_pretrained_model

    release_memory()
    before, peaks, done = resident_bytes(), [0], threading.Event()
    mapped_before = peak_resident_bytes()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peaks[0] = max(peaks[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _, model, _, _ = load_pretrained_model(checkpoint, device="cpu", dtype=dtype, reduce="TRIM:-1")
        for weight in model.parameters():
            weight.flatten()[::NUMBERS_PER_PAGE].sum()  # reads weights that are still in the mapped file
    finally:
        done.set()
        watcher.join()
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    own = max(peaks[0], resident_bytes()) - before
    print(json.dumps({"weights": weights, "own": own, "mapped": peak_resident_bytes() - mapped_before}))


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        load_and_tell(*sys.argv[2:])
        return
    args = make_parser().parse_args()
    if resident_bytes() is None:
        raise InputError("this system does not report a process's memory (no /proc/self/status)")
    figures: dict[str, Any] = {"saved_in": args.dtype}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(args, Path(folder))
        for dtype in ("float32", "bfloat16"):
            rounds = []
            for _ in range(args.rounds):
                command = [sys.executable, "-m", "scripts.bench.loading", CHILD, str(checkpoint), dtype]
                child = subprocess.run(command, check=False, capture_output=True, text=True)
                if child.returncode:
                    raise InputError(f"loading failed: {child.stderr.strip().splitlines()[-1]}")
                rounds.append(json.loads(child.stdout.splitlines()[-1]))
            figures[dtype] = rounds
            weights = rounds[0]["weights"]
            own, mapped = (Spread.of([each[key] / weights for each in rounds]) for key in ("own", "mapped"))
            print(f"saved {args.dtype}, loaded {dtype}: weights {weights / MEGABYTE:.0f} MB")
            print(f"  peak {own.format(1, 3)} of them, with mapped file pages {mapped.format(1, 3)}")
    side_by_side.write_figures(figures, args.json)


if __name__ == "__main__":
    run_command(main)
