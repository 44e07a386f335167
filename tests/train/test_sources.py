"""Training sets as files of several kinds, with images beside them or inside: all give the same samples."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessorPil, LlamaTokenizer

from llava.errors import InputError
from llava.train.dataset import ConversationDataset, ImageFormat, Sample, TextFormat
from llava.train.records import check_image_files, read_records
from llava.train.targets import choose_template

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def samples(golden: Path, tokenizer: LlamaTokenizer) -> Callable[[str | Path], list[Sample]]:
    """All samples of a training set."""
    tower = golden / "checkpoints/openai/clip-vit-tiny-patch14-84"
    image_format = ImageFormat(golden / "data/images", CLIPImageProcessorPil.from_pretrained(str(tower)), "pad")

    def build(source: str | Path) -> list[Sample]:
        records = check_image_files(read_records(source), image_format.folder)
        dataset = ConversationDataset(records, tokenizer, TextFormat(choose_template("v1")), image_format)
        return [dataset[number] for number in range(len(dataset))]

    return build


@pytest.fixture
def expected(samples: Callable, golden: Path) -> list[Sample]:
    return samples(golden / "data/questions/train6.json")


def assert_equal(left: list[Sample], right: list[Sample]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
        assert one.query == other.query and one.image_sizes == other.image_sizes
        assert all(torch.equal(a, b) for a, b in zip(one.images, other.images, strict=True))


def with_cells(records: list[dict], make: Callable[[str], object], column: str = "image") -> datasets.Dataset:
    rows = [{"id": raw["id"], "conversations": raw["conversations"]} for raw in records]
    for row, raw in zip(rows, records, strict=True):
        row[column] = make(raw["image"]) if "image" in raw else None
    return datasets.Dataset.from_list(rows)


def test_parquet_with_names_equals_json(
    conversations: list[dict], samples: Callable, expected: list[Sample], tmp_path: Path
):
    with_cells(conversations, lambda name: name).to_parquet(tmp_path / "names.parquet")
    assert_equal(samples(tmp_path / "names.parquet"), expected)


@pytest.mark.parametrize("column", ["image", "images"])
def test_parquet_with_images_inside_equals_json(
    column: str, conversations: list[dict], samples: Callable, expected: list[Sample], golden: Path, tmp_path: Path
):
    def read(name: str) -> dict:
        return {"bytes": (golden / "data/images" / name).read_bytes(), "path": name}

    table = with_cells(conversations, read, column).cast_column(column, datasets.Image())
    table.to_parquet(tmp_path / "inside.parquet")
    assert_equal(samples(tmp_path / "inside.parquet"), expected)


def test_several_images_inside_a_row_keep_their_order(samples: Callable, golden: Path, tmp_path: Path):
    names = ["sign.png", "noise.png"]
    turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The first."}]
    contents = [{"bytes": (golden / "data/images" / name).read_bytes(), "path": None} for name in names]
    table = datasets.Dataset.from_list([{"id": "a", "conversations": turns, "images": contents}])
    table.cast_column("images", datasets.List(datasets.Image())).to_parquet(tmp_path / "two.parquet")
    (tmp_path / "two.json").write_text(json.dumps([{"id": "a", "conversations": turns, "image": names}]))
    assert_equal(samples(tmp_path / "two.parquet"), samples(tmp_path / "two.json"))


def test_json_lines_and_a_folder_of_parquet_equal_json(
    conversations: list[dict], samples: Callable, expected: list[Sample], tmp_path: Path
):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(raw) for raw in conversations) + "\n\n")
    assert_equal(samples(tmp_path / "data.jsonl"), expected)
    (tmp_path / "folder").mkdir()
    with_cells(conversations, lambda name: name).to_parquet(tmp_path / "folder/train.parquet")
    assert_equal(samples(tmp_path / "folder"), expected)


def test_a_damaged_image_inside_names_its_row(conversations: list[dict], samples: Callable, tmp_path: Path):
    table = with_cells(conversations[:1], lambda name: {"bytes": b"no image", "path": name})
    table.to_parquet(tmp_path / "damaged.parquet")
    with pytest.raises(InputError, match=r"record 0 .*wide_shapes.png of row 0"):
        samples(tmp_path / "damaged.parquet")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.json", None, "no such file"),
        ("absent.parquet", None, "absent.parquet; --data_path takes a .json, .jsonl or .parquet file"),
        ("broken.json", "[{", "broken.json is not JSON"),
        ("broken.parquet", "PAR1 or not", "cannot be read as a dataset"),
        ("object.json", "{}", "expected a JSON list"),
    ],
)
def test_what_cannot_be_read_is_one_line(name: str, content: str | None, says: str, tmp_path: Path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        read_records(tmp_path / name)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_of_the_hub_is_asked_for_there(monkeypatch: pytest.MonkeyPatch, conversations: list[dict]):
    asked = []

    def load_dataset(path: str, split: str) -> datasets.Dataset:
        asked.append((path, split))
        return with_cells(conversations, lambda name: name)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_records("owner/name")) == len(conversations)
    assert asked == [("owner/name", "train")]
