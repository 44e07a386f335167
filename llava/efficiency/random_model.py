"""A LLaVA of given shapes with random weights: the same work as the real one, without a download.

What it says is noise; how long it takes and how much memory it needs is what the shapes demand. Nothing is read from
disk or the network.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from llava.efficiency.cost import Precision, weight_bytes
from llava.efficiency.memory import available_bytes
from llava.efficiency.shapes import ModelSource, is_siglip_config
from llava.errors import InputError
from llava.model.token_reduction import TEXT, Need

TOWER_NAMES = {False: "random/clip", True: "random/siglip"}
WEIGHT_STD = 0.02  # Llama's initializer_range
SLACK = 1.05  # weights are not all that is needed
TEXT_ENDS = ("<|startoftext|>", "<|endoftext|>")
WORD_END = "</w>"
WORDS = ["is", "there", "a", "thing", "with", "the", "number", "in", "image"]
"""Words of the made-up questions (`stages.make_batch`): the text tower then reads as many tokens as with CLIP's own
vocabulary, which nothing here has to bring along."""


def check_memory(source: ModelSource, precision: Precision, device: torch.device, extra_bytes: int) -> None:
    """Refuse what does not fit.

    Args:
        source: the model.
        precision: of its weights.
        device: where it should go.
        extra_bytes: what the work needs besides the weights, at least.

    Raises:
        InputError: with the numbers.
    """
    weights = sum(weight_bytes(source.shape, precision).values())
    free = available_bytes(device)
    needed = int(SLACK * weights) + extra_bytes
    if free is not None and needed > free:
        raise InputError(
            f"{source.name} with random weights needs {needed / 1e9:.1f} GB on {device} (weights {weights / 1e9:.1f} "
            f"GB), but {free / 1e9:.1f} GB are free: take a smaller --dtype or --batch-size, or leave --random-weights "
            "out to count without measuring"
        )


def build_random_model(
    config: Mapping[str, Any],
    tower_config: Mapping[str, Any],
    *,
    needs: Collection[Need] = frozenset(),
    device: torch.device,
    dtype: torch.dtype,
    tower_dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Build a model whose numbers are drawn.

    Args:
        config: config.json of the model; its token reduction is obeyed.
        tower_config: config.json of a CLIP or a SigLIP, in Hugging Face's keys.
        needs: what token reductions that the model will be switched to look at, besides text.
        device: where it goes.
        dtype: of the language model and projector.
        tower_dtype: of both towers.
        attn_implementation: of the language model; None: transformers' choice.
        seed: of the weights.

    Returns:
        (a `LlavaCausalLM` in evaluation mode, image processor). It has no tokenizer: pass `texts`.
    """
    from transformers.initialization import no_init_weights

    from llava.model.config_rules import family_of
    from llava.model.language_model.families import FAMILIES

    values = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "dtype")}
    settings = {"attn_implementation": attn_implementation} if attn_implementation else {}
    is_siglip = is_siglip_config(tower_config)
    with no_init_weights(), torch.device(device):
        family = FAMILIES[family_of(config.get("model_type"))]
        llava_config = family.config.from_dict(values | {"mm_vision_tower": TOWER_NAMES[is_siglip]})
        model = family.model._from_config(llava_config, dtype=dtype, **settings)
        model.tie_weights()  # where the config ties them
        vision, text_tower = (_build_siglip if is_siglip else _build_clip)(tower_config, tower_dtype)
    tower = model.get_vision_tower()
    tower.provide({TEXT, *needs})
    tower.take_parts(vision, _image_processor(vision.config.image_size, is_siglip), text_tower)
    model.to(device)
    draw_weights(model, torch.Generator(device).manual_seed(seed))
    model.generation_config.eos_token_id = None  # a random answer must not end early
    return model.eval(), tower.image_processor


def draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Fill all weights in place: matrices with small normal numbers, norms with ones, biases with zeros."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or name.endswith("class_embedding"):
                weight.normal_(std=WEIGHT_STD, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)


def _build_clip(tower_config: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    from llava.model.multimodal_encoder.clip_text import CLIPTextTower

    joint_width = tower_config.get("projection_dim", 512)
    vision_config = CLIPVisionConfig(**dict(tower_config["vision_config"]) | {"projection_dim": joint_width})
    text_values = dict(tower_config.get("text_config") or {})
    last = text_values.get("vocab_size", CLIPTextConfig().vocab_size) - 1
    marks = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    text_config = CLIPTextConfig(**text_values | marks | {"projection_dim": joint_width})
    vision = CLIPVisionModelWithProjection._from_config(vision_config, dtype=dtype)
    text = CLIPTextModelWithProjection._from_config(text_config, dtype=dtype)
    return vision, CLIPTextTower(text, _clip_tokenizer(text_config.vocab_size))


def _build_siglip(tower_config: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import SiglipTextConfig, SiglipTextModel, SiglipVisionConfig, SiglipVisionModel

    from llava.model.multimodal_encoder.siglip_text import SiglipTextTower

    vision_config = SiglipVisionConfig(**tower_config["vision_config"])
    marks = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    text_values = dict(tower_config.get("text_config") or {})
    text_config = SiglipTextConfig(**text_values | marks | {"projection_size": vision_config.hidden_size})
    vision = SiglipVisionModel._from_config(vision_config, dtype=dtype)
    text = SiglipTextModel._from_config(text_config, dtype=dtype)
    return vision, SiglipTextTower(text, _siglip_tokenizer())


def _siglip_tokenizer() -> Any:
    """A tokenizer with SigLIP's padding: whatever a question's words are, the text tower reads all of its positions."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", unk_token="<unk>")


def _clip_tokenizer(vocab_size: int) -> Any:
    """A tokenizer in CLIP's format: one token for each of `WORDS`, else one per letter; as many as have embeddings."""
    from transformers import CLIPTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + WORD_END for letter in letters)]
    merges = []
    for word in WORDS:
        left = word[0]
        for place, letter in enumerate(word[1:], start=2):
            right = letter + WORD_END if place == len(word) else letter
            if left + right not in pieces:
                pieces.append(left + right)
                merges.append((left, right))
            left += right
    plain = pieces[: vocab_size - len(TEXT_ENDS)]
    # The two special tokens have the last ids, as in CLIP; ids between are never given.
    vocabulary = {token: number for number, token in enumerate(plain)}
    vocabulary |= {token: vocab_size - len(TEXT_ENDS) + number for number, token in enumerate(TEXT_ENDS)}
    merges = [(left, right) for left, right in merges if {left, right, left + right} <= vocabulary.keys()]
    return CLIPTokenizerFast(vocab=vocabulary, merges=merges)


def _image_processor(side: int, is_siglip: bool) -> Any:
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    if is_siglip:
        square = {"height": side, "width": side}
        return SiglipImageProcessorPil(size=square, do_center_crop=False, crop_size=square)
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
