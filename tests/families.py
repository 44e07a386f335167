"""Tiny checkpoints of each language model family, from a config, in LLaVA's key layout, with random weights."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

GOLDEN = Path(__file__).parent / "golden/checkpoints"
TOWER = "openai/clip-vit-tiny-patch14-84"
WIDTH, TOWER_WIDTH = 48, 64
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "vocab_size": 1000, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True,
}  # fmt: skip
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
# name: the language model's model_type, what its config has besides, LLaVA's model_type and class, template.
FAMILIES = {
    "llama": ("llama", {}, "llava_llama", "LlavaLlamaForCausalLM", "vicuna_v1"),
    "mistral": ("mistral", {"sliding_window": None}, "llava_mistral", "LlavaMistralForCausalLM", "mistral_instruct"),
    "mistral-window": (
        "mistral",
        {"sliding_window": 24},
        "llava_mistral",
        "LlavaMistralForCausalLM",
        "mistral_instruct",
    ),
    "qwen2": ("qwen2", {}, "llava_qwen2", "LlavaQwen2ForCausalLM", "qwen_1_5"),
    "qwen": ("qwen2", {"tie_word_embeddings": True}, "llava_qwen", "LlavaQwenForCausalLM", "qwen_1_5"),
}


def build_language_model(name: str, seed: int = 0, **sizes: int) -> torch.nn.Module:
    """The plain language model, with weights far from initialisation; `sizes` change `SIZES`."""
    kind, extra = FAMILIES[name][:2]
    config_class, model_class = CLASSES[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**SIZES | extra | sizes)).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.tie_weights()
    return model


def build_projector(width: int = WIDTH) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(TOWER_WIDTH, width), torch.nn.GELU(), torch.nn.Linear(width, width))


def write_checkpoint(folder: Path, name: str, is_llava: bool = True, **sizes: int) -> Path:
    """Write a family's checkpoint: LLaVA, or the language model alone; `sizes` change `SIZES`."""
    kind, extra, llava_type, architecture, _ = FAMILIES[name]
    folder.mkdir(parents=True)
    weights = dict(build_language_model(name, **sizes).state_dict())
    if extra.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    config = SIZES | extra | sizes
    config |= {"model_type": kind, "architectures": [CLASSES[kind][1].__name__], "torch_dtype": "float32"}
    config |= {"bos_token_id": None if kind == "qwen2" else 1, "eos_token_id": 2}
    if is_llava:
        projector = build_projector(config["hidden_size"])
        weights |= {f"model.mm_projector.{key}": value for key, value in projector.state_dict().items()}
        config |= {
            "model_type": llava_type, "architectures": [architecture], "mm_vision_tower": str(GOLDEN / TOWER),
            "mm_hidden_size": TOWER_WIDTH, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad", "use_mm_proj": True,
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    if kind == "qwen2":
        write_qwen_tokenizer(folder)
    else:
        for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(GOLDEN / "llava-v1.5-tiny84" / file, folder)
    return folder


def write_qwen_tokenizer(folder: Path) -> None:
    """Bytes, a few merges, and ChatML's tokens behind them, with Qwen2's settings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["You are a helpful assistant.", "What shape is red?"] * 3
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"bos_token": None, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 2048}))
