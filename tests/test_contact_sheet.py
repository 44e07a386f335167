"""The contact sheet: one file with every question, its answers and pictures; nothing of a file is taken for HTML."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from llava import Llava, contact_sheet
from llava.contact_sheet import Asked, read_questions, take, write_sheet
from llava.errors import InputError, run_command
from llava.model.token_reduction import parse_reduction
from llava.serve.samples import PHOTOS, SHAPES
from llava.visualize import main

COFFEE, ROCKET = str(PHOTOS / "coffee.jpg"), str(PHOTOS / "rocket.jpg")
MODES = ["TRIM:9", "VisionZip:16"]


class Reader(HTMLParser):
    """Collects the tags of a page, the addresses of its images and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [value for name, value in attrs if tag == "img" and name == "src"]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def pocket():
    pytest.importorskip("matplotlib")
    return Llava.from_pretrained(SHAPES / "checkpoints" / "llava-shapes-trim", reduce="none", device="cpu")


def draw(pocket, path, asked, max_new_tokens=None) -> Reader:
    reductions = [parse_reduction(spec) for spec in MODES]
    write_sheet(path, asked, pocket.model, pocket.image_processor, reductions, "vicuna_v1", max_new_tokens)
    return Reader(path.read_text(encoding="utf-8"))


def test_a_page_has_each_questions_image_and_panels_embedded_and_its_texts_escaped(pocket, tmp_path, capsys):
    asked = [
        Asked(COFFEE, "Is there <script>alert(1)</script> & a circle?", "<b>Yes</b>"),
        Asked(COFFEE, "What color is it?"),
        Asked(str(tmp_path / "none<.png"), "Where?"),
        Asked(ROCKET, "What color is the sky?"),
    ]
    page = draw(pocket, tmp_path / "deep" / "sheet.html", asked, max_new_tokens=3)
    assert page.tags.count("section") == 4 and "script" not in page.tags and "b" not in page.tags
    assert "<script>alert(1)</script> & a circle?" in page.text and "<b>Yes</b>" in page.text
    # The image, kept patches and scores of both methods, three times; the missing image has its reason in its place.
    assert len(page.images) == 3 * (1 + 2 * len(MODES))
    for source in page.images:
        kind, content = source.split(",")
        assert kind == "data:image/jpeg;base64"
        assert max(Image.open(BytesIO(base64.b64decode(content))).size) <= contact_sheet.SIDE
    assert page.text.count("full model") == 3 and "none<.png" in page.text
    assert "9 of 64 patches kept" in page.text and "none<.png" in capsys.readouterr().err


def test_an_image_is_encoded_once_for_the_questions_in_a_row(pocket, tmp_path, monkeypatch):
    calls, encode = [], pocket.model.encode_patches
    monkeypatch.setattr(pocket.model, "encode_patches", lambda *args: calls.append(1) or encode(*args))
    draw(pocket, tmp_path / "a.html", [Asked(COFFEE, "One?"), Asked(COFFEE, "Two?"), Asked(ROCKET, "Three?")])
    assert len(calls) == 2


def test_a_page_stays_below_its_size_and_says_what_it_leaves_out(pocket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contact_sheet, "MAX_BYTES", 300_000)
    page = draw(pocket, tmp_path / "a.html", [Asked(COFFEE, f"Number {number}?") for number in range(4)])
    shown = page.tags.count("section")
    assert 1 <= shown < 4 and (tmp_path / "a.html").stat().st_size < 310_000
    assert f"{4 - shown} more are left out" in page.text and "more are left out" in capsys.readouterr().err


def test_questions_are_read_from_question_files_and_answers_files(tmp_path):
    file, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    rows = [
        {"question_id": 1, "image": "a.png", "text": "<image>\nWhat?"},
        {"question_id": 2, "image": "b.png", "prompt": "Where?", "text": "left"},
        {"image": "https://example.org/c.png", "query": "Who?"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers.write_text('{"question_id": 1, "text": "a dog"}\n')
    folder = tmp_path / "images"
    assert read_questions(file, folder, answers) == [
        Asked(str(folder / "a.png"), "What?", "a dog"),
        Asked(str(folder / "b.png"), "Where?", "left"),
        Asked("https://example.org/c.png", "Who?"),
    ]
    assert read_questions(file)[0] == Asked(str(tmp_path / "a.png"), "What?")


def test_the_first_sixty_are_drawn_unless_told_otherwise(capsys):
    asked = [Asked("a.png", "What?")] * 100
    assert (len(take(asked, None)), len(take(asked, 80)), len(take(asked[:5], None))) == (60, 80, 5)
    assert capsys.readouterr().err == "the first 60 of 100 questions are drawn (--limit N for another number)\n"


PLACES = ["--image-file", COFFEE, "--query", "What?"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([*PLACES], "name one place: --out FILE for a drawing, or --html FILE"),
        ([*PLACES, "--out", "a.png", "--html", "a.html"], "name one place"),
        ([*PLACES, "--html", "a.png"], "--html a.png: a page is a .html file"),
        ([*PLACES, "--html", "a.html", "--what-if"], "--what-if is a drawing of its own"),
        ([*PLACES, "--html", "a.html", "--limit", "3"], "--limit has no effect without --questions"),
        (["--out", "a.png", "--query", "What?"], "--image-file and --query are needed"),
        (["--questions", "q.jsonl", "--out", "a.png"], "--questions has images and questions"),
        (["--questions", "q.jsonl", "--html", "a.html", "--query", "What?"], "--questions has images and questions"),
        (["--questions", "none.jsonl", "--html", "a.html"], "no such file: none.jsonl"),
        (["--questions", "bare.jsonl", "--html", "a.html"], 'bare.jsonl record 1: "image" and a question are needed'),
        (["--questions", "empty.jsonl", "--html", "a.html"], "empty.jsonl record 1: the question is empty"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.jsonl").write_text('{"question_id": 1, "prompt": "What?", "text": "a dog"}\n')
    (tmp_path / "empty.jsonl").write_text('{"image": "a.png", "text": "<image>"}\n')
    monkeypatch.setattr(sys, "argv", ["visualize", "--model-path", "no-such-checkpoint", *options])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.match("error: ", error) and says in error and error.count("\n") == 1


def test_an_error_of_a_question_names_it(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "text": "What?"}\n{"image": 3, "text": "What?"}\n')
    with pytest.raises(InputError, match=r"q\.jsonl record 2"):
        read_questions(tmp_path / "q.jsonl")
