"""Queries beyond a text half's context: cut into pieces that fit, and pooled; all others as ever."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_named_tower, load_tower
from llava.model.multimodal_encoder.query_pooling import pool_embeddings, split_query
from llava.model.multimodal_encoder.text_reader import TextIds, TextReader
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.token_reduction import TEXT
from llava.prompt import TURN_BREAK, join_turns

TOWER = "openai/clip-vit-tiny-patch14-84"
LLAVA = "llava-v1.5-tiny84-TRIM"
LONG = " ".join(f"Is the circle number {number} red or blue?" for number in range(30))


@dataclass(frozen=True)
class Reader(TextReader):
    """A token for each part that a function cuts a text into."""

    context: int
    cut: Callable[[str], Sequence[str]]

    def __call__(self, text: str) -> TextIds:
        return TextIds(tuple(range(len(self.cut(text))))[: self.context])

    def count(self, texts: list[str]) -> list[int]:
        return [len(self.cut(text)) for text in texts]


WORDS = Reader(5, str.split)


@pytest.fixture(scope="module")
def tower(golden: Path) -> VisionTower:
    return load_tower(str(golden / "checkpoints" / TOWER), needs={TEXT})


# -------------------------------------------------------------------------------------------------------------- cutting
@pytest.mark.parametrize(
    ("query", "pieces"),
    [
        ("one two three", ["one two three"]),
        ("one  two\nthree ", ["one  two\nthree "]),
        ("1 2 3 4 5 6 7", ["1 2 3", "4 5 6 7"]),
        ("1 2 3 4 5 6 7 8 9 10 11", ["1 2 3 4 5", "6 7 8", "9 10 11"]),
        (f"one{TURN_BREAK}two", ["one", "two"]),
        (f" {TURN_BREAK}two", ["two"]),
        ("", [""]),
        (TURN_BREAK, [""]),
    ],
)
def test_a_query_is_cut_at_its_turns_and_in_the_middle(query: str, pieces: list[str]):
    assert split_query(query, WORDS) == pieces


def test_a_word_that_is_too_long_is_cut_inside():
    letters = Reader(3, list)
    assert split_query("abcdefgh", letters) == ["ab", "cd", "ef", "gh"]


def test_every_piece_of_a_long_query_fits_and_nothing_is_lost(tower: VisionTower):
    reader = tower.text_reader
    assert reader.context == 77 and reader.count([LONG])[0] > 2 * 77
    pieces = split_query(LONG, reader)
    assert max(reader.count(pieces)) <= 77 and " ".join(pieces) == LONG


def test_the_reader_counts_what_the_text_half_reads(tower: VisionTower):
    texts = ["", "a", "Is it red?", LONG]
    tokenizer = tower.text_tower.tokenizer
    cut = tokenizer(texts, truncation=True, max_length=77).input_ids
    assert [min(count, 77) for count in tower.text_reader.count(texts)] == [len(ids) for ids in cut]


# -------------------------------------------------------------------------------------------------------------- pooling
def test_the_pooled_direction_is_the_mean_of_directions_and_the_length_that_of_lengths():
    pieces = torch.tensor([[3.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    pooled = pool_embeddings(pieces, [2, 1])
    torch.testing.assert_close(pooled[0], torch.tensor([1.0, 1.0]) / 2**0.5 * 2.0)
    assert torch.equal(pooled[1], pieces[2])


def test_a_question_that_fits_is_embedded_bit_for_bit_as_without_pooling(tower: VisionTower, monkeypatch):
    texts = ["Is it red?", "What shape is it?"]
    plain = tower.embed_text(texts)
    monkeypatch.setattr(tower, "pools_queries", True)
    assert torch.equal(tower.embed_text(texts), plain)


def test_every_turn_counts_alike_and_the_order_does_not(tower: VisionTower, monkeypatch):
    turns = ["Is the circle red?", "What is behind the big square?", "How many are there?"]
    units = F.normalize(tower.embed_text(turns), dim=-1)
    monkeypatch.setattr(tower, "pools_queries", True)
    queries = [join_turns(turns, "turns"), join_turns(turns[::-1], "turns")]
    forth, back = F.normalize(tower.embed_text(queries), dim=-1)
    torch.testing.assert_close(forth, F.normalize(units.mean(dim=0), dim=-1))
    torch.testing.assert_close(forth, back)


def test_without_pooling_what_is_beyond_the_context_changes_nothing_and_with_it_does(tower: VisionTower, monkeypatch):
    queries = [LONG, f"{LONG} And is the last triangle yellow?"]
    here, there = tower.embed_text(queries)
    torch.testing.assert_close(here, there)
    monkeypatch.setattr(tower, "pools_queries", True)
    here, there = tower.embed_text(queries)
    assert not torch.allclose(here, there, atol=1e-3)


# --------------------------------------------------------------------------------------------- checkpoints and towers
def test_config_json_says_whether_a_checkpoint_pools(golden: Path, tmp_path: Path):
    folder = tmp_path / LLAVA
    shutil.copytree(golden / "checkpoints" / LLAVA, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["mm_vision_tower"] = str((golden / "checkpoints" / TOWER).resolve())
    pools = {}
    for source in (None, "questions", "turns"):
        given = {} if source is None else {"mm_vision_token_reduce_query": source}
        (folder / "config.json").write_text(json.dumps(config | given))
        pools[source] = load_pretrained_model(str(folder), device="cpu")[1].get_vision_tower().pools_queries
    assert pools == {None: False, "questions": False, "turns": True}


@pytest.mark.parametrize("kind", ["hf", "open_clip:local-dir:oc"])
@pytest.mark.parametrize("family", ["clips", "siglips"])
def test_every_kind_of_tower_counts_what_its_text_half_reads(family: str, kind: str, request: pytest.FixtureRequest):
    if kind != "hf":
        pytest.importorskip("open_clip")
    folder = request.getfixturevalue(family)
    place = str(folder / "hf") if kind == "hf" else kind
    reader = build_named_tower(place, folder=folder).text_reader
    tower = build_named_tower(place, folder=folder, needs={TEXT})
    tower.load_model()
    # Up to the context another word changes the embedding, beyond it none does.
    counts = dict(enumerate(reader.count(["a " * number for number in range(150)])))
    fitting = max(number for number, count in counts.items() if count <= reader.context)
    beyond = min(number for number, count in counts.items() if count > reader.context + 2)
    embedded = tower.embed_text(["a " * number for number in (fitting - 1, fitting, beyond, beyond + 1)])
    assert not torch.allclose(embedded[0], embedded[1], atol=1e-4)
    torch.testing.assert_close(embedded[2], embedded[3])


def test_a_vision_half_alone_has_no_reader(golden: Path, tmp_path: Path):
    shutil.copytree(golden / "checkpoints" / TOWER, tmp_path / "clip")
    config = json.loads((tmp_path / "clip/config.json").read_text(encoding="utf-8"))["vision_config"]
    (tmp_path / "clip/config.json").write_text(json.dumps(config | {"model_type": "clip_vision_model"}))
    with pytest.raises(InputError, match="has no text half: text-guided token reduction needs a full CLIP"):
        build_named_tower(str(tmp_path / "clip")).text_reader  # noqa: B018 # reads it
