"""A tiny LLaVA of random weights with grouped-query attention, and its configs."""

from types import SimpleNamespace

import pytest
import torch

from llava.efficiency.random_model import build_random_model
from llava.efficiency.shapes import read_shape

CONFIG = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "somewhere/else",
    "image_aspect_ratio": "pad",
}
TOWER = {
    "projection_dim": 24,
    "vision_config": {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"image_size": 84, "patch_size": 14},
    "text_config": {"hidden_size": 40, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"vocab_size": 700, "max_position_embeddings": 77},
}


@pytest.fixture(scope="session")
def configs() -> SimpleNamespace:
    return SimpleNamespace(model=CONFIG, tower=TOWER, shape=read_shape(CONFIG, TOWER, "test"))


@pytest.fixture
def random_parts() -> tuple:
    """(model, image processor)."""
    return build_random_model(CONFIG, TOWER, device=torch.device("cpu"), dtype=torch.float32)
