"""What is missing is planned, fetched, checked and noted; against a real server on this machine."""

import hashlib
import io
import json
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from filelock import FileLock

from llava.download.store import DataSet, Item, Plan, bring, describe_items
from llava.download.table import Download, Place, format_size
from llava.errors import InputError

IMAGES = {f"images/{number}.jpg": bytes([number]) * 100 for number in range(4)}


def make_zip(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # without the time of day
    return stream.getvalue()


def archive_of(address: str | None, **more) -> Download:
    return Download((Place("images/", 4),), "http://page", address, unpack_in="", **more)


class Try:
    """One call of `bring`, with what it says."""

    def __init__(self, root: Path, *data_sets: DataSet, **options: bool):
        self.lines: list[str] = []
        self.complete = bring(root, data_sets, self.lines.append, **options)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def read_manifest(root: Path) -> dict:
    return json.loads((root / ".downloads" / "manifest.json").read_text())


def test_an_archive_and_a_file_are_brought_and_noted(server, tmp_path):
    archive = server.serve("/images.zip", make_zip(IMAGES))
    labels = server.serve("/labels.json", b"[1]")
    home = tmp_path / "pope"
    downloads = (archive_of(archive), Download((Place("coco/labels.json"),), "http://page", labels))
    first = Try(tmp_path, DataSet("pope", home, downloads))
    assert first.complete and first.lines[-1] == "complete: pope"
    assert (home / "coco" / "labels.json").read_bytes() == b"[1]"
    assert {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*.jpg")} == IMAGES
    manifest = read_manifest(tmp_path)
    assert manifest[labels]["sha256"] == hashlib.sha256(b"[1]").hexdigest()
    assert manifest[archive]["size"] == len(server.files["/images.zip"].content)
    assert manifest[archive]["unpacked_in"] == [str(home)]
    assert sorted(path.name for path in (tmp_path / ".downloads").iterdir()) == ["lock", "manifest.json"]


def test_a_second_call_asks_no_server(server, tmp_path):
    data_set = DataSet("pope", tmp_path / "pope", (archive_of(server.serve("/images.zip", make_zip(IMAGES))),))
    Try(tmp_path, data_set)
    server.asked.clear()
    second = Try(tmp_path, data_set)
    assert second.complete and not server.asked and "  there: images/" in second.lines


def test_a_dry_run_only_says_the_sizes(server, tmp_path):
    address = server.serve("/images.zip", make_zip(IMAGES))
    told = Try(tmp_path, DataSet("pope", tmp_path / "pope", (archive_of(address, size=1_234_567),)), dry_run=True)
    assert not told.complete and not server.asked and not any(tmp_path.iterdir())
    assert f"  missing: images/, 1.2 MB, {address}" in told.lines
    assert "to fetch: 1 downloads, 1.2 MB; " in told.text


def test_a_size_that_nobody_has_published_is_the_servers(server, tmp_path):
    known = server.serve("/images.zip", bytes(2_500_000))
    gone = f"{server.address}/gone.zip"
    data_set = DataSet(
        "pope", tmp_path / "pope", (archive_of(known), archive_of(gone), archive_of("http://127.0.0.1:9/a"))
    )
    told = Try(tmp_path, data_set, dry_run=True)
    assert f"  missing: images/, 2.5 MB, {known}" in told.lines
    assert f"  missing: images/, size unknown, {gone}" in told.lines
    assert "to fetch: 3 downloads, 2.5 MB, and 2 of unknown size; " in told.text
    assert server.asked == [("/images.zip", "HEAD"), ("/gone.zip", "HEAD")]


def test_one_archive_of_two_data_sets_is_fetched_once_and_linked(server, tmp_path):
    address = server.serve("/val2014.zip", make_zip(IMAGES))
    both = [DataSet(name, tmp_path / name, (archive_of(address),)) for name in ("vqav2", "pope")]
    assert Try(tmp_path, *both).complete
    assert [how for _, how in server.asked] == ["HEAD", "HEAD", None]
    assert (tmp_path / "pope" / "images").is_symlink()
    assert (tmp_path / "pope" / "images" / "3.jpg").read_bytes() == IMAGES["images/3.jpg"]
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    assert (moved / "pope" / "images" / "3.jpg").is_file()


def test_a_link_whose_target_is_gone_is_filled_anew(server, tmp_path):
    address = server.serve("/val2014.zip", make_zip(IMAGES))
    both = [DataSet(name, tmp_path / name, (archive_of(address),)) for name in ("vqav2", "pope")]
    Try(tmp_path, *both)
    shutil.rmtree(tmp_path / "vqav2")
    assert Try(tmp_path, both[1]).complete
    assert not (tmp_path / "pope" / "images").is_symlink() and len(list((tmp_path / "pope" / "images").iterdir())) == 4


def test_half_a_folder_is_completed_and_what_is_there_stays(server, tmp_path):
    home = tmp_path / "pope"
    (home / "images").mkdir(parents=True)
    (home / "images" / "0.jpg").write_bytes(b"mine")
    told = Try(tmp_path, DataSet("pope", home, (archive_of(server.serve("/images.zip", make_zip(IMAGES))),)))
    assert told.complete
    assert (home / "images" / "0.jpg").read_bytes() == b"mine" and len(list((home / "images").iterdir())) == 4
    assert "1 were there with another size and stay, such as" in told.text


def test_an_archive_that_a_person_saves_is_unpacked_and_left_alone(tmp_path):
    data_set = DataSet("mme", tmp_path / "MME", (archive_of(None, by_hand="consent", archive="MME.zip"),))
    told = Try(tmp_path, data_set)
    assert not told.complete
    assert "by hand: MME.zip (images/) needs consent: see http://page and save it as" in told.text
    (tmp_path / "MME").mkdir()
    (tmp_path / "MME" / "MME.zip").write_bytes(make_zip(IMAGES))
    assert Try(tmp_path, data_set).complete
    assert (tmp_path / "MME" / "MME.zip").is_file()
    assert read_manifest(tmp_path)["MME.zip"]["sha256"] == hashlib.sha256(make_zip(IMAGES)).hexdigest()


def test_what_only_a_person_can_make_is_said_with_page_and_place(tmp_path):
    by_hand = Download((Place("frames/", 3),), "http://page", by_hand="the videos")
    told = Try(tmp_path, DataSet("seed", tmp_path / "seed", (by_hand,)))
    assert (
        f"  by hand: frames/ needs the videos: see http://page and put it at {tmp_path / 'seed' / 'frames'}"
        in told.lines
    )
    assert told.lines[-1] == "still missing: seed (1 of its downloads)"


def test_a_failure_does_not_keep_the_others_from_coming(server, tmp_path):
    downloads = (
        Download((Place("a.json"),), "http://page", f"{server.address}/none"),
        Download((Place("b.json"),), "http://page", server.serve("/b", b"{}")),
    )
    told = Try(tmp_path, DataSet("x", tmp_path / "x", downloads))
    assert not told.complete and (tmp_path / "x" / "b.json").is_file()
    assert "failed: a.json: " in told.text and "404 Not Found" in told.text
    assert told.lines[-1] == "still missing: x (1 of its downloads)"


def test_another_file_than_the_first_time_is_refused(server, tmp_path):
    data_set = DataSet("pope", tmp_path / "pope", (archive_of(server.serve("/images.zip", make_zip(IMAGES))),))
    Try(tmp_path, data_set)
    shutil.rmtree(tmp_path / "pope")
    server.files["/images.zip"].content = make_zip({**IMAGES, "images/new.jpg": b"new"})
    told = Try(tmp_path, data_set)
    assert not told.complete and "the first time it was another file" in told.text
    assert str(tmp_path / ".downloads" / "manifest.json") in told.text
    assert not (tmp_path / "pope").exists()


def test_an_archive_that_was_fetched_is_not_fetched_again_after_an_interrupted_unpacking(server, tmp_path, monkeypatch):
    data_set = DataSet("pope", tmp_path / "pope", (archive_of(server.serve("/images.zip", make_zip(IMAGES))),))
    with monkeypatch.context() as patch:
        patch.setattr("llava.download.archive._write_member", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Try(tmp_path, data_set)
    server.asked.clear()
    assert Try(tmp_path, data_set).complete and not server.asked


def test_an_archive_that_had_just_arrived_when_the_command_was_killed_is_noted_and_unpacked(server, tmp_path):
    images = archive_of(server.serve("/images.zip", make_zip(IMAGES)))
    (tmp_path / ".downloads").mkdir()
    (tmp_path / ".downloads" / images.archive_name).write_bytes(make_zip(IMAGES))
    assert Try(tmp_path, DataSet("pope", tmp_path / "pope", (images,))).complete and not server.asked
    assert read_manifest(tmp_path)[images.address]["sha256"] == hashlib.sha256(make_zip(IMAGES)).hexdigest()


def test_files_are_missing_until_the_last_of_an_archive_is_in_its_place(server, tmp_path, monkeypatch):
    moved = []

    def stop_at_second(source, target):
        moved.append(source.rename(target))
        if len(moved) == 2:
            raise KeyboardInterrupt

    images = Download((Place("images/"),), "http://page", server.serve("/images.zip", make_zip(IMAGES)), unpack_in="")
    data_set = DataSet("pope", tmp_path / "pope", (images,))
    (tmp_path / "pope" / "images").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("llava.download.archive._move", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            Try(tmp_path, data_set)
    assert len(list((tmp_path / "pope" / "images").iterdir())) == 2
    assert data_set.items[0].state == "missing"
    assert Try(tmp_path, data_set).complete
    assert len(list((tmp_path / "pope" / "images").iterdir())) == 4 and data_set.items[0].state == "there"


def test_a_damaged_archive_is_deleted_and_fetched_anew(server, tmp_path):
    good = make_zip(IMAGES)
    address = server.serve("/images.zip", good[:-30])
    data_set = DataSet("pope", tmp_path / "pope", (archive_of(address),))
    told = Try(tmp_path, data_set)
    assert "it is deleted, and the same command fetches it anew" in told.text
    assert not list((tmp_path / ".downloads").glob("*.zip"))


def test_an_archive_without_what_is_expected_is_named(server, tmp_path):
    address = server.serve("/images.zip", make_zip({"images/0.jpg": b"x"}))
    told = Try(tmp_path, DataSet("pope", tmp_path / "pope", (archive_of(address),)))
    assert "it came without images/, or with less in it than published" in told.text and not told.complete


def test_archives_are_kept_on_demand(server, tmp_path):
    data_set = DataSet("pope", tmp_path / "pope", (archive_of(server.serve("/images.zip", make_zip(IMAGES))),))
    Try(tmp_path, data_set, keep_archives=True)
    kept = list((tmp_path / ".downloads").glob("*images.zip"))
    assert [path.read_bytes() for path in kept] == [make_zip(IMAGES)]


def test_too_little_room_for_everything_is_said_before_anything_is_asked_for(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 0, 2_000_000_000))
    data_set = DataSet("gqa", tmp_path / "gqa", (archive_of(server.serve("/images.zip", b""), size=1_500_000_000),))
    with pytest.raises(InputError, match=r"needs 3\.0 GB, and 2\.0 GB are free"):
        Try(tmp_path, data_set)
    assert not server.asked


def test_two_commands_do_not_fetch_into_one_folder(server, tmp_path):
    (tmp_path / ".downloads").mkdir()
    data_set = DataSet("pope", tmp_path / "pope", (archive_of(server.serve("/images.zip", make_zip(IMAGES))),))
    with FileLock(tmp_path / ".downloads" / "lock"), pytest.raises(InputError, match="another command fetches"):
        Try(tmp_path, data_set)


def test_a_broken_manifest_is_named(server, tmp_path):
    (tmp_path / ".downloads").mkdir()
    (tmp_path / ".downloads" / "manifest.json").write_text("[]")
    data_set = DataSet("pope", tmp_path / "pope", (archive_of(server.serve("/images.zip", make_zip(IMAGES))),))
    with pytest.raises(InputError, match=r"manifest\.json is no manifest"):
        Try(tmp_path, data_set)


def test_a_plan_counts_each_address_once_and_the_largest_archive_twice(tmp_path):
    downloads = [archive_of("a", size=10), archive_of("a", size=10), archive_of("b", size=4), archive_of("c")]
    items = [Item(tmp_path, each) for each in downloads]
    assert Plan.of(items, tmp_path, keep_archives=False) == Plan(3, 14, 24, 1)
    assert Plan.of(items, tmp_path, keep_archives=True) == Plan(3, 14, 28, 1)


def test_what_has_arrived_already_needs_no_room_again(tmp_path):
    items = [Item(tmp_path, archive_of("http://host/a.zip", size=10)), Item(tmp_path, archive_of("b", size=4))]
    (tmp_path / f"{items[0].download.archive_name}.part").write_bytes(b"1234567")
    (tmp_path / items[1].download.archive_name).write_bytes(b"1234")
    assert Plan.of(items, tmp_path, keep_archives=False) == Plan(2, 14, 24 - 11, 0)


def test_many_files_of_a_folder_share_a_line(tmp_path):
    items = [Item(tmp_path, Download((Place(f"images/{number}.jpg"),), "http://page", "a")) for number in range(24)]
    assert list(describe_items(items)) == ["missing: 24 files in images, http://page"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "size unknown"), (12, "12 bytes"), (1500, "1.5 kB"), (7_072_297_970, "7.1 GB"), (181_000_000, "181.0 MB")],
)
def test_sizes_are_in_powers_of_a_thousand(size, text):
    assert format_size(size) == text
