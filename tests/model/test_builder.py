"""Loading checkpoints: the layouts that work, and one clear line for those that don't."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from llava.errors import InputError
from llava.model.builder import load_pretrained_model

NAME = "llava-v1.5-tiny84-TRIM"


@pytest.fixture
def copied(golden, tmp_path, monkeypatch) -> Path:
    """A checkpoint that a test may damage, with its vision tower beside it."""
    shutil.copytree(golden / "checkpoints" / NAME, tmp_path / NAME)
    shutil.copytree(golden / "checkpoints" / "openai", tmp_path / "openai")
    monkeypatch.chdir(tmp_path)
    return tmp_path / NAME


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def generate(model, **settings) -> list[int]:
    ids = torch.tensor([[1, 5, -200, 7]])
    image = torch.linspace(-1, 1, 3 * 84 * 84).view(1, 3, 84, 84)
    return model.generate(ids, images=image, texts="a bus", max_new_tokens=6, do_sample=False, **settings)[0].tolist()


def test_config_line_switches_the_reduction_on_and_off(copied):
    counts = {}
    for spec in ("TRIM:-1", "TRIM:0.5", None, ""):
        edit_config(copied, mm_vision_token_reduce_func=spec)
        model = load_pretrained_model(str(copied))[1]
        counts[spec] = model.encode_images(torch.zeros(1, 3, 84, 84), ["a bus"])[0].num_tokens
    assert counts["TRIM:0.5"] == 19
    assert counts[None] == counts[""] == 36
    assert counts["TRIM:-1"] < 19


def test_reduce_argument_overrides_the_config(copied):
    model = load_pretrained_model(str(copied), reduce="none")[1]
    assert model.token_reducer is None
    model.set_token_reduction("TRIM:0.25")
    assert model.encode_images(torch.zeros(1, 3, 84, 84), ["a bus"])[0].num_tokens == 10
    assert model.config.mm_vision_token_reduce_func == "TRIM:0.25"


def test_text_tower_is_loaded_only_where_it_is_needed(copied):
    tower = load_pretrained_model(str(copied), reduce="Pool:0.25")[1].get_vision_tower()
    assert not hasattr(tower, "text_tower")
    assert hasattr(load_pretrained_model(str(copied))[1].get_vision_tower(), "text_tower")


def test_tower_holds_no_layer_that_it_does_not_run(copied):
    tower = load_pretrained_model(str(copied))[1].get_vision_tower()
    assert len(tower.vision_tower.vision_model.encoder.layers) == tower.config.num_hidden_layers - 1


def test_vision_tower_beside_the_checkpoint_is_found_from_anywhere(copied, tmp_path, monkeypatch):
    edit_config(copied, mm_vision_tower="../openai/clip-vit-tiny-patch14-84")
    expected = generate(load_pretrained_model(str(copied))[1])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert generate(load_pretrained_model(str(copied))[1]) == expected


def test_saved_checkpoint_loads_and_answers_the_same(copied, tmp_path):
    tokenizer, model, _, _ = load_pretrained_model(str(copied))
    model.save_pretrained(tmp_path / "saved-llava")
    tokenizer.save_pretrained(tmp_path / "saved-llava")
    saved = load_pretrained_model(str(tmp_path / "saved-llava"))[1]
    assert generate(saved) == generate(model)
    assert json.loads((tmp_path / "saved-llava" / "config.json").read_text())["model_type"] == "llava_llama"


def test_half_precision_images_and_models_mix(copied):
    for dtype in ("float32", "bfloat16", "float16"):
        model = load_pretrained_model(str(copied), dtype=dtype)[1]
        ids, image = torch.tensor([[1, 5, -200, 7]]), torch.zeros(1, 3, 84, 84, dtype=torch.float16)
        assert model.generate(ids, images=image, max_new_tokens=2).shape[0] == 1
        assert model.get_vision_tower().dtype == torch.float32


@pytest.mark.parametrize("device_map", ["auto", "cpu", None, {"": "cpu"}])
def test_device_maps_of_external_clients_load(copied, device_map):
    model = load_pretrained_model(str(copied), None, NAME, device_map=device_map, device="cpu", multimodal=True)[1]
    assert len(generate(model)) > 0


@pytest.mark.parametrize("width", ["load_4bit", "load_8bit"])
def test_a_quantised_model_answers_on_this_cpu_whatever_its_shapes(copied, width):
    pytest.importorskip("bitsandbytes")
    model = load_pretrained_model(str(copied), device="cpu", **{width: True})[1]
    assert len(generate(model, min_new_tokens=6)) == 6


def test_4_bit_layers_are_packed_where_bitsandbytes_can_and_nowhere_else(copied, monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load_pretrained_model(str(copied), load_4bit=True, device="cpu")[1]
    packed = {}
    for name, layer in model.model.layers[0].named_modules():
        if type(layer).__name__ == "Linear4bit":
            packed[name] = layer.support_avx512bf16_for_cpu
            with nullcontext() if packed[name] else pytest.raises((AssertionError, RuntimeError)):
                functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    # 176 is no multiple of the 32 rows of a block, nor of the 64 values of a quantised block.
    assert packed["self_attn.q_proj"]
    assert not packed["mlp.up_proj"]
    assert not packed["mlp.down_proj"]


def test_beam_search_and_sampling_run(copied):
    model = load_pretrained_model(str(copied))[1]
    assert len(generate(model, num_beams=3)) > 0
    assert model.generate(torch.tensor([[1, 5]]), do_sample=True, temperature=0.7, max_new_tokens=3).shape == (1, 3)


def test_images_may_come_as_tensor_or_list_or_crops(copied):
    model = load_pretrained_model(str(copied))[1]
    ids = torch.tensor([[1, -200, 7, -200, 9]])
    stack = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    answers = [
        model.generate(ids, images=images, texts="a bus", max_new_tokens=6, do_sample=False).tolist()
        for images in (stack, list(stack), [stack[:1], stack[1:]], stack[:, None])
    ]
    assert all(row == answers[0] for row in answers)


def damage(folder: Path, kind: str) -> None:
    actions = {
        "no such folder": lambda: shutil.rmtree(folder),
        "no config": lambda: (folder / "config.json").unlink(),
        "broken config": lambda: (folder / "config.json").write_text("{"),
        "missing shard": lambda: (folder / "pytorch_model-00002-of-00002.bin").unlink(),
        "truncated shard": lambda: (folder / "pytorch_model-00002-of-00002.bin").write_bytes(b"PK\x03\x04"),
        "no weights": lambda: [path.unlink() for path in folder.glob("pytorch_model*")],
        "no tokenizer": lambda: (folder / "tokenizer.model").unlink(),
        "missing vision tower": lambda: edit_config(folder, mm_vision_tower="./towers/absent"),
        "no vision tower": lambda: edit_config(folder, mm_vision_tower=None),
        "misspelt reducer": lambda: edit_config(folder, mm_vision_token_reduce_func="TRIMM:-1"),
        "budget is no number": lambda: edit_config(folder, mm_vision_token_reduce_func="TRIM:abc"),
        "unknown option": lambda: edit_config(folder, mm_vision_token_reduce_func="TRIM:-1,foo=2"),
        "unknown projector": lambda: edit_config(folder, mm_projector_type="mlp"),
        "unknown layer": lambda: edit_config(folder, mm_vision_select_layer=-9),
        "CLS row with reduction": lambda: edit_config(folder, mm_vision_select_feature="cls_patch"),
        "wrong size": lambda: edit_config(folder, hidden_size=32),
        "vision-only tower": lambda: strip_text_half(folder.parent / "openai" / "clip-vit-tiny-patch14-84"),
    }
    actions[kind]()


def strip_text_half(tower: Path) -> None:
    weights = torch.load(tower / "pytorch_model.bin", weights_only=True)
    torch.save({k: v for k, v in weights.items() if not k.startswith("text_")}, tower / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no such folder", "is not there"),
        ("no config", "holds no config.json"),
        ("broken config", "config.json is not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("missing shard", "lacks 1 of 2 weight files, first pytorch_model-00002-of-00002.bin"),
        ("truncated shard", "pytorch_model-00002-of-00002.bin can't be read"),
        ("no weights", "holds no weights"),
        ("no tokenizer", "tokenizer"),
        ("missing vision tower", "vision tower ./towers/absent is not there"),
        ("no vision tower", "names no mm_vision_tower"),
        ("misspelt reducer", 'did you mean "TRIM"?'),
        ("budget is no number", '"abc" is not a budget'),
        ("unknown option", "known: position_ids, similarity"),
        ("unknown projector", "use linear, mlp2x_gelu"),
        ("unknown layer", "has 4 layers"),
        ("CLS row with reduction", "set mm_vision_select_feature to patch"),
        ("wrong size", "model.embed_tokens.weight has shape [1000, 64], the config asks for [1000, 32]"),
        ("vision-only tower", "is it a full CLIP checkpoint?"),
    ],
)
def test_damaged_checkpoint_ends_in_one_line(copied, kind, says):
    damage(copied, kind)
    with pytest.raises(InputError) as caught:
        load_pretrained_model(str(copied))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"device": "cuda"} if not torch.accelerator.is_available() else {"device": "nonsense"}, "device"),
        ({"device": "toaster"}, 'device "toaster" is unknown'),
        ({"dtype": "float8"}, "use float32, float16, bfloat16"),
        ({"reduce": "TRIMM:-1"}, 'did you mean "TRIM"?'),
        ({"model_base": "lmsys/vicuna"}, "is a full checkpoint: leave out the model base"),
    ],
)
def test_wrong_arguments_end_in_one_line(copied, arguments, says):
    with pytest.raises(InputError, match=says):
        load_pretrained_model(str(copied), **arguments)


def test_autocast_of_a_training_loop_does_not_reach_the_scores(copied):
    model = load_pretrained_model(str(copied))[1]
    image = torch.linspace(-1, 1, 3 * 84 * 84).view(1, 3, 84, 84)
    plain = model.encode_images(image, ["a bus"])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.encode_images(image, ["a bus"])[0]
    assert torch.equal(plain.scores, mixed.scores)
    assert torch.equal(plain.kept, mixed.kept)
