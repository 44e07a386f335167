"""Reading and writing files: whole or not at all, regular files only, one error with one line for every failure."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from llava.errors import InputError
from llava.files import (
    FileError,
    append_line,
    atomic_folder,
    atomic_write,
    make_folder,
    parse_json,
    parse_natural,
    partial_of,
    read_bytes,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("42", 42), ("-1", None), ("1.5", None), ("", None), (" 1", None), ("²", None), ("9" * 5000, None)],
)
def test_a_whole_number_is_read_and_nothing_else(text, number):
    assert parse_natural(text) == number


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "data.json"
    assert read_json(write_json(path, {"a": [1, "\u2028", None]})) == {"a": [1, "\u2028", None]}
    assert read_jsonl(write_jsonl(path, [{"a": "x\u2028y"}, {"b": 2}])) == [{"a": "x\u2028y"}, {"b": 2}]
    assert read_text(write_text(path, "a\r\nb\u2028c\n")) == "a\r\nb\u2028c\n"
    assert read_bytes(write_bytes(path, b"\x00\xff")) == b"\x00\xff"


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}


def test_lines_end_at_newlines_only_and_keep_their_numbers(tmp_path):
    path = write_text(tmp_path / "lines", "one\n\ntwo\u2028still two\n")
    assert list(read_lines(path)) == [(1, "one"), (3, "two\u2028still two")]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = write_text(tmp_path / "data", "old")
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        partial.write_text("half of the new")
        raise RuntimeError
    assert read_text(path) == "old"
    assert os.listdir(tmp_path) == ["data"]


def test_a_link_stays_a_link_and_its_target_is_written(tmp_path):
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    write_text(target, "old")
    link.symlink_to(target)
    write_text(link, "new")
    append_line(link, " and more")
    assert link.is_symlink()
    assert read_text(target) == "new and more\n"


WRITERS = [
    lambda path: write_text(path, "x"),
    lambda path: write_json(path, 1),
    lambda path: write_jsonl(path, [{}]),
    lambda path: append_line(path, "x"),
]


@pytest.mark.parametrize("write", WRITERS)
def test_links_that_lead_in_a_circle_are_refused_and_stay(tmp_path, write):
    one, other = tmp_path / "one", tmp_path / "other"
    one.symlink_to(other)
    other.symlink_to(one)
    with pytest.raises(FileError, match="one: its links lead in a circle"):
        write(one)
    assert one.is_symlink() and other.is_symlink()


def test_a_file_keeps_its_permissions(tmp_path):
    path = write_text(tmp_path / "data", "old")
    path.chmod(0o640)
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("write", WRITERS)
def test_nothing_but_a_regular_file_is_replaced(tmp_path, write):
    folder, pipe = tmp_path / "folder", tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(pipe)
    for path, kind in ((folder, "a folder"), (pipe, "a pipe"), ("/dev/null", "a device")):
        with pytest.raises(FileError, match=kind):
            write(type(tmp_path)(path))
    assert folder.is_dir()
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_reading_a_pipe_or_a_device_is_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused = []

    def read(path):
        with pytest.raises(FileError, match="not a regular file"):
            read_bytes(path)
        refused.append(path)

    paths = [pipe, type(tmp_path)("/dev/zero"), tmp_path]
    for path in paths:
        reader = threading.Thread(target=read, args=[path], daemon=True)
        reader.start()
        reader.join(timeout=10)
    assert refused == paths


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,}', 'a comma before the closing "}"'),
        (b'{\n "a": [1, 2,\n ]}', 'a comma before the closing "]"'),
        (b'{"a": 1', "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b"9" * 5000, "digits"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_every_bad_document_is_one_error_that_names_the_file(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_a_syntax_error_names_line_and_column():
    with pytest.raises(FileError, match=r"config\.json is not JSON: .* line 3 column \d"):
        parse_json('{\n "a": 1\n "b": 2}', "config.json")


def test_a_bad_line_is_named_by_its_number(tmp_path):
    path = write_text(tmp_path / "rows.jsonl", '{"a": 1}\n\n[1]\n')
    with pytest.raises(FileError, match=r"rows\.jsonl line 3: a JSON object is needed, not list"):
        read_jsonl(path)


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(FileError, match=r"no such file: .*; run the other command first"):
        read_json(tmp_path / "data.json", hint="run the other command first")


def test_a_full_disk_is_one_error(tmp_path, monkeypatch):
    def fail(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", fail)
    with pytest.raises(FileError, match="No space left on device"):
        write_bytes(tmp_path / "data", b"x")


def test_an_impossible_name_is_one_error(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / "null\0byte", write_text(tmp_path / "file", "") / "below"):
        with pytest.raises(InputError):
            write_text(path, "x")
        with pytest.raises(InputError):
            read_text(path)
    with pytest.raises(InputError):
        make_folder(tmp_path / "file")


def test_a_name_of_255_bytes_is_written(tmp_path):
    for name in ("x" * 255, "\N{SNOWMAN}" * 85):
        assert read_text(write_text(tmp_path / name, "content")) == "content"


def test_numbers_too_long_for_python_are_one_error_in_a_line(tmp_path):
    path = write_text(tmp_path / "rows.jsonl", json.dumps({"a": 1}) + "\n" + '{"a": ' + "9" * 5000 + "}\n")
    with pytest.raises(FileError, match="line 2"):
        read_jsonl(path)


def test_a_limit_of_size_is_kept(tmp_path):
    path = write_bytes(tmp_path / "data", b"12345")
    assert read_bytes(path, limit=5) == b"12345"
    with pytest.raises(FileError, match=r"data is larger than .* GiB"):
        read_bytes(path, limit=4)


def test_a_file_larger_than_the_memory_is_one_error(tmp_path, monkeypatch):
    def fail(self):
        raise MemoryError

    path = write_bytes(tmp_path / "data", b"x")
    monkeypatch.setattr(type(tmp_path), "read_bytes", fail)
    with pytest.raises(FileError, match=r"cannot read .*data: it does not fit into memory"):
        read_bytes(path)


def test_half_a_surrogate_pair_is_no_name_but_is_written_as_its_escape(tmp_path):
    for use in (
        read_bytes,
        read_text,
        lambda path: write_text(path, "x"),
        lambda path: append_line(path, "x"),
        make_folder,
    ):
        with pytest.raises(FileError, match="the name is not valid Unicode"):
            use(tmp_path / "half \ud83d")
    path = write_text(tmp_path / "data", '"\ud83d"\n')
    append_line(path, '"\udc00"')
    assert [parse_json(line, "line") for _, line in read_lines(path)] == ["\ud83d", "\udc00"]


@pytest.mark.parametrize("use", [read_bytes, read_text, read_json, read_jsonl, lambda path: list(read_lines(path))])
def test_a_file_that_may_not_be_read_is_one_error(tmp_path, monkeypatch, use):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    path = write_text(tmp_path / "data", "{}")
    monkeypatch.setattr(type(tmp_path), "read_bytes", refuse)
    with pytest.raises(FileError, match=r"cannot read .*data: Permission denied"):
        use(path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    place = tmp_path / "new/folder"
    with atomic_folder(place) as partial:
        (partial / "a").write_text("1")
        assert not place.exists()
    assert [path.name for path in place.iterdir()] == ["a"]
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "other") as partial:
        (partial / "a").write_text("1")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in place.parent.iterdir()] == ["folder"]


def test_what_a_killed_process_left_of_a_folder_goes_and_what_a_living_one_writes_stays(tmp_path, monkeypatch):
    place, ended = tmp_path / "new [1]", subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process in (ended.pid, os.getppid()):
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda process=process: process)
            partial_of(place).mkdir()
            partial_of(tmp_path / "new").mkdir()
    strange = tmp_path / f".new [1].00000000-{ended.pid}.partial"  # of another machine, where it may run
    strange.mkdir()
    before = set(tmp_path.iterdir())
    with atomic_folder(place) as partial:
        (partial / "a").touch()
    after = set(tmp_path.iterdir())
    assert after - before == {place}
    (gone,) = before - after
    assert gone.name.startswith(".new [1].") and gone.name.endswith(f"-{ended.pid}.partial")


def test_of_two_processes_that_write_one_folder_the_second_is_told_so(tmp_path):
    with pytest.raises(FileError, match="place was written by another process meanwhile"):  # noqa: SIM117
        with atomic_folder(tmp_path / "place") as partial:
            (partial / "mine").touch()
            (tmp_path / "place").mkdir()
            (tmp_path / "place/theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["place", "theirs"]


def test_a_folder_takes_the_place_of_an_empty_one_and_of_nothing_else(tmp_path):
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as partial:
        (partial / "a").touch()
    for name, words in (("empty", "holds files already"), ("empty/a", "is not a folder")):
        with pytest.raises(FileError, match=words), atomic_folder(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "empty"]
