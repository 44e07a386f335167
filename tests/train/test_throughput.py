"""What is done ahead of the training step, and what the frozen towers run in."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava.model.image_tokens import embed_distinct
from llava.model.multimodal_encoder import clip_text
from llava.model.multimodal_encoder.builder import build_named_tower
from llava.model.multimodal_encoder.text_reader import TextIds
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.token_reduction import TEXT
from llava.train.arguments import TrainingArguments, parse_arguments

TRIM = {"mm_vision_token_reduce_func": "TRIM:-1"}
TEXTS = ["What shape is red?", "", "Is there a dog?", "word " * 200, "What shape is red?"]
REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "out"]


@pytest.fixture(scope="module")
def tower(golden: Path) -> VisionTower:
    tower = build_named_tower(str(golden / "checkpoints/openai/clip-vit-tiny-patch14-84"), needs={TEXT})
    tower.load_model()
    return tower


# ---------------------------------------------------------------------------------------------------------------- texts
def test_ids_that_were_made_elsewhere_embed_as_their_texts(tower):
    read = pickle.loads(pickle.dumps(tower.text_reader))
    assert torch.equal(tower.embed_text([read(text) for text in TEXTS]), tower.embed_text(TEXTS))
    assert torch.equal(tower.embed_text([read(TEXTS[0]), TEXTS[1]]), tower.embed_text(TEXTS[:2]))
    longest = max(len(read(text).ids) for text in TEXTS)
    assert longest == tower.text_tower.model.config.max_position_embeddings


def test_equal_queries_of_a_batch_are_embedded_once(tower, monkeypatch):
    embedded: list[list[str | TextIds]] = []
    features = type(tower).text_features
    monkeypatch.setattr(
        type(tower), "text_features", lambda self, texts: embedded.append(texts) or features(self, texts)
    )
    read = tower.text_reader
    rows = embed_distinct(tower, [read(text) for text in TEXTS])
    assert [len(texts) for texts in embedded] == [len(set(TEXTS))]
    assert torch.equal(rows[0], rows[4]) and not torch.equal(rows[0], rows[2])


def test_queries_are_read_in_the_workers(run_training: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    call = clip_text.ClipTextReader.__call__
    monkeypatch.setattr(clip_text.ClipTextReader, "__call__", lambda self, text: read.append(text) or call(self, text))
    here = run_training(max_steps=2, output_dir=tmp_path / "here", **TRIM)
    assert "What is the capital of France?\nThanks!" in read
    read.clear()
    there = run_training(max_steps=2, dataloader_num_workers=1, output_dir=tmp_path / "there", **TRIM)
    assert not read
    assert [entry.get("loss") for entry in there.state.log_history] == [
        entry.get("loss") for entry in here.state.log_history
    ]


# -------------------------------------------------------------------------------------------------------------- workers
@pytest.mark.parametrize(
    ("flags", "lives_on"),
    [
        ("", False),
        ("--dataloader_num_workers 2", True),
        ("--dataloader_num_workers 2 --dataloader_persistent_workers False", False),
        ("--dataloader_num_workers 2 --dataloader_persistent_workers True", True),
    ],
)
def test_workers_live_on_from_epoch_to_epoch_unless_told_otherwise(flags: str, lives_on: bool):
    training_args = parse_arguments([*REQUIRED, *flags.split()])[2]
    assert training_args.dataloader_persistent_workers is lives_on


def test_batches_are_pinned_only_where_there_is_an_accelerator(tmp_path: Path):
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True).dataloader_pin_memory is False
    assert TrainingArguments.dataloader_pin_memory is True


# ------------------------------------------------------------------------------------------------------- tower's dtype
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"bf16": True}, torch.float32),
        ({"bf16": True, "tower_dtype": "run"}, torch.bfloat16),
        ({"tower_dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_towers_run_in_float32_unless_a_flag_says_otherwise(
    run_training: Callable, monkeypatch: pytest.MonkeyPatch, flags: dict, dtype: torch.dtype
):
    seen: list[set[torch.dtype]] = []
    extract = VisionTower.extract

    def noting_extract(self: VisionTower, *arguments: object) -> object:
        seen.append({value.dtype for value in self.parameters()})
        return extract(self, *arguments)

    monkeypatch.setattr(VisionTower, "extract", noting_extract)
    trainer = run_training(max_steps=1, **TRIM, **flags)
    assert seen == [{dtype}]
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))
