"""The open_clip tower gives what the Hugging Face one gives with the same weights."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel

from llava.image import load_image
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.builder import build_named_tower, load_tower
from llava.model.token_reduction import TEXT

open_clip = pytest.importorskip("open_clip")
from llava.model.multimodal_encoder import open_clip_source  # noqa: E402 # needs it

TEXTS = ["What is in the picture?", "", "a red square left of a blue circle", "Is there a dog? " * 40]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def plain_names(clips, monkeypatch) -> dict:
    """Two architectures by name: `tiny` as open_clip's GELU variants are, `tiny-quickgelu` as the weights need."""
    config = json.loads((clips / "oc/open_clip_config.json").read_text())["model_cfg"]
    models = {"tiny": config | {"quick_gelu": False}, "tiny-quickgelu": config}
    for name, model in models.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, model)
    return models


def load_pair(clips: Path, needs=frozenset({TEXT}), **settings):
    pair = [
        build_named_tower(name, folder=clips, needs=needs, **settings)
        for name in (str(clips / "hf"), "open_clip:local-dir:oc")
    ]
    for tower in pair:
        tower.load_model()
    return pair


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 84, 84, generator=torch.Generator().manual_seed(1))


def test_converting_there_and_back_changes_no_weight(clips, layouts):
    original = load_file(clips / "hf/model.safetensors")
    back = layouts.from_open_clip(load_file(clips / "oc/open_clip_model.safetensors"))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)


@pytest.mark.parametrize("layer", [-2, -1, 0, 1, -5])
def test_patches_and_joint_patches_equal_the_hugging_face_tower(clips, layer):
    theirs, ours = load_pair(clips, needs=(), select_layer=layer)
    expected, patches = theirs.encode(pixels()), ours.encode(pixels())
    assert patches.shape == (3, 36, 64)
    torch.testing.assert_close(patches, expected, **TOLERANCE)
    torch.testing.assert_close(ours.project_to_joint(patches), theirs.project_to_joint(expected), **TOLERANCE)


def test_cls_row_comes_first_as_in_the_hugging_face_tower(clips):
    theirs, ours = load_pair(clips, needs=(), select_feature="cls_patch")
    torch.testing.assert_close(ours.encode(pixels()), theirs.encode(pixels()), **TOLERANCE)


def test_text_embeddings_equal_the_hugging_face_tower_also_beyond_77_tokens(clips):
    theirs, ours = load_pair(clips)
    torch.testing.assert_close(ours.embed_text(TEXTS), theirs.embed_text(TEXTS), **TOLERANCE)


def test_size_grid_and_width_are_known_before_loading(clips):
    tower = build_named_tower("open_clip:local-dir:oc", folder=clips)
    assert not tower.is_loaded
    assert (tower.image_size, tower.grid, tower.num_patches, tower.hidden_size) == (84, (6, 6), 36, 64)


def test_trim_keeps_the_same_patches_with_either_tower(clips):
    kept = []
    for name in ("hf", "open_clip:local-dir:oc"):
        config = LlavaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
            mm_vision_tower=name, mm_hidden_size=64, mm_projector_type="linear", mm_vision_token_reduce_func="TRIM:-1",
        )  # fmt: skip
        config._name_or_path = str(clips)
        model = LlavaLlamaForCausalLM(config)
        model.get_vision_tower().load_model()
        kept.append([tokens.kept for tokens in model.encode_images(pixels(4), TEXTS)])
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*kept, strict=True))
    assert all(0 < ours.sum() < 36 for ours in kept[1])


def test_layers_behind_the_selected_one_and_the_text_half_are_gone(clips):
    _, ours = load_pair(clips, needs=())
    assert len(ours.vision_tower.transformer.resblocks) == 3
    names = {name.split(".")[0] for name, _ in ours.named_parameters()}
    assert names == {"vision_tower"}
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_text_half_comes_back_when_it_is_asked_for_and_has_no_vision_half(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(clips)
    late = load_tower("open_clip:local-dir:oc")
    monkeypatch.chdir(tmp_path)  # the path was relative, and is still known
    _, early = load_pair(clips)
    assert torch.equal(late.embed_text(TEXTS), early.embed_text(TEXTS))
    assert late.text_tower.model.visual is None
    assert sum(p.numel() for p in late.parameters()) == sum(p.numel() for p in early.parameters())


def test_scores_are_float32_whatever_the_tower_runs_in(clips):
    tower = load_tower(f"open_clip:local-dir:{clips / 'oc'}", needs={TEXT}, dtype=torch.bfloat16)
    patches = tower.encode(pixels())
    assert patches.dtype == torch.bfloat16
    assert tower.project_to_joint(patches).dtype == tower.embed_text(TEXTS).dtype == torch.float32
    exact = load_tower(f"open_clip:local-dir:{clips / 'oc'}")
    assert (patches - exact.encode(pixels())).abs().mean() < 0.02


def test_pixel_values_are_those_of_llava_and_of_open_clip(clips, golden):
    theirs, ours = load_pair(clips, needs=())
    picture = load_image(next((golden / "data/images").glob("*.png")))
    for settings in (LlavaConfig(image_aspect_ratio="pad"), LlavaConfig()):
        expected = process_images([picture], theirs.image_processor, settings)
        assert torch.equal(process_images([picture], ours.image_processor, settings), expected)
    square = picture.resize((200, 200))
    own = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=84), is_train=False)(square)
    torch.testing.assert_close(process_images([square], ours.image_processor, LlavaConfig())[0], own, **TOLERANCE)


def test_colours_and_interpolation_are_those_of_the_model_config(clips, tmp_path):
    folder = shutil.copytree(clips / "oc", tmp_path / "oc")
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    processor = load_tower(f"open_clip:local-dir:{folder}").image_processor
    assert list(processor.image_mean) == [0.5, 0.5, 0.5] and processor.resample == Image.Resampling.BILINEAR
    white = process_images([Image.new("RGB", (10, 10), "white")], processor, LlavaConfig())
    assert white.unique().tolist() == [2.0]


class Weights(nn.Module):
    """Nothing but weights; scripted, it is a file like those that OpenAI published."""

    def __init__(self, weights: dict):
        super().__init__()
        for name, value in weights.items():
            *parents, leaf = name.split(".")
            owner = self
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, Weights({}))
                owner = owner.get_submodule(parent)
            owner.register_parameter(leaf, nn.Parameter(value.half()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write_weights(weights: dict, path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    elif path.name == "openai.pt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(Weights(weights)).save(path)
    else:
        wrapped = {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in weights.items()}}
        torch.save(wrapped if path.suffix == ".pt" else weights, path)


@pytest.mark.parametrize("file", ["w.safetensors", "w.bin", "w.pt", "openai.pt"])
def test_weights_file_of_any_kind_is_found_beside_the_checkpoint(clips, plain_names, tmp_path, file):
    write_weights(load_file(clips / "oc/open_clip_model.safetensors"), tmp_path / file)
    tower = build_named_tower(f"open_clip:tiny-quickgelu,pretrained={file}", folder=tmp_path, needs={TEXT})
    tower.load_model()
    theirs, _ = load_pair(clips)
    tolerance = {"atol": 2e-2, "rtol": 0} if file == "openai.pt" else TOLERANCE  # that one is float16
    torch.testing.assert_close(tower.encode(pixels()), theirs.encode(pixels()), **tolerance)
    torch.testing.assert_close(tower.embed_text(TEXTS), theirs.embed_text(TEXTS), **tolerance)


def test_activation_of_a_weights_file_is_pointed_out_and_can_be_given(clips, plain_names, caplog):
    weights = clips / "oc/open_clip_model.safetensors"
    theirs, _ = load_pair(clips, needs=())
    expected = theirs.encode(pixels())
    with caplog.at_level(logging.WARNING):
        silent = load_tower(f"open_clip:tiny,pretrained={weights},quickgelu=true")
        chosen = load_tower(f"open_clip:tiny,pretrained={weights},quickgelu=false")
        assert not caplog.records
        gelu = load_tower(f"open_clip:tiny,pretrained={weights}")
    assert [",quickgelu=true" in record.getMessage() for record in caplog.records] == [True]
    torch.testing.assert_close(silent.encode(pixels()), expected, **TOLERANCE)
    assert torch.equal(gelu.encode(pixels()), chosen.encode(pixels()))
    assert (gelu.encode(pixels()) - expected).abs().max() > 1e-3


def test_tag_needs_no_path_and_weights_in_a_folder_with_commas_are_found(tmp_path):
    source = open_clip_source.parse_source("ViT-B/32,pretrained=laion2b_s34b_b79k")
    assert (source.model, source.weights) == ("ViT-B-32", "laion2b_s34b_b79k")
    file = tmp_path / "a,b.pt"
    file.touch()
    assert open_clip_source.parse_source(f"ViT-B-32-quickgelu,pretrained={file}").weights == file


@pytest.mark.parametrize("reduce", ["none", "TRIM:-1", "TRIM:0.25"])
def test_llava_checkpoint_answers_the_same_with_its_tower_in_open_clip_layout(checkpoints, layouts, tmp_path, reduce):
    name = "llava-v1.5-tiny84-TRIM"
    tower = checkpoints / "openai/clip-vit-tiny-patch14-84"
    converted = shutil.copytree(checkpoints / name, tmp_path / name)
    clip = CLIPModel.from_pretrained(tower)
    folder = layouts.write_open_clip(
        converted / "clip", clip.config, clip.state_dict(), hf_tokenizer_name="beside this file"
    )
    for file in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tower / file, folder)
    config = json.loads((converted / "config.json").read_text()) | {"mm_vision_tower": "open_clip:local-dir:clip"}
    (converted / "config.json").write_text(json.dumps(config))

    picture = load_image(checkpoints.parent / "data/images/wide_shapes.png")
    question = "What is the color of the ball?"
    answers, counts = [], []
    for path in (name, str(converted)):
        tokenizer, model, processor, _ = load_pretrained_model(path, reduce=reduce, device="cpu")
        ids = tokenizer_image_token(f"USER: <image>\n{question} ASSISTANT:", tokenizer, return_tensors="pt")[None]
        values = process_images([picture], processor, model.config)
        answers.append(model.generate(ids, images=values, texts=question, max_new_tokens=12, do_sample=False).tolist())
        counts.append(model.encode_images(values, [question])[0].kept.tolist())
    assert answers[0] == answers[1]
    assert counts[0] == counts[1]
