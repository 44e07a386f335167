"""Samples and batches: what the model is handed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaTokenizer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.image import load_image
from llava.mm_utils import process_images
from llava.train.collator import Collator
from llava.train.dataset import ConversationDataset, ImageFormat, Sample, TextFormat, check_fit
from llava.train.records import Record, parse_record
from llava.train.targets import choose_template

V1 = choose_template("v1")


@pytest.fixture(scope="module")
def image_format(golden: Path) -> ImageFormat:
    tower = golden / "checkpoints/openai/clip-vit-tiny-patch14-84"
    return ImageFormat(golden / "data/images", CLIPImageProcessorPil.from_pretrained(str(tower)), "pad")


@pytest.fixture(scope="module")
def dataset(conversations: list[dict], tokenizer: LlamaTokenizer, image_format: ImageFormat) -> ConversationDataset:
    records = [parse_record(raw, number) for number, raw in enumerate(conversations)]
    two = {"image": ["sign.png", "noise.png"], "conversations": [
        {"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The first."}
    ]}  # fmt: skip
    return ConversationDataset([*records, parse_record(two, 6)], tokenizer, TextFormat(V1), image_format)


def test_pixels_are_those_of_the_published_preprocessing(dataset: ConversationDataset, image_format: ImageFormat):
    image = load_image(image_format.folder / "wide_shapes.png")
    expected = process_images([image], image_format.processor, image_format)
    assert torch.equal(dataset[0].images[0], expected[0])
    assert dataset[0].image_sizes == [image.size]


def test_several_images_keep_the_order_of_their_placeholders(dataset: ConversationDataset):
    sample = dataset[6]
    assert (sample.input_ids == IMAGE_TOKEN_INDEX).sum() == 2
    assert [torch.equal(image, dataset[one].images[0]) for image, one in zip(sample.images, (1, 4), strict=True)] == [
        True,
        True,
    ]


def test_a_text_only_record_has_no_image_and_its_own_query(dataset: ConversationDataset):
    assert dataset[2].images == []
    assert dataset[2].query == "What is the capital of France?\nThanks!"


def test_anyres_gives_crops_and_the_image_size(dataset: ConversationDataset, image_format: ImageFormat):
    crops = replace(image_format, image_aspect_ratio="anyres", image_grid_pinpoints="[[84,168],[168,84]]")
    sample = ConversationDataset(dataset.records, dataset.tokenizer, TextFormat(V1), crops)[0]
    assert sample.images[0].shape == (3, 3, 84, 84)


def test_an_unreadable_image_names_the_record(dataset: ConversationDataset, tmp_path: Path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    record = Record("record 3 (id 'x')", ("bad.png",), ("<image>\nWhat?", "x"))
    broken = ConversationDataset(
        [record], dataset.tokenizer, TextFormat(V1), replace(dataset.image_format, folder=tmp_path)
    )
    with pytest.raises(InputError, match=r"record 3 \(id 'x'\): image .*bad\.png"):
        broken[0]


def test_a_cut_image_in_a_loader_worker_is_still_one_line(dataset: ConversationDataset, tmp_path: Path):
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    record = Record("record 0 (id 'x')", ("cut.png",), ("<image>\nWhat?", "x"))
    broken = ConversationDataset(
        [record], dataset.tokenizer, TextFormat(V1), replace(dataset.image_format, folder=tmp_path)
    )
    loader = torch.utils.data.DataLoader(broken, num_workers=1, collate_fn=Collator(0, 64))
    with pytest.raises(InputError, match=r"record 0 \(id 'x'\): image .*cut\.png"):
        next(iter(loader))


def test_images_without_vision_tower_are_refused_before_training():
    with pytest.raises(InputError, match=r"r 1: has an image, but there is no --vision_tower"):
        check_fit([Record("r 0", (), ("a", "b")), Record("r 1", ("x.png",), ("<image>", "b"))], V1, has_vision=False)


def test_conversations_for_the_plain_template_are_refused_before_training():
    with pytest.raises(InputError, match=r"r 1: --version plain needs records of two turns"):
        check_fit([Record("r 1", (), ("a", "b"))], choose_template("plain"), has_vision=True)


def test_a_batch_is_padded_on_the_right_with_labels_ignored(dataset: ConversationDataset):
    samples = [dataset[1], dataset[4]]
    batch = Collator(pad_token_id=0, max_length=2048)(samples)
    short = len(samples[0].input_ids)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["input_ids"][0, :short].equal(samples[0].input_ids)
    assert batch["input_ids"][0, short:].eq(0).all()
    assert batch["labels"][0, short:].eq(IGNORE_INDEX).all()
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(sample.input_ids) for sample in samples]


def test_real_tokens_equal_to_the_padding_stay_visible():
    ids = torch.tensor([1, 0, 5])  # a real <unk>, which is also the padding token
    batch = Collator(pad_token_id=0, max_length=8)([Sample(ids, ids), Sample(ids[:1], ids[:1])])
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, False, False]]


def test_images_of_a_batch_are_stacked_in_order_of_the_placeholders(dataset: ConversationDataset):
    batch = Collator(0, 2048)([dataset[0], dataset[2], dataset[6]])
    assert batch["images"].shape == (3, 3, 84, 84)
    assert batch["images"][0].equal(dataset[0].images[0])
    assert batch["images"][1:].equal(torch.stack(dataset[6].images))
    assert [len(size) for size in batch["image_sizes"]] == [2, 2, 2]
    assert batch["texts"] == [dataset[0].query, dataset[2].query, dataset[6].query]


def test_images_of_unequal_shape_stay_a_list():
    ids = torch.tensor([1, IMAGE_TOKEN_INDEX])
    samples = [Sample(ids, ids, [torch.zeros(crops, 3, 4, 4)], [(4, 4)]) for crops in (2, 3)]
    images = Collator(0, 8)(samples)["images"]
    assert [image.shape[0] for image in images] == [2, 3]


def test_a_batch_without_images_passes_none(dataset: ConversationDataset):
    batch = Collator(0, 2048)([dataset[2]])
    assert batch["images"] is None
    assert batch["texts"] == [dataset[2].query]


def test_a_language_model_gets_no_vision_arguments(dataset: ConversationDataset):
    batch = Collator(0, 2048, has_vision=False)([dataset[2]])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_cutting_a_placeholder_off_drops_its_image(dataset: ConversationDataset):
    sample = dataset[6]
    second_placeholder = (sample.input_ids == IMAGE_TOKEN_INDEX).nonzero()[1].item()
    batch = Collator(0, max_length=second_placeholder)([sample])
    assert batch["input_ids"].shape == (1, second_placeholder)
    assert len(batch["images"]) == len(batch["image_sizes"]) == 1
