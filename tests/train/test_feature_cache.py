"""`--feature_cache`: the tower runs once per image, whatever the epoch, the run and the token reduction."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaTokenizer

from llava.errors import InputError
from llava.model.feature_files import FeatureFiles, KeptFeatures, round_to_half
from llava.model.multimodal_encoder.builder import build_named_tower
from llava.model.multimodal_encoder.tower import ImageFeatures, VisionTower
from llava.model.token_reduction import TEXT, Need
from llava.train import dataset, feature_cache
from llava.train.collator import Collator
from llava.train.dataset import ConversationDataset, ImageFormat, TextFormat
from llava.train.feature_cache import open_cache
from llava.train.flags import DataArguments, ModelArguments
from llava.train.llava_trainer import LLaVATrainer
from llava.train.records import parse_record
from llava.train.targets import choose_template

TRIM = {"mm_vision_token_reduce_func": "TRIM:-1"}
NUM_IMAGES = 5  # of the six records, all different
NEED = Need("cls_attention", -2)
ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[[84,168],[168,84]]"}


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts crops that the tower encodes, and images that are decoded."""
    counts: Counter = Counter()
    extract, load = VisionTower.extract, dataset.load_image

    def counting_extract(self: VisionTower, images: Tensor, needs: Collection[Need] = frozenset()) -> ImageFeatures:
        counts["encoded"] += len(images)
        return extract(self, images, needs)

    def counting_load(*arguments: object) -> object:
        counts["decoded"] += 1
        return load(*arguments)

    monkeypatch.setattr(VisionTower, "extract", counting_extract)
    monkeypatch.setattr(dataset, "load_image", counting_load)
    return counts


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------- whole runs
def losses(trainer: LLaVATrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_later_epochs_runs_and_reductions_skip_the_tower_and_lose_by_rounding_alone(run_training, work, tmp_path):
    def run(name: str, **flags: object) -> list[float]:
        return losses(run_training(max_steps=6, output_dir=tmp_path / name, **TRIM | flags))  # two epochs

    plain = run("plain")
    work.clear()
    first = run("first", feature_cache=tmp_path / "cache")
    assert first == pytest.approx(plain, rel=2e-3) and first != plain
    assert run("second", feature_cache=tmp_path / "cache") == first
    run("third", feature_cache=tmp_path / "cache", mm_vision_token_reduce_func="none")
    assert work == {"encoded": NUM_IMAGES, "decoded": NUM_IMAGES}


def test_a_run_goes_on_with_the_cache_elsewhere_but_not_without_one(run_training, tmp_path):
    run_training(max_steps=1, feature_cache=tmp_path / "cache")
    assert json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["settings"]["feature_cache"] is True
    assert run_training(max_steps=1, feature_cache=tmp_path / "moved") is None  # finished already
    with pytest.raises(InputError, match="feature_cache True -> False"):
        run_training(max_steps=1)


def test_a_cache_without_a_vision_tower_is_refused(run_training, tmp_path):
    with pytest.raises(InputError, match=r"--feature_cache: .* has no vision tower; give --vision_tower"):
        run_training(vision_tower=None, feature_cache=tmp_path / "cache")


def test_a_cache_that_is_a_file_is_refused_before_anything_loads(run_training, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(InputError, match=r"cannot write .*cache: File exists"):
        run_training(feature_cache=tmp_path / "cache")


# ------------------------------------------------------------------------------------------------- from image to file
@pytest.fixture(scope="module")
def tower(golden: Path) -> VisionTower:
    name = str(golden / "checkpoints/openai/clip-vit-tiny-patch14-84")
    tower = build_named_tower(name, needs={TEXT, NEED})
    tower.load_model()
    return tower


@pytest.fixture
def encode(
    tower: VisionTower, golden: Path, conversations: list[dict], tokenizer: LlamaTokenizer, tmp_path: Path
) -> Callable[..., list[ImageFeatures]]:
    """Go through the data once, with a cache in `tmp_path / "cache"`; returns the features of all images."""

    def run(
        needs: Collection[Need] = (),
        records: list[dict] = conversations,
        folder: Path = golden / "data/images",
        num_workers: int = 0,
        **flags: object,
    ) -> list[ImageFeatures]:
        given = {"data_path": "", "feature_cache": str(tmp_path / "cache"), "image_aspect_ratio": "pad"} | flags
        data_args = DataArguments(**given)
        cache = open_cache(ModelArguments("llm", vision_tower=tower.name), data_args, tower, needs)
        samples = ConversationDataset(
            [parse_record(raw, number) for number, raw in enumerate(records)],
            tokenizer,
            TextFormat(choose_template("v1")),
            ImageFormat(folder, tower.image_processor, data_args.image_aspect_ratio, data_args.image_grid_pinpoints),
            feature_files=cache.files,
        )
        found = []
        for batch in DataLoader(samples, batch_size=2, collate_fn=Collator(0, 2048), num_workers=num_workers):
            found += cache.complete(batch["images"], batch["image_keys"], batch["image_sizes"])
        cache.flush()
        return found

    return run


def same(left: list[ImageFeatures], right: list[ImageFeatures]) -> bool:
    return all(
        torch.equal(one.patches, other.patches)
        and one.intermediates.keys() == other.intermediates.keys()
        and all(torch.equal(values, other.intermediates[need]) for need, values in one.intermediates.items())
        for one, other in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_found_is_what_was_made(encode, work, tmp_path, num_workers: int):
    made = encode({NEED, Need("text")})
    assert made[0].patches.dtype == torch.float32 and made[0].intermediates.keys() == {NEED}
    assert work == {"encoded": NUM_IMAGES, "decoded": NUM_IMAGES}
    assert len(list_files(tmp_path / "cache")) == 2 * NUM_IMAGES
    assert same(encode({NEED, Need("text")}, num_workers=num_workers), made)
    assert work == {"encoded": NUM_IMAGES, "decoded": NUM_IMAGES}


def test_a_reduction_that_needs_more_of_the_tower_adds_to_what_is_there(encode, work, tmp_path):
    encode()
    before = {path: path.stat().st_mtime_ns for path in list_files(tmp_path / "cache")}
    encode({NEED})
    assert work["encoded"] == 2 * NUM_IMAGES and len(list_files(tmp_path / "cache")) == 2 * NUM_IMAGES
    assert {path: path.stat().st_mtime_ns for path in before} == before
    encode()
    assert work["encoded"] == 2 * NUM_IMAGES


def test_crops_of_an_image_are_kept_together(encode, work):
    made = encode({NEED}, **ANYRES)
    assert {image.num_crops for image in made} == {3}
    assert same(encode({NEED}, **ANYRES), made)
    assert work == {"encoded": 3 * NUM_IMAGES, "decoded": NUM_IMAGES}


def test_what_would_be_computed_otherwise_is_not_found(encode, work, tower, monkeypatch):
    encode()
    encode(image_aspect_ratio="square")
    assert work["encoded"] == 2 * NUM_IMAGES
    encode(**ANYRES)
    monkeypatch.setattr(tower, "select_layer", -3)
    encode()
    assert work["encoded"] == (2 + 3 + 1) * NUM_IMAGES


def test_an_image_counts_by_its_content_not_its_name(encode, work, golden, conversations, tmp_path):
    encode()
    with_image = [raw for raw in conversations if "image" in raw]
    renamed = [raw | {"image": f"{number}.png"} for number, raw in enumerate(with_image)]
    for new, old in zip(renamed, with_image, strict=True):
        (tmp_path / new["image"]).write_bytes((golden / "data/images" / old["image"]).read_bytes())
    there = encode(records=renamed, folder=tmp_path)
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    changed = encode(records=renamed, folder=tmp_path)
    assert same(changed[:1], there[1:2]) and not same(changed[:1], there[:1])
    assert work["encoded"] == NUM_IMAGES


@pytest.mark.parametrize("damage", ["cut", "emptied", "changed", "foreign"])
def test_a_damaged_file_is_made_anew(encode, work, tmp_path, damage: str):
    made = encode()
    file = list_files(tmp_path / "cache")[0]
    content = file.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    file.write_bytes({"cut": content[:-100], "emptied": b"", "changed": changed, "foreign": b"GIF89a" * 50}[damage])
    assert same(encode(), made)
    assert work["encoded"] == NUM_IMAGES + 1
    assert file.read_bytes() == content


def test_a_full_disk_is_said_once_and_changes_no_number(encode, work, tmp_path, monkeypatch, caplog):
    made = encode(feature_cache=str(tmp_path / "other"))
    monkeypatch.setattr(feature_cache, "RESERVED_BYTES", 2**80)
    with caplog.at_level(logging.WARNING, logger=feature_cache.__name__):
        assert same(encode(), made)
    assert caplog.text.count("--feature_cache") == 1 and "nothing more is written" in caplog.text
    assert not list_files(tmp_path / "cache")


def test_an_error_while_writing_is_said_once(encode, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llava.model.feature_files.write_bytes", refuse)
    with caplog.at_level(logging.WARNING, logger=feature_cache.__name__):
        encode()
    assert caplog.text.count("No space left on device") == 1


def test_a_broken_image_is_named_as_without_a_cache(encode, golden, conversations, tmp_path):
    raw = next(raw for raw in conversations if "image" in raw)
    content = (golden / "data/images" / raw["image"]).read_bytes()
    (tmp_path / raw["image"]).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"record 0 .*damaged"):
        encode(records=[raw], folder=tmp_path)


def test_a_tower_that_cannot_be_told_from_others_is_refused(tower, tmp_path):
    arguments = ModelArguments("llm", vision_tower="./nowhere"), DataArguments("", feature_cache=str(tmp_path))
    with pytest.raises(InputError, match=r"--feature_cache: the files of vision tower \./nowhere cannot be read"):
        open_cache(*arguments, tower, ())


# ---------------------------------------------------------------------------------------------------------- the files
def make_record(scale: float = 1.0) -> KeptFeatures:
    values = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)) * scale
    features = ImageFeatures(values, {NEED: values[..., 0]})
    return KeptFeatures(features.map(round_to_half), (640, 480))


def test_files_give_back_what_was_written_bit_for_bit(tmp_path):
    store, record = FeatureFiles(tmp_path, "tower", {NEED, Need("text")}), make_record()
    assert store.read("ab" * 32) is None
    store.write("ab" * 32, record)
    found = store.read("ab" * 32)
    assert found.size == (640, 480)
    assert found.features.patches.dtype == torch.float16
    assert torch.equal(found.features.patches, record.features.patches)
    assert torch.equal(found.features.intermediates[NEED], record.features.intermediates[NEED])


def test_files_of_another_tower_are_not_found(tmp_path):
    FeatureFiles(tmp_path, "one", {NEED}).write("ab" * 32, make_record())
    assert FeatureFiles(tmp_path, "another", {NEED}).read("ab" * 32) is None


def test_numbers_out_of_half_precision_stay_in_float32():
    assert round_to_half(torch.tensor([1e5])).item() == 1e5
    assert round_to_half(torch.tensor([1.0])).dtype == torch.float16
