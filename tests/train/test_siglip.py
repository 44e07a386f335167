"""Training LLaVA on a SigLIP: what was trained is what loads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava.errors import InputError
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.prompt import wrap_prompt
from llava.train.arguments import DataArguments, ModelArguments
from llava.train.preflight import count_image_tokens
from tests.families import write_checkpoint
from tests.siglips import NUM_PATCHES, SIDE, write_open_clip_siglip, write_siglip

LORA = {"lora_enable": True, "lora_r": 8, "lora_alpha": 32}
QUESTION = "What shape is red?"


def logits(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    ids = tokenizer_image_token(wrap_prompt(QUESTION, 1, "vicuna_v1"), tokenizer, return_tensors="pt")[None]
    pixels = torch.linspace(-1, 1, 3 * SIDE * SIDE).view(1, 3, SIDE, SIDE)
    with torch.no_grad():
        return model.eval()(ids, images=pixels, texts=[QUESTION]).logits


@pytest.mark.parametrize(
    ("layout", "flags"),
    [("hf", {}), ("hf", LORA), ("open_clip", {})],
    ids=["full", "lora", "open_clip"],
)
def test_five_steps_change_the_model_and_the_saved_one_has_its_logits(
    run_training: Callable, tmp_path: Path, layout: str, flags: dict
):
    tower = str(write_siglip(tmp_path / "siglip"))
    if layout == "open_clip":
        pytest.importorskip("open_clip")
        tower = f"open_clip:local-dir:{write_open_clip_siglip(tmp_path / 'oc', tmp_path / 'siglip')}"
    start = write_checkpoint(tmp_path / "language_model", "llama", is_llava=False)
    settings = {"mm_vision_token_reduce_func": "TRIM:-1", "mm_projector_type": "mlp2x_gelu"}
    trainer = run_training(
        model_name_or_path=start, vision_tower=tower, mm_vision_select_layer=-2, version="v1", max_steps=5,
        learning_rate=1e-2, **settings, **flags,
    )  # fmt: skip
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5 and losses[-1] < losses[0]
    expected = logits(trainer.model, trainer.processing_class)
    folder = tmp_path / "run"
    tokenizer, model, _, _ = load_pretrained_model(str(folder), str(start) if flags else None, device="cpu")
    assert torch.allclose(logits(model, tokenizer), expected, atol=1e-4 if flags else 1e-6)
    assert model.get_vision_tower().num_patches == NUM_PATCHES and model.token_reducer.spec() == "TRIM:-1"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["mm_hidden_size"] == model.get_vision_tower().hidden_size


def test_training_with_a_method_that_reads_cls_is_refused(run_training: Callable, tmp_path: Path):
    tower = write_siglip(tmp_path / "siglip")
    with pytest.raises(InputError, match="which has no CLS: use TRIM"):
        run_training(vision_tower=tower, mm_vision_token_reduce_func="FasterVLM:0.5")


def test_the_positions_of_an_image_are_known_from_the_config(tmp_path: Path):
    tower = write_siglip(tmp_path / "siglip")
    (tower / "model.safetensors").unlink()
    counted = count_image_tokens(ModelArguments("none", vision_tower=str(tower)), DataArguments("none"))
    assert counted.count((100, 100)) == NUM_PATCHES and counted.is_exact and counted.side == SIDE
