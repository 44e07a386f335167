"""Transfers resume, notice what has changed, and refuse what is not the file; against a real server on this machine."""

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from llava.download.transfer import ChecksumError, fetch
from llava.errors import InputError

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 400
OTHER = CONTENT[::-1]
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def lines() -> list[str]:
    return []


def refusal(address, path, **more) -> str:
    with pytest.raises(InputError) as caught:
        fetch(address, path, lambda line: None, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def faults(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("fetching ")]


def leave_part(server, path, content=CONTENT, length=1000, **behaviour) -> str:
    """Make a transfer end after some bytes; returns the address."""
    address = server.serve(f"/{path.name}", content, cuts=[length], statuses_after_cut=(503,) * 5, **behaviour)
    assert "in a row" in refusal(address, path)
    assert path.with_name(f"{path.name}.part").stat().st_size == length and not path.exists()
    server.asked.clear()
    return address


def test_a_file_arrives_with_its_size_and_checksum(server, tmp_path, lines):
    fetched = fetch(server.serve("/a.bin", CONTENT), tmp_path / "deep" / "a.bin", lines.append)
    assert (tmp_path / "deep" / "a.bin").read_bytes() == CONTENT
    assert (fetched.size, fetched.sha256) == (len(CONTENT), DIGEST)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.bin"] and lines == ["fetching a.bin, 102.4 kB"]


def test_a_cut_connection_goes_on_where_it_ended(server, tmp_path, lines):
    address = server.serve("/a.bin", CONTENT, cuts=[1000, 500])
    assert fetch(address, tmp_path / "a.bin", lines.append).sha256 == DIGEST
    assert server.asked == [("/a.bin", None), ("/a.bin", "bytes=1000-"), ("/a.bin", "bytes=1500-")]
    assert len(faults(lines)) == 2 and "the connection ended at 1.0 kB" in faults(lines)[0]


def test_a_later_call_goes_on_where_an_earlier_one_ended(server, tmp_path, lines):
    address = leave_part(server, tmp_path / "a.bin")
    assert fetch(address, tmp_path / "a.bin", lines.append).sha256 == DIGEST
    assert server.asked == [("/a.bin", "bytes=1000-")]
    assert lines == ["fetching a.bin, 102.4 kB, 1.0 kB of it are there"]


def test_a_server_that_cannot_go_on_sends_the_file_from_the_start(server, tmp_path, lines):
    address = leave_part(server, tmp_path / "a.bin", ranges=False)
    assert fetch(address, tmp_path / "a.bin", lines.append).sha256 == DIGEST
    assert "cannot go on in the middle" in faults(lines)[0]


def test_a_file_that_changed_in_between_is_fetched_anew(server, tmp_path, lines):
    address = leave_part(server, tmp_path / "a.bin")
    server.files["/a.bin"].content = OTHER
    fetch(address, tmp_path / "a.bin", lines.append)
    assert (tmp_path / "a.bin").read_bytes() == OTHER
    assert "the file has changed" in faults(lines)[0]
    assert len(server.asked) == 1, "the rest is asked for on condition that the file is the same"


def test_without_etag_another_size_shows_the_change(server, tmp_path, lines):
    address = leave_part(server, tmp_path / "a.bin", etag="")
    server.files["/a.bin"].content = OTHER + b"more"
    fetch(address, tmp_path / "a.bin", lines.append)
    assert (tmp_path / "a.bin").read_bytes() == OTHER + b"more"
    assert "the file has changed" in faults(lines)[0]


def test_a_file_that_is_shorter_now_is_fetched_anew(server, tmp_path, lines):
    address = leave_part(server, tmp_path / "a.bin", etag="")
    server.files["/a.bin"].content = OTHER[:500]
    fetch(address, tmp_path / "a.bin", lines.append)
    assert (tmp_path / "a.bin").read_bytes() == OTHER[:500]


def test_a_file_that_changes_all_the_time_is_given_up(server, tmp_path):
    versions = [bytes([number]) * 3000 + b"x" * number for number in range(20)]
    address = server.serve("/a.bin", CONTENT, etag="", cuts=[1000] * 20, after=versions)
    assert "changed, 4 times" in refusal(address, tmp_path / "a.bin")


def test_a_part_of_another_address_is_not_gone_on_with(server, tmp_path, lines):
    leave_part(server, tmp_path / "a.bin")
    fetch(server.serve("/b.bin", OTHER), tmp_path / "a.bin", lines.append)
    assert (tmp_path / "a.bin").read_bytes() == OTHER


def test_a_part_that_nothing_is_known_of_is_not_gone_on_with(server, tmp_path, lines):
    (tmp_path / "a.bin.part").write_bytes(OTHER[:1000])
    assert fetch(server.serve("/a.bin", CONTENT), tmp_path / "a.bin", lines.append).sha256 == DIGEST


def test_a_whole_part_needs_no_further_request(server, tmp_path, lines):
    address = leave_part(server, tmp_path / "a.bin")
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    assert fetch(address, tmp_path / "a.bin", lines.append).sha256 == DIGEST
    assert server.asked == []


def test_a_file_of_unannounced_length_arrives(server, tmp_path, lines):
    assert fetch(server.serve("/a.bin", CONTENT, length=False), tmp_path / "a.bin", lines.append).sha256 == DIGEST


def test_a_busy_server_is_asked_again(server, tmp_path, lines):
    address = server.serve("/a.bin", CONTENT, statuses=[503, 429, 500])
    assert fetch(address, tmp_path / "a.bin", lines.append).sha256 == DIGEST
    assert "503 Service Unavailable" in faults(lines)[0] and len(faults(lines)) == 3


def test_tries_that_bring_nothing_are_limited(server, tmp_path):
    line = refusal(server.serve("/a.bin", CONTENT, statuses=[503] * 20), tmp_path / "a.bin")
    assert "503 Service Unavailable, 5 times in a row" in line
    assert len(server.asked) == 5


def test_a_server_without_ranges_that_cuts_at_the_same_byte_is_given_up(server, tmp_path):
    address = server.serve("/a.bin", CONTENT, ranges=False, cuts=[1000] * 50)
    assert "5 times in a row" in refusal(address, tmp_path / "a.bin")
    assert len(server.asked) < 10


def test_a_missing_file_is_not_asked_for_twice(server, tmp_path):
    line = refusal(f"{server.address}/none.bin", tmp_path / "a.bin")
    assert "404 Not Found" in line and len(server.asked) == 1


def test_no_server_at_all_ends_in_one_line(server, tmp_path):
    line = refusal("http://127.0.0.1:9/a.bin", tmp_path / "a.bin")
    assert line.startswith("http://127.0.0.1:9/a.bin: Connection refused, 5 times")


def test_a_login_page_is_not_the_file(server, tmp_path):
    address = server.serve("/a.zip", b"<html>log in", kind="text/html; charset=utf-8")
    assert "web page instead of the file" in refusal(address, tmp_path / "a.zip")
    assert not any(tmp_path.iterdir())


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    line = refusal(server.serve("/a.bin", CONTENT), tmp_path / "a.bin", sha256="0" * 64)
    assert "0" * 64 in line and DIGEST in line
    assert not any(tmp_path.iterdir())


def test_the_checksum_that_the_hub_names_counts(server, tmp_path, lines):
    right, wrong = ({"X-Linked-Etag": f'"{digest}"'} for digest in (DIGEST, "1" * 64))
    fetch(server.serve("/a.bin", CONTENT, redirect_headers=right), tmp_path / "a.bin", lines.append)
    with pytest.raises(ChecksumError, match="the server names sha256 1111"):
        fetch(server.serve("/b.bin", CONTENT, redirect_headers=wrong), tmp_path / "b.bin", lines.append)
    assert not (tmp_path / "b.bin").exists()


def test_too_little_room_is_said_before_anything_arrives(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    line = refusal(server.serve("/a.bin", CONTENT), tmp_path / "a.bin")
    assert "needs 102.4 kB, and 5.0 kB are free" in line
    assert not list(tmp_path.glob("*.bin*.part"))


def test_a_disk_that_fills_up_keeps_what_has_arrived(server, tmp_path, lines, monkeypatch):
    address = server.serve("/a.bin", CONTENT)
    plain = Path.open

    def open_on_small_disk(path, *args, **options):
        file = plain(path, *args, **options)
        if path.suffix != ".part":
            return file
        write = file.write

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, chunk):
                write(chunk[:1000])
                raise OSError(errno.ENOSPC, "No space left on device")

        return Full()

    with monkeypatch.context() as small:
        small.setattr(Path, "open", open_on_small_disk)
        line = refusal(address, tmp_path / "a.bin")
    assert "is full: 1.0 kB of 102.4 kB are kept" in line
    server.asked.clear()
    assert fetch(address, tmp_path / "a.bin", lines.append).sha256 == DIGEST
    assert server.asked == [("/a.bin", "bytes=1000-")]


def test_ctrl_c_leaves_a_part_that_is_gone_on_with(server, tmp_path, lines):
    pause = threading.Event()
    address = server.serve("/a.bin", CONTENT, pause=pause)
    code = (
        "from pathlib import Path; from llava.download.transfer import fetch; from llava.errors import run_command; "
        f"run_command(lambda: fetch({address!r}, Path({str(tmp_path / 'a.bin')!r}), print))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "a.bin.part"
    while not (part.is_file() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    pause.set()
    assert process.wait(20) == 130 and process.stderr.read() == "interrupted\n"
    assert json.loads((tmp_path / "a.bin.part.json").read_text())["size"] == len(CONTENT)
    length = part.stat().st_size
    server.asked.clear()
    assert fetch(address, tmp_path / "a.bin", lines.append).sha256 == DIGEST
    assert server.asked == [("/a.bin", f"bytes={length}-")]
