"""One random CLIP in two layouts, Hugging Face's and open_clip's, and how the one becomes the other."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from tests.siglips import write_open_clip_siglip, write_siglip

# Hugging Face name, open_clip name: prefixes of weights that differ in nothing else.
OUTER = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_projection.weight": "text_projection",
    "logit_scale": "logit_scale",
}
INNER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
TRANSPOSED = ("visual.proj", "text_projection", "visual_projection.weight", "text_projection.weight")
QKV = [f"self_attn.{letter}_proj" for letter in "qkv"]


def rename(key: str, names: dict[str, str]) -> str:
    old = next(old for old in names if key.startswith(old))
    return names[old] + key.removeprefix(old)


def to_open_clip(weights: dict) -> dict:
    converted = {}
    for key, value in weights.items():
        new = rename(key, OUTER)
        if "resblocks" not in new:
            converted[new] = value.T if key in TRANSPOSED else value
        elif QKV[0] in new:
            fused = torch.cat([weights[key.replace(QKV[0], part)] for part in QKV])
            converted[new.replace(f"{QKV[0]}.", "attn.in_proj_")] = fused
        elif not any(part in new for part in QKV):
            head, _, tail = new.partition("resblocks.")
            number, _, inner = tail.partition(".")
            converted[f"{head}resblocks.{number}.{rename(inner, INNER)}"] = value
    return {key: value.contiguous() for key, value in converted.items()}


def from_open_clip(weights: dict) -> dict:
    outer, inner_names = ({new: old for old, new in table.items()} for table in (OUTER, INNER))
    converted = {}
    for key, value in weights.items():
        old = rename(key, outer)
        if ".layers." not in old:
            converted[old] = value.T if key in TRANSPOSED else value
            continue
        head, _, tail = old.partition(".layers.")
        number, _, inner = tail.partition(".")
        if inner.startswith("attn.in_proj_"):
            for part, chunk in zip(QKV, value.chunk(3), strict=True):
                converted[f"{head}.layers.{number}.{part}.{inner.removeprefix('attn.in_proj_')}"] = chunk
        else:
            converted[f"{head}.layers.{number}.{rename(inner, inner_names)}"] = value
    return converted


def write_open_clip(folder: Path, config: CLIPConfig, weights: dict, **text_cfg) -> Path:
    vision, text = config.vision_config, config.text_config
    model_cfg = {
        "embed_dim": config.projection_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            **text_cfg,
        },
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    save_file(to_open_clip(weights), folder / "open_clip_model.safetensors")
    return folder


def write_bpe(folder: Path) -> None:
    """CLIP's own vocabulary, which open_clip brings along, as the files that transformers reads."""
    import open_clip

    bpe = open_clip.SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {specials.get(token, token): number for token, number in bpe.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in bpe.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


@pytest.fixture(scope="session")
def clips(tmp_path_factory, golden) -> Path:
    """One random CLIP, as Hugging Face folder `hf` and as open_clip folder `oc`."""
    folder = tmp_path_factory.mktemp("clips")
    config = CLIPConfig(
        projection_dim=24,
        vision_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"image_size": 84, "patch_size": 14, "projection_dim": 24},
        text_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"projection_dim": 24}
        # open_clip's end token; the recorded tokenizer ends with its highest id.
        | ({} if importlib.util.find_spec("open_clip") else {"eos_token_id": 2}),
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    for weight in model.parameters():
        # Far from initialisation: no bias is zero, no norm is one, and attention is not flat.
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder / "hf")
    if importlib.util.find_spec("open_clip"):
        write_bpe(folder / "hf")
    else:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(golden / "checkpoints/openai/clip-vit-tiny-patch14-84" / name, folder / "hf" / name)
    CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size=84).save_pretrained(folder / "hf")
    write_open_clip(folder / "oc", config, model.state_dict())
    return folder


@pytest.fixture(scope="session")
def layouts() -> SimpleNamespace:
    """The conversions, for tests that convert something else."""
    return SimpleNamespace(to_open_clip=to_open_clip, from_open_clip=from_open_clip, write_open_clip=write_open_clip)


@pytest.fixture(scope="session")
def siglips(tmp_path_factory) -> Path:
    """One random SigLIP, as Hugging Face folder `hf` and, where open_clip is there, as its folder `oc`."""
    folder = tmp_path_factory.mktemp("siglips")
    write_siglip(folder / "hf")
    if importlib.util.find_spec("open_clip"):
        write_open_clip_siglip(folder / "oc", folder / "hf")
    return folder
