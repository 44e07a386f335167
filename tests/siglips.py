"""A tiny SigLIP with random weights: as a Hugging Face folder, and the same weights as an open_clip folder."""

import io
import json
import shutil
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipTokenizer

from tests.families import TOWER_WIDTH, write_checkpoint

SIDE, PATCH, WIDTH, HEADS, NUM_LAYERS = (
    100,
    14,
    TOWER_WIDTH,
    4,
    4,
)  # as 384 pixels in SigLIP: not a multiple of the patch
NUM_PATCHES = (SIDE // PATCH) ** 2
CONTEXT, VOCABULARY = 32, 90
TIMM_NAME = "vit_tiny_patch14_siglip_100"
TEXTS = ["What shape is red?", "", "a RED square, left of a blue circle", "Is there a dog? " * 40]


def make_config(**vision: object) -> SiglipConfig:
    """A config of SigLIP's kind: no CLS, the text half's head as wide as the vision half."""
    half = {"num_attention_heads": HEADS, "hidden_size": WIDTH, "bos_token_id": None, "eos_token_id": 1}
    return SiglipConfig(
        vision_config={"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": NUM_LAYERS}
        | {"num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH} | vision,
        text_config=half | {"intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY,
                            "max_position_embeddings": CONTEXT, "pad_token_id": 1},
    )  # fmt: skip


def make_model(seed: int = 0, **vision: object) -> SiglipModel:
    """Far from initialisation: no bias is zero, no norm is one, and attention is not flat."""
    torch.manual_seed(seed)
    model = SiglipModel(make_config(**vision)).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def write_siglip(folder: Path, model: SiglipModel | None = None) -> Path:
    """Write a Hugging Face folder as those of google: weights, sentencepiece tokenizer, image processor."""
    (model or make_model()).save_pretrained(folder)
    write_tokenizer(folder)
    settings = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    SiglipImageProcessorPil(**settings).save_pretrained(folder)
    return folder


def write_llava(folder: Path, tower: str, name: str = "llama", **settings: object) -> Path:
    """Write a LLaVA checkpoint of a family with that tower."""
    write_checkpoint(folder, name)
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {"mm_vision_tower": tower} | settings
    file.write_text(json.dumps(values))
    return folder


def write_tokenizer(folder: Path) -> None:
    """A sentencepiece vocabulary with SigLIP's special ids: </s> is 1 and pads."""
    words = " ".join(TEXTS).lower().replace("?", "").replace(",", "").split()
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)] * 50), model_writer=written, vocab_size=60, model_type="unigram",
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    file = folder / "spiece.model"
    file.write_bytes(written.getvalue())
    SiglipTokenizer(str(file), model_max_length=CONTEXT).save_pretrained(folder)


# -------------------------------------------------------------------------------------------------- open_clip's layout
OUTER = {
    "vision_model.embeddings.patch_embedding.": "visual.trunk.patch_embed.proj.",
    "vision_model.encoder.layers.": "visual.trunk.blocks.",
    "vision_model.post_layernorm.": "visual.trunk.norm.",
    "vision_model.head.attention.out_proj.": "visual.trunk.attn_pool.proj.",
    "vision_model.head.layernorm.": "visual.trunk.attn_pool.norm.",
    "vision_model.head.mlp.": "visual.trunk.attn_pool.mlp.",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "text_model.embeddings.token_embedding.": "text.token_embedding.",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.encoder.layers.": "text.transformer.resblocks.",
    "text_model.final_layer_norm.": "text.ln_final.",
    "text_model.head.": "text.text_projection.",
    "logit_": "logit_",
}
IMAGE_INNER = {"layer_norm": "norm", "self_attn.out_proj.": "attn.proj.", "mlp.": "mlp."}
TEXT_INNER = {
    "layer_norm": "ln_",
    "self_attn.out_proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}


def swap(key: str, names: dict[str, str]) -> str:
    old = next(old for old in names if key.startswith(old))
    return names[old] + key.removeprefix(old)


def to_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of a Hugging Face SigLIP as open_clip and timm do; queries, keys and values become one."""
    converted = {}
    for key, value in weights.items():
        kind = key.rpartition(".")[2]
        if key == "vision_model.embeddings.position_embedding.weight":
            converted["visual.trunk.pos_embed"] = value[None]
        elif key.startswith("vision_model.head.attention.in_proj_"):
            query, *rest = value.chunk(3)
            kind = key.rpartition("_")[2]
            converted[f"visual.trunk.attn_pool.q.{kind}"] = query
            converted[f"visual.trunk.attn_pool.kv.{kind}"] = torch.cat(rest)
        elif ".self_attn.q_proj." in key:
            fused = torch.cat([value, *(weights[key.replace("q_proj", name)] for name in ("k_proj", "v_proj"))])
            own = swap(key.partition(".self_attn")[0], OUTER)
            converted[f"{own}.attn.qkv.{kind}" if "trunk" in own else f"{own}.attn.in_proj_{kind}"] = fused
        elif ".self_attn.k_proj." in key or ".self_attn.v_proj." in key:
            continue
        elif ".layers." in key:
            outer, _, tail = key.partition(".layers.")
            number, _, inner = tail.partition(".")
            names = IMAGE_INNER if key.startswith("vision_model.") else TEXT_INNER
            converted[f"{OUTER[f'{outer}.layers.']}{number}.{swap(inner, names)}"] = value
        else:
            converted[swap(key, OUTER)] = value
    return {key: value.contiguous() for key, value in converted.items()}


def register_trunk() -> None:
    """Make timm know an image half of these sizes."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if timm.is_model(TIMM_NAME):
        return

    def vit_tiny_patch14_siglip_100(pretrained: bool = False, **settings: object) -> VisionTransformer:
        sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": NUM_LAYERS, "num_heads": HEADS}
        settings = {key: value for key, value in settings.items() if "pretrained" not in key and key != "cache_dir"}
        kind = {"class_token": False, "mlp_ratio": 1.5, "act_layer": "gelu_tanh"}
        return VisionTransformer(**sizes | kind | settings)

    vit_tiny_patch14_siglip_100.__module__ = "timm.models.vision_transformer"
    timm.models.register_model(vit_tiny_patch14_siglip_100)


def open_clip_config(**text: object) -> dict:
    """The `model_cfg` of open_clip's SigLIPs, in these sizes."""
    return {
        "embed_dim": WIDTH,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": SIDE, "timm_model_name": TIMM_NAME, "timm_model_pretrained": False}
        | {"timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "hf_tokenizer_name": "beside this file"}
        | {"tokenizer_kwargs": {"clean": "canonicalize"}, "width": WIDTH, "heads": HEADS, "layers": 2, "mlp_ratio": 2}
        | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
        | {"act_kwargs": {"approximate": "tanh"}} | text,
    }  # fmt: skip


def write_open_clip_siglip(folder: Path, source: Path) -> Path:
    """Write the SigLIP of a Hugging Face folder as `local-dir:` of open_clip."""
    register_trunk()
    folder.mkdir()
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    settings = {"model_cfg": open_clip_config(), "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(to_open_clip(load_file(source / "model.safetensors")), folder / "open_clip_model.safetensors")
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    return folder
