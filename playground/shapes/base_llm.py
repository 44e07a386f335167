"""Write a small, untrained language model in the published layout: where the pocket LLaVA's training starts from.

Run: `python -m playground.shapes.base_llm --out DIR`. The folder has what a Vicuna folder has: `config.json`,
`generation_config.json`, `model.safetensors`, `tokenizer.model` and the tokenizer's two JSON files. It knows nothing;
the first step of the recipe is `scripts/finetune.sh` on `letters.json`.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from llava.errors import run_command
from playground.shapes.tokenizer import train_llama_tokenizer

CONTEXT_LENGTH = 2048
NUM_HEADS = 4
WEIGHT_SPREAD = 0.06
"""Standard deviation of the random weights, near 1 / sqrt(width): three times LLaMA's, which is 20 times as wide."""
LOOK_BACK = (1, 2)
"""Distances of the tokens that the first layer's first heads look at."""
LOOK_BACK_SCORE = 4.0
NUM_FREQUENCIES = 8
NOISE_SHARE = 0.1


def write_base_llm(folder: Path, num_layers: int = 6, width: int = 192, seed: int = 0) -> None:
    """Write an untrained model and its tokenizer.

    Args:
        folder: where; made if it is not there.
        num_layers: decoder layers.
        width: hidden size, a multiple of 8.
        seed: of the random weights.
    """
    train_llama_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,  # LLaMA's two thirds of 4 x width, in whole eights
        num_hidden_layers=num_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=WEIGHT_SPREAD,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    look_back(model)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Let the first layer's first heads start by looking at the token one and two places back.

    To find an option's letter a model must match a word and then tell what stood before it. Such circuits of two layers
    (arXiv 2209.11895) appear late in training because neither layer pays without the other; here the first is given.
    All embeddings get a vector in common, which queries and keys of these heads see and little else; rotary positions
    then make the score a sum of cosines of (distance - wanted distance), largest where they agree.

    Args:
        model: untrained; its embeddings and the first layer's attention are changed.
    """
    embeddings = model.model.embed_tokens.weight
    width = embeddings.shape[1]
    common = torch.randn(width)
    common *= WEIGHT_SPREAD * math.sqrt(width) / common.norm()
    embeddings += common
    # After the norm an embedding has root mean square 1; this is how long its part along `common` then is.
    length = common.norm() / math.sqrt(WEIGHT_SPREAD**2 + common.square().mean())
    for head, distance in enumerate(LOOK_BACK):
        set_distance(model.model.layers[0].self_attn, head, distance, common / common.norm(), length)


def set_distance(attention: LlamaAttention, head: int, distance: int, direction: Tensor, length: Tensor) -> None:
    """Make one head's score depend on the distance between tokens.

    Args:
        attention: the layer, changed.
        head: which head.
        distance: where the score is largest.
        direction: `[E]` unit vector that all inputs share.
        length: scalar, the inputs' part along it.
    """
    size = attention.head_dim
    frequencies = attention.config.rope_parameters["rope_theta"] ** (-torch.arange(size // 2) * 2 / size)
    used = (torch.arange(size // 2) < NUM_FREQUENCIES).float()
    query = torch.cat([used, torch.zeros_like(used)])
    key = torch.cat([used * torch.cos(frequencies * distance), used * torch.sin(frequencies * distance)])
    scale = math.sqrt(LOOK_BACK_SCORE * math.sqrt(size)) / length
    rows = slice(head * size, (head + 1) * size)
    for projection, vector in ((attention.q_proj, query), (attention.k_proj, key)):
        projection.weight[rows] *= NOISE_SHARE
        projection.weight[rows] += scale * torch.outer(vector, direction)


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description="Write an untrained pocket language model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_base_llm(arguments.out, arguments.layers, arguments.width, arguments.seed)


if __name__ == "__main__":
    run_command(main)
