"""The hub's datasets against the local layout: same questions, prompts, pictures and scores.

No hub is reachable in tests: each dataset is rebuilt from the local files as small parquet files with its columns.
"""

import base64
import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image as PillowImage

from llava.errors import InputError
from llava.eval import hub
from llava.eval.benchmark import Benchmark, Question, row_key
from llava.eval.benchmarks import BENCHMARKS as ALL_BENCHMARKS
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks.gqa import list_steps, parse_cell
from llava.eval.hub import HubTable, Layout, guess_suffix, name_alternatives, read_rows, safe_name
from tests.eval.test_commands import run

ORACLE = Path(__file__).parents[1] / "golden" / "oracle"
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


def fetch_benchmark(benchmark: Benchmark, root: Path, dataset: str | None = None) -> None:
    split, form = benchmark.find_hub_form()
    hub.fetch(form, split, root, dataset)


def draw(name: str) -> bytes:
    """A small picture that no other name has."""
    stream = io.BytesIO()
    PillowImage.new("RGB", (3, 2), tuple(hashlib.sha256(name.encode()).digest()[:3])).save(stream, "PNG")
    return stream.getvalue()


def cell(name: str) -> dict:
    return {"bytes": draw(name), "path": None}


def write_parquet(path: Path, rows: list[dict]) -> None:
    """Write rows as the hub has them: pictures as bytes, with the library's own note that they are pictures."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    features = dict(data.features)
    if "image" in features:
        image = datasets.Image()
        features["image"] = datasets.List(image) if isinstance(rows[0]["image"], list) else image
    path.parent.mkdir(parents=True, exist_ok=True)
    data.cast(datasets.Features(features)).to_parquet(path)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def asked(record: dict) -> str:
    return record["text"].removesuffix(SHORT_ANSWER)


# One function per benchmark: from its local folder to a folder of parquet files. Some drop records that the hub's
# columns cannot express; they then rewrite the (copied) local folder accordingly.


def make_pope(local: Path, out: Path) -> None:
    for category in ("adversarial", "popular", "random"):
        labels = read_lines(local / "coco" / f"coco_pope_{category}.json")
        rows = [
            {
                "id": str(number),
                "question_id": str(label["question_id"]),
                "question": label["text"],
                "answer": label["label"],
                "image_source": label["image"].removesuffix(".jpg"),
                "image": cell(label["image"]),
                "category": category,
            }
            for number, label in enumerate(labels)
        ]
        write_parquet(out / "Full" / f"{category}-00000-of-00001.parquet", rows)


def make_gqa(local: Path, out: Path) -> None:
    annotations = read_json(local / "testdev_balanced_questions.json")
    asked_ids = [record["question_id"] for record in read_lines(local / "llava_gqa_testdev_balanced.jsonl")]
    rows = []
    for identity in [*asked_ids, *(identity for identity in annotations if identity not in asked_ids)]:
        record = annotations[identity]
        names = ("imageId", "question", "answer", "isBalanced", "fullAnswer", "semanticStr", "types", "semantic")
        rows.append(
            {
                "id": identity,
                **{name: record[name] for name in names},
                "groups": record["groups"],
                "entailed": str(record["entailed"]),
                "equivalent": str(record["equivalent"]),
            }
        )
    write_parquet(out / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    pictures = sorted({row["imageId"] for row in rows})
    rows = [{"id": name, "image": cell(f"{name}.jpg")} for name in pictures]
    write_parquet(out / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", rows)


def make_vqav2_row(question: dict, image: str) -> dict:
    return {
        "question_id": question["question_id"],
        "image_id": int(Path(image).stem.rsplit("_", 1)[-1]),
        "question": asked(question) if "text" in question else question["question"],
        "image": cell(image),
    }


def make_vqav2_val(local: Path, out: Path) -> None:
    annotations = {
        record["question_id"]: record
        for record in read_json(local / "v2_mscoco_val2014_annotations.json")["annotations"]
    }
    rows = [
        make_vqav2_row(question, question["image"])
        | {
            name: annotations[question["question_id"]][name]
            for name in ("question_type", "multiple_choice_answer", "answers", "answer_type")
        }
        for question in read_lines(local / "llava_vqav2_mscoco_val2014.jsonl")
    ]
    write_parquet(out / "data" / "validation-00000-of-00001.parquet", rows)


def make_vqav2_test(local: Path, out: Path) -> None:
    for split, name in (("testdev", "test-dev2015"), ("test", "test2015")):
        questions = read_lines(local / f"llava_vqav2_mscoco_{name}.jsonl")
        rows = [make_vqav2_row(question, question["image"]) for question in questions]
        write_parquet(out / "data" / f"{split}-00000-of-00001.parquet", rows)


def make_vizwiz(local: Path, out: Path) -> None:
    rows = [
        {
            "question_id": record["image"],
            "image": cell(record["image"]),
            "question": record["question"],
            "answers": [answer["answer"] for answer in record["answers"]],
            "category": record["answer_type"],
        }
        for record in read_json(local / "val.json")
    ]
    write_parquet(out / "data" / "val-00000-of-00001.parquet", rows)


def make_sqa(local: Path, out: Path) -> None:
    problems = read_json(local / "problems.json")
    questions = [record for record in read_json(local / "llava_test_CQM-A.json") if "image" in record]
    (local / "llava_test_CQM-A.json").write_text(json.dumps(questions))
    kept = [record["id"] for record in questions]
    (local / "pid_splits.json").write_text(json.dumps({"test": kept}))
    names = ("question", "choices", "answer", "hint", "task", "grade", "subject", "topic", "category", "skill")
    rows = [
        {**{name: problems[record["id"]][name] for name in names}, "image": cell(record["image"])}
        for record in questions
    ]
    write_parquet(out / "ScienceQA-IMG" / "test-00000-of-00001.parquet", rows)


OCR_START = "Reference OCR token: "


def make_textvqa(local: Path, out: Path) -> None:
    data = read_json(local / "TextVQA_0.5.1_val.json")
    questions = [
        record
        for record in read_lines(local / "llava_textvqa_val_v051_ocr.jsonl")
        if len(record["text"].split("\n")) == 3 and record["text"].split("\n")[1].startswith(OCR_START)
    ]
    annotations = {(record["image_id"], record["question"].lower()): record for record in data["data"]}
    rows, kept = [], []
    for record in questions:
        question, tokens, _ = record["text"].split("\n")
        annotation = annotations[record["question_id"], question.lower()]
        if annotation["question"].capitalize() != question:
            continue
        kept.append(record)
        tokens = tokens.removeprefix(OCR_START)
        rows.append({**annotation, "image": cell(record["image"]), "ocr_tokens": tokens.split(", ") if tokens else []})
    assert len(rows) > 60
    text = "".join(json.dumps(record) + "\n" for record in kept)
    (local / "llava_textvqa_val_v051_ocr.jsonl").write_text(text)
    write_parquet(out / "data" / "validation-00000-of-00001.parquet", rows)


def make_mme(local: Path, out: Path) -> None:
    labels = {}
    for path in (local / "MME_Benchmark_release_version").rglob("*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            question, answer = line.rstrip("\n").split("\t")[:2]
            labels[path.stem, question.replace("  Please", " Please")] = (question, answer)
    rows = []
    for record in read_lines(local / "llava_mme.jsonl"):
        key = (Path(record["image"]).stem, f"{asked(record)} Please answer yes or no.")
        question, answer = labels[key]
        rows.append(
            {
                "question_id": record["question_id"],
                "image": cell(record["image"].rsplit("/", 1)[-1]),
                "question": question,
                "answer": answer,
                "category": record["category"],
            }
        )
    write_parquet(out / "data" / "test-00000-of-00001.parquet", rows)


def make_mmbench(local: Path, out: Path) -> None:
    (path,) = (path for path in local.glob("*.tsv") if "base_rows" not in path.name)
    with path.open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file, delimiter="\t"))
    rows = []
    for record in records:
        record = {name: value or None for name, value in record.items()}
        image = record["image"]
        rows.append(
            {
                **record,
                "hint": record["hint"] or "nan",
                "index": int(record["index"]),
                "image": {"bytes": base64.b64decode(image), "path": None},
                "L2-category": record.pop("l2-category"),
            }
        )
        rows[-1].pop("l2-category")
    folder = "cn" if "_cn_" in path.name else "data"
    write_parquet(out / folder / "dev-00000-of-00001.parquet", rows)


def make_seed(local: Path, out: Path) -> None:
    annotations = {record["question_id"]: record for record in read_json(local / "SEED-Bench.json")["questions"]}
    rows = []
    for record in read_lines(local / "llava-seed-bench.jsonl"):
        name = record["image"].rsplit("/", 1)[-1]
        annotation = dict(annotations[str(record["question_id"])])
        annotation.setdefault("segment", None)
        is_video = annotation["data_type"] == "video"
        frames = ["before", name, "after"] if is_video else [name]
        rows.append({**annotation, "image": [cell(frame) for frame in frames]})
    write_parquet(out / "data" / "test-00000-of-00001.parquet", rows)


def make_llavabench(local: Path, out: Path) -> None:
    contexts = read_lines(local / "context.jsonl")
    for record in contexts:
        # A caption may be a list of lines in the local file; the hub has text.
        record["caption"] = record["caption"] if isinstance(record["caption"], str) else "\n".join(record["caption"])
    (local / "context.jsonl").write_text("".join(json.dumps(record) + "\n" for record in contexts))
    captions = {record["image"]: record["caption"] for record in contexts}
    references = {record["question_id"]: record["text"] for record in read_lines(local / "answers_gpt4.jsonl")}
    rows = [
        {
            "question_id": record["question_id"],
            "image": cell(record["image"]),
            "question": record["text"],
            "caption": captions[record["image"]],
            "gpt_answer": references[record["question_id"]],
            "category": record["category"],
        }
        for record in read_lines(local / "questions.jsonl")
    ]
    write_parquet(out / "data" / "train-00000-of-00001.parquet", rows)


def make_mmvet(local: Path, out: Path) -> None:
    rows = [
        {
            "question_id": key,
            "image": cell(record["imagename"]),
            "question": record["question"],
            "answer": record["answer"],
            "image_source": record["imagesource"],
            "capability": ",".join(record["capability"]),
        }
        for key, record in read_json(local / "mm-vet.json").items()
    ]
    write_parquet(out / "data" / "test-00000-of-00001.parquet", rows)


Make = Callable[[Path, Path], None]
BENCHMARKS: dict[str, tuple[str, str | None, str, Make]] = {
    "pope": ("pope", None, "pope", make_pope),
    "gqa": ("gqa", None, "gqa", make_gqa),
    "vqav2": ("vqav2", "val2014", "vqav2", make_vqav2_val),
    "vizwiz": ("vizwiz", "val", "vizwiz", make_vizwiz),
    "sqa": ("sqa", None, "scienceqa", make_sqa),
    "textvqa": ("textvqa", None, "textvqa", make_textvqa),
    "mme": ("mme", None, "mme", make_mme),
    "mmbench": ("mmbench", None, "mmbench", make_mmbench),
    "mmbench_cn": ("mmbench_cn", None, "mmbench_cn", make_mmbench),
    "seed": ("seed", None, "seed_bench", make_seed),
    "llavabench": ("llavabench", None, "llava_bench_in_the_wild", make_llavabench),
    "mmvet": ("mmvet", None, "mm_vet", make_mmvet),
}
"""Word, split, folder of the local data, how to make the dataset."""


def prepare(name: str, tmp_path: Path) -> tuple[Benchmark, Path, Path]:
    """Return the benchmark, a copy of its local folder, and the folder of the dataset."""
    word, split, folder, make = BENCHMARKS[name]
    task = find_benchmark(word) if split is None else find_benchmark(word).with_split(split)
    local, dataset = tmp_path / "local", tmp_path / "dataset"
    shutil.copytree(ORACLE / folder, local)
    make(local, dataset)
    return task, local, dataset


def picture_of(question: Question) -> bytes | None:
    """The bytes of a question's one picture."""
    if not question.images:
        return None
    (picture,) = question.images
    return picture.read_bytes() if isinstance(picture, Path) else picture.content


def name_picture(name: str, path: Path) -> str:
    """What the dataset's maker drew for a local picture: ScienceQA's are all called image.png, in folders."""
    return f"{path.parent.name}/{path.name}" if name == "sqa" else path.name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hubs_questions_prompts_and_pictures_are_those_of_the_local_layout(name: str, tmp_path: Path) -> None:
    task, local, dataset = prepare(name, tmp_path)
    fetch_benchmark(task, tmp_path / "hub", str(dataset))
    ours, theirs = task.load(local), task.load(tmp_path / "hub")
    assert len(ours) == len(theirs) > 20
    for own, other in zip(ours, theirs, strict=True):
        assert (other.prompt, other.query, other.category) == (own.prompt, own.query, own.category)
        assert (other.record, dict(other.fields), other.fault) == (own.record, dict(own.fields), own.fault)
        if own.images:
            (picture,) = own.images
            expected = draw(name_picture(name, picture)) if isinstance(picture, Path) else picture.content
            assert picture_of(other) == expected
    if name not in ("sqa", "pope"):
        assert [other.id for other in theirs] == [own.id for own in ours]


def answer_both(task: Benchmark, local: Path, other: Path, answers_file: Path) -> list[dict]:
    """Give the answers to the local questions to those of the hub, too; return both by key."""
    ours, theirs = task.load(local), task.load(other)
    rows = {row_key(row, task.key_fields): row for row in read_lines(answers_file)}
    both: list[dict] = [{}, {}]
    for own, hubs in zip(ours, theirs, strict=True):
        row = rows.get(row_key(own.head(), task.key_fields))
        if row is not None:
            both[0][row_key(own.head(), task.key_fields)] = row
            both[1][row_key(hubs.head(), task.key_fields)] = {**row, **hubs.head()}
    return both


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in ("llavabench", "mmvet")])
def test_answers_score_the_same_on_the_hubs_data(name: str, tmp_path: Path) -> None:
    task, local, dataset = prepare(name, tmp_path)
    fetch_benchmark(task, tmp_path / "hub", str(dataset))
    ours, theirs = answer_both(task, local, tmp_path / "hub", local / "answers.jsonl")
    own, other = task.score(ours, local), task.score(theirs, tmp_path / "hub")
    assert own.count == other.count > 20
    assert other.headline == pytest.approx(own.headline, abs=1e-9)
    assert other.columns == pytest.approx(own.columns)


def test_vqav2_test_dev_asks_test_dev_and_uploads_all_of_test(tmp_path: Path) -> None:
    local, dataset, root = tmp_path / "local", tmp_path / "dataset", tmp_path / "hub"
    shutil.copytree(ORACLE / "vqav2", local)
    make_vqav2_test(local, dataset)
    task = find_benchmark("vqav2").with_split("test-dev2015")
    fetch_benchmark(task, root, str(dataset))
    ours, theirs = task.load(local), task.load(root)
    assert [(each.id, each.prompt) for each in theirs] == [(each.id, each.prompt) for each in ours]
    assert all(picture_of(each) == draw(own.images[0].name) for each, own in zip(theirs, ours, strict=True))
    answers = answer_both(task, local, root, local / "answers_testdev.jsonl")[1]
    (tmp_path / "out").mkdir()
    (file,) = task.export(answers, root, tmp_path / "out")
    assert read_json(file) == read_json(local / "expected_upload_testdev.json")


def test_llava_bench_has_its_contexts_and_references(tmp_path: Path) -> None:
    task, local, dataset = prepare("llavabench", tmp_path)
    fetch_benchmark(task, tmp_path / "hub", str(dataset))
    for name, columns in (
        ("context.jsonl", ("caption",)),
        ("answers_gpt4.jsonl", ("question_id", "prompt", "text")),
        ("questions.jsonl", ("question_id", "category", "text")),
    ):
        ours, theirs = read_lines(local / name), read_lines(tmp_path / "hub" / name)
        assert [[row[column] for column in columns] for row in theirs] == [
            [row[column] for column in columns] for row in ours
        ]


def test_mmvet_has_its_answers_and_capabilities(tmp_path: Path) -> None:
    task, local, dataset = prepare("mmvet", tmp_path)
    fetch_benchmark(task, tmp_path / "hub", str(dataset))
    ours, theirs = read_json(local / "mm-vet.json"), read_json(tmp_path / "hub" / "mm-vet.json")
    for record in (*ours.values(), *theirs.values()):
        record.pop("imagename")
    assert theirs == ours


def test_every_hub_form_is_tried_here() -> None:
    assert set(BENCHMARKS) == {name for name, benchmark in ALL_BENCHMARKS.items() if benchmark.hub}


# The folder's life: written once, whole or not at all, never over other data.


@pytest.fixture
def pope(tmp_path: Path) -> tuple[Benchmark, Path, Path]:
    """The benchmark, its folder to be, the folder of its dataset."""
    make_pope(ORACLE / "pope", tmp_path / "dataset")
    return find_benchmark("pope"), tmp_path / "root", tmp_path / "dataset"


def test_a_second_call_reads_nothing(pope: tuple[Benchmark, Path, Path]) -> None:
    task, root, dataset = pope
    fetch_benchmark(task, root, str(dataset))
    shutil.rmtree(dataset)
    fetch_benchmark(task, root, str(dataset))
    assert not (root / hub.PARTIAL_FOLDER).exists()


def test_a_call_that_is_cut_off_leaves_no_questions_and_the_next_keeps_its_pictures(
    pope: tuple[Benchmark, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, root, dataset = pope
    saved: list[str] = []
    save = Layout.save_image

    def save_some(layout: Layout, name: str, picture: object) -> None:
        if len(saved) == 10:
            raise KeyboardInterrupt
        save(layout, name, picture)
        saved.append(name)

    monkeypatch.setattr(Layout, "save_image", save_some)
    with pytest.raises(KeyboardInterrupt):
        fetch_benchmark(task, root, str(dataset))
    assert not (root / "llava_pope_test.jsonl").exists()
    written = []
    monkeypatch.setattr(Layout, "save_image", save)
    write = hub.write_bytes
    monkeypatch.setattr(hub, "write_bytes", lambda path, content: (written.append(path), write(path, content))[1])
    fetch_benchmark(task, root, str(dataset))
    names = {str(path.relative_to(root / hub.PARTIAL_FOLDER / "coco")) for path in written}
    assert names
    assert not set(saved) & names
    assert len(task.load(root)) == 176


def test_a_call_that_is_cut_off_while_moving_is_finished_by_the_next(
    pope: tuple[Benchmark, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, root, dataset = pope
    publish = hub._publish

    def publish_half(partial: Path, root: Path, files: tuple[str, ...]) -> None:
        for path in sorted((partial / "val2014").iterdir())[:5]:
            (root / "val2014").mkdir(exist_ok=True)
            path.replace(root / "val2014" / path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_publish", publish_half)
    with pytest.raises(KeyboardInterrupt):
        fetch_benchmark(task, root, str(dataset))
    monkeypatch.setattr(hub, "_publish", publish)
    shutil.rmtree(dataset)
    fetch_benchmark(task, root, str(dataset))
    assert all(picture.exists() for question in task.load(root) for picture in question.images)


def test_other_data_is_never_overwritten(pope: tuple[Benchmark, Path, Path]) -> None:
    task, root, dataset = pope
    root.mkdir()
    (root / "llava_pope_test.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match=r"llava_pope_test.jsonl is there already and is not from the hub"):
        fetch_benchmark(task, root, str(dataset))
    assert (root / "llava_pope_test.jsonl").read_text() == "mine\n"
    (root / "llava_pope_test.jsonl").unlink()
    fetch_benchmark(task, root, str(dataset))
    with pytest.raises(InputError, match="already; name another --root for someone/POPE"):
        fetch_benchmark(task, root, "someone/POPE")


def test_a_row_without_picture_keeps_its_question(pope: tuple[Benchmark, Path, Path]) -> None:
    task, root, dataset = pope
    path = dataset / "Full" / "popular-00000-of-00001.parquet"
    rows = list(read_rows(str(dataset), HubTable("popular", (), config="Full")))
    write_parquet(path, [{**rows[0], "image": cell("x"), "image_source": "lost"}, *rows[1:]])
    rows[0] = {**rows[0], "image_source": "lost", "image": None}
    write_parquet(path, rows[1:] + rows[:1])
    fetch_benchmark(task, root, str(dataset))
    questions = task.load(root)
    assert len(questions) == 176
    assert [question.images[0].name for question in questions if not question.images[0].exists()] == ["lost.jpg"]


def test_what_a_dataset_lacks_is_named(pope: tuple[Benchmark, Path, Path], tmp_path: Path) -> None:
    task, root, dataset = pope
    path = dataset / "Full" / "adversarial-00000-of-00001.parquet"
    write_parquet(path, [{"question_id": "1", "image": cell("x"), "text": "?"}])
    with pytest.raises(InputError, match="has no column question, answer, image_source; it has question_id, image"):
        fetch_benchmark(task, root, str(dataset))
    path.unlink()
    with pytest.raises(InputError, match=r"has no Full/adversarial-\*.parquet \(config Full, split adversarial\)"):
        fetch_benchmark(task, root, str(dataset))
    path.write_bytes(b"no parquet")
    with pytest.raises(InputError, match="cannot be read"):
        fetch_benchmark(task, root, str(dataset))
    assert not (root / hub.MARKER_FILE).exists()


def test_without_network_one_line_says_so(pope: tuple[Benchmark, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, **_: object) -> None:
        raise ConnectionError(f"could not reach {path}\nand more")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(InputError, match=r"lmms-lab/POPE \(config Full, split adversarial\) cannot be read: Conn") as e:
        fetch_benchmark(pope[0], pope[1])
    assert "\n" not in str(e.value)


def test_the_organisations_new_name_is_tried_too() -> None:
    assert name_alternatives("lmms-lab/POPE") == ["lmms-lab/POPE", "lmms-lab-encoder/POPE"]
    assert name_alternatives("me/POPE") == ["me/POPE"]


def test_splits_live_side_by_side(tmp_path: Path) -> None:
    task, local, dataset = prepare("vqav2", tmp_path)
    make_vqav2_test(local, dataset)
    root = tmp_path / "hub"
    fetch_benchmark(task, root, str(dataset))
    fetch_benchmark(find_benchmark("vqav2").with_split("test-dev2015"), root, str(dataset))
    assert set(read_json(root / hub.MARKER_FILE)) == {"val2014", "test-dev2015"}
    with pytest.raises(InputError, match="vqav2: no hub dataset of split test2015; known: test-dev2015, val2014"):
        fetch_benchmark(find_benchmark("vqav2").with_split("test2015"), root, str(dataset))


def test_the_commands_read_the_hub_and_go_on_as_with_local_data(pope: tuple[Benchmark, Path, Path]) -> None:
    _, root, dataset = pope
    fixed = ["score", "pope", "--answers", ORACLE / "pope" / "answers.jsonl", "--root", root]
    first = run(*fixed, "--source", "hub", "--hub-dataset", dataset)
    assert (first.returncode, first.stdout) == (0, "POPE (Avg. F1)\t60.60\n")
    assert run(*fixed).stdout == first.stdout
    lonely = run(*fixed, "--hub-dataset", dataset)
    assert (lonely.returncode, lonely.stderr) == (2, "error: --hub-dataset goes with --source hub\n")


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a\\b"])
def test_names_that_lead_out_of_the_folder_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not a file name"):
        safe_name(name, "here")


def test_a_pictures_suffix_comes_from_its_bytes() -> None:
    assert guess_suffix(cell("x")) == ".png"
    assert guess_suffix(b"\xff\xd8\xff") == ".jpg"
    assert guess_suffix(None) == ".jpg"


def test_gqa_reads_lists_and_records_in_each_form() -> None:
    assert parse_cell("['1', '2']") == parse_cell('["1", "2"]') == ["1", "2"]
    assert parse_cell("no list") is None
    steps = [{"operation": "select", "argument": "x", "dependencies": []}]
    assert list_steps(steps) == list_steps({"operation": ["select"], "argument": ["x"], "dependencies": [[]]}) == steps
    assert list_steps(None) == []
