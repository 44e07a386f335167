"""LLaVA's training data by command, against archives of the shapes world on a server of our own."""

import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from llava.download.table import Place
from llava.train import download
from llava.train.download import STAGES, check_stage
from llava.train.recipe import read_recipe
from playground.shapes.generate import write_train
from tests.eval.test_commands import run

NUM_IMAGES = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_train(folder, NUM_IMAGES, 1, seed=3)
    return folder


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def pack(world: Path, prefix: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in sorted((world / "images").iterdir()):
            archive.write(path, f"{prefix}{path.name}")
    return stream.getvalue()


@pytest.fixture
def published(world, server, monkeypatch) -> None:
    """Serve both stages: captions of images in folders, conversations about images of all data sets in turn."""
    captions = [{**row, "image": f"00000/{row['image']}"} for row in read(world / "pretrain.json")]
    folders = ["coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2"]
    talks = [
        {**row, "image": f"{folder}/{row['image']}"}
        for row, folder in zip(read(world / "pretrain.json"), folders, strict=True)
    ] + [{"id": "text", "conversations": []}]
    contents = {
        download.PRETRAIN_FILE: json.dumps(captions).encode(),
        download.FINETUNE_FILE: json.dumps(talks).encode(),
        "LLaVA-Pretrain/images/": pack(world, "00000/"),
        **{f"{folder}/": pack(world, f"{folder.split('/')[1]}/") for folder in folders},
    }
    for name, stage in STAGES.items():
        served = []
        for number, each in enumerate(stage.downloads):
            place = each.places[0]
            content = contents.get(place.path, contents.get(place.path.rpartition("/")[2]))
            count = NUM_IMAGES if place.is_folder else None
            address = server.serve(f"/{name}/{number}", content) if each.address else None
            served.append(replace(each, places=(replace(place, count=count),), address=address, size=None))
        size = len(captions) if name == "pretrain" else len(talks)
        monkeypatch.setitem(STAGES, name, replace(stage, num_records=size, downloads=tuple(served)))


def call(*arguments: object) -> tuple[int, str, str]:
    done = run(*arguments, module="llava.train.download")
    return done.returncode, done.stdout, done.stderr


def test_the_captions_and_their_images_arrive_and_are_complete(published, tmp_path):
    code, out, err = call("pretrain", "--root", tmp_path)
    assert (code, err) == (0, "") and out.endswith("complete: pretrain\n")
    code, out, _ = call("pretrain", "--root", tmp_path, "--check")
    assert (code, out) == (0, f"ok    pretrain: {NUM_IMAGES} records, {NUM_IMAGES} images, in {tmp_path}\n")


def test_what_a_person_has_to_fetch_is_said_and_missed(published, world, tmp_path):
    code, out, _ = call("all", "--root", tmp_path)
    assert code == 1 and out.endswith("still missing: finetune (1 of its downloads)\n")
    assert f"put it at {tmp_path / 'ocr_vqa' / 'images'}" in out
    code, out, _ = call("finetune", "--root", tmp_path, "--check")
    assert code == 1 and "FAULT finetune: 1 of 1 images in ocr_vqa are missing, such as " in out
    assert out.endswith("; python -m llava.train.download finetune\n")
    shutil.copytree(world / "images", tmp_path / "ocr_vqa" / "images")
    assert call("all", "--root", tmp_path)[0] == 0
    assert call("all", "--root", tmp_path, "--check")[0] == 0


def test_a_check_without_records_names_the_command(tmp_path):
    lines = list(map(str, check_stage("pretrain", tmp_path)))
    assert len(lines) == 1 and lines[0].endswith("python -m llava.train.download pretrain")


def test_other_numbers_and_damaged_images_are_faults(published, tmp_path, monkeypatch):
    call("pretrain", "--root", tmp_path)
    for path in (tmp_path / "LLaVA-Pretrain" / "images" / "00000").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    monkeypatch.setitem(STAGES, "pretrain", replace(STAGES["pretrain"], num_records=558_128))
    lines = list(map(str, check_stage("pretrain", tmp_path)))
    assert f"has {NUM_IMAGES} records instead of 558,128" in lines[0]
    assert len(lines) == 1 + NUM_IMAGES and "damaged or truncated" in lines[1]


def test_an_unknown_stage_is_refused_before_anything_is_written(tmp_path):
    assert call("vision", "--root", tmp_path / "new")[0] == 2
    assert not (tmp_path / "new").exists()


def test_the_default_place_is_the_one_of_the_training_scripts():
    root = Path(__file__).parents[2]
    assert download.find_data_root() == root / "playground" / "data"
    recipes = [read_recipe(root / "scripts/recipes" / name).settings for name in ("pretrain.yaml", "finetune.yaml")]
    for stage in STAGES.values():
        assert f"playground/data/{stage.records}" in [recipe["DATA"] for recipe in recipes]
        assert str(Path("playground/data", stage.images)) in [recipe["IMAGES"] for recipe in recipes]


def test_every_address_is_in_the_documents():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for stage in STAGES.values():
        for each in stage.downloads:
            assert isinstance(each.places[0], Place)
            address = each.address or each.page
            assert address in page or address.rpartition("/")[0] in page, address
