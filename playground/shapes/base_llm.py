"""Write a small, untrained language model: the start of the pocket LLaVA's training.

Run: `python -m playground.shapes.base_llm --out DIR`. The folder has the files of a Vicuna folder: `config.json`,
`generation_config.json`, `model.safetensors`, `tokenizer.model` and the tokenizer's two JSON files. The first training
step is `scripts/finetune.sh` on `letters.json`.
"""

import argparse
import math
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description="Write an untrained pocket language model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from llava.errors import run_command
from playground.shapes.tokenizer import train_llama_tokenizer

CONTEXT_LENGTH = 2048
NUM_HEADS = 4
WEIGHT_SPREAD = 0.06
"""Standard deviation of the initial weights, near 1 / sqrt(width): three times LLaMA's, at a twentieth of its width."""
LOOK_BACK = (1, 2)
"""How many tokens back each of the first layer's first heads attends."""
LOOK_BACK_SCORE = 4.0
NUM_FREQUENCIES = 8
NOISE_SHARE = 0.1


def write_base_llm(folder: Path, num_layers: int = 6, width: int = 192, seed: int = 0) -> None:
    """Write an untrained model and its tokenizer.

    Args:
        folder: output folder, created if missing.
        num_layers: decoder layers.
        width: hidden size, a multiple of 8.
        seed: seed of the initial weights.
    """
    train_llama_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,  # LLaMA's 2/3 of 4 x width, rounded down to a multiple of 8
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
    """Initialise the first layer's first heads to attend one and two tokens back.

    To find an option's letter, a model must match the option's text and then read the token before it. Such two-layer
    circuits (arXiv 2209.11895) appear late in training, because neither layer helps without the other; here the first
    one is built in. All embeddings share one vector, and the queries and keys of these heads respond to little else.
    With rotary positions the score is then a sum of cosines of (distance - wanted distance), largest where they agree.

    Args:
        model: untrained; its embeddings and the first layer's attention are changed in place.
    """
    embeddings = model.model.embed_tokens.weight
    width = embeddings.shape[1]
    common = torch.randn(width)
    common *= WEIGHT_SPREAD * math.sqrt(width) / common.norm()
    embeddings += common
    # After the norm an embedding has root mean square 1; `length` is its component along `common`.
    length = common.norm() / math.sqrt(WEIGHT_SPREAD**2 + common.square().mean())
    for head, distance in enumerate(LOOK_BACK):
        set_distance(model.model.layers[0].self_attn, head, distance, common / common.norm(), length)


def set_distance(attention: LlamaAttention, head: int, distance: int, direction: Tensor, length: Tensor) -> None:
    """Make one head's attention score depend on the distance between tokens.

    Args:
        attention: the layer, changed in place.
        head: index of the head.
        distance: the distance at which the score is largest, in tokens.
        direction: `[E]` unit vector that all inputs share.
        length: scalar, the inputs' component along it.
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
    arguments = make_parser().parse_args()
    write_base_llm(arguments.out, arguments.layers, arguments.width, arguments.seed)


if __name__ == "__main__":
    run_command(main)
