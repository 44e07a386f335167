"""What answers depend on, by content: folders, hub ids, images, and the hashes that are kept."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava.cli import ModelSpec
from llava.eval.benchmark import Question
from llava.eval.identity import identify_images, identify_model
from llava.image import EmbeddedImage
from llava.model import identity
from llava.model.identity import hash_files

KEY = ("question_id",)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every file for one that has not changed for a while."""
    monkeypatch.setattr(identity, "SETTLED_NS", -(10**18))


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, golden: Path) -> Path:
    """A checkpoint with everything in its folder."""
    shutil.copytree(golden / "checkpoints" / "openai" / "clip-vit-tiny-patch14-84", tiny_checkpoint / "tower")
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (tiny_checkpoint / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "tower"}))
    return tiny_checkpoint


def change_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def set_value(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))


CHANGES = {
    "pytorch_model-00001-of-00002.bin": "checkpoint",
    "pytorch_model-00002-of-00002.bin": "checkpoint",
    "config.json": "checkpoint",
    "generation_config.json": "checkpoint",
    "tokenizer.model": "checkpoint",
    "tokenizer_config.json": "checkpoint",
    "special_tokens_map.json": "checkpoint",
    "added_tokens.json": "checkpoint",
    "tower/config.json": "vision_tower",
    "tower/pytorch_model.bin": "vision_tower",
    "tower/preprocessor_config.json": "vision_tower",
    "tower/merges.txt": "vision_tower",
    "tower/vocab.json": "vision_tower",
    "tower/tokenizer.json": "vision_tower",
}


@pytest.mark.parametrize(("name", "part"), CHANGES.items())
def test_a_changed_file_changes_its_part_alone(checkpoint: Path, name: str, part: str) -> None:
    before = identify_model(ModelSpec(str(checkpoint)))
    assert identify_model(ModelSpec(str(checkpoint))) == before
    file = checkpoint / name
    set_value(file, changed=1) if file.suffix == ".json" else change_byte(file)
    after = identify_model(ModelSpec(str(checkpoint)))
    assert {name for name in before if before[name] != after[name]} == {part}


def test_the_tokenizers_chat_template_counts(checkpoint: Path) -> None:
    before = identify_model(ModelSpec(str(checkpoint)))
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert identify_model(ModelSpec(str(checkpoint)))["checkpoint"] != before["checkpoint"]


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "trainer_state.json",
        "training_args.bin",
        "optimizer.bin",
        "events.log",
        "tower/tf_model.h5",
        ".x/y",
    ],
)
def test_a_file_that_loading_does_not_read_changes_nothing(checkpoint: Path, name: str) -> None:
    before = identify_model(ModelSpec(str(checkpoint)))
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("something")
    assert identify_model(ModelSpec(str(checkpoint))) == before


def test_the_place_of_the_tower_and_of_the_folder_do_not_count(checkpoint: Path, tmp_path: Path) -> None:
    before = identify_model(ModelSpec(str(checkpoint)))
    (checkpoint / "tower").rename(tmp_path / "moved")
    set_value(checkpoint / "config.json", mm_vision_tower=str(tmp_path / "moved"), _name_or_path="elsewhere")
    assert identify_model(ModelSpec(str(checkpoint))) == before


def test_weights_in_the_format_that_is_not_loaded_do_not_count(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    before = identify_model(ModelSpec(str(checkpoint)))
    change_byte(checkpoint / "pytorch_model-00001-of-00002.bin")
    assert identify_model(ModelSpec(str(checkpoint))) == before


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "base/pytorch_model.bin"]
)
def test_adapters_and_their_base_count(checkpoint: Path, golden: Path, tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(golden / "checkpoints" / "lmsys" / "vicuna-tiny-v1.5", base)
    (checkpoint / "adapter_config.json").write_text("{}")
    for each in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        (checkpoint / each).write_bytes(b"weights")
    spec = ModelSpec(str(checkpoint), str(base))
    before = identify_model(spec)
    file = tmp_path / name if name.startswith("base/") else checkpoint / name
    set_value(file, changed=1) if file.suffix == ".json" else change_byte(file)
    after = identify_model(spec)
    part = "base_checkpoint" if name.startswith("base/") else "checkpoint"
    assert {name for name in before if before[name] != after[name]} == {part}


def test_an_open_clip_tower_counts_with_its_weights(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"weights")
    tower = f"open_clip:ViT-B-32-quickgelu,pretrained={weights}"
    set_value(checkpoint / "config.json", mm_vision_tower=tower)
    before = identify_model(ModelSpec(str(checkpoint)))
    assert identify_model(ModelSpec(str(checkpoint))) == before
    change_byte(weights)
    changed = identify_model(ModelSpec(str(checkpoint)))
    assert {name for name in before if before[name] != changed[name]} == {"vision_tower"}
    set_value(checkpoint / "config.json", mm_vision_tower=tower.replace("-quickgelu", "") + ",quickgelu=false")
    assert identify_model(ModelSpec(str(checkpoint))) != changed
    set_value(checkpoint / "config.json", mm_vision_tower=tower)
    assert identify_model(ModelSpec(str(checkpoint))) == changed
    weights.rename(tmp_path / "moved, here.pt")
    set_value(checkpoint / "config.json", mm_vision_tower=tower.replace("weights.pt", "moved, here.pt"))
    assert identify_model(ModelSpec(str(checkpoint)))["checkpoint"] == changed["checkpoint"]


@pytest.mark.parametrize("place", ["nowhere", "./nowhere", "/nowhere/at/all", "owner/absent"])
def test_what_is_not_there_equals_nothing(place: str) -> None:
    first, second = identify_model(ModelSpec(place)), identify_model(ModelSpec(place))
    assert first["checkpoint"] != second["checkpoint"]
    assert first["vision_tower"] != second["vision_tower"]


FIND_COMMIT = """
import sys
from llava.eval.identity import ModelSpec, identify_model
print(identify_model(ModelSpec(sys.argv[1])))
"""


def test_a_hub_id_is_the_commit_that_the_cache_resolves_it_to(tmp_path: Path) -> None:
    for owner, commit in (("owner--model", "a" * 40), ("owner--model", "b" * 40), ("openai--clip", "c" * 40)):
        repository = tmp_path / "hub" / f"models--{owner}"
        for folder in ("refs", f"snapshots/{commit}", "blobs"):
            (repository / folder).mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit / "config.json").write_text('{"mm_vision_tower": "openai/clip"}')
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-c", FIND_COMMIT, "owner/model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"'owner/model@{'b' * 40}'" in done.stdout
    assert f"'vision_tower': 'openai/clip@{'c' * 40}'" in done.stdout


# --------------------------------------------------------------------------------------------------------------- images
def test_a_llava_hf_folder_is_known_with_and_without_its_clip(checkpoint: Path) -> None:
    with_tower = identify_model(ModelSpec(str(checkpoint)))["vision_tower"]
    hf = {"model_type": "llava", "text_config": {}, "mm_vision_tower": "tower"}
    (checkpoint / "config.json").write_text(json.dumps(hf))
    assert identify_model(ModelSpec(str(checkpoint)))["vision_tower"] == with_tower
    shutil.rmtree(checkpoint / "tower")
    (checkpoint / "config.json").write_text(json.dumps(hf | {"mm_vision_tower": "./tower"}))
    assert identify_model(ModelSpec(str(checkpoint)))["vision_tower"] == "in the checkpoint"


@pytest.fixture
def question(tmp_path: Path) -> Callable[..., Question]:
    """Ask about images in files of these names."""

    def ask(*names: str) -> Question:
        return Question(id=1, prompt="?", images=tuple(tmp_path / name for name in names))

    return ask


def test_images_count_by_their_content_and_order(tmp_path: Path, question: Callable[..., Question]) -> None:
    for name, color in (("a.png", 1), ("b.png", 2), ("a again.png", 1)):
        Image.new("RGB", (9, 9), (color, 0, 0)).save(tmp_path / name)

    def identify(*names: str) -> str | None:
        return identify_images([question(*names)], KEY).get("[1]")

    assert identify("a.png") == identify("a again.png") != identify("b.png")
    assert identify("a.png", "b.png") != identify("b.png", "a.png")
    assert identify("a.png", "b.png") not in (identify("a.png"), None)
    assert identify() is None
    assert identify("a.png", "absent.png") is None


def test_one_changed_byte_of_a_large_image_is_seen(
    tmp_path: Path, question: Callable[..., Question], settled: None
) -> None:
    Image.new("RGB", (2000, 1000)).save(tmp_path / "a.bmp")
    before = identify_images([question("a.bmp")], KEY)
    time.sleep(0.02)
    change_byte(tmp_path / "a.bmp")
    assert identify_images([question("a.bmp")], KEY) != before


def test_embedded_images_count_by_their_content() -> None:
    def identify(content: bytes, name: str = "table row 1") -> dict:
        return identify_images([Question(id=1, images=(EmbeddedImage(name, content),))], KEY)

    assert identify(b"one") == identify(b"one", "table row 2") != identify(b"two")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "absent"])
def test_what_is_no_image_file_is_unknown_and_nothing_hangs(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "image"
    {
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "device": lambda: file.symlink_to("/dev/zero"),
        "absent": lambda: None,
    }[kind]()
    assert identify_images([Question(id=1, images=(file,))], KEY) == {}


# --------------------------------------------------------------------------------------------------------- kept hashes
def refuse(*_: object) -> str:
    raise AssertionError("a file was read")


def test_the_second_look_reads_no_file(
    checkpoint: Path, settled: None, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    before = identify_model(ModelSpec(str(checkpoint)))
    assert len(list(cache.glob("hashes/*.json"))) == 2
    monkeypatch.setattr(identity, "hash_file", refuse)
    assert identify_model(ModelSpec(str(checkpoint))) == before


def test_a_changed_file_of_the_same_size_and_forged_time_is_read_again(tmp_path: Path, settled: None) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    before, times = hash_files([file], "files"), os.stat(file)
    time.sleep(0.02)
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(file).st_mtime_ns == times.st_mtime_ns
    assert hash_files([file], "files") != before


def test_a_hash_of_a_file_that_changed_just_now_is_not_kept(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    hash_files([file], "files")
    assert not cache.exists()


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"weights.bin": []}', '{"weights.bin": [1, 2, 3]}', "\0"])
def test_a_broken_cache_is_none(tmp_path: Path, settled: None, cache: Path, content: str) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    before = hash_files([file], "files")
    (kept,) = cache.glob("hashes/*.json")
    kept.write_text(content)
    assert hash_files([file], "files") == before
    assert "weights.bin" in json.loads(kept.read_text())


def test_a_cache_folder_that_cannot_be_written_costs_only_time(
    tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_CACHE", "/dev/null/cache")
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    assert hash_files([file], "files") == hash_files([file], "files") != {file: None}


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_CACHE", "/a")
    assert identity.find_cache_folder() == Path("/a")
    monkeypatch.delenv("LLAVA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert identity.find_cache_folder() == Path("/b/llava")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert identity.find_cache_folder() == Path.home() / ".cache" / "llava"
