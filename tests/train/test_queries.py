"""What token reduction reads of samples with several questions: counted before training, and whole where asked for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.model.builder import load_pretrained_model

TRIM = {"mm_vision_token_reduce_func": "TRIM:-1"}
TURNS = {"mm_vision_token_reduce_query": "turns"}
LONG = "Is the circle on the left of the picture red or is it blue, and what is behind it?"


def talk(name: str, questions: list[str], **fields: object) -> dict:
    turns = [
        turn for text in questions for turn in ({"from": "human", "value": text}, {"from": "gpt", "value": "Yes."})
    ]
    return {"id": name, "conversations": turns, **fields}


@pytest.fixture
def data(golden: Path, write_records: Callable) -> dict[str, Path]:
    """One question, two short ones, many, a single one that is too long, and many without an image."""
    image = {"image": sorted((golden / "data/images").glob("*.png"))[0].name}
    records = [
        talk("one", ["<image>\nIs it red?"], **image),
        talk("two", ["<image>\nIs it red?", "Is it blue?"], **image),
        talk("many", ["<image>\n" + LONG] + [LONG] * 9, **image),
        talk("long", ["<image>\n" + LONG * 10], **image),
        talk("text", [LONG] * 10),
    ]
    return {"data_path": write_records(records)}


def test_cut_queries_are_counted_and_the_line_says_how_to_read_them_whole(
    data: dict, run_training: Callable, capsys: pytest.CaptureFixture
):
    assert run_training(preflight_only=True, **data, **TRIM) is None
    assert (
        "  queries cut at 77 tokens: 2 records: record 2 (id 'many'); record 3 (id 'long') (of 4 with an image; 1 of 2 "
        "with several questions); --mm_vision_token_reduce_query turns reads them whole\n"
    ) in capsys.readouterr().out


def test_pooled_turns_cut_no_query(data: dict, run_training: Callable, capsys: pytest.CaptureFixture):
    run_training(preflight_only=True, **data, **TRIM, **TURNS)
    assert "  queries cut at 77 tokens: 0 records (of 4 with an image; 0 of 2 with several questions)\n" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("spec", ["none", "FasterVLM:8"])
def test_a_reduction_that_reads_no_query_cuts_none(
    spec: str, data: dict, run_training: Callable, capsys: pytest.CaptureFixture
):
    run_training(preflight_only=True, **data, mm_vision_token_reduce_func=spec)
    assert "queries cut" not in capsys.readouterr().out


def test_a_checkpoint_trained_on_pooled_turns_answers_and_goes_on_so(
    data: dict, run_training: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    texts: list[str] = []
    trainer = run_training(**data, **TRIM, **TURNS, max_steps=1, per_device_train_batch_size=5)
    tower = trainer.model.get_vision_tower()
    assert tower.pools_queries
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    assert config["mm_vision_token_reduce_query"] == "turns"
    tower = load_pretrained_model(str(tmp_path / "run"), device="cpu")[1].get_vision_tower()
    assert tower.pools_queries
    # Without the flag the next run follows the checkpoint.
    monkeypatch.setattr(
        type(tower), "text_features", lambda self, batch: (texts.extend(batch), self.text_tower(batch))[1]
    )
    again = run_training(
        model_name_or_path=tmp_path / "run", output_dir=tmp_path / "again", max_steps=1, per_device_train_batch_size=5,
        **data,
    )  # fmt: skip
    assert texts.count(LONG) == 10 and "Is it blue?" in texts  # a sample without an image asks nothing
    assert again.model.get_vision_tower().pools_queries
    back = run_training(
        model_name_or_path=tmp_path / "run", output_dir=tmp_path / "back", max_steps=1,
        mm_vision_token_reduce_query="questions", **data,
    )  # fmt: skip
    assert not back.model.get_vision_tower().pools_queries
