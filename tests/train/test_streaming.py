"""JSON files read item by item: the values and the messages of reading them whole."""

import json
import random
from pathlib import Path

import pytest

from llava.files import FileError, read_json
from llava.files import read_lines as read_lines_whole
from llava.train import streaming
from llava.train.streaming import read_lines, read_list

VALUES = ['a\u00e9\U0001f600\n"\\', -1.5e-7, 12345678, True, None, {"b": [1, {"c": "}]"}], "d": ""}, [], [[2]]]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks end everywhere, inside characters, numbers and escapes as well."""
    monkeypatch.setattr(streaming._Window, "BLOCK_BYTES", 7)


def outcome(read, path: Path) -> object:
    try:
        return read(path)
    except FileError as error:
        return str(error)


def test_values_and_messages_are_those_of_the_whole_file(tmp_path: Path):
    path, rng = tmp_path / "data.json", random.Random(0)
    for number in range(300):
        values = rng.choices(VALUES, k=rng.randrange(6))
        text = json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1, 4]))
        if number % 3:
            place = rng.randrange(len(text))
            text = (
                text[:place] + rng.choice(["", ",", '"', "[", "}", " ", "\n", "x", "\\"]) + text[place + number % 2 :]
            )
        path.write_text(text, encoding="utf-8")
        whole, streamed = outcome(read_json, path), outcome(lambda name: list(read_list(name)), path)
        if isinstance(whole, list) or (isinstance(whole, str) and whole.startswith(str(path))):
            assert repr(streamed) == repr(whole), text
        else:
            assert "expected a JSON list of records, found" in streamed


@pytest.mark.parametrize("byte", [0, 3, 20, 41])
def test_bytes_that_are_no_text_are_named_by_their_place(byte: int, tmp_path: Path):
    content = json.dumps(["\u00e9" * 8, "x" * 30], ensure_ascii=False).encode()
    (tmp_path / "data.json").write_bytes(content[:byte] + b"\xff" + content[byte:])
    start = byte - 1 if content[byte - 1 : byte] in (b"\xc3",) else byte
    for read in (read_list, read_lines):
        with pytest.raises(FileError, match=rf"data\.json is not UTF-8 text \(byte {start}\); save it as UTF-8"):
            list(read(tmp_path / "data.json"))


def test_lines_are_those_of_the_whole_file(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes("\ufeffone\r\n\n \u2028two\n\nthree".encode())
    assert list(read_lines(path)) == list(read_lines_whole(path))


def test_only_regular_files_are_read(tmp_path: Path):
    with pytest.raises(FileError, match=r"is a folder, not a regular file"):
        list(read_list(tmp_path))
    with pytest.raises(FileError, match=r"no such file: .*nowhere\.json; a hint"):
        list(read_lines(tmp_path / "nowhere.json", "a hint"))
