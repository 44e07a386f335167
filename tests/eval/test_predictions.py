"""The answers file, and the run on disk with real processes, real kills and real files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.benchmark import Question, Row
from llava.eval.predictions import (
    ANSWER_ID_ALPHABET,
    PredictionStore,
    make_answer_id,
    make_row,
    name_questions,
    pair_answers,
    parse_rows,
    read_answers,
)
from llava.files import FileError, write_jsonl


def dump_line(row: Row) -> str:
    return json.dumps(row) + "\n"


QUESTION = Question(id="7", prompt="Is it?\nAnswer.", query="Is it?", images=(Path("a.jpg"),))


def test_a_row_has_the_published_columns_in_the_published_order() -> None:
    row = make_row(QUESTION, "Yes", "llava", {"num_tokens": 4})
    assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (row["question_id"], row["prompt"], row["text"]) == ("7", "Is it?\nAnswer.", "Yes")
    assert row["metadata"] == {"num_tokens": 4}


def test_a_benchmark_may_record_another_prompt_and_add_columns() -> None:
    question = Question(id=7, prompt="Is it?\nAnswer.", record="Is it?", fields={"round_id": 2, "options": ["a"]})
    row = make_row(question, "A", "llava", {})
    assert (row["prompt"], row["round_id"], row["options"]) == ("Is it?", 2, ["a"])


def test_answer_ids_look_like_the_published_ones_and_never_change() -> None:
    identity = make_answer_id("llava", QUESTION)
    assert len(identity) == 22
    assert set(identity) <= set(ANSWER_ID_ALPHABET)
    assert identity == make_answer_id("llava", QUESTION) == "js2CTDUVDf7JQYmMhctpSF"
    assert identity != make_answer_id("llava-2", QUESTION)
    assert identity != make_answer_id("llava", Question(id=7, prompt=QUESTION.prompt))


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_ignored(cut: int) -> None:
    row = make_row(QUESTION, "Yes\nand “no”", "llava", {})
    content = (dump_line(row) * 2).encode()
    assert parse_rows(content, "x") == [row, row]
    assert parse_rows(content[:-1], "x") == [row, row]
    assert parse_rows(content[: -1 - cut], "x") == [row]


@pytest.mark.parametrize("line", ["{", "[]", '{"question_id": 1}', '{"text": "a"}', '{"question_id": 1, "text": null}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    row = make_row(QUESTION, "Yes", "llava", {})
    file = tmp_path / "answers.jsonl"
    file.write_text(f"{dump_line(row)}{line}\n{dump_line(row)}")
    with pytest.raises(InputError, match=r"answers.jsonl line 2 is not"):
        read_answers(file)


def test_a_missing_answers_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file: .*answers.jsonl; `python -m llava.eval answer` makes it"):
        read_answers(tmp_path / "answers.jsonl")


def test_writing_leaves_no_half_file_behind(tmp_path: Path) -> None:
    file = tmp_path / "new" / "answers.jsonl"
    rows = [make_row(QUESTION, "Yes", "llava", {})]
    write_jsonl(file, rows)

    def failing() -> object:
        yield rows[0]
        raise OSError("disk full")

    with pytest.raises(FileError, match="disk full"):
        write_jsonl(file, failing())
    assert read_answers(file) == rows


def test_equal_answers_to_one_question_count_once() -> None:
    row = make_row(QUESTION, "Yes", "llava", {})
    assert len(pair_answers([QUESTION], [row, row], ("question_id",))) == 1


def test_questions_that_share_an_id_are_told_apart_by_their_prompt() -> None:
    questions = [Question(id="a", prompt="One?"), Question(id="a", prompt="Two?")]
    rows = [make_row(question, question.prompt, "llava", {}) for question in questions]
    paired = pair_answers(questions, reversed(rows), ("question_id", "prompt"))
    assert sorted(row["text"] for row in paired.values()) == ["One?", "Two?"]


def test_many_questions_are_named_by_the_first_few() -> None:
    questions = [Question(id=number) for number in range(9)]
    assert name_questions(questions[:2]) == "0, 1"
    assert name_questions(questions) == "0, 1, 2, 3, 4 and 4 more"


WORKER = """
import sys, time
from pathlib import Path
from llava.eval.predictions import make_row
from llava.eval.predictions import PredictionStore
from llava.eval.benchmark import Question, row_key

path, worker, seconds, model = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
repeats, key_fields = int(sys.argv[5]), sys.argv[6].split(",")
questions = [Question(id=number // repeats, prompt=f"What is {number}?") for number in range(60)]
store = PredictionStore(path, key_fields, worker)
store.open({"model": model})
print("open", flush=True)
for unit in range(20):
    if store.claim(unit):
        store.refresh()
        todo = [q for q in questions[3 * unit : 3 * unit + 3] if row_key(q.head(), key_fields) not in store.done]
        if todo:
            time.sleep(seconds)
            store.append([make_row(q, f"{q.prompt} by {model}", model, {}) for q in todo])
missing = store.finish(questions, questions)
print("none" if missing is None else len(missing), flush=True)
"""
QUESTIONS = [Question(id=number, prompt=f"What is {number}?") for number in range(60)]
KEY = ("question_id",)


UNIQUE = (1, "question_id")
"""Every question has its own id."""
REPEATED = (3, "question_id,prompt")
"""Three questions share an id, as those on one image do in TextVQA and MME; the prompt tells them apart."""


def start(
    path: Path,
    worker: int = 0,
    seconds: float = 0.0,
    model: str = "a",
    ids: tuple[int, str] = UNIQUE,
    code: str = WORKER,
) -> subprocess.Popen:
    command = [sys.executable, "-c", code, str(path), str(worker), str(seconds), model, *map(str, ids)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(file: Path) -> str:
    """Return the code by which a worker waits until a file is there."""
    return f"while not Path({str(file)!r}).exists(): time.sleep(0.01)"


def finish(process: subprocess.Popen) -> str:
    """Return the last printed word; fail with the worker's traceback."""
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out.split()[-1]


@pytest.fixture
def undisturbed(tmp_path: Path) -> bytes:
    path = tmp_path / "undisturbed" / "answers.jsonl"
    assert finish(start(path)) == "0"
    return path.read_bytes()


def test_a_finished_run_leaves_the_answers_and_what_they_belong_to(tmp_path: Path) -> None:
    path = tmp_path / "run" / "answers.jsonl"
    assert finish(start(path)) == "0"
    assert [row["question_id"] for row in read_answers(path)] == list(range(60))
    assert sorted(file.name for file in path.parent.iterdir()) == [
        ".answers.jsonl.lock",
        "answers.jsonl",
        "answers.jsonl.run.json",
    ]


def test_twenty_kills_and_resumes_of_one_worker_give_the_undisturbed_file(tmp_path: Path, undisturbed: bytes) -> None:
    path, dice = tmp_path / "answers.jsonl", random.Random(1)
    for _ in range(20):
        process = start(path, seconds=0.02)
        process.stdout.readline()
        time.sleep(dice.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert finish(start(path)) == "0"
    assert path.read_bytes() == undisturbed


def test_twenty_kills_among_two_workers_give_the_undisturbed_file(tmp_path: Path, undisturbed: bytes) -> None:
    path, dice = tmp_path / "answers.jsonl", random.Random(2)
    for _ in range(10):
        workers = [start(path, worker, seconds=0.02) for worker in (0, 1)]
        for process in dice.sample(workers, 2):
            process.stdout.readline()
            time.sleep(dice.uniform(0, 0.04))
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert [finish(process) for process in [start(path, 0), start(path, 1)]].count("0") >= 1
    assert path.read_bytes() == undisturbed


@pytest.mark.parametrize("workers", [(0,), (0, 1)])
def test_kills_lose_nothing_where_questions_share_their_ids(tmp_path: Path, workers: tuple[int, ...]) -> None:
    undisturbed, path, dice = tmp_path / "undisturbed.jsonl", tmp_path / "answers.jsonl", random.Random(3)
    assert finish(start(undisturbed, ids=REPEATED)) == "0"
    for _ in range(4):
        for process in [start(path, worker, seconds=0.02, ids=REPEATED) for worker in workers]:
            process.stdout.readline()
            time.sleep(dice.uniform(0, 0.06))
            process.send_signal(signal.SIGKILL)
            process.communicate()
    ends = [finish(process) for process in [start(path, worker, ids=REPEATED) for worker in workers]]
    assert "0" in ends
    assert path.read_bytes() == undisturbed.read_bytes()
    rows = read_answers(path)
    assert len({(row["question_id"], row["prompt"]) for row in rows}) == len(rows) == 60
    assert len({row["question_id"] for row in rows}) == 20


def test_workers_share_the_units_and_the_last_one_writes_the_file(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    workers = [start(path, worker, seconds=0.05) for worker in range(3)]
    ends = [finish(process) for process in workers]
    assert "0" in ends
    assert set(ends) <= {"0", "none"}
    assert path.read_bytes() == undisturbed


def test_a_living_worker_takes_over_what_a_killed_one_left(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    doomed = start(path, 0, seconds=30)
    doomed.stdout.readline()
    time.sleep(0.2)
    doomed.send_signal(signal.SIGKILL)
    doomed.communicate()
    assert finish(start(path, 1)) == "0"
    assert path.read_bytes() == undisturbed


def test_a_worker_that_is_still_busy_writes_the_file_later(tmp_path: Path) -> None:
    path, gate = tmp_path / "answers.jsonl", tmp_path / "gate"
    slow = start(path, 0, code=WORKER.replace("time.sleep(seconds)", wait_for(gate)))
    slow.stdout.readline()
    assert finish(start(path, 1)) == "none"
    assert not path.exists()
    gate.touch()
    assert finish(slow) == "0"
    assert len(read_answers(path)) == 60


def test_answers_written_while_another_worker_leaves_do_not_look_missing_to_it(
    tmp_path: Path, undisturbed: bytes
) -> None:
    path, gate = tmp_path / "answers.jsonl", tmp_path / "gate"
    slow = start(path, 0, code=WORKER.replace("time.sleep(seconds)", wait_for(gate)))
    slow.stdout.readline()
    leave_slowly = f"""
collect = store._collect
def collect_and_wait():
    rows = collect()
    Path({str(gate)!r}).touch()
    while store._others_at_work():
        time.sleep(0.01)
    return rows
store._collect = collect_and_wait
missing = store.finish"""
    assert finish(start(path, 1, code=WORKER.replace("\nmissing = store.finish", leave_slowly))) == "none"
    assert finish(slow) == "0"
    assert path.read_bytes() == undisturbed


def test_a_torn_line_is_cut_before_new_answers_are_appended(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    store = PredictionStore(path, KEY)
    store.open({"model": "a"})
    rows = [make_row(question, f"{question.prompt} by a", "a", {}) for question in QUESTIONS[:5]]
    store.append(rows)
    with (tmp_path / "answers.jsonl.parts" / "0.jsonl").open("a") as part:
        part.write(json.dumps(make_row(QUESTIONS[5], "What is 5? by a", "a", {}))[:40])
    store.finish(QUESTIONS, QUESTIONS)
    assert finish(start(path)) == "0"
    assert path.read_bytes() == undisturbed


def test_answers_of_a_run_with_other_settings_are_moved_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    for model in "abc":
        assert finish(start(path, model=model)) == "0"
    assert {row["text"].split()[-1] for row in read_answers(path)} == {"c"}
    assert {row["model_id"] for row in read_answers(tmp_path / "answers.jsonl.old-1")} == {"a"}
    assert {row["model_id"] for row in read_answers(tmp_path / "answers.jsonl.old-2")} == {"b"}
    assert json.loads((tmp_path / "answers.jsonl.old-2.run.json").read_text()) == {"model": "b"}


def test_unfinished_parts_of_other_settings_are_moved_too(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    process = start(path, seconds=0.05)
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert finish(start(path, model="b")) == "0"
    assert {row["model_id"] for row in read_answers(path)} == {"b"}
    assert read_answers(tmp_path / "answers.jsonl.old-1.parts" / "0.jsonl")


def test_a_file_of_unknown_origin_is_moved_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 1, "text": "from another program"}\n')
    assert PredictionStore(path, KEY).open({"model": "a"}) == tmp_path / "answers.jsonl.old-1"
    assert read_answers(tmp_path / "answers.jsonl.old-1")[0]["text"] == "from another program"


def test_two_workers_of_one_number_do_not_run_at_once(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    busy = start(path, 0, seconds=0.5)
    busy.stdout.readline()
    with pytest.raises(InputError, match=r"another process answers as worker 0 of .*answers.jsonl: wait for it"):
        PredictionStore(path, KEY).open({"model": "a"})
    busy.kill()
    busy.communicate()


def test_a_run_with_other_settings_does_not_disturb_a_living_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    busy = start(path, 0, seconds=0.05)
    busy.stdout.readline()
    with pytest.raises(InputError, match="a run with other settings is at work"):
        PredictionStore(path, KEY, worker=1).open({"model": "b"})
    assert finish(busy) == "0"


def test_a_shorter_second_run_keeps_the_answers_of_a_longer_first_one(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    assert finish(start(path)) == "0"
    store = PredictionStore(path, KEY)
    store.open({"model": "a"})
    assert store.finish(QUESTIONS, QUESTIONS[:5]) == []
    assert path.read_bytes() == undisturbed


def test_unanswered_questions_are_told_and_the_rest_is_written(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    store = PredictionStore(path, KEY)
    store.open({"model": "a"})
    store.append([make_row(question, "x", "a", {}) for question in QUESTIONS[2:]])
    assert [question.id for question in store.finish(QUESTIONS, QUESTIONS)] == [0, 1]
    assert [row["question_id"] for row in read_answers(path)] == list(range(2, 60))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_path_that_is_no_file_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(InputError, match=f"answers.jsonl: it is a {kind}; name a regular file"):
        PredictionStore(path, KEY)
    assert [found.name for found in tmp_path.iterdir()] == ["answers.jsonl"]


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path, undisturbed: bytes) -> None:
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "answers.jsonl", tmp_path / "disk" / "real.jsonl"
    target.write_text('{"question_id": 1, "text": "from another program"}\n')
    link.symlink_to(target)
    assert finish(start(link)) == "0"
    assert link.is_symlink()
    assert target.read_bytes() == undisturbed
    assert read_answers(tmp_path / "disk" / "real.jsonl.old-1")[0]["text"] == "from another program"


def test_answers_are_on_the_disk_after_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    store = PredictionStore(tmp_path / "answers.jsonl", KEY)
    store.open({"model": "a"})
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    rows = [make_row(question, "x", "a", {}) for question in QUESTIONS[:2]]
    store.append(rows)
    assert synced == [sum(len(json.dumps(row)) + 1 for row in rows)]
    store.finish(QUESTIONS, QUESTIONS)


FULL_DISK = """
import resource
from pathlib import Path
from llava.eval.benchmark import Question
from llava.eval.predictions import PredictionStore, make_row
from llava.files import FileError

path, questions = Path(sys.argv[1]), [Question(id=number, prompt=f"What is {number}?") for number in range(60)]
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
for worker in (0, 1):
    store = PredictionStore(path, ("question_id",), worker)
    store.open({"model": "a"})
    store.append([make_row(q, f"{q.prompt} by a", "a", {}) for q in questions[worker::2]])
try:
    store.finish(questions, questions)
except FileError as error:
    print(error)
"""


def test_a_full_disk_while_merging_loses_nothing(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    command = [sys.executable, "-c", f"import sys{FULL_DISK}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"cannot write {path}: File too large\n", "")
    assert sorted(file.name for file in tmp_path.glob("answers*")) == ["answers.jsonl.parts", "answers.jsonl.run.json"]
    assert finish(start(path)) == "0"
    assert path.read_bytes() == undisturbed


def test_rows_that_lack_columns_of_the_key_belong_to_the_one_question_that_fits() -> None:
    questions = [Question(id="a", prompt="One?"), Question(id="a", prompt="Two?"), Question(id="b", prompt="Two?")]
    key = ("question_id", "prompt")
    paired = pair_answers(questions, [{"question_id": "b", "text": "x"}], key)
    assert paired == {'["b", "Two?"]': {"question_id": "b", "prompt": "Two?", "text": "x"}}
    with pytest.raises(InputError, match=r"an answer may belong to any of 2 questions, it has no prompt: .*\["):
        pair_answers(questions, [{"question_id": "a", "text": "x"}], key)
    with pytest.raises(InputError, match="an answer belongs to no question"):
        pair_answers(questions, [{"question_id": "c", "text": "x"}], key)


def test_an_id_of_the_other_type_is_found_unless_both_are_there() -> None:
    questions = [Question(id=1, prompt="One?"), Question(id="2", prompt="Two?")]
    rows = [{"question_id": "1", "text": "x"}, {"question_id": 2, "text": "y"}]
    paired = pair_answers(questions, rows, KEY)
    assert {key: (row["question_id"], row["text"]) for key, row in paired.items()} == {
        "[1]": (1, "x"),
        '["2"]': ("2", "y"),
    }
    both = [Question(id=1, prompt="One?"), Question(id="1", prompt="Two?")]
    assert list(pair_answers(both, [{"question_id": "1", "text": "x"}], KEY)) == ['["1"]']


def test_an_image_counts_once_its_question_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    store = PredictionStore(path, KEY)
    store.open({"model": "a"}, {"[0]": "one", "[1]": "two"})
    store.append([make_row(QUESTIONS[0], "x", "a", {})])
    store.finish(QUESTIONS, QUESTIONS[:2])
    assert PredictionStore(path, KEY).holds({"model": "a"}, {"[0]": "one", "[1]": "mended"})
    assert PredictionStore(path, KEY).holds({"model": "a"}, {"[1]": "two"})
    assert not PredictionStore(path, KEY).holds({"model": "a"}, {"[0]": "other", "[1]": "two"})
    again = PredictionStore(path, KEY)
    assert again.open({"model": "a"}, {"[0]": "other", "[1]": "two"}) == tmp_path / "answers.jsonl.old-1"
    assert again.changes == ["images"]


def test_places_and_the_name_do_not_count_and_the_name_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    PredictionStore(path, KEY).open({"path": "here", "base": None, "model_id": "a", "x": 1})
    store = PredictionStore(path, KEY, worker=1)
    assert store.open({"path": "there", "base": "b", "model_id": "b", "x": 1}) is None
    assert store.run == {"path": "there", "base": "b", "model_id": "a", "x": 1}
    assert json.loads((tmp_path / "answers.jsonl.run.json").read_text()) == store.run
