"""Images read ahead, images and queries encoded once."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava.errors import InputError
from llava.eval import features
from llava.eval.features import FeatureCache, ImageReader, QueryCache, apply_in_parts


def draw(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (5 + number, 5), (number, 0, 0)).save(path)
    return paths


def test_a_query_is_embedded_once_until_it_falls_out_of_the_cache(fake_parts: tuple) -> None:
    model = fake_parts[0]
    cache = QueryCache(model, capacity=2)
    assert {text: row.item() for text, row in cache.embed(["a", "bb", "a"]).items()} == {"a": 1, "bb": 2}
    cache.embed(["bb", "ccc"])
    assert model.embedded == ["a", "bb", "ccc"]
    cache.embed(["a"])
    assert model.embedded == ["a", "bb", "ccc", "a"]


def test_a_reduction_that_reads_no_text_gets_none() -> None:
    assert QueryCache(SimpleNamespace(embed_queries=lambda texts: None)).embed(["a", "b"]) is None


def test_work_that_does_not_fit_into_memory_is_halved_until_it_does() -> None:
    sizes = []

    def double(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError
        return [2 * item for item in items]

    assert apply_in_parts(double, list(range(20)), 12) == list(range(0, 40, 2))
    assert sizes == [12, 6, 3, 3, 3, 3, 3, 3, 2]


def test_a_single_item_that_does_not_fit_is_an_error() -> None:
    def fail(items: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        apply_in_parts(fail, [1, 2], 2)


def test_images_are_read_ahead_in_their_order_and_no_further_than_the_bound(
    tmp_path: Path, fake_parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "READ_AHEAD", 4)
    paths = draw(tmp_path, 10)
    reader = ImageReader(fake_parts[2], fake_parts[0].config)
    reader.announce(paths)
    assert list(reader._started) == paths[:4]
    assert [reader.take(path)[1][0] for path in paths] == [5 + number for number in range(10)]
    assert not reader._started
    assert reader.take(paths[0])[1] == (5, 5)  # not announced
    reader.close()


def test_a_broken_image_fails_where_it_is_asked_for(tmp_path: Path, fake_parts: tuple) -> None:
    paths = draw(tmp_path, 2)
    paths[0].write_bytes(b"no image")
    reader = ImageReader(fake_parts[2], fake_parts[0].config)
    reader.announce(paths)
    assert reader.take(paths[1])[1] == (6, 5)
    with pytest.raises(InputError, match="not an image"):
        reader.take(paths[0])
    reader.close()


def test_announced_images_that_are_in_the_cache_do_not_block_the_reader(
    tmp_path: Path, fake_parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "READ_AHEAD", 2)
    paths = draw(tmp_path, 6)
    cache = FeatureCache(fake_parts[0], fake_parts[2], capacity=10)
    for part in (paths[:4], paths[2:], paths):
        cache.announce(paths)
        found, faults = cache.encode(part)
        assert set(found) == set(part)
        assert faults == {}
    assert sum(fake_parts[0].encoded) == 6
    cache.close()


COUNT_THREADS = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from transformers import CLIPImageProcessorPil
from llava.eval.features import ImageReader

torch.set_num_threads(4)
torch.ones(2**20).add(1)
before = len(os.listdir("/proc/self/task"))
assert before >= 4, "torch has started no team of its own; the test would show nothing"
aspect_ratio, *images = sys.argv[1:]
config = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=[[672, 672]])
processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
reader = ImageReader(processor, config)
shapes = {tuple(reader.take(Path(image))[0].shape) for image in images}
assert shapes == ({(5, 3, 336, 336)} if aspect_ratio == "anyres" else {(3, 336, 336)}), shapes
print(len(os.listdir("/proc/self/task")) - before - len(reader._pool._threads))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "anyres"])
def test_reading_threads_start_no_threads_of_their_own(tmp_path: Path, aspect_ratio: str) -> None:
    """Torch would, and with more OpenMP threads than cores waiting ones sleep: the model runs at half its pace."""
    images = [tmp_path / f"{number}.png" for number in range(4)]
    for image in images:
        Image.effect_noise((400, 300), 50).convert("RGB").save(image)
    command = [sys.executable, "-c", COUNT_THREADS, aspect_ratio, *map(str, images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
