"""Training files: what is read, and what is refused with its place."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.train.dataset import check_fit
from llava.train.records import check_image_files, locate_image, parse_record, read_records
from llava.train.targets import choose_template


def make_record(*turns: str, **fields: object) -> dict:
    """A record of turns that alternate between user and assistant."""
    speakers = ("human", "gpt")
    conversations = [{"from": speakers[number % 2], "value": turn} for number, turn in enumerate(turns)]
    return {"id": "r", "conversations": conversations, **fields}


GOOD = make_record("<image>\nWhat?", "A cat.", image="cat.png")
BROKEN = {
    "no object": ([1, 2], "expected a JSON object"),
    "no conversations": ({"id": "r"}, "'conversations' must be a list"),
    "a system role": ({"conversations": [{"from": "system", "value": "x"}]}, "turn 0 is from 'system'"),
    "two questions": ({"conversations": [{"from": "human", "value": "x"}] * 2}, "turn 1 is from 'human'"),
    "no answer": (make_record("<image>\nWhat?", image="a.png"), "needs a user's turn and an answer"),
    "no text": ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "turn 0 has no text"),
    "an empty question": (make_record(" ", "x"), "turn 0, the user's, is empty"),
    "a placeholder without image": (make_record("<image>\nWhat?", "x"), "1 <image> placeholders for 0 images"),
    "an image without placeholder": (make_record("What?", "x", image="a.png"), "0 <image> placeholders for 1 images"),
    "three placeholders, two images": (
        make_record("<image><image><image> what?", "x", image=["a.png", "b.png"]),
        "3 <image> placeholders for 2 images",
    ),
    "an image that is no name": (make_record("<image>", "x", image=7), "'image' must be a file name"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_record_is_refused_with_index_and_id(case: str):
    raw, reason = BROKEN[case]
    with pytest.raises(InputError, match="record 4") as caught:
        parse_record(raw, 4)
    assert reason in str(caught.value)
    if isinstance(raw, dict) and "id" in raw:
        assert "id 'r'" in str(caught.value)


@pytest.mark.parametrize(
    ("turns", "images", "expected"),
    [
        (("What is it?\n<image>", "x"), 1, ("<image>\nWhat is it?", "x")),
        (("Look <image> here", "x"), 1, ("<image>\nLook  here", "x")),
        (("<image>", "x"), 1, ("<image>", "x")),
        (("<image>\n<image>\nWhat?", "x"), 1, ("<image>\nWhat?", "x")),
        (("<image> or <image>?", "x"), 2, ("<image> or <image>?", "x")),
        (("a <image>", "x", "b <image>", "y"), 2, ("<image>\na", "x", "<image>\nb", "y")),
        (("  no image  ", "x "), 0, ("  no image  ", "x ")),
    ],
)
def test_placeholders_go_where_llavas_preprocessing_puts_them(turns: tuple, images: int, expected: tuple):
    names = [f"{number}.png" for number in range(images)]
    assert parse_record(make_record(*turns, image=names), 0).turns == expected


@pytest.mark.parametrize(
    ("turns", "images"),
    [(("Look <image> here", " x"), 1), ((" <image> What?", " x"), 1), (("a <image>", "x", "b\n<image> ", "y"), 2)],
)
def test_a_record_may_say_that_its_placeholders_stay_as_written(turns: tuple, images: int):
    names = [f"{number}.png" for number in range(images)]
    assert parse_record(make_record(*turns, image=names, image_places="as_written"), 0).turns == turns


def test_places_as_written_need_a_placeholder_for_each_image():
    with pytest.raises(InputError, match="2 <image> placeholders for 1 images"):
        parse_record(make_record("<image><image> a", "x", image="a.png", image_places="as_written"), 0)
    with pytest.raises(InputError, match=r"record 0 \(id 'r'\): image_places 'kept': expected 'as_written'"):
        parse_record(make_record("<image> a", "x", image="a.png", image_places="kept"), 0)


def test_a_leading_assistant_turn_is_dropped():
    raw = {"conversations": [{"from": "gpt", "value": "Hello."}, *make_record("Hi", "x")["conversations"]]}
    assert parse_record(raw, 0).turns == ("Hi", "x")


def test_json_and_json_lines_give_the_same_records(write_records: Callable, tmp_path: Path):
    raws = [GOOD, make_record("Hi", "Hello 一.")]
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(json.dumps(raw, ensure_ascii=False) for raw in raws) + "\n\n", encoding="utf-8")
    assert read_records(lines) == read_records(write_records(raws))


def test_all_broken_records_are_counted_in_one_line(write_records: Callable):
    path = write_records([GOOD, {"id": "x"}, make_record("<image>", "x")])
    with pytest.raises(InputError, match=r"2 broken records: record 1 \(id 'x'\).*record 2 \(id 'r'\)"):
        read_records(path)


def test_skip_broken_trains_on_the_rest_and_says_so(write_records: Callable, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        records = read_records(write_records([{"id": "x"}, GOOD]), skip_broken=True)
    assert [record.name for record in records] == ["record 1 (id 'r')"]
    assert "left out 1 broken records: record 0 (id 'x')" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "{", r"a\.json is not JSON: .* at column 2"),
        ("a.jsonl", '{"id": 1}\n{', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", "", "no training record"),
        ("a.json", "{}", "expected a JSON list"),
        ("a.json", "[]", "no training record"),
    ],
)
def test_a_file_that_is_no_training_file_is_refused(name: str, content: str, reason: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=reason):
        read_records(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"id": "caf\xe9"}]', r"is not UTF-8 text \(byte 12\); save it as UTF-8"),
        ('[{"id": "你好"}]'.encode("gbk"), r"is not UTF-8 text \(byte 9\); save it as UTF-8"),
        ('[{"id": "a"}]'.encode("utf-16"), r"is not UTF-8 text \(byte 0\); save it as UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"id": ' + b"9" * 5000 + b"}]", "is not readable JSON: .*digits"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_with_odd_content_is_one_line(name: str, content: bytes, reason: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_records(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_and_line_separators_inside_texts_are_read(name: str, tmp_path: Path):
    raw = make_record("One\u2028two?", "Yes.\x85")
    text = json.dumps(raw if name == "a.jsonl" else [raw], ensure_ascii=False)
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    assert [record.turns for record in read_records(tmp_path / name)] == [("One\u2028two?", "Yes.\x85")]


def test_an_absent_file_is_named():
    with pytest.raises(
        InputError, match=r"no such file: nowhere\.json; --data_path takes a \.json, \.jsonl or \.parquet file"
    ):
        read_records("nowhere.json")


def test_a_missing_image_is_reported_before_training_and_can_be_skipped(tmp_path: Path):
    (tmp_path / "cat.png").touch()
    records = [parse_record(GOOD, 0), parse_record({**GOOD, "image": "dog.png"}, 1)]
    with pytest.raises(InputError, match=r"record 1 \(id 'r'\): no image file .*dog\.png"):
        check_image_files(records, tmp_path)
    assert check_image_files(records, tmp_path, skip_broken=True) == records[:1]


def test_a_name_that_no_file_can_have_is_a_missing_image(tmp_path: Path):
    for name in ("a" * 5000 + ".png", "a\0b.png"):
        with pytest.raises(InputError, match=r"record 0 \(id 'r'\): no image file"):
            check_image_files([parse_record({**GOOD, "image": name}, 0)], tmp_path)


def test_urls_need_no_file_and_no_folder(tmp_path: Path):
    url = "https://example.org/cat.png"
    record = parse_record({**GOOD, "image": url}, 0)
    assert check_image_files([record], tmp_path) == [record]
    assert locate_image(url, tmp_path) == url
    assert locate_image("cat.png", tmp_path) == str(tmp_path / "cat.png")


# --------------------------------------------------------------------------------------- one record is one fault
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (make_record("Half \ud83d of a smile", "x"), "turn 0 holds half of a surrogate pair"),
        (make_record("Hi", "\udc00"), "turn 1 holds half of a surrogate pair"),
        (make_record("<image>\nWhat?", "x", image="\ud83d.png"), "the name of its image holds half of a surrogate"),
        (make_record("Hi", 7), "turn 1 has no text in 'value'"),
        (make_record("Hi", None), "turn 1 has no text in 'value'"),
        (make_record("Hi", ["a"]), "turn 1 has no text in 'value'"),
        ({"id": "r", "conversations": ["Hi"]}, "'conversations' must be a list"),
        ({"id": "r", "conversations": [{"from": 3, "value": "x"}]}, "turn 0 is from 3"),
        ({"id": "r", "conversations": [{"from": ["human"], "value": "x"}]}, "turn 0 is from ['human']"),
    ],
)
def test_one_odd_record_is_one_fault(raw: dict, reason: str, write_records: Callable, caplog: pytest.LogCaptureFixture):
    path = write_records([GOOD, raw, GOOD])
    with pytest.raises(InputError) as caught:
        read_records(path)
    assert "1 broken records: record 1 (id 'r')" in str(caught.value) and reason in str(caught.value)
    assert len(read_records(path, skip_broken=True)) == 2
    assert "left out 1 broken records: record 1" in caplog.text


def test_a_line_that_is_no_json_is_one_fault(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    good = json.dumps(GOOD)
    path.write_text(f"{good}\n{good[:-5]}\n" + "[" * 100_000 + f'\n{{"id": {"9" * 5000}}}\n{good}\n')
    with pytest.raises(InputError, match=r"3 broken records: record 1: .*data\.jsonl line 2 is not JSON"):
        read_records(path)
    assert [record.name for record in read_records(path, skip_broken=True)] == [
        "record 0 (id 'r')",
        "record 4 (id 'r')",
    ]


def test_records_that_do_not_suit_the_template_are_left_out_when_told_to(caplog: pytest.LogCaptureFixture):
    records = [parse_record(make_record("Hi", "x"), 0), parse_record(GOOD, 1)]
    assert check_fit(records, choose_template("plain"), has_vision=True, skip_broken=True) == records[1:]
    assert check_fit(records, choose_template("v1"), has_vision=False, skip_broken=True) == records[:1]
    assert "left out 1 broken records: record 0 (id 'r')" in caplog.text
