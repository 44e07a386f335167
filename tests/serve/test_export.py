"""The exported language model is the checkpoint's, and a model without its layers makes the same prompts."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llava.convert import convert
from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.serve.export import export_language_model
from tests.families import FAMILIES, GOLDEN, write_checkpoint

TEXTS = ["What color is it?", "  two\nlines, été 🙂", "USER: <image> yes"]
IDS = torch.arange(5, 40)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/language_models"


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", request.param)


@pytest.fixture
def lora(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter with weights far from zero, and its base."""
    from peft import LoraConfig, get_peft_model

    base = write_checkpoint(tmp_path / "base", "llama", is_llava=False)
    full = write_checkpoint(tmp_path / "full", "llama")
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            value.data = 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
    wrapped.save_pretrained(tmp_path / "lora")
    shutil.copy(full / "config.json", tmp_path / "lora/config.json")
    _, model, _, _ = load_pretrained_model(str(full), device="cpu")
    projector = {name: value for name, value in model.state_dict().items() if "mm_projector" in name}
    torch.save(projector, tmp_path / "lora/non_lora_trainables.bin")
    return tmp_path / "lora", base


@torch.inference_mode()
def check_same(folder: Path, source: Path, base: Path | None = None) -> None:
    """Logits, end tokens and ids of texts of an export are the checkpoint's, bit for bit."""
    tokenizer, model, _, _ = load_pretrained_model(str(source), base and str(base), device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain).__module__.startswith("transformers.") and not hasattr(plain.model, "mm_projector")
    assert torch.equal(plain(IDS).logits, model(IDS).logits)
    assert plain.generation_config.eos_token_id == model.generation_config.eos_token_id
    own = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert own(text).input_ids == ids
        assert own.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)


# -------------------------------------------------------------------------------------------------------------- export
def test_an_export_computes_what_its_checkpoint_computes(family: Path) -> None:
    folder = export_language_model(str(family))
    check_same(folder, family)
    settings = json.loads((folder / "config.json").read_text())
    assert not any(key.startswith("mm_") for key in settings)


def test_a_checkpoint_in_transformers_layout_is_exported_as_well(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    convert(str(source), str(tmp_path / "hf"), "llava-hf")
    check_same(export_language_model(str(tmp_path / "hf")), tmp_path / "hf")


def test_an_adapter_is_exported_merged(lora: tuple[Path, Path]) -> None:
    source, base = lora
    folder = export_language_model(str(source), str(base))
    check_same(folder, source, base)
    stored = LlamaForCausalLM.from_pretrained(base)
    assert not torch.equal(stored(IDS).logits, AutoModelForCausalLM.from_pretrained(folder)(IDS).logits)


def test_merged_weights_have_the_dtype_that_is_asked_for(lora: tuple[Path, Path]) -> None:
    source, base = (str(path) for path in lora)
    half, single = (export_language_model(source, base, dtype) for dtype in ("bfloat16", "float32"))
    assert half != single
    assert AutoConfig.from_pretrained(half).dtype == torch.bfloat16


def test_the_second_start_finds_the_export_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    first = export_language_model(str(source))
    assert f"writing the language model to {first.parent} (once; 0.0 GB at most)" in capsys.readouterr().err
    written = {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
    copy = Path(shutil.copytree(source, tmp_path / "elsewhere/model"))
    assert export_language_model(str(copy)) == first
    assert capsys.readouterr().err == ""
    assert {file.name: file.stat().st_mtime_ns for file in first.iterdir()} == written


def test_a_changed_checkpoint_is_exported_anew(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    first = export_language_model(str(source))
    shutil.rmtree(source)
    write_checkpoint(source, "llama", max_position_embeddings=256)
    second = export_language_model(str(source))
    assert second != first
    assert AutoConfig.from_pretrained(second).max_position_embeddings == 256


def test_what_a_killed_export_left_is_cleared_away(tmp_path: Path, cache: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    folder = export_language_model(str(source))
    left = cache / f".{folder.name}.123.partial"
    folder.rename(left)
    assert export_language_model(str(source)) == folder
    assert folder.is_dir() and not left.exists()


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path: Path, monkeypatch, cache: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr("llava.serve.export.shutil.disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(InputError, match=r"takes 0\.0 GB, and .*language_models has 0\.0 GB left: set LLAVA_CACHE"):
        export_language_model(str(source))
    assert [file.name for file in cache.iterdir() if file.suffix != ".lock"] == []


@pytest.mark.parametrize("name", ["repetition_penalty", "no_repeat_ngram_size"])
def test_settings_that_change_greedy_answers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, name: 2}))
    with pytest.raises(InputError, match=f"asks for {name}, which changes greedy answers"):
        export_language_model(str(source))


def test_several_end_tokens_are_kept(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.9}))
    folder = export_language_model(str(source))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(InputError, match="is quantised: export the checkpoint that it was made from"):
        export_language_model(str(source))


# -------------------------------------------------------------------------------------------------- without its layers
@torch.inference_mode()
def check_same_prompts(source: Path, base: Path | None = None) -> None:
    """A model without its layers holds none of their weights and embeds a prompt with an image as the whole model."""
    base = base and str(base)
    _, whole, _, _ = load_pretrained_model(str(source), base, device="cpu", reduce="TRIM:-1")
    _, model, _, _ = load_pretrained_model(str(source), base, device="cpu", reduce="TRIM:-1", without_layers=True)
    assert not [name for name, _ in model.named_parameters() if name.startswith("model.layers.")]
    assert model.config.num_hidden_layers == whole.config.num_hidden_layers
    pixels = torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, -200, 6, 7]])
    embeds = [each.embed_prompts(ids, images=pixels, texts=["Is it red?"]).embeds for each in (whole, model)]
    assert embeds[0].shape[1] > 4 and torch.equal(*embeds)


def test_a_model_without_its_layers_makes_the_same_prompts(family: Path) -> None:
    check_same_prompts(family)


def test_an_adapted_model_without_its_layers_makes_the_same_prompts(lora: tuple[Path, Path]) -> None:
    check_same_prompts(*lora)


def test_layers_are_not_read_where_they_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    from safetensors.torch import load_file, save_file

    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))  # which reading would refuse
    save_file(weights, source / "model.safetensors")
    load_pretrained_model(str(source), device="cpu", without_layers=True)
    with pytest.raises(InputError, match="holds inf or NaN"):
        load_pretrained_model(str(source), device="cpu")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reduce": "FastV:0.5,layer=2"}, "FastV:0.5 drops image tokens between layers of the language model"),
        ({"load_4bit": True}, "8 and 4 bit are for the language model's layers"),
    ],
)
def test_what_works_on_the_layers_is_refused_without_them(options: dict, says: str) -> None:
    if "load_4bit" in options:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(InputError, match=says):
        load_pretrained_model(str(GOLDEN / "llava-v1.5-tiny84"), device="cpu", without_layers=True, **options)
