"""The embedded world: reproducible pictures, honest boxes, valid files, a tokenizer pair in the published numbering."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPTokenizer

from llava.calibrate import LabelledImage, calibrate
from llava.conversation import conv_templates
from llava.model.multimodal_encoder.builder import load_tower
from llava.model.token_reduction import TEXT
from playground.shapes import clip_data, sentence, train_clip
from playground.shapes.base_llm import write_base_llm
from playground.shapes.benchmark import pope
from playground.shapes.generate import write_calibrate, write_eval, write_train
from playground.shapes.tokenizer import train_clip_tokenizer
from playground.shapes.world import MIN_OBJECT_SIZE, PICTURE_SIZE, SPLITS, Scene, WorldObject, draw_scene, overlaps

NUM_EVAL, NUM_TRAIN = 8, 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny set of all files."""
    folder = tmp_path_factory.mktemp("shapes")
    write_train(folder / "train", NUM_TRAIN, samples_per_image=4, seed=3)
    write_eval(folder, NUM_EVAL, seed=3)
    write_calibrate(folder / "calibrate", 4, seed=3)
    return folder


def read_lines(path: Path) -> list[dict]:
    """JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_seed_always_draws_the_same_picture() -> None:
    first, scene = draw_scene(5, 0, 7)
    second, again = draw_scene(5, 0, 7)
    other, _ = draw_scene(5, 0, 8)
    assert first.tobytes() == second.tobytes()
    assert scene == again
    assert first.tobytes() != other.tobytes()


def test_splits_share_no_seed() -> None:
    assert len(set(SPLITS.values())) == len(SPLITS)


def test_boxes_lie_inside_the_picture_and_apart() -> None:
    for index in range(100):
        boxes = [item.box for item in draw_scene(0, 0, index)[1].objects]
        assert boxes
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= PICTURE_SIZE and 0 <= top < bottom <= PICTURE_SIZE
            assert right - left >= MIN_OBJECT_SIZE
        assert not any(overlaps(a, b) for number, a in enumerate(boxes) for b in boxes[:number])


def test_no_two_objects_of_a_scene_share_colour_and_shape() -> None:
    for index in range(100):
        names = [item.name for item in draw_scene(0, 0, index)[1].objects]
        assert len(set(names)) == len(names)


def test_a_box_holds_its_object() -> None:
    scenes = (draw_scene(0, 0, index) for index in range(100))
    picture, scene = next(pair for pair in scenes if all(item.color != "white" for item in pair[1].objects))
    pixels = np.asarray(picture).astype(int)
    saturated = (pixels.max(2) - pixels.min(2)) > 100
    outside = saturated.copy()
    for left, top, right, bottom in (item.box for item in scene.objects):
        assert saturated[top:bottom, left:right].mean() > 0.2
        outside[top:bottom, left:right] = False
    assert not outside.any()


def test_article_is_an_before_a_vowel() -> None:
    assert sentence.ask_presence("orange star") == "Is there an orange star in the image?"
    assert sentence.ask_presence("red circle") == "Is there a red circle in the image?"


def test_places_are_named_by_the_larger_offset() -> None:
    assert sentence.name_place(WorldObject("red", "circle", (2, 45, 32, 75))) == "left"
    assert sentence.name_place(WorldObject("red", "circle", (45, 78, 75, 108))) == "bottom"
    assert sentence.name_place(WorldObject("red", "circle", (41, 41, 71, 71))) is None


def test_colour_is_asked_only_where_one_answer_is_right() -> None:
    circles = (WorldObject("red", "circle", (0, 0, 30, 30)), WorldObject("blue", "circle", (50, 50, 80, 80)))
    square = WorldObject("green", "square", (0, 50, 30, 80))
    questions = sentence.ask_color(Scene((0,), (*circles, square)))
    assert [(question.text, question.answer) for question in questions] == [("What color is the square?", "green")]


def test_presence_answers_are_true() -> None:
    chooser = random.Random(0)
    for index in range(50):
        scene = draw_scene(0, 0, index)[1]
        names = {item.name for item in scene.objects}
        for ask in (sentence.ask_present, sentence.ask_absent):
            question = ask(scene, chooser)
            named = next(name for name in sentence.ALL_NAMES if name in question.text)
            assert (named in names) == (question.answer == "Yes")


def test_adversarial_objects_share_colour_or_shape_with_the_picture() -> None:
    scene = draw_scene(0, 0, 2)[1]
    parts = {part for item in scene.objects for part in (item.color, item.shape)}
    names = sentence.confusable_names(scene, random.Random(0))
    assert names
    assert all(parts & set(name.split()) for name in names)


def test_pope_files_have_the_published_layout_and_balance(files: Path) -> None:
    rows = read_lines(files / "pope" / "llava_pope_test.jsonl")
    assert list(dict.fromkeys(row["category"] for row in rows)) == ["adversarial", "popular", "random"]
    for category, first_id in pope.FIRST_ID.items():
        asked = [row for row in rows if row["category"] == category]
        labels = read_lines(files / "pope" / "coco" / f"coco_pope_{category}.json")
        assert [row["question_id"] for row in asked] == list(range(first_id, first_id + len(asked)))
        assert [(row["image"], row["text"]) for row in asked] == [
            (label["image"], label["text"] + sentence.SUFFIX) for label in labels
        ]
        answers = [label["label"] for label in labels]
        assert answers.count("yes") == answers.count("no") > 0
    for row in rows:
        assert Image.open(files / "pope" / "val2014" / row["image"]).size == (PICTURE_SIZE, PICTURE_SIZE)


def test_pope_labels_are_true_of_the_pictures(files: Path) -> None:
    for category in pope.FIRST_ID:
        for label in read_lines(files / "pope" / "coco" / f"coco_pope_{category}.json"):
            index = int(Path(label["image"]).stem.rsplit("_", 1)[1])
            names = {item.name for item in draw_scene(3, SPLITS["eval"], index)[1].objects}
            named = next(name for name in sentence.ALL_NAMES if name in label["text"])
            assert (named in names) == (label["label"] == "yes")


def test_training_files_are_valid_conversations(files: Path) -> None:
    for name in ("pretrain", "finetune", "letters", "text", "exam"):
        samples = json.loads((files / "train" / f"{name}.json").read_text(encoding="utf-8"))
        assert samples
        for sample in samples:
            turns = sample["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            images = sample.get("image", [])
            images = [images] if isinstance(images, str) else images
            assert sum(turn["value"].count("<image>") for turn in turns) == len(images)
            assert all((files / "train" / "images" / image).exists() for image in images)
    assert not any("image" in sample for sample in json.loads((files / "train" / "text.json").read_text()))


def test_calibration_rows_point_at_pictures_and_boxes(files: Path) -> None:
    for row in read_lines(files / "calibrate" / "calibrate.jsonl"):
        assert (files / "calibrate" / row["image"]).exists()
        assert row["query"].startswith("Is there a") and len(row["boxes"]) == 1


def test_the_clip_end_mark_is_the_largest_id(tmp_path: Path) -> None:
    train_clip_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("Is there an orange circle in the image?" + sentence.SUFFIX).input_ids
    assert ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert ids[0] == tokenizer.bos_token_id == len(tokenizer) - 2
    assert len(ids) < 30
    assert tokenizer.model_max_length == 77


def test_the_base_model_has_llamas_numbering_and_short_prompts(tmp_path: Path) -> None:
    write_base_llm(tmp_path, num_layers=1, width=16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    frame = conv_templates["v1"]
    assert len(tokenizer(f"{frame.system} {frame.roles[0]}: ").input_ids) < 40
    assert tokenizer.decode(tokenizer("红", add_special_tokens=False).input_ids) == "红"
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"} <= names


def test_a_text_matches_every_picture_it_is_true_of() -> None:
    words = [["red circle", "red", "circle"], ["blue circle", "blue", "circle"]]
    features = torch.stack([clip_data.mark_features(each) for each in words])
    needs = torch.stack([clip_data.mark_features(each) for each in (["circle"], ["red circle"])])
    assert clip_data.match_pairs(needs, features).tolist() == [[1, 1], [1, 0]]


def test_chosen_texts_are_true_of_their_own_picture_and_exchanged_ones_are_not() -> None:
    chooser = random.Random(0)
    scenes = [draw_scene(0, 0, index)[1] for index in range(200)]
    features = torch.stack([clip_data.mark_features(clip_data.list_features(scene)) for scene in scenes])
    texts = [clip_data.choose_texts(scene, chooser) for scene in scenes]
    fitting, exchanged = (
        torch.stack([clip_data.mark_features(pair[1]) for pair in side]) for side in zip(*texts, strict=True)
    )
    assert clip_data.match_pairs(fitting, features).diagonal().all()
    # A question names colour or shape alone, so an exchange of the other attribute leaves it as it is.
    assert clip_data.match_pairs(exchanged, features).diagonal().mean() < 0.15


def test_the_loss_falls_where_true_pairs_agree() -> None:
    image = torch.eye(4)
    good = train_clip.contrast(image, image, torch.eye(4), torch.tensor(2.0))
    bad = train_clip.contrast(image, image.flip(0), torch.eye(4), torch.tensor(2.0))
    assert good < bad


def test_a_saved_clip_is_measured_alike_by_the_tower_and_while_training(tmp_path: Path) -> None:
    train_clip_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    model = train_clip.build_model(len(tokenizer), "mimetic")
    probe = train_clip.SignProbe(4, seed=0)
    figures = probe.measure(model, tokenizer)
    train_clip.save(model, tmp_path / "tokenizer", tmp_path / "clip", train_clip.Recipe())
    rows = []
    for index, (scene, query) in enumerate(zip(probe.pictures.scenes, probe.queries, strict=True)):
        Image.fromarray(probe.pictures.pixels[index]).save(tmp_path / f"{index}.png")
        about = next(item for item in scene.objects if item.name in query)
        rows.append(LabelledImage(tmp_path / f"{index}.png", query, (about.box,)))
    measured = calibrate(load_tower(str(tmp_path / "clip"), needs={TEXT}), rows)
    for one, other in zip(figures, measured, strict=True):
        assert one.kept_ratio == pytest.approx(other.kept_ratio)
        assert one.auc == pytest.approx(other.auc, abs=1e-3)


def test_the_mimetic_start_passes_a_token_on_with_the_opposite_sign() -> None:
    torch.manual_seed(0)
    model = train_clip.build_model(300, "mimetic")
    for layer in model.vision_model.encoder.layers:
        product = (layer.self_attn.out_proj.weight @ layer.self_attn.v_proj.weight).detach()
        assert product.diagonal().mean().item() == pytest.approx(-train_clip.MIMETIC_SIZE, abs=0.02)
        assert abs((product - product.diagonal().diag()).mean()) < 0.01
