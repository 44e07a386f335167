"""The folder of random weights of `scripts.bench.train_7b`: written once, resumed, and loadable as a LLaVA."""

from pathlib import Path

import pytest

from llava.errors import InputError
from llava.files import read_json
from llava.model.builder import load_pretrained_model
from scripts.bench import side_by_side, train_7b

ROOT = Path(__file__).parents[1]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 700, "num_attention_heads": 4}
TOWER = "openai/clip"
CONFIG = train_7b.CONFIG | SMALL | {
    "num_hidden_layers": 2, "mm_hidden_size": 96, "mm_vision_tower": TOWER, "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"], "dtype": "bfloat16",
}  # fmt: skip
SHARD_BYTES = 100_000


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)  # the pocket model's tokenizer
    train_7b.write_weights(tmp_path / "model", CONFIG, SHARD_BYTES)
    return tmp_path / "model"


def test_the_true_size_has_the_published_weights():
    shapes = train_7b.list_shapes(train_7b.CONFIG)
    assert 6.75e9 < sum(train_7b.torch.Size(shape).numel() for shape in shapes.values()) < 6.77e9
    assert shapes["model.layers.31.mlp.down_proj.weight"] == (4096, 11008)
    assert shapes["model.mm_projector.2.weight"] == (4096, 4096)
    assert not [name for name in shapes if "vision_tower" in name]


def test_no_file_is_larger_than_the_limit_unless_one_weight_is(weights: Path):
    index = read_json(weights / train_7b.INDEX_FILE)
    shapes = train_7b.list_shapes(CONFIG)
    assert index["weight_map"].keys() == shapes.keys()
    for names in train_7b.split_shards(shapes, SHARD_BYTES):
        size = 2 * sum(train_7b.torch.Size(shapes[name]).numel() for name in names)
        assert size <= SHARD_BYTES or len(names) == 1
    assert len({*index["weight_map"].values()}) == len(list(weights.glob("*.safetensors"))) > 2


def test_a_folder_that_was_left_half_way_is_completed_and_what_is_there_stays(weights: Path):
    before = {file.name: file.read_bytes() for file in weights.glob("*.safetensors")}
    first, second = sorted(before)[:2]
    stamp = (weights / first).stat().st_mtime_ns
    (weights / second).unlink()
    (weights / train_7b.INDEX_FILE).unlink()
    train_7b.write_weights(weights, CONFIG, SHARD_BYTES)
    assert {file.name: file.read_bytes() for file in weights.glob("*.safetensors")} == before
    assert (weights / first).stat().st_mtime_ns == stamp
    assert (weights / train_7b.INDEX_FILE).exists()


def test_a_model_of_another_size_is_not_mixed_in(weights: Path):
    with pytest.raises(InputError, match="holds a model of another size: name another folder"):
        train_7b.write_weights(weights, CONFIG | {"num_hidden_layers": 3}, SHARD_BYTES)


def test_it_loads_as_a_llava_with_its_tower(weights: Path):
    train_7b.write_tower(weights / TOWER, side_by_side.TINY_TOWER)
    model = load_pretrained_model(str(weights), device="cpu", dtype="bfloat16", reduce="TRIM:0.21")[1]
    assert len(model.model.layers) == 2 and model.token_reducer.spec() == "TRIM:0.21"
    assert model.get_vision_tower().num_patches == 576


def test_a_machine_without_the_memory_is_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train_7b, "available_bytes", lambda device: 8 * 2**30)
    says = r"training takes about 18\.\d GiB of memory, but 8\.0 GiB are free: take fewer --layers"
    with pytest.raises(InputError, match=says):
        train_7b.check_memory(train_7b.CONFIG, side_by_side.LARGE_TOWER, rank=64)
