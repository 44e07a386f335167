from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from llava.errors import InputError
from llava.eval import reading
from llava.eval.features import FeatureCache, QueryCache, apply_in_parts
from llava.eval.reading import PictureReader
from llava.eval.sizing import MAX_UNIT, MIN_UNIT, BatchLimits, choose_limits, choose_unit_size


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


def test_pictures_are_read_ahead_in_their_order_and_no_further_than_the_bound(
    tmp_path: Path, fake_parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "READ_AHEAD", 4)
    paths = draw(tmp_path, 10)
    reader = PictureReader(fake_parts[2], fake_parts[0].config)
    reader.announce(paths)
    assert list(reader._started) == paths[:4]
    assert [reader.take(path)[1][0] for path in paths] == [5 + number for number in range(10)]
    assert not reader._started
    assert reader.take(paths[0])[1] == (5, 5)  # not announced
    reader.close()


def test_a_broken_picture_fails_where_it_is_asked_for(tmp_path: Path, fake_parts: tuple) -> None:
    paths = draw(tmp_path, 2)
    paths[0].write_bytes(b"no picture")
    reader = PictureReader(fake_parts[2], fake_parts[0].config)
    reader.announce(paths)
    assert reader.take(paths[1])[1] == (6, 5)
    with pytest.raises(InputError, match="not an image"):
        reader.take(paths[0])
    reader.close()


def test_announced_pictures_that_are_in_the_cache_do_not_block_the_reader(
    tmp_path: Path, fake_parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "READ_AHEAD", 2)
    paths = draw(tmp_path, 6)
    cache = FeatureCache(fake_parts[0], fake_parts[2], capacity=10)
    for part in (paths[:4], paths[2:], paths):
        cache.announce(paths)
        found, faults = cache.encode(part)
        assert set(found) == set(part)
        assert faults == {}
    assert sum(fake_parts[0].encoded) == 6
    cache.close()


def make_shapes(**config: Any) -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"),
        dtype=torch.float16,
        get_vision_tower=lambda: SimpleNamespace(num_patches=576),
        config=SimpleNamespace(
            **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
            | {"mm_hidden_size": 1024} | config
        ),
    )  # fmt: skip


def test_automatic_batches_shrink_with_length_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.eval.sizing.usable_bytes", lambda device: 10 * 2**30)
    limits = choose_limits(make_shapes(), None)
    assert limits.positions == 10 * 2**30 // (2 * (2 * 32 * 4096 + 6 * 4096 + 3 * 11008))
    assert limits.allow(16, 768)
    assert not limits.allow(32, 768)
    assert limits.allow(1, 10**9)
    small = choose_limits(make_shapes(hidden_size=192, intermediate_size=512, num_hidden_layers=4), None)
    assert small.allow(small.rows, 500)
    assert not small.allow(small.rows + 1, 1)


def test_a_given_batch_size_is_taken_as_it_is() -> None:
    assert choose_limits(make_shapes(), 7) == BatchLimits(7)
    assert BatchLimits(7).allow(7, 10**9)
    assert not BatchLimits(7).allow(8, 1)


def test_units_follow_from_the_shapes_alone() -> None:
    assert MIN_UNIT < choose_unit_size(make_shapes()) < MAX_UNIT
    assert choose_unit_size(make_shapes(image_aspect_ratio="anyres")) == MIN_UNIT
    assert choose_unit_size(make_shapes(hidden_size=192, mm_hidden_size=128)) == MAX_UNIT
