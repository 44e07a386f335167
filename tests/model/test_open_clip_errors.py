"""Whatever is wrong with an `open_clip:` tower is told in one line that names it and says what would be right."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import InputError
from llava.model.multimodal_encoder.builder import build_named_tower
from llava.model.token_reduction import TEXT

open_clip = pytest.importorskip("open_clip")
from llava.model.multimodal_encoder import open_clip_source  # noqa: E402 # needs it

MISTAKES = {
    "": "names no model",
    "local-dir:": "names no model",
    "ViT-L-14-366": "did you mean ViT-L-14-336",
    "vit_l_14_336": "ViT-L-14-336",
    "nothing-like-it": "list_models",
    "ViT-B-32": "has no weights: add ,pretrained=",
    "ViT-B-32,pretrained=": "can't read",
    "ViT-B-32,weights=x.pt": "can't read",
    "ViT-B-32,pretrained=absent.pt": "neither a file (tried absent.pt and {folder}/absent.pt) nor one of open_clip",
    "ViT-B-32,quickgelu=yes": "quickgelu is true or false",
    "ViT-L-14-336,pretrained=openai": "add ,quickgelu=true",
    "ViT-B-16-SigLIP": "has no weights: add ,pretrained=FILE or a tag of open_clip (webli)",
    "coca_ViT-B-32,pretrained=laion2b_s13b_b90k": "a custom text tower and attention pooling",
    "RN50,pretrained=openai": "a ResNet",
    "convnext_base,pretrained=laion400m_s13b_b51k": "a timm image tower",
    "local-dir:absent": "no such folder (tried absent and {folder}/absent)",
    "local-dir:hf": "named without open_clip:",
    "local-dir:oc,pretrained=openai": "leave pretrained= out",
    "local-dir:broken-config": "is not JSON",
    "local-dir:no-model": "has no model_cfg",
    "local-dir:foreign-model": "is none of open_clip",
    "local-dir:oblong": "is not square",
    "local-dir:no-weights": "no weights in",
    "local-dir:two-weights": "several weights files",
    "local-dir:broken-weights": "can't be read",
    "local-dir:pickle": "can't be read",
    "local-dir:fewer": "1 are missing, first visual.proj",
    "local-dir:more": "1 have no place in the model, first extra",
    "local-dir:larger": "positional_embedding is [50, 64], the model has [37, 64]",
    "local-dir:hf-weights": "without open_clip:",
    "local-dir:refused": "open_clip refuses its config",
    "local-dir:colours": "interpolation sinc is unknown",
    "local-dir:shallow-vocabulary": "knows 100 token ids, its tokenizer has 49408",
    "local-dir:no-tokenizer": "its tokenizer can't be loaded",
    "hf-hub:org/name": "open_clip_config.json can't be downloaded: no network",
    "ViT-B-32,pretrained=laion2b_s34b_b79k": "weights can't be downloaded: no network",
}


@pytest.fixture(scope="module")
def wrong_folders(clips, tmp_path_factory) -> Path:
    """Folders that are wrong in one way each, and two that are not."""
    tmp_path = tmp_path_factory.mktemp("wrong")
    weights = load_file(clips / "oc/open_clip_model.safetensors")
    settings = json.loads((clips / "oc/open_clip_config.json").read_text())

    def folder(name: str, config: object = settings, **files: dict) -> Path:
        (tmp_path / name).mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / name / "open_clip_config.json").write_text(text)
        for file, values in (files or {"open_clip_model": weights}).items():
            save_file(values, tmp_path / name / f"{file}.safetensors")
        return tmp_path / name

    def model(half: str | None = None, **changes: object) -> dict:
        changed = json.loads(json.dumps(settings))
        (changed["model_cfg"][half] if half else changed["model_cfg"]).update(changes)
        return changed

    for name in ("hf", "oc"):
        (tmp_path / name).symlink_to(clips / name)
    folder("broken-config", "{")
    folder("no-model", {})
    folder("foreign-model", model("vision_cfg", hidden_size=64))
    folder("oblong", model("vision_cfg", image_size=[84, 168]))
    (folder("no-weights") / "open_clip_model.safetensors").unlink()
    folder("two-weights", a=weights, b=weights)
    (folder("broken-weights") / "open_clip_model.safetensors").write_bytes(b"short")
    (folder("pickle") / "open_clip_model.safetensors").unlink()
    torch.save({"weights": Path()}, tmp_path / "pickle/open_clip_pytorch_model.bin")
    folder("fewer", w={key: value for key, value in weights.items() if key != "visual.proj"})
    folder("more", w=weights | {"extra": torch.ones(1)})
    folder("larger", w=weights | {"visual.positional_embedding": torch.zeros(50, 64)})
    folder("hf-weights", w=load_file(clips / "hf/model.safetensors"))
    folder("refused", model(heads=3))
    folder("colours", settings | {"preprocess_cfg": {"interpolation": "sinc"}})
    fewer_words = weights | {"token_embedding.weight": weights["token_embedding.weight"][:100].clone()}
    folder("shallow-vocabulary", model("text_cfg", vocab_size=100), w=fewer_words)
    folder("no-tokenizer", model("text_cfg", hf_tokenizer_name="there"))

    return tmp_path


@pytest.fixture
def broken(wrong_folders, monkeypatch) -> Path:
    """`wrong_folders`, on a machine without network."""

    def no_network(*args, **kwargs):
        raise OSError("no network\nfor a reason told at length")

    monkeypatch.setattr(open_clip_source, "download_pretrained_from_hf", no_network)
    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    return wrong_folders


@pytest.mark.parametrize("spec", MISTAKES)
def test_mistake_ends_in_one_line_that_says_what_would_be_right(broken, spec):
    with pytest.raises(InputError) as caught:
        build_named_tower(f"open_clip:{spec}", folder=broken, needs={TEXT}).load_model()
    message = str(caught.value)
    assert MISTAKES[spec].replace("{folder}", str(broken)) in message
    assert "\n" not in message and f"open_clip:{spec}" in message


def test_missing_layer_is_named_before_weights_are_read(clips):
    with pytest.raises(InputError, match=r"mm_vision_select_layer -6 does not exist: open_clip:.* has 4 layers"):
        build_named_tower("open_clip:local-dir:oc", folder=clips, select_layer=-6).load_model()
