"""The twelve benchmarks' tables of downloads, against archives of the shapes world on a server of our own."""

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava.download.inventory import count_records
from llava.download.table import Download, Place
from llava.eval.benchmark import Benchmark, Extent
from llava.eval.benchmarks import BENCHMARKS, find_benchmark
from llava.eval.data import check_task, choose_tasks, list_downloads, plan_data
from llava.eval.hub import MARKER_FILE
from playground.shapes.benchmark import FOLDERS
from playground.shapes.generate import write_eval
from tests.eval.test_commands import run
from tests.file_server import Server

NUM_PICTURES = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes world in the official layouts; no test changes it."""
    folder = tmp_path_factory.mktemp("world")
    write_eval(folder, NUM_PICTURES, seed=7)
    return folder


@pytest.fixture
def root(world: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(world, tmp_path / "eval")
    return tmp_path / "eval"


@pytest.fixture
def as_published(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the shapes world's numbers for those of the official files."""
    for name, (_, folder) in FOLDERS.items():
        task, home = BENCHMARKS[name], world / folder
        downloads = tuple(count_as_in(download, home) for download in task.downloads)
        monkeypatch.setattr(type(task), "downloads", tuple(each for each in downloads if each.places))
        split = task.split_in(home)
        questions = task.load(home)
        images = {image for question in questions for image in question.images}
        monkeypatch.setattr(type(task), "official", {**task.official, split: Extent(len(questions), len(images))})


def count_as_in(download: Download, home: Path) -> Download:
    """Give a download the numbers of a folder, and of LLaVA-Bench's single images those that are there."""
    places = []
    for place in download.places:
        path = home / place.path
        if place.is_folder and path.is_dir():
            places.append(replace(place, count=sum(each.is_file() for each in path.rglob("*"))))
        elif path.is_file():
            places.append(place if place.count is None else replace(place, count=count_records(path)))
        elif not download.address or "/images/" not in download.address:
            places.append(place)  # of another split
    return replace(download, places=tuple(places))


def pack(home: Path, download: Download) -> bytes:
    """Make the archive that a download is said to be, of what is in a folder."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for place in download.places:
            path = home / place.path
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                archive.write(file, file.relative_to(home / download.unpack_in))
    return stream.getvalue()


def serve_task(server: Server, task: Benchmark, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve what a benchmark's table names, and let the table name our addresses."""
    served = []
    for number, download in enumerate(task.downloads):
        file = home / download.places[0].path
        if download.address and file.exists():
            content = file.read_bytes() if download.unpack_in is None else pack(home, download)
            address = server.serve(f"/{task.name}/{number}", content)
            served.append(replace(download, address=address, size=len(content)))
        else:
            served.append(download)
    monkeypatch.setattr(type(task), "downloads", tuple(served))


def pack_eval_zip(world: Path, path: Path) -> None:
    """Make LLaVA's archive: the question files of all benchmarks, in their folders."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, (_, folder) in FOLDERS.items():
            for download in BENCHMARKS[name].downloads:
                for place in download.places if download.archive == "eval.zip" else ():
                    if (world / folder / place.path).is_file():
                        archive.write(world / folder / place.path, f"{folder}/{place.path}")


def call(*arguments: object) -> tuple[int, str, str]:
    """Run a command of `llava.eval`; returns exit code, standard output and standard error."""
    done = run(*arguments)
    return done.returncode, done.stdout, done.stderr


def findings(name: str, root: Path) -> Iterator[str]:
    return map(str, check_task(BENCHMARKS[name], root))


# ---------------------------------------------------------------------------------------------------------- download
@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "mme"])
def test_a_downloaded_benchmark_is_complete_and_asks_the_same(name, world, server, tmp_path, as_published, monkeypatch):
    task, folder, root = BENCHMARKS[name], FOLDERS[name][1], tmp_path / "data"
    serve_task(server, task, world / folder, monkeypatch)
    root.mkdir()
    pack_eval_zip(world, root / "eval.zip")
    code, out, err = call("download", name, "--root", root)
    assert (code, err) == (0, ""), out
    assert out.rstrip().endswith(f"complete: {name}")
    code, out, _ = call("check", name, "--root", root)
    assert code == 0 and out.startswith(f"ok    {name}: ") and out.endswith("1 of 1 benchmarks are complete\n")
    home = task.find_root(root)
    asked, original = task.load(home), task.load(world / folder)
    assert [question.prompt for question in asked] == [question.prompt for question in original]


def test_mme_is_unpacked_from_what_its_authors_send(world, tmp_path, as_published):
    root = tmp_path / "data"
    (root / "MME").mkdir(parents=True)
    pack_eval_zip(world, root / "eval.zip")
    code, out, _ = call("download", "mme", "--root", root)
    assert code == 1 and "needs its authors' consent" in out and out.endswith("mme (1 of its downloads)\n")
    (archive := root / "MME" / "MME_Benchmark_release_version.zip").write_bytes(
        pack(world / "MME", BENCHMARKS["mme"].downloads[1])
    )
    assert call("download", "mme", "--root", root)[0] == 0
    assert archive.is_file() and next(findings("mme", root)).startswith("ok ")


def test_data_from_the_hub_are_left_alone(root, tmp_path):
    (root / "pope" / MARKER_FILE).write_text(json.dumps({"coco": "lmms-lab/POPE"}))
    code, out, _ = call("download", "pope", "--root", root)
    assert (code, out) == (0, f"pope: {root / 'pope'} holds lmms-lab/POPE, from the hub\n")
    assert next(findings("pope", root)).startswith("ok    pope: coco: 78 questions, 6 images, from lmms-lab/POPE")


def test_the_hubs_split_does_not_stand_for_another_one(root):
    (root / "vqav2" / MARKER_FILE).write_text(json.dumps({"test-dev2015": "lmms-lab/VQAv2"}))
    planned, others = plan_data(choose_tasks(["vqav2"]), root)
    assert [each.name for each in planned] == ["vqav2"] and not others


def test_a_file_that_the_hub_wrote_is_missed(root):
    (root / "textvqa" / MARKER_FILE).write_text(json.dumps({"val": "lmms-lab/textvqa"}))
    assert next(findings("textvqa", root)).startswith("ok ")
    (root / "textvqa" / "TextVQA_0.5.1_val.json").unlink()
    assert next(findings("textvqa", root)).startswith("FAULT textvqa: no TextVQA_0.5.1_val.json; ")


def test_without_a_split_the_one_that_is_scored_here_is_planned(tmp_path):
    planned, _ = plan_data(choose_tasks(["vqav2"]), tmp_path)
    assert {name for each in planned[0].downloads for name in each.splits} == {"val2014"}
    planned, _ = plan_data(choose_tasks(["vqav2"], "test-dev"), tmp_path)
    assert any("test2015" in str(each.address) for each in planned[0].downloads)
    assert not any("val2014" in str(each.address) for each in planned[0].downloads)


def test_a_benchmark_of_the_users_own_names_no_downloads(tmp_path):
    (tmp_path / "colors.py").write_text(OWN)
    code, out, _ = call("download", str(tmp_path / "colors.py"), "--root", tmp_path)
    assert (code, out) == (0, "colors: its file names no downloads of this split\n")
    folder = tmp_path / "colors"
    assert findings_of(tmp_path) == [f"FAULT colors: nothing is there, no folder {folder}"]
    (folder / "images").mkdir(parents=True)
    (folder / "questions.jsonl").write_text('{"question_id": 1, "image": "1.png", "text": "x"}\n')
    assert findings_of(tmp_path) == [f"FAULT colors: 1 of 1 images are missing, such as {folder / 'images' / '1.png'}"]
    Image.new("RGB", (3, 3)).save(folder / "images" / "1.png")
    assert findings_of(tmp_path) == [f"ok    colors: all: 1 questions, 1 images, in {folder}"]


def findings_of(root: Path) -> list[str]:
    return list(map(str, check_task(find_benchmark(str(root / "colors.py")), root)))


OWN = """
from llava.eval.benchmark import Benchmark
from llava.eval.benchmarks._files import load_question_file

class Colors(Benchmark):
    "Colors."
    name, row, folders = "colors", "Colors", ("colors",)
    def load(self, root):
        return load_question_file(root / "questions.jsonl", root / "images")
    def score(self, answers, root, judge=None):
        return None
"""


# -------------------------------------------------------------------------------------------------------------- check
def test_all_twelve_complete_ones_are_one_line_each(root, as_published):
    code, out, err = call("check", "--root", root)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"ok    {name}" for name in BENCHMARKS]
    assert lines[-1] == "12 of 12 benchmarks are complete"


def test_what_is_missing_names_the_command_that_fetches_it(root, as_published):
    (root / "pope" / "coco" / "coco_pope_random.json").unlink()
    gone = next((root / "pope" / "val2014").iterdir())
    gone.unlink()
    shutil.rmtree(root / "MME")
    code, out, _ = call("check", "pope", "mme", "gqa", "--root", root)
    lines = out.splitlines()
    assert code == 1
    assert lines[0] == "FAULT pope: no coco/coco_pope_random.json; python -m llava.eval download pope"
    assert lines[1].startswith("FAULT mme: nothing is there") and lines[1].endswith("python -m llava.eval download mme")
    assert lines[2].startswith("ok    gqa: ") and lines[3] == "1 of 3 benchmarks are complete"


def test_missing_images_are_counted(root, as_published):
    for path in list((root / "gqa" / "data" / "images").iterdir())[:2]:
        path.unlink()
    assert next(findings("gqa", root)).startswith("FAULT gqa: 2 of 6 images are missing, such as ")


def test_other_numbers_than_the_official_ones_are_faults(root):
    number = len(BENCHMARKS["textvqa"].load(root / "textvqa"))
    assert [
        line.removesuffix("; delete it, then python -m llava.eval download textvqa")
        for line in findings("textvqa", root)
    ] == [
        f"FAULT textvqa: TextVQA_0.5.1_val.json has {number} records instead of 5,000",
        f"FAULT textvqa: {number} questions instead of 5,000, in their file",
        "FAULT textvqa: questions about 6 images instead of 3,166, in their file",
    ]


def test_a_damaged_image_is_found(root, as_published):
    for path in (root / "seed_bench" / "SEED-Bench-image").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    lines = list(findings("seed", root))
    assert len(lines) == NUM_PICTURES and all("damaged or truncated" in line for line in lines)


def test_a_damaged_image_inside_a_table_is_found(root, as_published):
    table = root / "mmbench" / "mmbench_dev_20230712.tsv"
    rows = table.read_text().splitlines()
    cells = rows[1].split("\t")
    cells[9] = cells[9][:200]
    table.write_text("\n".join([rows[0], "\t".join(cells), *rows[2:]]) + "\n")
    assert any("mmbench_dev_20230712.tsv row 1" in line for line in findings("mmbench", root))


def test_broken_records_are_counted(root, as_published):
    path = root / "mm-vet" / "llava-mm-vet.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(['{"question_id": 0}', *lines[1:]]) + "\n")
    assert 'FAULT mmvet: 1 broken records, such as 0: llava-mm-vet.jsonl line 1: "text" must be' in next(
        findings("mmvet", root)
    )


def test_labels_that_are_cut_off_are_named_with_their_line(root, as_published):
    path = root / "pope" / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text()[:-20])
    assert "coco_pope_random.json line 26 is not JSON" in next(findings("pope", root))


def test_a_split_that_is_there_alone_is_the_one_that_is_checked(root, monkeypatch):
    home = root / "vizwiz"
    (home / "val").rename(home / "test")
    (home / "val.json").unlink()
    images = sorted((home / "test").iterdir())
    lines = [{"question_id": number, "image": path.name, "text": "x"} for number, path in enumerate(images)]
    (home / "llava_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(type(BENCHMARKS["vizwiz"]), "official", {"test": Extent(NUM_PICTURES, NUM_PICTURES)})
    assert next(findings("vizwiz", root)).startswith(f"ok    vizwiz: test: {NUM_PICTURES} questions")


def test_of_nothing_the_default_split_is_missed(tmp_path):
    for name, folder in (("vqav2", "vqav2"), ("mmbench", "mmbench"), ("vizwiz", "vizwiz")):
        (tmp_path / folder).mkdir()
        default = next(split for each in BENCHMARKS[name].downloads for split in each.splits)
        lines = list(findings(name, tmp_path))
        assert lines and all(line.endswith(f"download {name} --split {default}") for line in lines)


# ------------------------------------------------------------------------------------------------------------- tables
def test_every_download_is_complete_in_itself():
    for task in BENCHMARKS.values():
        assert task.downloads and task.official
        for download in task.downloads:
            assert download.page.startswith("https://")
            assert bool(download.address) != bool(download.by_hand)
            assert download.address is None or download.address.startswith(
                ("https://", "http://images.cocodataset.org/")
            )
            assert all(isinstance(place, Place) and place.path and "\\" not in place.path for place in download.places)
            assert download.unpack_in is not None or len(download.places) == 1


def test_every_split_that_is_fetched_is_one_of_the_benchmark():
    for task in BENCHMARKS.values():
        for split in {name for download in task.downloads for name in download.splits}:
            assert list_downloads(task.with_split(split)) and split in task.official


def test_the_page_of_the_data_names_every_address():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for task in BENCHMARKS.values():
        for download in task.downloads:
            address = download.address or download.page
            assert address in page or address.rpartition("/")[0] in page, f"{task.name}: {address}"
