import base64
import csv
import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llava.errors import InputError
from llava.eval.benchmark import Case, row_key
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks.mmbench import load_table_questions, read_predictions, write_workbook
from llava.eval.judge import ExactJudge
from llava.eval.predictions import read_answers
from llava.eval.results import ServerOnlyError, export_answers, score_answers
from llava.files import write_jsonl
from llava.image import EmbeddedImage, load_image
from llava.prompt import wrap_prompt

TABLES = {"mmbench": "mmbench_dev_20230712", "mmbench_cn": "mmbench_dev_cn_20231003"}
both_languages = pytest.mark.parametrize("name", list(TABLES))


@pytest.fixture
def make_folder(golden: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copy the made-up answers of one language, with the numbers of the official scripts, for a test to spoil."""

    def copy(name: str) -> Path:
        return shutil.copytree(golden / "oracle" / name, tmp_path / name)

    return copy


@pytest.fixture
def mmbench(make_folder: Callable[[str], Path]) -> Path:
    return make_folder("mmbench")


class CannedJudge:
    """Serves replies by the row's index, one per attempt, the last again and again."""

    name = "canned"
    offline = False
    num_runs = 1

    def __init__(self, replies: Mapping[str, Sequence[str]]):
        self.replies = replies
        self.messages: list[str] = []

    def ask(self, case: Case, messages: Sequence[Mapping[str, str]], *, attempt: int = 0, **_: object) -> str:
        self.messages.append(messages[-1]["content"])
        replies = self.replies[case.key.split()[1]]
        return replies[min(attempt, len(replies) - 1)]

    def map(self, judge_one: Callable, items: Sequence) -> list:
        return [judge_one(item) for item in items]


def assert_equal_numbers(found: Mapping, expected: Mapping) -> None:
    """Compare with what the official scripts gave; `note` and the like are left out by the caller."""
    for name, value in expected.items():
        if isinstance(value, dict) and name != "hits":
            assert set(found[name]) == set(value)
            assert_equal_numbers(found[name], value)
        elif isinstance(value, float):
            assert found[name] == pytest.approx(value, abs=1e-6), name
        elif name != "note":
            assert found[name] == value, name


def read_expected(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())


@both_languages
def test_every_number_of_exact_matching_is_reproduced(make_folder: Callable[[str], Path], name: str) -> None:
    folder = make_folder(name)
    expected = read_expected(folder)
    result = score_answers(find_benchmark(name), folder / "answers.jsonl", folder)
    assert_equal_numbers(result.scores, expected["main"])
    assert_equal_numbers(result.scores["variants"], expected["variants"])
    assert result.headline == result.scores["overall"]
    assert result.count == expected["n_questions"]
    assert "with_judge" not in result.scores


@both_languages
def test_both_rules_read_every_row_as_the_official_scripts_do(make_folder: Callable[[str], Path], name: str) -> None:
    folder = make_folder(name)
    result = score_answers(find_benchmark(name), folder / "answers.jsonl", folder)
    assert result.scores["per_row_inferred"] == read_expected(folder)["per_row_inferred"]


@both_languages
def test_every_number_with_a_judge_is_reproduced(make_folder: Callable[[str], Path], name: str) -> None:
    folder = make_folder(name)
    expected = read_expected(folder)
    judge = CannedJudge(json.loads((folder / "judge_replies.json").read_text()))
    result = score_answers(find_benchmark(name), folder / "answers.jsonl", folder, judge=judge)
    for flow in ("with_judge", "opencompass_with_judge"):
        found = result.scores[flow]
        found["rows_sent_to_judge"] = sorted(map(int, found["rows_sent_to_judge"]))
        assert_equal_numbers(found, expected[flow])
    assert_equal_numbers(result.scores, expected["main"])


def test_the_headline_does_not_depend_on_a_judge(mmbench: Path) -> None:
    task, answers = find_benchmark("mmbench"), mmbench / "answers.jsonl"
    judged = score_answers(task, answers, mmbench, judge=ExactJudge(task))
    assert judged.headline == score_answers(task, answers, mmbench).headline
    assert judged.columns["With judge"] > judged.headline


def test_the_judge_reads_question_options_answer_and_how_to_say_none(mmbench: Path) -> None:
    judge = CannedJudge(json.loads((mmbench / "judge_replies.json").read_text()))
    score_answers(find_benchmark("mmbench"), mmbench / "answers.jsonl", mmbench, judge=judge)
    message = next(message for message in judge.messages if "picture 2013?" in message)
    assert "D. " in message
    assert "Answer: In this picture one can see" in message
    assert {"Z. none" in message for message in judge.messages} == {True, False}


def test_a_judge_that_never_names_a_letter_leaves_the_row_wrong(mmbench: Path) -> None:
    judge = CannedJudge({row: ["I wonder"] for row in json.loads((mmbench / "judge_replies.json").read_text())})
    result = score_answers(find_benchmark("mmbench"), mmbench / "answers.jsonl", mmbench, judge=judge)
    assert result.scores["with_judge"]["overall"] == result.headline
    assert len(judge.messages) % 3 == 0


@both_languages
@pytest.mark.parametrize("left_out", [None, 1_000_077])
def test_the_headline_follows_from_the_verdicts(
    make_folder: Callable[[str], Path], name: str, left_out: int | None
) -> None:
    folder, task = make_folder(name), find_benchmark(name)
    answers = {
        row_key(row, task.key_fields): row
        for row in read_answers(folder / "answers.jsonl")
        if row["question_id"] != left_out
    }
    scores = task.score(answers, folder)
    assert task.headline(scores.verdicts) == pytest.approx(scores.headline, abs=1e-9)
    assert len(scores.verdicts) == scores.count == len(scores.scores["hits"])
    assert {verdict.key: verdict.points for verdict in scores.verdicts} == scores.scores["hits"]
    assert {verdict.unit for verdict in scores.verdicts} == {"group"}


def test_a_verdict_joins_the_rows_of_its_question(mmbench: Path) -> None:
    task = find_benchmark("mmbench")
    answers = {row_key(row, task.key_fields): row for row in read_answers(mmbench / "answers.jsonl")}
    verdicts = {verdict.key: verdict for verdict in task.score(answers, mmbench).verdicts}
    right, unread, empty = verdicts["630"], verdicts["2785"], verdicts["2227"]
    assert (right.prediction, right.parsed, right.reference, right.points) == ("B | A", "B | A", "B | A", 1.0)
    assert (right.category, right.details) == ("physical_relation", {"question_keys": ["[630, 0]", "[1000630, 0]"]})
    assert (unread.prediction, unread.parsed, unread.points) == ("D | A | b | C", "D | A | ? | C", 0.0)
    assert (empty.prediction, empty.parsed, empty.correct) == ("(B) |  | A: a sofa", "B | ? | A", False)


def test_the_base_row_is_first_in_a_verdict_wherever_it_is_in_the_table(mmbench: Path) -> None:
    edit_table(mmbench, lambda rows: rows.reverse())
    task = find_benchmark("mmbench")
    answers = {row_key(row, task.key_fields): row for row in read_answers(mmbench / "answers.jsonl")}
    verdicts = task.score(answers, mmbench).verdicts
    assert all(verdict.details["question_keys"][0] == f"[{verdict.key}, 0]" for verdict in verdicts)


@both_languages
@pytest.mark.parametrize("rounds", ["", "_allrounds"])
def test_prompts_and_queries_are_the_released_ones(make_folder: Callable[[str], Path], name: str, rounds: str) -> None:
    folder = make_folder(name)
    task = find_benchmark(name)
    if rounds:
        task = task.with_split(f"{TABLES[name]}_base_rows_only:all-rounds")
    recorded = [json.loads(line) for line in (folder / f"expected_prompts{rounds}.jsonl").read_text().splitlines()]
    for question, row in zip(task.load(folder), recorded, strict=True):
        columns = {column: row[column] for column in ("question_id", "round_id", "options", "option_char")}
        assert question.head() == {**columns, "prompt": row["answers_file_prompt"]}
        assert question.query == row["trim_text"]
        assert wrap_prompt(question.prompt, len(question.images), "vicuna_v1") == row["prompt_sent_to_llm"]
        assert task.max_new_tokens == row["max_new_tokens"]


@both_languages
def test_all_rounds_of_a_table_without_rotations_are_one_question(
    make_folder: Callable[[str], Path], name: str
) -> None:
    folder = make_folder(name)
    task = find_benchmark(name).with_split(f"{TABLES[name]}_base_rows_only:all-rounds")
    expected = read_expected(folder)["all_rounds"]
    scores = score_answers(task, folder / "answers_allrounds.jsonl", folder).scores
    assert scores["variants"]["literal_letter_circular"] == pytest.approx(expected.pop("literal_letter"), abs=1e-6)
    del expected["what_upstream_convert_script_would_imply"]
    assert_equal_numbers(scores, expected)


def test_all_rounds_can_be_asked_of_the_own_table(mmbench: Path) -> None:
    base = mmbench / "mmbench_dev_20230712_base_rows_only.tsv"
    base.replace(mmbench / "mmbench_dev_20230712.tsv")
    result = score_answers(
        find_benchmark("mmbench").with_split("all-rounds"), mmbench / "answers_allrounds.jsonl", mmbench
    )
    assert result.headline == pytest.approx(64.2857142857, abs=1e-6)


def read_cells(path: Path) -> list[list]:
    return [[cell.value for cell in row] for row in pytest.importorskip("openpyxl").load_workbook(path).active]


@both_languages
def test_the_workbook_is_equal_cell_for_cell(make_folder: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    pytest.importorskip("openpyxl")
    folder = make_folder(name)
    [file] = export_answers(find_benchmark(name), folder / "answers.jsonl", folder, tmp_path / "out")
    assert file.name == f"{TABLES[name]}.xlsx"
    assert read_cells(file) == read_cells(folder / "expected_upload.xlsx")


def test_the_same_answers_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openpyxl")
    rows = [["index", "question"], [1, "Is it?"]]
    first = write_workbook(tmp_path / "1.xlsx", rows).read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2030, 1, 2, 3, 4, 5, 0, 0, 0))
    assert write_workbook(tmp_path / "2.xlsx", rows).read_bytes() == first


def test_texts_stay_texts_in_a_workbook(tmp_path: Path) -> None:
    texts = ["=1+1", "#N/A", "12", "two\nlines", None, "a\x07b"]
    sheet = pytest.importorskip("openpyxl").load_workbook(write_workbook(tmp_path / "1.xlsx", [texts])).active
    assert [cell.value for cell in sheet[1]] == ["=1+1", "#N/A", "12", "two\nlines", None, "ab"]
    assert {cell.data_type for cell in sheet[1] if cell.value} == {"s"}


def test_images_are_taken_from_the_table_once(mmbench: Path) -> None:
    questions = {question.id: question for question in find_benchmark("mmbench").load(mmbench)}
    [image], [again] = questions[2785].images, questions[1002785].images
    assert isinstance(image, EmbeddedImage)
    assert again is image
    assert str(image) == "mmbench_dev_20230712.tsv row 2785"
    assert load_image(image).size == (4, 4)
    assert len({question.images for question in questions.values()}) == 42


def edit_table(folder: Path, edit: Callable[[list[dict]], None], name: str = TABLES["mmbench"]) -> None:
    """Rewrite a table."""
    path = folder / f"{name}.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    edit(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def test_an_image_cell_may_name_the_row_that_has_the_image(mmbench: Path) -> None:
    before = find_benchmark("mmbench").load(mmbench)

    def refer(rows: list[dict]) -> None:
        for row in rows:
            if int(row["index"]) >= 1_000_000:
                row["image"] = str(int(row["index"]) % 1_000_000)

    edit_table(mmbench, refer)
    assert [question.images for question in find_benchmark("mmbench").load(mmbench)] == [item.images for item in before]


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "None", "NONE", "nOnE", "NA"])
def test_an_empty_cell_ends_the_options_and_drops_the_hint(mmbench: Path, cell: str) -> None:
    def empty(rows: list[dict]) -> None:
        rows[0].update(C=cell, hint=cell if cell != "NA" else "")

    edit_table(mmbench, empty)
    question = find_benchmark("mmbench").load(mmbench)[0]
    assert question.record == "Which object is shown in made-up picture 2785?\nA. guitar\nB. a violin"
    assert question.fields["option_char"] == ["A", "B"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": ""}, "the row has no image"),
        ({"image": "77777"}, "its image is said to be in row 77777, which has none"),
        ({"image": "abcde"}, "its image is not base64"),
        ({"A": ""}, "it has no options"),
        ({"index": "x"}, "the index is not a whole number"),
    ],
)
def test_a_broken_row_costs_its_own_question_only(mmbench: Path, change: dict, words: str) -> None:
    edit_table(mmbench, lambda rows: rows[3].update(change))
    questions = find_benchmark("mmbench").load(mmbench)
    [fault] = [question for question in questions if question.fault]
    assert words in fault.fault
    assert fault is questions[3]
    rows = [row for row in read_answers(mmbench / "answers.jsonl") if row["question_id"] != 2013]
    write_jsonl(mmbench / "rest.jsonl", rows)
    partial = score_answers(find_benchmark("mmbench"), mmbench / "rest.jsonl", mmbench, allow_partial=True)
    assert (partial.count, partial.missing) == (41, 1)
    assert "2013" not in partial.scores["hits"]


@pytest.mark.parametrize("surplus", ["x", "\tx", "\t\t\tx\ty"])
@pytest.mark.parametrize(("line", "number"), [(1, 0), (-2, -1)])
def test_a_row_with_more_cells_than_columns_costs_its_own_question_only(
    mmbench: Path, surplus: str, line: int, number: int
) -> None:
    path = mmbench / f"{TABLES['mmbench']}.tsv"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[line] += f"\t{surplus}"
    path.write_text("\n".join(lines), encoding="utf-8")
    questions = find_benchmark("mmbench").load(mmbench)
    [fault] = [question for question in questions if question.fault]
    assert "there are more cells than columns" in fault.fault
    assert fault is questions[number]
    assert len(questions) == 136


def test_a_cell_in_quotes_may_hold_tabs_newlines_and_quotes(mmbench: Path) -> None:
    edit_table(mmbench, lambda rows: rows[0].update(hint='a\t"b"\nc'))
    assert find_benchmark("mmbench").load(mmbench)[0].prompt.startswith('a\t"b"\nc\nWhich object')


def test_a_question_that_lacks_an_answer_to_one_row_takes_no_part(mmbench: Path) -> None:
    whole = score_answers(find_benchmark("mmbench"), mmbench / "answers.jsonl", mmbench).scores["hits"]
    right = int(next(group for group, hit in whole.items() if hit))
    rows = [row for row in read_answers(mmbench / "answers.jsonl") if row["question_id"] != 1_000_000 + right]
    write_jsonl(mmbench / "some.jsonl", rows)
    partial = score_answers(find_benchmark("mmbench"), mmbench / "some.jsonl", mmbench, allow_partial=True)
    assert partial.scores["hits"] == {group: hit for group, hit in whole.items() if group != str(right)}
    write_jsonl(mmbench / "some.jsonl", [row for row in rows if row["question_id"] < 1_000_000])
    with pytest.raises(InputError, match="no question has answers to all of its rows"):
        score_answers(find_benchmark("mmbench"), mmbench / "some.jsonl", mmbench, allow_partial=True)


def test_answers_about_other_options_are_refused(mmbench: Path) -> None:
    edit_table(mmbench, lambda rows: rows[0].update(A="a harp"))
    with pytest.raises(InputError, match=r"row 2785, round 0, is about the options \['guitar', .* with --split"):
        score_answers(find_benchmark("mmbench"), mmbench / "answers.jsonl", mmbench)


def test_a_right_option_that_is_not_there_is_named(mmbench: Path) -> None:
    edit_table(mmbench, lambda rows: rows[0].update(answer="E"))
    with pytest.raises(InputError, match=r"row 2785: the right option is 'E', which is not among its options"):
        score_answers(find_benchmark("mmbench"), mmbench / "answers.jsonl", mmbench)


def test_a_table_without_answers_is_scored_by_the_server_only(mmbench: Path, tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")

    def hide(rows: list[dict]) -> None:
        for row in rows:
            del row["answer"]

    edit_table(mmbench, hide)
    with pytest.raises(ServerOnlyError, match=r"only https://mmbench.opencompass.org.cn"):
        score_answers(find_benchmark("mmbench"), mmbench / "answers.jsonl", mmbench)
    [file] = export_answers(find_benchmark("mmbench"), mmbench / "answers.jsonl", mmbench, tmp_path / "out")
    assert read_cells(file)[0] == ["index", "question", "A", "B", "C", "D", "prediction", "split"]


def test_predictions_are_read_as_pandas_reads_their_cells() -> None:
    empty = ["", "nan", "NA", "None", "#N/A N/A", "-1.#IND", "<NA>"]
    other = ["NONE", " NA", "B", 'a "b"', "a\rb", "a\n\nb", "\n", " ", "a\tb", "\ud800"]
    rows = {text: {"text": text} for text in [*other, *empty]}
    assert read_predictions(rows) == {**{text: text for text in other}, **dict.fromkeys(empty, "nan")}
    assert read_predictions({}) == {}


@pytest.mark.parametrize("text", ["", "nan", "NA"])
def test_an_empty_answer_is_the_word_that_the_scorers_read_from_its_cell(mmbench: Path, text: str) -> None:
    edit_table(mmbench, lambda rows: rows[0].update(B="an"))
    rows = read_answers(mmbench / "answers.jsonl")
    options = ["guitar", "an", "a kettle", "bicycle"]
    rows = [row | {"text": text, "options": options} if row["question_id"] == 2785 else row for row in rows]
    write_jsonl(mmbench / "empty.jsonl", rows)
    scores = score_answers(find_benchmark("mmbench"), mmbench / "empty.jsonl", mmbench).scores
    assert scores["per_row_inferred"]["2785"]["vlmevalkit"] == "B"


def test_of_two_versions_llavas_is_taken_and_the_other_by_name(mmbench: Path) -> None:
    shutil.copy(mmbench / "mmbench_dev_20230712_base_rows_only.tsv", mmbench / "mmbench_dev_en_20231003.tsv")
    assert len(find_benchmark("mmbench").load(mmbench)) == 136
    assert len(find_benchmark("mmbench").with_split("mmbench_dev_en_20231003").load(mmbench)) == 42
    (mmbench / "mmbench_dev_20230712.tsv").unlink()
    assert len(find_benchmark("mmbench").load(mmbench)) == 42


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it lacks the column index, question"),
        (b"index\tquestion\n1\t?\n", "it lacks the column A, B, image"),
        (b"index\tquestion\tA\tB\timage\n", "has no row with an index"),
        (b"index\tquestion\tA\tB\timage\n1\t?\ta\tb\tx\n1\t?\ta\tb\tx\n", "rows 1 and 2 share the index 1"),
        (b"index\tquestion\tA\tB\timage\n" + b"9" * 5000 + b"\t?\ta\tb\tx\n", "has no row with an index"),
        (b"index\tquestion\tA\tB\timage\n1\t\xff\ta\tb\tx\n", "is not UTF-8 text"),
        (b'index\tquestion\tA\tB\timage\n1\t"?\ta\tb\tx\n', "is not a tab-separated table"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "mmbench_dev_20230712.tsv").write_bytes(content)
    with pytest.raises(InputError, match=words):
        find_benchmark("mmbench").load(tmp_path)


def test_answers_and_uploads_are_kept_apart_by_the_table_that_is_there(tmp_path: Path) -> None:
    task = find_benchmark("mmbench")
    assert task.place_answers(tmp_path, "run") == tmp_path / "answers/mmbench_dev_20230712/run/merge.jsonl"
    (tmp_path / "mmbench_dev_en_20231003.tsv").touch()
    assert task.place_answers(tmp_path, "run") == tmp_path / "answers/mmbench_dev_en_20231003/run/merge.jsonl"
    assert task.place_upload(tmp_path, "run") == tmp_path / "answers_upload/mmbench_dev_en_20231003/run"
    (tmp_path / "mmbench_dev_20230712.tsv").touch()
    assert task.place_upload(tmp_path, "run") == tmp_path / "answers_upload/mmbench_dev_20230712/run"


def test_the_chinese_table_is_found_in_either_folder(tmp_path: Path) -> None:
    task = find_benchmark("mmbench_cn")
    assert task.find_root(tmp_path) == tmp_path / "mmbench_cn"
    (tmp_path / "mmbench").mkdir()
    assert task.find_root(tmp_path) == tmp_path / "mmbench"
    (tmp_path / "mmbench_cn").mkdir()
    assert task.find_root(tmp_path) == tmp_path / "mmbench_cn"
    (tmp_path / "mmbench" / f"{TABLES['mmbench_cn']}.tsv").touch()
    assert task.find_root(tmp_path) == tmp_path / "mmbench"
    assert task.place_answers(tmp_path, "run") == tmp_path / "answers/mmbench_dev_cn_20231003/run/merge.jsonl"


def test_a_folder_without_table_names_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no mmbench_dev_20230712.tsv or mmbench_dev_en_20231003.tsv in "):
        find_benchmark("mmbench").load(tmp_path)
    with pytest.raises(InputError, match=r"no such file: .*mmbench_test.tsv"):
        find_benchmark("mmbench").with_split("mmbench_test").load(tmp_path)


def test_images_longer_than_a_csv_cell_are_read(mmbench: Path) -> None:
    limit = csv.field_size_limit()
    edit_table(mmbench, lambda rows: rows[0].update(image=base64.b64encode(bytes(limit)).decode()))
    question = find_benchmark("mmbench").load(mmbench)[0]
    assert question.images[0].content == bytes(limit)
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("folder", ["", "run"])
def test_the_released_converter_writes_the_workbook(
    mmbench: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, folder: str
) -> None:
    pytest.importorskip("openpyxl")
    place = mmbench / "run" / "merge.jsonl" if folder else mmbench / "run.jsonl"
    place.parent.mkdir(exist_ok=True)
    shutil.copy(mmbench / "answers.jsonl", place)
    spec = importlib.util.spec_from_file_location("c", repository / "scripts" / "convert_mmbench_for_submission.py")
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    arguments = ["--annotation-file", mmbench / "mmbench_dev_20230712.tsv", "--result-dir", mmbench]
    arguments += ["--upload-dir", mmbench / "up", "--experiment", "run"]
    monkeypatch.setattr("sys.argv", ["convert_mmbench_for_submission", *map(str, arguments)])
    converter.main()
    assert capsys.readouterr().out == f"{mmbench / 'up' / 'run.xlsx'}\n"
    assert read_cells(mmbench / "up" / "run.xlsx") == read_cells(mmbench / "expected_upload.xlsx")


def test_of_all_rounds_the_first_goes_into_the_workbook(
    mmbench: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openpyxl")
    spec = importlib.util.spec_from_file_location("c", repository / "scripts" / "convert_mmbench_for_submission.py")
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    arguments = ["--annotation-file", mmbench / "mmbench_dev_20230712_base_rows_only.tsv", "--result-dir", mmbench]
    arguments += ["--upload-dir", mmbench, "--experiment", "answers_allrounds"]
    monkeypatch.setattr("sys.argv", ["convert_mmbench_for_submission", *map(str, arguments)])
    converter.main()
    rows = read_answers(mmbench / "answers_allrounds.jsonl")
    first = {row["question_id"]: row["text"] or None for row in rows if row["round_id"] == 0}
    assert {cells[0]: cells[6] for cells in read_cells(mmbench / "answers_allrounds.xlsx")[1:]} == first


SHIMS = {
    "mmbench": ["--question-file", "mmbench.tsv", "--single-pred-prompt", "--all-rounds", "--conv-mode", "vicuna_v1"],
    "mmbench_cn": ["--question-file", "mmbench_cn.tsv", "--single-pred-prompt", "--all-rounds", "--lang", "cn"],
    "mmbench_plain": ["--question-file", "mmbench.tsv"],
    "science": ["--question-file", "science.json", "--single-pred-prompt", "--conv-mode", "vicuna_v1"],
}


@pytest.mark.parametrize("case", list(SHIMS))
def test_the_released_commands_give_the_recorded_answers(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    model, options = "llava-v1.5-tiny84-TRIM", list(SHIMS[case])
    if case == "mmbench_cn":
        options += ["--conv-mode", "vicuna_v1"]
    options[1] = golden / "data" / "questions" / options[1]
    if case == "science":
        options += ["--image-folder", golden / "data" / "images"]
    arguments = ["--model-path", model, "--answers-file", tmp_path / "a.jsonl", "--temperature", 0, *options]
    monkeypatch.chdir(golden / "checkpoints")
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    importlib.import_module(f"llava.eval.model_vqa_{case.partition('_')[0]}").main()
    recorded = [json.loads(line) for line in (golden / "cli" / f"{model}.{case}.jsonl").read_text().splitlines()]
    # Some of the recorded ids are no UTF-8 together, which libraries decode differently.
    tokenizer = AutoTokenizer.from_pretrained(golden / "checkpoints" / model)
    for found, expected in zip(read_answers(tmp_path / "a.jsonl"), recorded, strict=True):
        assert found["text"] == tokenizer.decode(expected.pop("output_ids"), skip_special_tokens=True).strip()
        assert set(found) == set(expected)
        for column in set(expected) - {"text", "answer_id", "metadata"}:
            assert found[column] == expected[column]


def test_without_the_letter_line_nothing_but_question_and_options_is_asked(mmbench: Path) -> None:
    questions = load_table_questions(mmbench / "mmbench_dev_20230712.tsv", letter_line=None)
    assert all(question.prompt == question.record for question in questions)
