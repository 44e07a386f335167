"""Training scenarios on several CPU ranks (the fixture `run_ranks`): common settings, and reading what they leave."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
LLM = "lmsys/vicuna-tiny-v1.5"
TRIM = {"mm_vision_token_reduce_func": "TRIM:-1"}
LORA = {"lora_enable": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
# Limits are for runs that hang: two minutes are usual, a slow or busy machine takes several times that.
LIMIT_SECONDS = 1800


def losses(folder: Path, name: str) -> list[float]:
    return read_result(folder, name)["losses"]


def read_result(folder: Path, name: str) -> dict:
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert "error" not in result, (
        f"{name}: {result['error']}\n{(folder / f'{name}.0.log').read_text(encoding='utf-8')[-3000:]}"
    )
    return result


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert left.keys() == right.keys()
    return max((left[name].float() - right[name].float()).abs().max().item() for name in left)


def stage_1(data: dict[str, Path]) -> dict:
    return {"data_path": data["captions"], "version": "plain", "tune_mm_mlp_adapter": True, "max_steps": 3}
