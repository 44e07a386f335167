"""What is there is found by listing folders, and counted as the files' publishers do."""

import json

import pytest
from PIL import Image

from llava.download.inventory import count_records, find_missing, find_unreadable, has_files
from llava.download.table import Place
from llava.errors import InputError


def test_files_count_in_all_levels_and_hidden_ones_do_not(tmp_path):
    for name in ("a/1.jpg", "a/b/2.jpg", "3.jpg", ".hidden", ".images.zip.unpacking/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert has_files(tmp_path, 3) and not has_files(tmp_path, 4)
    assert not has_files(tmp_path / "none", 1)


def test_a_place_may_be_elsewhere_and_an_empty_file_is_none(tmp_path):
    place = Place("mm-vet.json", also=("mm-vet/mm-vet.json",))
    (tmp_path / "mm-vet").mkdir()
    (tmp_path / "mm-vet" / "mm-vet.json").write_text("")
    assert place.find(tmp_path) is None
    (tmp_path / "mm-vet" / "mm-vet.json").write_text("{}")
    assert place.find(tmp_path) == tmp_path / "mm-vet" / "mm-vet.json"


def test_missing_files_are_found_by_listing_each_folder_once(tmp_path, monkeypatch):
    import os

    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed, plain = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or plain(folder))
    wanted = [tmp_path / name for name in ("a/1.jpg", "a/3.jpg", "b/1.jpg", "a/2.jpg", "c/1.jpg", "a/3.jpg")]
    assert find_missing(wanted) == [tmp_path / "a/3.jpg", tmp_path / "c/1.jpg"]
    assert listed == [tmp_path / "a", tmp_path / "b"]


def test_a_sample_is_decoded_and_damage_is_named(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for path in paths:
        Image.new("RGB", (3, 3)).save(path)
    assert find_unreadable(paths, 5) == {}
    for path in paths:
        path.write_bytes(path.read_bytes()[:40])
    faults = find_unreadable(paths, 5)
    assert len(faults) == 5 and all(str(path) in fault for path, fault in faults.items())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('[{"a": 1}, {"a": 2}]', 2),
        ('[\n{"a": 1},\n{"a": 2},\n{"a": 3}\n]', 3),
        ('{"questions": [1, 2, 3], "question_type": {"x": 1}}', 3),
        ('{"v1_0": {"answer": "a"}, "v1_1": {"answer": "b"}}', 2),
        ('{"question_id": 1}\n{"question_id": 2}\n', 2),
        ("7", 1),
    ],
)
def test_records_are_counted_in_every_published_form(text, number, tmp_path):
    (tmp_path / "a.json").write_text(text)
    assert count_records(tmp_path / "a.json") == number


def test_one_line_of_json_lines_is_one_record(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question_id": 1, "text": "x"}))
    assert count_records(tmp_path / "a.jsonl") == 1


def test_a_cut_file_is_named_with_its_place(tmp_path):
    (tmp_path / "a.json").write_text('{"question_id": 1}\n{"question_id"')
    with pytest.raises(InputError, match=r"a\.json line 2"):
        count_records(tmp_path / "a.json")
