"""Checkpoints that are not what they seem: each fault ends in one line with file, key or tensor, and what is right."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.consolidate import consolidate_ckpt
from llava.train.flags import ModelArguments
from llava.train.model_setup import read_config as read_training_config

ROOT = Path(__file__).parents[2]
NAME = "llava-v1.5-tiny84-TRIM-r025"  # one model.safetensors
SHARDED = "llava-v1.5-tiny84-TRIM"  # two .bin files with an index
BASE = "lmsys/vicuna-tiny-v1.5"
PART = "liuhaotian/llava-v1.5-mlp2x-tiny-pretrain"
TOWER = "openai/clip-vit-tiny-patch14-84"
LAYER = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def place(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of checkpoints that a test may damage, as working directory."""
    for name in (NAME, SHARDED, BASE, PART, TOWER):
        shutil.copytree(golden / "checkpoints" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(file: Path, **values: object) -> None:
    """Set keys of a JSON file; `a__b` is key b of the object a."""
    content = json.loads(file.read_text())
    for path, value in values.items():
        inner, keys = content, path.split("__")
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")


def poison(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights[f"{LAYER}.weight"].view(-1)[-1:].fill_(value)


def recast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights.update({f"{LAYER}.weight": weights[f"{LAYER}.weight"].to(dtype)})


def refused(path: str, base: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_pretrained_model(path, base, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# ------------------------------------------------------------------------------------------------------- model types
FOREIGN = {
    "llava_phi": "a LLaVA on another language model (phi)",
    "llava_mixtral": "a LLaVA on another language model (mixtral)",
    "llava_mpt": "a LLaVA on another language model (mpt)",
    "llava_gemma": "a LLaVA on another language model (gemma)",
    "mixtral": "another language model",
    "qwen3": "another language model",
    "mllama": "another language model",
    "clip": "a CLIP vision tower",
    "siglip": "a vision tower (mm_vision_tower names those)",
    "siglip2": "a SigLIP 2 for images of any size (NaFlex;",
}
ROLES = {
    "checkpoint": "the checkpoint must be a LLaVA on Llama, Mistral or Qwen2 (model_type llava, llava_llama,",
    "base": "the model base must be the Llama, Mistral, Qwen2 or LLaVA that the adapter or projector was trained on",
    "training": "the model to train must be a Llama, Mistral, Qwen2 or a LLaVA on one of them",
    "tower": "the vision tower must be a CLIP in Hugging Face's layout",
}


def try_role(role: str, folder: str) -> str:
    """Use a folder in one of the roles; return the line that refuses it."""
    if role == "training":
        with pytest.raises(InputError) as caught:
            read_training_config(ModelArguments(model_name_or_path=folder))
        return str(caught.value)
    if role == "tower":
        edit(Path(NAME) / "config.json", mm_vision_tower=f"./{folder}")
        return refused(NAME)
    return refused(PART, folder) if role == "base" else refused(folder)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", [*FOREIGN, 7, None])
def test_a_foreign_model_is_refused_by_name_in_every_role(place: Path, role: str, kind: object):
    needed = (("tower", "clip"), ("tower", "siglip"), ("checkpoint", None), ("base", None), ("training", None))
    if (role, kind) in needed:
        pytest.skip("that is what the role needs, or what old checkpoints have")
    shutil.copytree(SHARDED, "foreign")
    edit(place / "foreign/config.json", model_type=kind, architectures=["ForeignForCausalLM"])
    message = try_role(role, "foreign")
    assert "foreign/config.json" in message
    assert FOREIGN.get(kind, "model_type") in message
    assert ROLES[role].removeprefix("the ").split(" must be ")[1] in message


@pytest.mark.parametrize("role", sorted(ROLES.keys() - {"checkpoint"}))
def test_transformers_own_llava_format_is_refused_by_name_where_it_has_to_be_converted(place: Path, role: str):
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "model_type": "llava",
        "text_config": {"model_type": "llama", "num_hidden_layers": 3},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 64},
    }
    shutil.copytree(SHARDED, "foreign")
    (place / "foreign/config.json").write_text(json.dumps(config))
    message = try_role(role, "foreign")
    advice = "it holds no text half; name the full CLIP" if role == "tower" else "convert it first"
    assert f"transformers' own LLaVA format (LlavaForConditionalGeneration): {advice}" in message
    assert ROLES[role] in message


def test_the_model_types_of_released_checkpoints_load(place: Path):
    for kind in ("llava", "llava_llama"):
        edit(
            place / NAME / "config.json", model_type=kind, mm_resampler_type=None, unfreeze_mm_vision_tower=True,
            image_grid_pinpoints=None, pretraining_tp=1, use_mm_proj=True, anything_else={"a": [1]},
        )  # fmt: skip
        model = load_pretrained_model(NAME, device="cpu")[1]
        assert type(model).__name__ == "LlavaLlamaForCausalLM" and model.config.anything_else == {"a": [1]}


# ----------------------------------------------------------------------------------------------------------- tensors
TENSORS = {
    "biases of another model": (
        lambda weights: weights.update({f"{LAYER}.bias": torch.zeros(64), f"{LAYER[:-6]}k_proj.bias": torch.zeros(64)}),
        "holds 2 weights that its config.json has no place for, first model.layers.1.self_attn.k_proj.bias",
    ),
    "a tensor too many": (
        lambda weights: weights.update({"model.resampler.query": torch.zeros(3)}),
        "holds 1 weight that its config.json has no place for, first model.resampler.query",
    ),
    "a tensor missing": (lambda weights: weights.pop("model.norm.weight"), "lacks 1 weight model.norm.weight"),
    "no projector": (
        lambda weights: [weights.pop(name) for name in list(weights) if "mm_projector" in name],
        "lacks 4 weights, first model.mm_projector.0.bias",
    ),
    "two more rows of embeddings": (
        lambda weights: weights.update({"model.embed_tokens.weight": torch.zeros(1002, 64)}),
        "model.embed_tokens.weight has shape [1002, 64], the config asks for [1000, 64]",
    ),
    "another width of a projector": (
        lambda weights: weights.update({"model.mm_projector.0.weight": torch.zeros(64, 48)}),
        "model.mm_projector.0.weight has shape [64, 48], the config asks for [64, 64]",
    ),
    "inf": (poison(float("inf")), f"{LAYER}.weight holds inf or NaN (1 of 4096 values)"),
    "-inf": (poison(-float("inf")), f"{LAYER}.weight holds inf or NaN (1 of 4096 values)"),
    "NaN": (poison(float("nan")), f"{LAYER}.weight holds inf or NaN (1 of 4096 values)"),
    "whole numbers": (recast(torch.int8), f"{LAYER}.weight holds I8; expected floating-point numbers"),
    "complex numbers": (recast(torch.complex64), f"{LAYER}.weight holds C64; expected floating-point numbers"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit_are_named(place: Path, kind: str):
    change, says = TENSORS[kind]
    edit_tensors(place / NAME, change)
    assert says in refused(NAME)


def test_tensors_of_towers_and_rotary_tables_are_expected_and_ignored(place: Path):
    extra = {
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding": torch.zeros(64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    before = load_pretrained_model(NAME, device="cpu")[1].state_dict()
    edit_tensors(place / NAME, lambda weights: weights.update(extra))
    after = load_pretrained_model(NAME, device="cpu")[1].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("number", [2, 4, 1000])
def test_another_number_of_layers_than_the_weights_have_is_refused(place: Path, number: int):
    for name in (NAME, SHARDED):
        edit(place / name / "config.json", num_hidden_layers=number)
        says = f"config.json says num_hidden_layers {number}, the weights have 3 model.layers.*"
        assert says in refused(name)


def test_weights_of_a_tower_are_checked_too(place: Path):
    file = place / TOWER / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    weights["vision_model.encoder.layers.0.mlp.fc1.weight"][0, 0] = float("nan")
    torch.save(weights, file)
    assert "vision_model.encoder.layers.0.mlp.fc1.weight holds inf or NaN" in refused(NAME)
    edit(place / TOWER / "config.json", vision_config__num_hidden_layers=5)
    assert "num_hidden_layers 5, the weights have 4 vision_model.encoder.layers.*" in refused(NAME)


class Payload:
    """Pickled, it makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("file", [f"{SHARDED}/pytorch_model-00001-of-00002.bin", f"{TOWER}/pytorch_model.bin"])
def test_code_in_weight_files_is_not_run(place: Path, file: str, is_zip: bool):
    torch.save({"model.norm.weight": Payload()}, place / file, _use_new_zipfile_serialization=is_zip)
    assert f"{file} can't be read: it holds no weights, or more than weights (code is not run)" in refused(SHARDED)
    assert not (place / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"not weights"])
def test_files_that_are_no_weights_are_named(place: Path, content: bytes):
    (place / NAME / "model.safetensors").write_bytes(content)
    message = refused(NAME)
    assert "model.safetensors can't be read" in message or "lacks" in message


# -------------------------------------------------------------------------------------------- values of config.json
CONFIG_VALUES = [
    ({"mm_vision_select_layer": None}, "mm_vision_select_layer is null; expected a whole number", "LLaVA-1.5 has -2"),
    ({"mm_vision_select_layer": "-2"}, 'mm_vision_select_layer is "-2"; expected a whole number', ""),
    ({"mm_vision_select_layer": -2.5}, "mm_vision_select_layer is -2.5; expected a whole number", ""),
    ({"mm_vision_select_layer": -9}, "mm_vision_select_layer -9 does not exist", "has 4 layers"),
    ({"mm_vision_select_feature": None}, "mm_vision_select_feature is null", 'expected one of "patch", "cls_patch"'),
    ({"mm_vision_select_feature": "PATCH"}, 'mm_vision_select_feature is "PATCH"', '"patch", "cls_patch"'),
    ({"image_aspect_ratio": "PAD"}, 'image_aspect_ratio is "PAD"', 'expected one of "square", "pad", "anyres"'),
    ({"image_aspect_ratio": "padd"}, 'image_aspect_ratio is "padd"', '"square", "pad", "anyres"'),
    ({"image_aspect_ratio": 3}, "image_aspect_ratio is 3", '"square", "pad", "anyres"'),
    ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints is null; expected [[336, 672]", "anyres"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": []}, "image_grid_pinpoints is []", "[[336, 672]"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "x"}, 'image_grid_pinpoints is "x"', "[[336, 672]"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[84]]}, "image_grid_pinpoints is [[84]]", "672"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[84, 0]]}, "image_grid_pinpoints is [[84, 0]]", "672"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [["a", 1]]}, "image_grid_pinpoints is [['a', 1]]", ""),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[90, 84]]}, "image_grid_pinpoints is [90, 84]", "84"),
    (
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[8400, 8400]]},
        "image_grid_pinpoints is [8400, 8400]",
        "at most 100 crops in all",
    ),
    ({"mm_patch_merge_type": "unpad"}, 'mm_patch_merge_type is "unpad"', '"flat", "spatial", "spatial_unpad"'),
    ({"mm_projector_type": "identity"}, "holds 4 weights that its config.json has no place for", "mm_projector"),
    (
        {"mm_projector_type": "identity", "mm_hidden_size": 32},
        'mm_projector_type is "identity"; expected a projector (linear, mlp2x_gelu)',
        "from mm_hidden_size 32 to hidden_size 64",
    ),
    ({"mm_projector_type": "mlp999999999x_gelu"}, 'mm_projector_type "mlp999999999x_gelu" is too deep', "mlp16x_gelu"),
    ({"mm_projector_type": "mlp17x_gelu"}, 'mm_projector_type "mlp17x_gelu" is too deep', "mlp16x_gelu"),
    ({"mm_projector_type": "mlp" + "9" * 5000 + "x_gelu"}, "is too deep", "mlp16x_gelu"),
    ({"mm_projector_type": "mlp0x_gelu"}, 'mm_projector_type "mlp0x_gelu" is unknown', "linear, mlp2x_gelu"),
    ({"mm_projector_type": ["linear"]}, "mm_projector_type is ['linear']; expected a text", ""),
    ({"mm_projector_type": "linear"}, "lacks 2 weights, first model.mm_projector.bias", ""),
    ({"mm_hidden_size": None}, "mm_hidden_size is null; expected a whole number", ""),
    ({"mm_hidden_size": "64"}, 'mm_hidden_size is "64"; expected a whole number', ""),
    ({"mm_vision_tower": 7}, "mm_vision_tower is 7; expected a text that is not empty", ""),
    ({"mm_vision_tower": ["a"]}, "mm_vision_tower is ['a']; expected a text that is not empty", ""),
    ({"mm_vision_token_reduce_func": 5}, "mm_vision_token_reduce_func: 5 is not a string", "TRIM:-1"),
    ({"num_hidden_layers": 1000000}, "num_hidden_layers is 1000000; expected a whole number from 1 to 1,000", "deeper"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number from 1", ""),
    ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0; expected a whole number", ""),
    ({"num_hidden_layers": True}, "num_hidden_layers is true; expected a whole number", ""),
    ({"hidden_size": "64"}, 'hidden_size is "64"; expected a whole number', ""),
    ({"hidden_size": 10**9}, "hidden_size is 1000000000; expected a whole number", "262,144"),
    ({"hidden_size": 128}, "model.embed_tokens.weight has shape [1000, 64], the config asks for [1000, 128]", ""),
    ({"vocab_size": 1002}, "has shape [1000, 64], the config asks for [1002, 64]", ""),
    ({"vocab_size": 500}, "has 1000 tokens, config.json says vocab_size 500", "another model's"),
    ({"vocab_size": -1}, "vocab_size is -1; expected a whole number", ""),
    ({"num_attention_heads": 5}, "num_attention_heads is 5; expected a divisor of hidden_size 64", ""),
    ({"num_attention_heads": 64}, "num_attention_heads is 64; expected heads of an even width", ""),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of num_attention_heads 4", ""),
    ({"hidden_act": "silly"}, 'hidden_act is "silly"; expected the name of an activation', "silu"),
    ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps is "1e-5"; expected a number above 0', ""),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a number above 0", ""),
    ({"rope_scaling": [1]}, "rope_scaling is [1]; expected an object", ""),
    ({"rope_scaling": {"type": "lin", "factor": 2.0}}, 'rope_scaling.type is "lin"; expected one of', '"linear"'),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'rope_scaling.factor is "2"; expected a number', ""),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is null; expected a number", '"linear" needs'),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling.low_freq_factor is null; expected a number",
        '"llama3" needs',
    ),
    ({"rope_theta": 0}, "rope_theta is 0; expected a number above 0", ""),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0; expected a whole number", ""),
    ({"pad_token_id": 1000}, "pad_token_id is 1000; expected null, or a token below vocab_size 1000", ""),
    ({"eos_token_id": [2, 5000]}, "eos_token_id is [2, 5000]; expected null, or a token below vocab_size 1000", ""),
    ({"eos_token_id": "</s>"}, 'eos_token_id is "</s>"; expected a whole number', ""),
    ({"torch_dtype": "float17"}, 'torch_dtype is "float17"; expected one of "float32"', ""),
    ({"torch_dtype": 16}, "torch_dtype is 16; expected one of", ""),
    ({"torch_dtype": "auto"}, 'torch_dtype is "auto"; expected one of "float32"', ""),
    ({"tie_word_embeddings": "no"}, 'tie_word_embeddings is "no"; expected true or false', ""),
    ({"architectures": "LlavaLlamaForCausalLM"}, "architectures is", "expected a list"),
    ({"architectures": ["LlavaMistralForCausalLM"]}, "another model", "must be a LLaVA on Llama"),
    ({"return_dict": False}, "return_dict is false; expected true", ""),
    ({"is_encoder_decoder": True}, "is_encoder_decoder is true; expected false", ""),
    ({"quantization_config": "4bit"}, 'quantization_config is "4bit"; expected an object', ""),
    ({"quantization_config": {"load_in_4bit": True}}, "but the weights are not quantised: delete it there", ""),
    ({"quantization_config": {"quant_method": "x"}}, "but the weights are not quantised: delete it there", ""),
    ({"conv_mode": "vicuna"}, 'conv_mode is "vicuna"; expected one of', '"vicuna_v1"'),
    ({"sliding_window": 3}, "sliding_window is 3; expected null: Llama attends to all tokens before", ""),
    ({"layer_types": "x"}, 'layer_types is "x"; expected a list', ""),
    ({"num_labels": 10**9}, "num_labels is 1000000000; expected a whole number", ""),
    ({"tokenizer_padding_side": "middle"}, 'tokenizer_padding_side is "middle"', '"left", "right"'),
    ({"max_sequence_length": "2048"}, 'max_sequence_length is "2048"; expected a whole number', ""),
    ({"num_beams": 100000}, "num_beams is 100000; expected a whole number from 1 to 100", ""),
    ({"to_dict": 5}, "to_dict cannot be a setting", ""),
    ({"mm_vision_token_reduce_func": "TRIMM:-1"}, 'did you mean "TRIM"?', ""),
]


@pytest.mark.parametrize(("values", "says", "right"), CONFIG_VALUES, ids=[str(row[0])[:60] for row in CONFIG_VALUES])
def test_a_wrong_value_in_config_json_is_named_with_what_is_right(place: Path, values: dict, says: str, right: str):
    edit(place / NAME / "config.json", **values)
    message = refused(NAME)
    assert says in message
    assert right in message


@pytest.mark.parametrize("content", ["[]", "3", '"a"', "null"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_json_file_that_is_no_object_is_named(place: Path, file: str, content: str):
    (place / NAME / file).write_text(content)
    assert f"{NAME}/{file}: a JSON object is needed" in refused(NAME)


SYNTAX = {
    '{"a": 1,\n "b": 2,\n}': 'is not JSON: a comma before the closing "}" at line',
    '{"a": 1\n "b": 2}': "is not JSON: Expecting ',' delimiter at line 2 column 2",
    "{'a': 1}": "is not JSON: Expecting property name enclosed in double quotes at column 2",
    "": "is not JSON: Expecting value at column 1",
    '{"a": ' + "[" * 100_000 + "}": "nested too deeply",
    '{"a": ' + "9" * 5000 + "}": "is not readable JSON",
}


@pytest.mark.parametrize("content", SYNTAX, ids=[text[:20] for text in SYNTAX])
@pytest.mark.parametrize(
    "file",
    [f"{SHARDED}/config.json", f"{SHARDED}/generation_config.json", f"{SHARDED}/tokenizer_config.json",
     f"{SHARDED}/pytorch_model.bin.index.json", f"{TOWER}/config.json", f"{TOWER}/preprocessor_config.json"],
)  # fmt: skip
def test_a_json_syntax_error_has_its_place(place: Path, file: str, content: str):
    (place / file).write_text(content)
    message = refused(SHARDED)
    assert file in message
    assert SYNTAX[content] in message


# ------------------------------------------------------------------------------------------------ the other JSON files
OTHER_FILES = [
    ("index", {"weight_map": None}, "weight_map is null; expected an object"),
    ("index", {"weight_map": {}}, "weight_map is {}; expected an object"),
    ("index", {"weight_map": ["a"]}, "weight_map is ['a']; expected an object"),
    ("index", {"weight_map": {"a": 3}}, 'weight_map has 3 for "a"; expected a .safetensors or .bin file beside it'),
    ("index", {"weight_map": {"a": "../../x.bin"}}, 'weight_map has "../../x.bin" for "a"'),
    ("index", {"weight_map": {"a": "/etc/passwd"}}, 'weight_map has "/etc/passwd" for "a"'),
    ("index", {"weight_map": {"a": "x.bin"}}, "lacks 1 of 1 weight files, first x.bin"),
    ("index", {"metadata": None}, "metadata is null; expected an object"),
    ("generation", {"temperature": "hot"}, 'temperature is "hot"; expected a number from 0'),
    ("generation", {"temperature": -1}, "temperature is -1; expected a number from 0"),
    ("generation", {"top_p": 1.5}, "top_p is 1.5; expected a number from 0 to 1"),
    ("generation", {"max_length": "long"}, 'max_length is "long"; expected a whole number'),
    ("generation", {"do_sample": "yes"}, 'do_sample is "yes"; expected true or false'),
    ("generation", {"num_beams": 100000}, "num_beams is 100000; expected a whole number from 1 to 100"),
    ("generation", {"num_return_sequences": 2}, "num_return_sequences is 2; expected a whole number from 1 to 1"),
    ("generation", {"eos_token_id": "x"}, 'eos_token_id is "x"; expected'),
    ("generation", {"eos_token_id": 10**9}, "eos_token_id is 1000000000; expected null, or a token below vocab_size"),
    ("generation", {"is_assistant": "x"}, 'is_assistant is "x"; expected false'),
    ("generation", {"stop_strings": ["x"]}, "stop_strings is ['x']; expected null"),
    ("generation", {"assistant_early_exit": 1}, "assistant_early_exit is 1; expected null"),
    ("generation", {"penalty_alpha": 0.6}, "penalty_alpha is 0.6; expected"),
    ("generation", {"return_dict_in_generate": True}, "return_dict_in_generate is true; expected false"),
    ("tokenizer", {"tokenizer_class": 5}, "tokenizer_class is 5; expected a text"),
    ("tokenizer", {"add_bos_token": "yes"}, 'add_bos_token is "yes"; expected true or false'),
    ("tokenizer", {"add_bos_token": False}, 'leaves out <s> at the start of a prompt, which Llama needs'),
    ("tokenizer", {"bos_token": None}, "has no beginning-of-sequence token; set bos_token in tokenizer_config.json"),
    ("tokenizer", {"bos_token": "<start>"}, "has no beginning-of-sequence token; set bos_token"),
    ("tokenizer", {"add_eos_token": True}, "add_eos_token is true; expected false"),
    ("tokenizer", {"model_max_length": "2048"}, 'model_max_length is "2048"; expected a number'),
    ("tokenizer", {"padding_side": "up"}, 'padding_side is "up"; expected one of "left", "right"'),
    ("preprocessor", {"size": None}, "size is null; expected"),
    ("preprocessor", {"size": "84"}, 'size is "84"; expected a whole number'),
    ("preprocessor", {"size": {"a": 1}}, "size is {'a': 1}; expected {\"shortest_edge\": 84}"),
    ("preprocessor", {"size": {"shortest_edge": "84"}}, 'size.shortest_edge is "84"; expected a whole number'),
    ("preprocessor", {"size": 60}, "size is 60; expected at least 84"),
    ("preprocessor", {"crop_size": 224}, "crop_size is 224; expected 84: the vision tower reads 84 x 84 pixels"),
    ("preprocessor", {"crop_size": {"height": 84, "width": 42}}, "expected 84: the vision tower"),
    ("preprocessor", {"image_mean": [0.5, 0.5]}, "image_mean is [0.5, 0.5]; expected a list of 3 items"),
    ("preprocessor", {"image_mean": None}, "image_mean is null; expected a list of 3 items"),
    ("preprocessor", {"resample": None}, "resample is null; expected a whole number"),
    ("preprocessor", {"return_tensors": "x"}, 'return_tensors is "x"; expected one of "pt", "np"'),
    ("tower", {"text_config__eos_token_id": None}, "text_config.eos_token_id is null; expected a whole number"),
    ("preprocessor", {"image_mean": "0.5"}, 'image_mean is "0.5"; expected a list of 3 items'),
    ("preprocessor", {"image_std": [0, 1, 1]}, "image_std is [0, 1, 1]; expected a list of 3 items"),
    ("preprocessor", {"resample": "bicubic"}, 'resample is "bicubic"; expected a whole number from 0 to 5'),
    ("preprocessor", {"do_resize": "yes"}, 'do_resize is "yes"; expected true or false'),
    ("preprocessor", {"image_processor_type": "SiglipImageProcessor"}, 'expected "CLIPImageProcessor"'),
    ("tower", {"vision_config": [1]}, "vision_config is [1]; expected an object"),
    ("tower", {"vision_config__image_size": "84"}, 'vision_config.image_size is "84"; expected a whole number'),
    ("tower", {"vision_config__patch_size": 0}, "vision_config.patch_size is 0; expected a whole number"),
    ("tower", {"vision_config__patch_size": 100}, "vision_config.patch_size is 100; expected at most image_size 84"),
    ("tower", {"vision_config__num_hidden_layers": 10**6}, "vision_config.num_hidden_layers is 1000000"),
    ("tower", {"vision_config__hidden_size": 48}, "mm_hidden_size is 64; expected 48"),
    ("tower", {"vision_config__num_attention_heads": 5}, "num_attention_heads is 5; expected a divisor of hidden_size"),
    ("tower", {"text_config__vocab_size": 1000}, "[2000, 48], the config asks for [1000, 48]"),
    ("tower", {"text_config__hidden_act": "silly"}, 'text_config.hidden_act is "silly"; expected the name'),
]  # fmt: skip
FILES = {
    "index": f"{SHARDED}/pytorch_model.bin.index.json",
    "generation": f"{SHARDED}/generation_config.json",
    "tokenizer": f"{SHARDED}/tokenizer_config.json",
    "preprocessor": f"{TOWER}/preprocessor_config.json",
    "tower": f"{TOWER}/config.json",
}


@pytest.mark.parametrize(("kind", "values", "says"), OTHER_FILES, ids=[str(row[:2])[:60] for row in OTHER_FILES])
def test_a_wrong_value_in_another_file_is_named_with_what_is_right(place: Path, kind: str, values: dict, says: str):
    (place / SHARDED / "special_tokens_map.json").unlink()  # it would override tokenizer_config.json
    edit(place / FILES[kind], **values)
    message = refused(SHARDED)
    assert says in message
    assert Path(FILES[kind]).name in message or kind in ("tower", "index")


def test_numbers_that_transformers_wants_as_floats_are_mended(place: Path):
    edit(place / NAME / "generation_config.json", do_sample=True, temperature=1, top_p=1, repetition_penalty=2)
    model = load_pretrained_model(NAME, device="cpu")[1]
    assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=2).shape[0] == 1


# -------------------------------------------------------------------------------------------------------- tokenizers
@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (f"{NAME}/tokenizer.model", b"", "tokenizer.model is empty; copy or download it again"),
        (f"{NAME}/tokenizer.model", b"no sentencepiece model", f"tokenizer of {NAME} can't be loaded"),
        (f"{NAME}/tokenizer.json", b"", "tokenizer.json is empty; copy or download it again"),
        (f"{NAME}/tokenizer.json", b"{}", f"tokenizer of {NAME}"),
        (f"{TOWER}/merges.txt", b"", "merges.txt is empty; copy or download it again"),
        (f"{TOWER}/vocab.json", b"", "vocab.json is empty; copy or download it again"),
        (f"{TOWER}/tokenizer.json", b"{", "no CLIP tokenizer (vocab.json, merges.txt) there"),
    ],
)
def test_an_empty_or_broken_tokenizer_is_named(place: Path, file: str, content: bytes, says: str):
    (place / file).write_bytes(content)
    assert says in refused(SHARDED if TOWER in file else NAME)


def test_a_tower_tokenizer_without_merges_is_refused(place: Path):
    (place / TOWER / "tokenizer.json").unlink()
    (place / TOWER / "merges.txt").write_text("#version: 0.2\n")
    assert "its tokenizer has no merges (merges.txt)" in refused(SHARDED)


@pytest.mark.parametrize(("end", "read_at"), [(7, 7), (2, 7)])
def test_a_tower_that_would_read_all_texts_alike_is_refused(place: Path, end: int, read_at: int):
    config = place / TOWER / "config.json"
    text = json.loads(config.read_text())["text_config"]
    edit(config, text_config=text | {"eos_token_id": end})
    if end == 2:  # the highest id is not the tokenizer's end token
        vocab = place / TOWER / "vocab.json"
        (place / TOWER / "tokenizer.json").unlink()
        tokens = json.loads(vocab.read_text())
        last, other = "<|endoftext|>", next(iter(tokens))
        tokens[last], tokens[other] = tokens[other], tokens[last]
        vocab.write_text(json.dumps(tokens))
        read_at = max(tokens.values())
    message = refused(SHARDED)
    assert f"reads texts at token {read_at} (eos_token_id {end} of text_config)" in message
    assert "all texts would be alike" in message


# ------------------------------------------------------------------------------------------------------ LoRA adapters
@pytest.fixture
def lora(place: Path) -> Path:
    """A LoRA adapter on the tiny language model, in LLaVA's layout."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(BASE)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    wrapped.save_pretrained(place / "lora")
    shutil.copy(place / PART / "config.json", place / "lora/config.json")
    shutil.copy(place / PART / "mm_projector.bin", place / "lora/non_lora_trainables.bin")
    load_pretrained_model("lora", BASE, device="cpu")
    return place / "lora"


ADAPTER_VALUES = [
    ({"r": "8"}, 'adapter_config.json: r is "8"; expected a whole number'),
    ({"r": 0}, "adapter_config.json: r is 0; expected a whole number from 1"),
    ({"r": None}, "adapter_config.json has no r"),
    ({"peft_type": "PREFIX_TUNING"}, 'peft_type is "PREFIX_TUNING"; expected "LORA"'),
    ({"peft_type": None}, "adapter_config.json has no peft_type"),
    ({"lora_alpha": None}, "lora_alpha is null; expected a number"),
    ({"lora_alpha": "16"}, 'lora_alpha is "16"; expected a number'),
    ({"lora_dropout": 2}, "lora_dropout is 2; expected a number from 0 to 1"),
    ({"bias": "some"}, 'bias is "some"; expected one of "none", "all", "lora_only"'),
    ({"target_modules": 5}, "target_modules is 5; expected"),
    ({"target_modules": ["nothing"]}, "does not fit the base model"),
    ({"target_modules": ["q_proj"]}, "has no place for"),
    ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "lacks 6 weights"),
    ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7; expected a text"),
]


@pytest.mark.parametrize(("values", "says"), ADAPTER_VALUES, ids=[str(row[0]) for row in ADAPTER_VALUES])
def test_a_wrong_value_in_adapter_config_is_named_with_what_is_right(lora: Path, values: dict, says: str):
    edit(lora / "adapter_config.json", **values)
    assert says in refused("lora", BASE)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_an_adapter_config_that_is_no_object_is_named(lora: Path, content: str):
    (lora / "adapter_config.json").write_text(content)
    assert "adapter_config.json: a JSON object is needed" in refused("lora", BASE)


def test_a_lora_on_a_base_of_another_size_names_the_tensor_and_both_shapes(lora: Path):
    weights = load_file(lora / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    weights[name] = torch.zeros(4, 128)
    save_file(weights, lora / "adapter_model.safetensors")
    assert f"{name} has shape [4, 128], the base model asks for [4, 64]" in refused("lora", BASE)


def test_a_lora_on_a_base_with_fewer_layers_names_the_tensor(lora: Path):
    weights = load_file(lora / "adapter_model.safetensors")
    weights["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)
    save_file(weights, lora / "adapter_model.safetensors")
    assert "model.layers.7.self_attn.q_proj.lora_A.weight belongs to a layer" in refused("lora", BASE)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "non_lora_trainables.bin"])
def test_nan_in_an_adapter_is_refused(lora: Path, file: str):
    is_adapter = file.endswith(".safetensors")
    weights = load_file(lora / file) if is_adapter else torch.load(lora / file, weights_only=True)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    (save_file if is_adapter else torch.save)(weights, lora / file)
    message = refused("lora", BASE)
    assert file in message
    assert "holds inf or NaN" in message


def test_a_lora_without_its_weights_is_refused(lora: Path):
    (lora / "adapter_model.safetensors").unlink()
    assert "has adapter_config.json, but no adapter_model.safetensors: copy the folder again" in refused("lora", BASE)


# ------------------------------------------------------------------------------------------------------ projector files
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "mm_projector.bin holds a list; expected named tensors"),
        ({"a": 1}, 'mm_projector.bin: "a" is a int; expected named tensors'),
        ({"model.mm_projector.0.weight": torch.zeros(3, 3)}, "mm_projector.0.weight has shape [3, 3]"),
        ({"model.something": torch.zeros(3)}, "mm_projector.bin: the model has no model.something"),
        ({}, "mm_projector.bin lacks 4 weights, first model.mm_projector.0.bias"),
        (Payload(), "mm_projector.bin can't be read: it holds no weights, or more than weights (code is not run)"),
    ],
)
def test_a_projector_file_that_is_something_else_is_named(place: Path, content: object, says: str):
    torch.save(content, place / PART / "mm_projector.bin")
    assert says in refused(PART, BASE)
    assert not (place / "ran").exists()


def test_a_projector_of_whole_numbers_is_refused(place: Path):
    file = place / PART / "mm_projector.bin"
    torch.save({name: value.to(torch.int8) for name, value in torch.load(file, weights_only=True).items()}, file)
    assert "0.bias holds int8; expected floating-point numbers" in refused(PART, BASE)


# --------------------------------------------------------------------------------------------------- what is kept safe
def test_consolidate_never_writes_over_another_checkpoint(place: Path):
    before = (place / SHARDED / "config.json").read_bytes()
    with pytest.raises(InputError, match=f"{SHARDED} holds a checkpoint already: name another folder"):
        consolidate_ckpt(NAME, SHARDED)
    with pytest.raises(InputError, match=r"config\.json is a file: name a folder"):
        consolidate_ckpt(NAME, f"{SHARDED}/config.json")
    assert (place / SHARDED / "config.json").read_bytes() == before
    consolidate_ckpt(NAME, "new")
    load_pretrained_model("new", device="cpu")


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("llava.model.consolidate", ["--src", NAME, "--dst", "new"]),
        (f"{ROOT}/scripts/extract_mm_projector.py", ["--model-path", NAME, "--output", "new"]),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_in_the_way(place: Path, module: str, options: list[str]):
    (place / "new").mkdir()
    (place / "new/notes.txt").write_text("mine")
    run = [sys.executable, *([module] if module.endswith(".py") else ["-m", module]), *options]
    # A limit of file sizes fails like a full disk: in the middle of a write.
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 5; exec "$@"', "bash", *run],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert limited.returncode == 2 and "Traceback" not in limited.stderr, limited.stderr
    assert limited.stderr.splitlines()[-1].startswith("error: cannot write ")
    assert [path.name for path in (place / "new").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("TRIM:1000", "TRIM:1000: an image has 36 patches; all of them are kept"),
        ("TRIM:-1,min_keep=100", "TRIM:-1,min_keep=100: an image has 36 patches; all of them are kept"),
        ("Random:0.001", "Random:0.001: less than one of an image's 36 patches; the least that Random allows is kept"),
        ("TRIM:0.25", None),
        ("TRIM:36", None),
        ("TRIM:-1", None),
    ],
)
def test_a_budget_that_the_image_cannot_meet_is_reported(
    place: Path, spec: str, says: str | None, caplog: pytest.LogCaptureFixture
):
    model = load_pretrained_model(NAME, reduce=spec, device="cpu")[1]
    model.set_token_reduction(spec)
    assert [record.getMessage() for record in caplog.records if "patches" in record.getMessage()] == [says] * 2 * bool(
        says
    )
    assert model.encode_images(torch.zeros(1, 3, 84, 84), ["a"])[0].num_tokens >= 1


@pytest.mark.parametrize("both", [True, False])
def test_quantising_needs_its_package_and_one_width(place: Path, both: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llava.model.builder.is_bitsandbytes_available", lambda: False)
    says = "to 8 or to 4 bit, not to both" if both else "needs bitsandbytes"
    with pytest.raises(InputError, match=says):
        load_pretrained_model(NAME, load_8bit=both, load_4bit=True, device="cpu")
