"""Write a small, untrained language model in the published layout: where the pocket LLaVA's training starts from.

Run: `python -m playground.shapes.base_llm --out DIR`. The folder has what a Vicuna folder has: `config.json`,
`generation_config.json`, `model.safetensors`, `tokenizer.model` and the tokenizer's two JSON files. It knows nothing;
the first step of the recipe is `llava/train/train.py` on `text.json`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llava.errors import run_command
from playground.shapes.tokenizer import train_llama_tokenizer

CONTEXT_LENGTH = 2048
NUM_HEADS = 4


def write_base_llm(folder: Path, num_layers: int = 4, width: int = 192, seed: int = 0) -> None:
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
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description="Write an untrained pocket language model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_base_llm(arguments.out, arguments.layers, arguments.width, arguments.seed)


if __name__ == "__main__":
    run_command(main)
