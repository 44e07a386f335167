"""Records on disk: made once, whole or not at all, found again by content, the same for every process."""

import json
import logging
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from llava.errors import InputError
from llava.train import preflight, records, sources, store, stored_images
from llava.train.preflight import find_broken_images
from llava.train.records import check_image_files, parse_record, read_records
from llava.train.store import Records


def talk(question: str, answer: str = "Yes.", **fields: object) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


MIXED = [
    talk("<image>\nWhat?", id=7, image="a.png"),
    talk("Hi", "Hello.", id="x", model="other", weight=[1, {"deep": None}]),
    talk("<image> or <image>?", image=["a.png", "b.png"]),
    talk("One two three", "four", id=None, image=None),
]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "stores"


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, reading a source fails."""

    def forbid(*arguments: object) -> None:
        raise AssertionError("a source was read")

    return lambda: monkeypatch.setattr(store, "read_rows", forbid)


# -------------------------------------------------------------------------------------------------------- what it holds
def test_records_with_other_keys_and_kinds_of_ids_are_those_of_the_file(write_records: Callable, cache: Path):
    found = read_records(write_records(MIXED), cache=cache)
    expected = [parse_record(raw, number) for number, raw in enumerate(MIXED)]
    assert list(found) == expected and [found[number] for number in range(4)] == expected and found[-1] == expected[-1]
    assert found == expected and found[1:3] == expected[1:3] and found != expected[:3]
    assert found.read([3, 0, 3]) == [expected[3], expected[0], expected[3]]
    assert found.num_words.tolist() == [record.num_words for record in expected]
    assert found.num_images.tolist() == [1, 0, 2, 0]
    assert found.column("is_caption").tolist() == [True, False, True, False]
    with pytest.raises(IndexError):
        found[4]


def test_more_records_than_a_batch_keep_their_order(write_records: Callable, cache: Path, monkeypatch):
    monkeypatch.setattr(store, "ROWS_PER_BATCH", 3)
    raws = [talk(f"<image>\nNumber {number}?", image=f"{number % 5}.png") for number in range(11)]
    found = read_records(write_records(raws), cache=cache)
    assert found == [parse_record(raw, number) for number, raw in enumerate(raws)]
    is_wanted = found.find_named(lambda name: name in ("1.png", "4.png"))
    assert np.flatnonzero(is_wanted).tolist() == [1, 4, 6, 9]


def test_each_image_name_is_looked_for_once_and_only_if_a_record_needs_it(write_records: Callable, cache: Path):
    found, asked = read_records(write_records(MIXED * 3), cache=cache), []
    found.find_named(lambda name: bool(asked.append(name)))
    assert sorted(asked) == ["a.png", "b.png"]
    asked.clear()
    found.keep(found.num_images == 1).find_named(lambda name: bool(asked.append(name)))
    assert asked == ["a.png"]


def test_the_fingerprint_is_that_of_texts_and_names_in_order(write_records: Callable, cache: Path):
    found = read_records(write_records(MIXED), cache=cache)
    lines = write_records([], "other.jsonl")
    lines.write_text("\n".join(json.dumps(raw | {"id": "other"}) for raw in MIXED))
    assert read_records(lines, cache=cache).fingerprint() == found.fingerprint()
    others = [MIXED[::-1], MIXED[:3], [*MIXED[:3], talk("One two", "three four")]]
    assert all(read_records(write_records(raws), cache=cache).fingerprint() != found.fingerprint() for raws in others)
    assert Records.of(list(found)).fingerprint() == found.fingerprint()


def test_the_fingerprint_of_some_records_is_that_of_a_file_with_these_alone(write_records: Callable, cache: Path):
    raws = [talk(f"What is {number}?") for number in range(40)]
    some = read_records(write_records(raws), cache=cache).keep(np.arange(40) >= 5)
    assert some.fingerprint() == read_records(write_records(raws[5:], "some.json"), cache=cache).fingerprint()
    raws[30]["conversations"][1]["value"] = "Other."
    other = read_records(write_records(raws, "other.json"), cache=cache).keep(np.arange(40) >= 5)
    assert some.fingerprint() != other.fingerprint()
    assert set(some.list_digests()) - set(other.list_digests()) == {some[25].digest()}


def test_a_pickle_of_the_records_is_their_place(write_records: Callable, cache: Path):
    found = read_records(write_records([talk("Hi " * 1000)] * 50), cache=cache)
    content = pickle.dumps(found)
    assert len(content) < 2000 and pickle.loads(content) == found


# ----------------------------------------------------------------------------------------------------- made once, whole
def test_a_second_start_reads_nothing_and_a_changed_file_is_read_anew(
    write_records: Callable, cache: Path, no_reading: Callable
):
    first = read_records(write_records(MIXED), cache=cache)
    changed = read_records(write_records(MIXED[:2]), cache=cache)
    assert len(changed) == 2 and len(first) == 4
    no_reading()
    assert read_records(write_records(MIXED), cache=cache) == first


def test_broken_records_are_named_at_every_start(
    write_records: Callable, cache: Path, no_reading: Callable, caplog: pytest.LogCaptureFixture
):
    path = write_records([{"id": "b"}, MIXED[0], *[talk("Hi", 7)] * 7])
    for _ in range(2):
        with pytest.raises(InputError, match=r"8 broken records: record 0 \(id 'b'\).*record 5 .*; \.\.\. \(--skip_br"):
            read_records(path, cache=cache)
        no_reading()
    with caplog.at_level(logging.WARNING):
        assert len(read_records(path, skip_broken=True, cache=cache)) == 1
    assert "left out 8 broken records: record 0 (id 'b')" in caplog.text


def test_a_killed_conversion_leaves_no_store_and_the_next_start_makes_one(
    write_records: Callable, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_records(MIXED)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(store, "_write_names", lambda folder: os.kill(os.getpid(), signal.SIGKILL))
        try:
            read_records(path, cache=cache)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [file.name.endswith(".partial") for file in cache.iterdir() if file.is_dir()] == [True]
    assert len(read_records(path, cache=cache)) == 4
    assert not list(cache.glob(".*.partial"))


@pytest.mark.parametrize("name", ["about.json", "records.arrow", "num_words.npy", "names.arrow"])
def test_a_damaged_store_is_made_anew(name: str, write_records: Callable, cache: Path):
    path = write_records(MIXED)
    expected = list(read_records(path, cache=cache))
    (file,) = cache.glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:-30])
    assert read_records(path, cache=cache) == expected


def test_a_process_that_finds_another_at_work_says_so_and_waits(
    write_records: Callable, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    read_records(path := write_records(MIXED), cache=cache)
    (folder,) = (file for file in cache.iterdir() if file.is_dir())
    other = FileLock(cache / f"{folder.name}.lock")
    folder.rename(cache / "aside")
    other.acquire()
    plain = FileLock.acquire

    def acquire(lock: FileLock, timeout: float | None = None, **options: object) -> object:
        if timeout is None:  # waits for good: the other one is done
            (cache / "aside").rename(folder)
            other.release()
        return plain(lock, timeout=timeout, **options)

    monkeypatch.setattr(type(other), "acquire", acquire)
    monkeypatch.setattr(store, "read_rows", None)
    with caplog.at_level(logging.WARNING):
        assert len(read_records(path, cache=cache)) == 4
    assert "another process reads" in caplog.text and "data.json into the store: waiting for it" in caplog.text


def test_a_cache_that_cannot_be_written_is_one_line(write_records: Callable, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file.*; --data_cache takes another folder") as caught:
        read_records(write_records(MIXED), cache=tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_leaves_nothing(cache: Path, tmp_path: Path):
    (tmp_path / "data.json").write_text(json.dumps(MIXED)[:-5])
    with pytest.raises(InputError, match=r"data\.json is not JSON: .* at column \d+"):
        read_records(tmp_path / "data.json", cache=cache)
    assert not [file for file in cache.iterdir() if file.is_dir()]


# --------------------------------------------------------------------------------------------------- images in parquet
PIXELS = [bytes([number]) * 2000 for number in range(12)]


def write_parquet(path: Path, cells: list, rows_per_group: int = 4) -> Path:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    kind = pa.list_(pa.binary()) if isinstance(cells[0], list) else pa.binary() if cells[0] == PIXELS[0] else kind
    rows = [talk("<image>\nWhat?" if cell else "Why?") for cell in cells]
    table = pa.table(
        {"conversations": [row["conversations"] for row in rows], "image": pa.array(cells, kind)}
        | {"other": [[1.5] * 10] * len(cells)}
    )
    pq.write_table(table, path, row_group_size=rows_per_group, compression="none")
    return path


def read_images(found: Records) -> list[list[bytes]]:
    return [[image.read().content for image in record.images] for record in found]


@pytest.mark.parametrize(
    "make",
    [lambda content: {"bytes": content, "path": None}, lambda content: content, lambda content: [content]],
    ids=["structures", "bytes", "lists of bytes"],
)
def test_images_in_parquet_are_read_in_place(make: Callable, cache: Path, tmp_path: Path):
    path = write_parquet(tmp_path / "data.parquet", [make(content) for content in PIXELS])
    found = read_records(path, cache=cache)
    assert read_images(found) == [[content] for content in PIXELS]
    assert [image.file.path for image in found[5].images] == [str(path)]
    assert sum(file.stat().st_size for file in cache.rglob("*")) < len(PIXELS) * 1000
    assert check_image_files(found, tmp_path) == found


def test_rows_without_bytes_are_texts_or_names(cache: Path, tmp_path: Path):
    cells = [{"bytes": PIXELS[0], "path": "a"}, None, {"bytes": None, "path": "named.png"}, *[None] * 5]
    found = read_records(write_parquet(tmp_path / "data.parquet", cells), cache=cache)
    assert [len(record.images) for record in found] == [1, 0, 1, 0, 0, 0, 0, 0]
    assert str(found[0].images[0]) == "a of row 0" and found[2].images == ("named.png",)
    cells[2] = {"bytes": PIXELS[2], "path": None}
    found = read_records(write_parquet(tmp_path / "data.parquet", cells), cache=cache)
    assert [image.read().content for image in found[2].images] == [PIXELS[2]]


def test_images_of_large_row_groups_are_copied_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "LARGEST_GROUP_BYTES", 6 * len(PIXELS[0]))
    path = write_parquet(tmp_path / "data.parquet", [{"bytes": content, "path": "x"} for content in PIXELS], 12)
    found = read_records(path, cache=cache)
    path.write_bytes(path.read_bytes()[:100])
    assert read_images(found) == [[content] for content in PIXELS]


def test_a_folder_of_parquet_is_one_set_and_a_file_that_is_gone_names_its_row(cache: Path, tmp_path: Path):
    (tmp_path / "set").mkdir()
    for part in range(2):
        cells = [{"bytes": content, "path": None} for content in PIXELS[part * 6 : part * 6 + 6]]
        write_parquet(tmp_path / f"set/train-0000{part}-of-00002.parquet", cells)
    found = read_records(tmp_path / "set", cache=cache)
    assert read_images(found) == [[content] for content in PIXELS]
    assert str(found[7].images[0]) == "image of row 7" and found[7].name == "record 7 (id None)"
    (tmp_path / "set/train-00001-of-00002.parquet").unlink()
    stored_images._open_images.cache_clear()
    with pytest.raises(InputError, match=r"image of row 7 of .*train-00001-of-00002\.parquet: "):
        found[7].images[0].read()


def test_a_folder_of_json_may_hold_lines_and_odd_records(cache: Path, tmp_path: Path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.json").write_text("\n".join(json.dumps(raw) for raw in MIXED[:2]))
    (tmp_path / "set/b.json").write_text(json.dumps(MIXED[2:]))
    assert read_records(tmp_path / "set", cache=cache) == [parse_record(raw, n) for n, raw in enumerate(MIXED)]


# ------------------------------------------------------------------------------------------------------------ mixtures
def write_mixture(folder: Path, text: str) -> Path:
    (folder / "mix.yaml").write_text(text)
    return folder / "mix.yaml"


def test_a_mixture_repeats_by_weight_and_takes_the_same_share_each_time(
    write_records: Callable, cache: Path, tmp_path: Path
):
    write_records([talk(f"a{number}") for number in range(10)], "a.json")
    write_records([talk(f"b{number}") for number in range(4)], "b.json")
    mix = write_mixture(tmp_path, "- path: a.json\n  weight: 0.5\n- {path: b.json, weight: 2.25}\n")
    found = read_records(mix, cache=cache)
    assert len(found) == 14 and found[11].name == "b.json record 1 (id None)"
    repeated = found.repeated()
    turns = [record.turns[0] for record in repeated]
    assert turns == [record.turns[0] for record in read_records(mix, cache=cache).repeated()]
    assert len(set(turns[:5])) == 5 and all(turn.startswith("a") for turn in turns[:5])
    assert turns[5:13] == ["b0", "b1", "b2", "b3"] * 2 and len(turns) == 14 and turns[13].startswith("b")
    assert repeated.fingerprint() != found.fingerprint() and repeated.num_words.tolist() == [2] * 14


def test_a_broken_record_of_a_mixture_names_its_file(write_records: Callable, cache: Path, tmp_path: Path):
    write_records([MIXED[0]], "a.json")
    write_records([{"id": "r"}], "b.json")
    mix = write_mixture(tmp_path, "- path: a.json\n- path: b.json\n")
    with pytest.raises(InputError, match=r"mix\.yaml: 1 broken records: b\.json record 0 \(id 'r'\)"):
        read_records(mix, cache=cache)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1", r"mix\.yaml: expected a list of entries such as"),
        ("[", r"mix\.yaml is not YAML: "),
        ("- a.json", r"mix\.yaml, entry 1: expected 'path: FILE'"),
        ("- path: a.json\n  weigth: 2", r"mix\.yaml, entry 1: 'weigth' is not known; expected path and weight"),
        ("- path: a.json\n  weight: 0", r"entry 1: weight 0: expected a number above 0, at most 1000"),
        ("- path: a.json\n  weight: .nan", r"entry 1: weight nan: expected a number above 0"),
        ("- path: a.json\n  weight: many", r"entry 1: weight 'many': expected a number"),
        ("- path: other.yaml", r"entry 1: other\.yaml is a mixture itself; list its entries here"),
        ("- path: nowhere.json", r"no such file: .*nowhere\.json; --data_path takes"),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_one_line(text: str, line: str, cache: Path, tmp_path: Path):
    with pytest.raises(InputError, match=line) as caught:
        read_records(write_mixture(tmp_path, text), cache=cache)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- image headers
def test_what_was_found_in_unchanged_images_is_not_looked_for_again(
    cache: Path, write_records: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preflight, "NOTED_IMAGES", 1)
    (tmp_path / "a.png").write_bytes(b"no image")
    os.utime(tmp_path / "a.png", (1e9, 1e9))
    monkeypatch.setattr(preflight, "is_settled", lambda stamp, now: True)
    found = records.check_image_files(read_records(write_records(MIXED[:1]), cache=cache), tmp_path)
    faults = find_broken_images(found, tmp_path, cache)
    assert list(faults) == [0] and "record 0 (id 7): image" in faults[0]
    monkeypatch.setattr(preflight, "find_header_fault", None)
    assert find_broken_images(found, tmp_path, cache) == faults
    (tmp_path / "a.png").write_bytes(b"another image")
    with pytest.raises(TypeError):
        find_broken_images(found, tmp_path, cache)
