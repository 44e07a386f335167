"""Archives of others are unpacked inside one folder or not at all; what is there stays."""

import io
import os
import shutil
import stat
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

import llava.download.archive
from llava.download.archive import DamagedArchiveError, unpack
from llava.errors import InputError

FILES = {"images/1.jpg": b"first", "images/deep/2.jpg": b"second", "questions.json": b"{}"}


def write_zip(path: Path, files=FILES, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files=FILES, members=()) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in members:
            archive.addfile(info)
    return path


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(archive: Path, folder: Path) -> str:
    """Return the line that an archive is refused with; nothing is left behind, inside the folder or outside."""
    before = read_tree(archive.parent)
    with pytest.raises(InputError) as caught:
        unpack(archive, folder)
    assert read_tree(archive.parent) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("write", [write_zip, write_tar], ids=["zip", "tar"])
@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a"])
def test_every_file_arrives_whatever_the_archive_is_called(write, name, tmp_path):
    unpacked = unpack(write(tmp_path / name), tmp_path / "data")
    assert read_tree(tmp_path / "data") == FILES
    assert (unpacked.num_files, unpacked.kept) == (3, [])
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["images", "questions.json"]


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "images/../../evil", "..\\evil", "C:/evil", "C:evil", "images\\1.jpg"]
)
@pytest.mark.parametrize("write", [write_zip, write_tar], ids=["zip", "tar"])
def test_a_name_that_leads_out_is_refused_with_everything_else(write, name, tmp_path):
    assert "leads out of the folder" in refusal(write(tmp_path / "a", {**FILES, name: b"evil"}), tmp_path / "data")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_tar_with_a_link_or_a_device_is_refused(kind, tmp_path):
    info = tarfile.TarInfo("images/link")
    info.type, info.linkname = kind, "../../evil"
    assert "a link or a device" in refusal(write_tar(tmp_path / "a.tar", members=[info]), tmp_path / "data")


def test_a_zip_with_a_link_is_refused(tmp_path):
    info = zipfile.ZipInfo("images/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(write_zip(tmp_path / "a.zip"), "a") as archive:
        archive.writestr(info, "/etc")
    assert "a link or a device" in refusal(tmp_path / "a.zip", tmp_path / "data")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    bomb = {"zeros": bytes(50 * 2**20)}
    for archive in (
        write_zip(tmp_path / "a.zip", bomb, compression=zipfile.ZIP_DEFLATED),
        write_tar(tmp_path / "a.gz", bomb),
    ):
        assert "more than 200 times its size" in refusal(archive, tmp_path / "data")


def test_a_member_that_is_longer_than_announced_is_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"a": b"x" * 1000}, compression=zipfile.ZIP_DEFLATED)
    content = archive.read_bytes().replace((1000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    archive.write_bytes(content)
    assert "is damaged" in refusal(archive, tmp_path / "data")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_cut_archive_is_damaged(name, tmp_path):
    archive = (write_zip if name == "a.zip" else write_tar)(tmp_path / name, {"a": os.urandom(50_000)})
    archive.write_bytes(archive.read_bytes()[:30_000])
    with pytest.raises(DamagedArchiveError):
        unpack(archive, tmp_path / "data")
    assert read_tree(tmp_path / "data") == {}


def test_a_changed_byte_is_damage(tmp_path):
    archive = write_zip(tmp_path / "a.zip")
    archive.write_bytes(archive.read_bytes().replace(b"second", b"secind"))
    with pytest.raises(DamagedArchiveError, match="CRC"):
        unpack(archive, tmp_path / "data")
    assert read_tree(tmp_path / "data") == {}


@pytest.mark.parametrize("content", [b"", b"no archive", bytes(20_000)])
def test_what_is_no_archive_is_refused(content, tmp_path):
    (tmp_path / "a.zip").write_bytes(content)
    assert "a.zip" in refusal(tmp_path / "a.zip", tmp_path / "data")


@pytest.mark.parametrize("write", [write_zip, write_tar], ids=["zip", "tar"])
def test_only_what_is_wanted_is_unpacked(write, tmp_path):
    assert unpack(write(tmp_path / "a"), tmp_path / "data", ["*.json", "1.jpg"]).num_files == 2
    assert sorted(read_tree(tmp_path / "data")) == ["images/1.jpg", "questions.json"]
    with pytest.raises(InputError, match=r"no none\.json in this archive"):
        unpack(tmp_path / "a", tmp_path / "data", ["none.json"])


def test_what_macos_adds_is_left_out(tmp_path):
    extra = {"__MACOSX/images/._1.jpg": b"x", "images/.DS_Store": b"x"}
    assert unpack(write_zip(tmp_path / "a.zip", {**FILES, **extra}), tmp_path / "data").num_files == 3
    assert read_tree(tmp_path / "data") == FILES


def test_files_that_are_there_stay_and_the_different_ones_are_named(tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "images" / "1.jpg").write_bytes(b"my own, longer")
    (data / "questions.json").write_bytes(b"{}")
    unpacked = unpack(write_zip(tmp_path / "a.zip"), data)
    assert read_tree(data) == {**FILES, "images/1.jpg": b"my own, longer"}
    assert unpacked.kept == [data / "images" / "1.jpg"]


def test_an_empty_file_is_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions.json").touch()
    assert unpack(write_zip(tmp_path / "a.zip"), tmp_path / "data").kept == []
    assert read_tree(tmp_path / "data") == FILES


def test_an_interrupted_unpacking_is_redone_and_leaves_no_half_file(tmp_path, monkeypatch):
    archive, data = write_zip(tmp_path / "a.zip"), tmp_path / "data"
    plain, calls = llava.download.archive._write_member, []

    def stop_at_second(member, path, progress):
        calls.append(path)
        if len(calls) == 2:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"sec")
            raise KeyboardInterrupt
        plain(member, path, progress)

    with monkeypatch.context() as patch:
        patch.setattr(llava.download.archive, "_write_member", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            unpack(archive, data)
    assert read_tree(data) == {}
    # What a kill, which cleans nothing up, leaves.
    (data / ".a.zip.unpacking" / "images").mkdir(parents=True)
    (data / ".a.zip.unpacking" / "images" / "1.jpg").write_bytes(b"fir")
    unpack(archive, data)
    assert read_tree(data) == FILES


def test_too_little_room_is_said_with_the_figures(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    line = refusal(write_zip(tmp_path / "a.zip"), tmp_path / "data")
    assert "unpacking a.zip needs 13 bytes, and 10 bytes are free" in line


def test_a_folder_that_is_a_link_to_another_disk_is_filled(tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    target = other / f"llava-test-{os.getpid()}"
    target.mkdir()
    try:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "images").symlink_to(target)
        unpack(write_zip(tmp_path / "a.zip"), tmp_path / "data")
        assert read_tree(target) == {"1.jpg": b"first", "deep/2.jpg": b"second"}
    finally:
        shutil.rmtree(target)
