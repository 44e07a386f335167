"""Reading pictures in threads, without taking the cores from a model on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

COUNT_THREADS = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from transformers import CLIPImageProcessorPil
from llava.eval.reading import PictureReader

torch.set_num_threads(4)
torch.ones(2**20).add(1)
before = len(os.listdir("/proc/self/task"))
assert before >= 4, "torch has started no team of its own; the test would show nothing"
aspect_ratio, *pictures = sys.argv[1:]
config = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=[[672, 672]])
processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
reader = PictureReader(processor, config)
shapes = {tuple(reader.take(Path(picture))[0].shape) for picture in pictures}
assert shapes == ({(5, 3, 336, 336)} if aspect_ratio == "anyres" else {(3, 336, 336)}), shapes
print(len(os.listdir("/proc/self/task")) - before - len(reader._pool._threads))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "anyres"])
def test_reading_threads_start_no_threads_of_their_own(tmp_path: Path, aspect_ratio: str) -> None:
    """Torch would, and with more OpenMP threads than cores waiting ones sleep: the model runs at half its pace."""
    pictures = [tmp_path / f"{number}.png" for number in range(4)]
    for picture in pictures:
        Image.effect_noise((400, 300), 50).convert("RGB").save(picture)
    command = [sys.executable, "-c", COUNT_THREADS, aspect_ratio, *map(str, pictures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
