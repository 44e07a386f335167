"""What the CLIP text tower reads, by entry point: the table of docs/parity.md.

One rule serves them all (`llava.prompt.query_of`: each `<image>` becomes a space); they differ in which text it is.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.calibrate import LabelledImage, encode_images
from llava.chat import ChatSession
from llava.conversation import conv_templates
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks._files import load_question_file
from llava.image import load_image
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.sampling import Sampling
from llava.visualize import visualize

pytest.importorskip("datasets", reason="training records are read with it")
from llava.train.dataset import ConversationDataset, TextFormat
from llava.train.records import Record

TRIM = "llava-v1.5-tiny84-TRIM"
IMAGE = "../data/images/noise.png"
SUFFIX = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def loaded(golden: Path) -> tuple:
    """The tiny TRIM model, loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden / "checkpoints")
        return load_pretrained_model(TRIM, device="cpu")


@pytest.fixture
def read(loaded: tuple, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the text tower reads from now on."""
    texts: list[str] = []
    tower = loaded[1].get_vision_tower()
    embed = tower.embed_text
    monkeypatch.setattr(tower, "embed_text", lambda batch: (texts.extend(batch), embed(batch))[1])
    return texts


def ask_in_chat(loaded: tuple, text: str) -> None:
    tokenizer, model, image_processor, _ = loaded
    session = ChatSession(model, tokenizer, image_processor, "vicuna_v1")
    session.show([load_image(IMAGE)])
    session.ask(text, Sampling(max_new_tokens=1))


def ask_by_ids(loaded: tuple, text: str) -> None:
    tokenizer, model, image_processor, _ = loaded
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], None)
    input_ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
    pixels = process_images([load_image(IMAGE)], image_processor, model.config)
    model.generate(input_ids, images=pixels, max_new_tokens=1)


ENTRY_POINTS: list[tuple[str, Callable[[tuple, str], None], str, str]] = [
    ("chat, run_llava", ask_in_chat, "What is it?", "What is it?"),
    ("chat, placeholder first", ask_in_chat, "<image>\nWhat is it?", "What is it?"),
    ("chat, placeholder inside", ask_in_chat, "Is <image> red?", "Is   red?"),
    ("generate without texts", ask_by_ids, "<image>\nWhat is it?", "What is it?"),
    ("generate without texts, instruction", ask_by_ids, f"<image>\nWhat is it?{SUFFIX}", f"What is it?{SUFFIX}"),
]


@pytest.mark.parametrize(("name", "ask", "text", "query"), ENTRY_POINTS, ids=[each[0] for each in ENTRY_POINTS])
def test_a_users_text_becomes_the_query(loaded, checkpoints, read, name, ask, text, query) -> None:
    ask(loaded, text)
    assert read == [query]


def test_visualize_reads_its_query(loaded, checkpoints, read) -> None:
    pytest.importorskip("matplotlib")
    visualize(loaded[1], loaded[2], load_image(IMAGE), "What is <image>?")
    assert read == ["What is  ?"]


def test_calibrate_reads_its_query(loaded, checkpoints, read) -> None:
    encode_images(loaded[1].get_vision_tower(), [LabelledImage(Path(IMAGE), "a bus", ((0, 0, 9, 9),))])
    assert read == ["a bus"]


def test_a_question_file_is_read_with_its_instruction(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question_id": 1, "image": "a.png", "text": f"<image>\nWhat is it?{SUFFIX}"}))
    (question,) = load_question_file(file, tmp_path)
    assert question.query == f" \nWhat is it?{SUFFIX}"


def test_scienceqa_reads_its_instruction_and_mmbench_does_not(golden: Path) -> None:
    science = find_benchmark("sqa").load(golden / "oracle" / "scienceqa")
    asked = next(question for question in science if question.images)
    assert asked.query == f" \n{asked.prompt}"
    assert asked.prompt.endswith("Answer with the option's letter from the given choices directly.")
    choice = next(each for each in find_benchmark("mmbench").load(golden / "oracle" / "mmbench") if not each.fault)
    assert choice.prompt == f"{choice.query}\nAnswer with the option's letter from the given choices directly."


TURNS = ("<image>\nWhat is it?", "A bus.", "Is <image> red?", "Yes.")


@pytest.mark.parametrize(
    ("source", "query"),
    [
        ("questions", "What is it?\nIs   red?"),
        ("turns", "What is it?\x1eIs   red?"),
        ("conversation", "USER:  \nWhat is it? ASSISTANT: A bus.</s>USER: Is   red? ASSISTANT: Yes.</s>"),
    ],
)
def test_training_reads_the_users_turns_or_the_whole_conversation(loaded, source: str, query: str) -> None:
    record = Record(name="record 1", turns=TURNS, images=())
    text_format = TextFormat(conv_templates["v1"], query_source=source)
    (sample,) = [ConversationDataset([record], loaded[0], text_format)[0]]
    assert sample.query.removeprefix(conv_templates["v1"].system + " ") == query


def test_turns_are_embedded_one_by_one_where_the_checkpoint_pools_them(loaded, checkpoints, monkeypatch) -> None:
    tower = loaded[1].get_vision_tower()
    monkeypatch.setattr(tower, "pools_queries", True)
    texts: list[str] = []
    features = tower.text_features
    monkeypatch.setattr(tower, "text_features", lambda batch: (texts.extend(batch), features(batch))[1])
    embeds = loaded[1].embed_queries(["What is it?\x1eIs   red?", "What is it?"])
    assert texts == ["What is it?", "Is   red?", "What is it?"] and embeds.shape[0] == 2
