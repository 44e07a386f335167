"""Sizes out of configs: folders without weights, known names, and one clear line for what is missing."""

import json

import pytest

from llava.efficiency.shapes import projector_depth, read_shape, read_source
from llava.errors import InputError


@pytest.fixture
def folder(tmp_path, configs):
    """A checkpoint folder with nothing but a config.json, and a vision tower beside it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps(configs.tower))
    (tmp_path / "model" / "config.json").write_text(json.dumps(configs.model | {"mm_vision_tower": "../clip"}))
    return tmp_path / "model"


def edit(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}, default=str))


def test_a_config_alone_is_enough(folder, configs):
    source = read_source(str(folder))
    assert source.shape == configs.shape
    assert not source.has_weights


def test_weights_in_the_folder_are_seen(folder):
    (folder / "model-00001-of-00002.safetensors").touch()
    assert read_source(str(folder)).has_weights


def test_a_llava_hf_folder_has_the_sizes_of_its_model(folder, configs):
    llama = {key: value for key, value in configs.model.items() if not key.startswith(("mm_", "image_"))}
    own = {"model_type": "llava", "vision_feature_layer": -2, "mm_vision_tower": "../clip"}
    hf = own | {"text_config": llama, "vision_config": configs.tower["vision_config"]}
    (folder / "config.json").write_text(json.dumps(hf))
    assert read_source(str(folder)).shape == configs.shape
    # What published folders leave out is the 7B model's.
    short = {"model_type": "llava", "text_config": {"vocab_size": 32000}, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(short))
    assert read_source(str(folder)).shape == read_source("llava-v1.5-7b").shape


@pytest.mark.parametrize("name", ["llava-v1.5-7b", "liuhaotian/llava-v1.5-7b"])
def test_published_names_need_no_files(name):
    shape = read_source(name).shape
    assert shape.tower.num_patches == 576
    assert shape.tower.vision.layers == 23
    assert shape.language.width == 4096


@pytest.mark.parametrize(
    "tower", ["openai/clip-vit-large-patch14-336", "open_clip:ViT-L-14-336-quickgelu,pretrained=x"]
)
def test_hub_and_open_clip_names_of_the_published_tower_are_known(folder, tower):
    edit(folder, mm_vision_tower=tower)
    assert read_source(str(folder)).shape.tower == read_source("llava-v1.5-7b").shape.tower


def test_a_missing_text_config_is_openai_clip_base(configs):
    tower = {key: value for key, value in configs.tower.items() if key != "text_config"}
    assert read_shape(configs.model, tower, "test").tower.text.width == 512


def test_heads_without_their_own_width_share_the_models(configs):
    assert configs.shape.language.query_width == 48
    assert configs.shape.language.cache_width == 16


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mm_vision_tower": None}, "without eyes"),
        ({"mm_vision_tower": "some/tower"}, "shape of vision tower some/tower is not known"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"hidden_size": "wide"}, "no number"),
        ({"num_attention_heads": 0}, "holds a size of 0"),
        ({"mm_projector_type": "mlpx_gelu"}, "mlpx_gelu"),
        ({"mm_projector_type": [1]}, 'mm_projector_type "[1]" is unknown'),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer -9"),
        ({"image_aspect_ratio": "anyres"}, "anyres"),
    ],
)
def test_what_can_not_be_counted_is_said_in_one_line(folder, values, words):
    edit(folder, **values)
    with pytest.raises(InputError) as caught:
        read_source(str(folder))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_and_no_known_name(tmp_path):
    with pytest.raises(InputError, match=r"llava-v1\.5-7b, llava-v1\.5-13b"):
        read_source(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_config_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        read_source(str(folder))


def test_projector_types():
    assert [projector_depth(kind) for kind in (None, "linear", "identity", "mlp3x_gelu")] == [1, 1, 0, 3]
