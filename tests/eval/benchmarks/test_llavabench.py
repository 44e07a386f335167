import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llava.errors import InputError, run_command
from llava.eval import eval_gpt_review_bench, summarize_gpt_review
from llava.eval.benchmarks.llavabench import (
    OWN_RULE_FILE,
    LlavaBench,
    parse_ratings,
    read_rules,
    summarize_ratings,
)
from llava.eval.judge import ApiJudge, ReplyCache, make_judge
from llava.eval.predictions import read_answers
from llava.eval.results import format_line, score_answers
from llava.files import write_jsonl
from llava.prompt import wrap_prompt

BENCH = LlavaBench()


@pytest.fixture
def oracle(golden: Path) -> Path:
    """Made-up answers and judge's replies with the numbers of the published scripts."""
    return golden / "oracle" / "llava_bench_in_the_wild"


@pytest.fixture
def copied(oracle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "llava-bench-in-the-wild"
    shutil.copytree(oracle, folder)
    return folder


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def canned(endpoint, oracle: Path) -> None:
    """The endpoint serves the recorded reply to each question."""
    replies = {row["question_id"]: row["reply"] for row in read_lines(oracle / "judge_replies.jsonl")}

    def respond(body: dict) -> str:
        return replies[int(re.search(r"\[Question\]\nPlease .* item (\d+) ", body["messages"][1]["content"])[1])]

    endpoint.respond = respond


@pytest.fixture
def judge_anew(tmp_path: Path) -> Callable[[], ApiJudge]:
    return lambda: make_judge(None, None, tmp_path / "run.judge.jsonl", BENCH)


@pytest.mark.usefixtures("canned")
def test_every_number_of_the_published_scripts_is_reproduced_at_an_endpoint(oracle: Path, endpoint, judge_anew) -> None:
    expected = json.loads((oracle / "expected.json").read_text())
    result = score_answers(BENCH, oracle / "answers.jsonl", oracle, judge=judge_anew())
    for part, numbers in expected["main"].items():
        assert result.scores[part] == numbers
    assert result.headline == expected["main"]["all"]["relative"] == 67.4
    assert result.count == expected["n_questions"] == len(endpoint.requests)
    assert result.scores["parsed_scores"] == expected["parsed_scores"]
    assert result.scores["unparsable"] == [str(number) for number in expected["unparsable"]]
    assert result.columns == {"all": 67.4, "complex": 76.3, "conv": 64.7, "detail": 51.4}
    assert (result.judge, result.offline_judge) == ("gpt-4-0613", False)


@pytest.mark.usefixtures("canned")
@pytest.mark.parametrize("part", [slice(None), slice(1, None, 2), slice(3)])
def test_the_headline_follows_from_the_verdicts(oracle: Path, judge_anew, part: slice) -> None:
    rows = read_answers(oracle / "answers.jsonl")[part]
    scores = BENCH.score({f"[{row['question_id']}]": row for row in rows}, oracle, judge_anew())
    assert BENCH.headline(scores.verdicts) == pytest.approx(scores.headline, abs=1e-9)
    again = [replace(verdict, details=json.loads(json.dumps(verdict.details))) for verdict in scores.verdicts]
    assert BENCH.headline(again) == scores.headline == scores.scores["all"]["relative"]
    assert len(scores.verdicts) == scores.count == len(rows)


@pytest.mark.usefixtures("canned")
def test_verdicts_hold_answer_reference_and_ratings(oracle: Path, judge_anew) -> None:
    rows = read_answers(oracle / "answers.jsonl")
    scores = BENCH.score({f"[{row['question_id']}]": row for row in rows}, oracle, judge_anew())
    references = {row["question_id"]: row["text"] for row in read_lines(oracle / "answers_gpt4.jsonl")}
    categories = {
        row["question_id"]: f"llava_bench_{row['category']}" for row in read_lines(oracle / "questions.jsonl")
    }
    ratings = scores.scores["parsed_scores"]
    verdicts = {json.loads(verdict.key)[0]: verdict for verdict in scores.verdicts}
    for row in rows:
        identity = row["question_id"]
        verdict = verdicts[identity]
        assert (verdict.prediction, verdict.reference) == (row["text"], references[identity])
        assert (verdict.category, verdict.unit, verdict.parsed) == (categories[identity], "question", None)
        assert verdict.details == {"ratings": [ratings[str(identity)]]}
        assert 0 <= verdict.points <= 1
    # The recorded replies begin with "8/10 7/10" (unreadable), "10 10", "6 2" and "9 6.5".
    assert [verdicts[number].points for number in (0, 1, 3, 6)] == pytest.approx([0, 1, 0.2, 0.65])
    assert verdicts[0].details == {"ratings": [[-1, -1]]}
    unreadable = scores.scores["unparsable"]
    assert len(unreadable) > 5
    assert all(verdicts[int(number)].points == 0 for number in unreadable)


def test_answers_have_the_place_of_the_script(tmp_path: Path) -> None:
    root = BENCH.find_root(tmp_path)
    assert root == tmp_path / "llava-bench-in-the-wild"
    assert BENCH.place_answers(root, "run-1") == root / "answers" / "run-1.jsonl"
    assert BENCH.place_upload(root, "run-1") is None


def test_points_are_the_mean_over_the_runs_as_a_fraction(oracle: Path, endpoint, tmp_path: Path) -> None:
    replies = ["10 5", "10 12", "0 -3", "8 4"]
    endpoint.respond = lambda body: replies[(len(endpoint.requests) - 1) // 2]
    judge = ApiJudge("m", ReplyCache(tmp_path / "c.jsonl"), address=endpoint.address, num_runs=4, num_threads=1)
    answers = {f"[{row['question_id']}]": row for row in read_answers(oracle / "answers.jsonl")[:2]}
    scores = BENCH.score(answers, oracle, judge)
    assert [verdict.points for verdict in scores.verdicts] == pytest.approx([(0.5 + 1 + 0 + 0.4) / 4] * 2)
    assert scores.verdicts[0].details == {"ratings": [[10, 5], [10, 12], [0, -3], [8, 4]]}
    assert BENCH.headline(scores.verdicts) == scores.headline == pytest.approx((50 + 120 + 0 + 50) / 4)


@pytest.mark.usefixtures("canned")
def test_the_judge_is_asked_as_published_but_for_the_words_of_the_rule(oracle: Path, endpoint, judge_anew) -> None:
    score_answers(BENCH, oracle / "answers.jsonl", oracle, judge=judge_anew())
    rule = read_rules(OWN_RULE_FILE)["llava_bench_conv"]["prompt"]
    asked = {body["messages"][1]["content"]: body for body in endpoint.requests}
    for expected in read_lines(oracle / "expected_judge_messages.jsonl"):
        body = asked.pop(expected["user_with_rule_text_replaced"].replace("<RULE>", rule))
        assert body["messages"][0] == {"role": "system", "content": expected["system"]}
        assert (body["temperature"], body["max_tokens"]) == (expected["temperature"], expected["max_tokens"])
    assert not asked


@pytest.mark.usefixtures("canned")
@pytest.mark.parametrize("place", ["rule.json", "table/rule.json"])
def test_llavas_own_rule_file_in_the_benchmarks_folder_replaces_our_words(
    copied: Path, place: str, endpoint, judge_anew
) -> None:
    rules = {f"llava_bench_{name}": {"role": "Helper", "prompt": f"Rule of {name}."} for name in ("conv", "detail")}
    rules["llava_bench_complex"] = rules["llava_bench_conv"]
    (copied / place).parent.mkdir(exist_ok=True)
    (copied / place).write_text(json.dumps(rules))
    score_answers(BENCH, copied / "answers.jsonl", copied, judge=judge_anew())
    detail = next(question for question in BENCH.load(copied) if question.category == "detail")
    contents = [body["messages"][1]["content"] for body in endpoint.requests]
    (content,) = [content for content in contents if f"[Question]\n{detail.prompt}\n" in content]
    assert content.endswith("[End of Helper 2]\n\n[System]\nRule of detail.\n\n")
    assert "[Helper 1]\n" in content
    assert "Assistant" not in content.replace("assistant", "")


def test_our_rule_says_what_the_judge_must_know() -> None:
    for category in ("conv", "detail", "complex"):
        rule = read_rules(OWN_RULE_FILE)[f"llava_bench_{category}"]
        assert rule["role"] == "Assistant"
        for word in ("few sentences", "helpful", "correct", "detailed", "1 (worst) to 10 (best)", "line", "one space"):
            assert word in rule["prompt"]


def test_prompts_and_queries_are_the_published_ones_with_room_for_1024_tokens(oracle: Path) -> None:
    expected = read_lines(oracle / "expected_prompts.jsonl")
    questions = BENCH.load(oracle)
    assert len(questions) == len(expected) == 36
    for question, record in zip(questions, expected, strict=True):
        assert question.id == record["question_id"]
        assert wrap_prompt(question.prompt, 1, "vicuna_v1") == record["prompt_sent_to_llm"]
        assert question.query == record["trim_text"]
        assert question.head()["prompt"] == record["answers_file_prompt"]
        assert record["max_new_tokens"] == BENCH.max_new_tokens == 1024
        assert question.images[0].parent == oracle / "images"


@pytest.mark.parametrize(
    ("reply", "ratings"),
    [
        ("8 7\nwhy", (8, 7)),
        ("8.5 9", (8.5, 9)),
        ("7,8\n", (7, 8)),
        ("5 1\r\nwhy", (5, 1)),
        ("7, 8", (-1, -1)),
        ("8  7", (-1, -1)),
        ("8 7 \nwhy", (-1, -1)),
        (" 8 7", (-1, -1)),
        ("8\t7", (-1, -1)),
        ("8/10 7/10", (-1, -1)),
        ("\n8 7", (-1, -1)),
        ("eight seven", (-1, -1)),
        ("", (-1, -1)),
        ("8", (-1, -1)),
        ("8 7 6", (-1, -1)),
        ("nan 8", (-1, -1)),
        ("8 inf", (-1, -1)),
    ],
)
def test_ratings_are_read_to_the_letter_as_published(reply: str, ratings: tuple) -> None:
    assert parse_ratings(reply) == ratings


def test_means_are_rounded_before_they_are_divided() -> None:
    summary = summarize_ratings(["a", "a", "b"], [(3, 1), (3, 1), (4, 2)])
    assert summary["all"] == {"relative": 40.0, "gpt4": 33.3, "model": 13.3}
    assert summary["a"] == {"relative": 33.3, "gpt4": 30.0, "model": 10.0}
    # 1.333 / 3.333 is 39.99 percent, 4 / 10 is 40.
    assert summary["b"]["relative"] == 50.0


@pytest.mark.usefixtures("canned")
def test_answers_references_and_contexts_are_paired_by_id_not_by_position(copied: Path, tmp_path: Path) -> None:
    dice = random.Random(4)
    for name in ("answers_gpt4.jsonl", "context.jsonl", "answers.jsonl"):
        lines = (copied / name).read_text().splitlines()
        dice.shuffle(lines)
        (copied / name).write_text("\n".join(lines) + "\n")
    judge = make_judge(None, None, tmp_path / "c.jsonl", BENCH)
    assert score_answers(BENCH, copied / "answers.jsonl", copied, judge=judge).scores["all"]["relative"] == 67.4


@pytest.mark.usefixtures("canned")
def test_several_runs_are_asked_anew_and_averaged(oracle: Path, endpoint, tmp_path: Path) -> None:
    ratings = {0: "10 5", 1: "10 6", 2: "10 10"}
    endpoint.respond = lambda body: ratings[(len(endpoint.requests) - 1) // 36]
    judge = ApiJudge("m", ReplyCache(tmp_path / "c.jsonl"), address=endpoint.address, num_runs=3, num_threads=1)
    result = score_answers(BENCH, oracle / "answers.jsonl", oracle, judge=judge)
    assert [run["all"]["relative"] for run in result.scores["runs"]] == [50.0, 60.0, 100.0]
    assert result.headline == result.scores["all"]["relative"] == pytest.approx(70.0)
    assert result.count == 36
    assert len(endpoint.requests) == 108


@pytest.mark.usefixtures("canned")
def test_missing_answers_are_refused_unless_allowed_and_then_take_no_part(
    oracle: Path, endpoint, tmp_path: Path, judge_anew
) -> None:
    rows = read_answers(oracle / "answers.jsonl")
    write_jsonl(tmp_path / "some.jsonl", rows[1::2])
    with pytest.raises(InputError, match=r"lacks 18 of 36 answers"):
        score_answers(BENCH, tmp_path / "some.jsonl", oracle, judge=judge_anew())
    assert not endpoint.requests
    partial = score_answers(BENCH, tmp_path / "some.jsonl", oracle, allow_partial=True, judge=judge_anew())
    assert (partial.count, partial.missing, len(endpoint.requests)) == (18, 18, 18)
    assert set(partial.scores["parsed_scores"]) == {str(row["question_id"]) for row in rows[1::2]}


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("context.jsonl", '"003.jpg"', '"303.jpg"', r"context.jsonl says nothing about 003.jpg, the image of question"),
        ("context.jsonl", '"caption": "', '"words": "', r'"image" and "caption" must be text'),
        ("answers_gpt4.jsonl", '"question_id": 7,', '"question_id": 77,', "no reference answer to question 7"),
        ("questions.jsonl", '"category": "detail"', '"category": "poem"', "has no rule for the category 'poem'"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_the_judge_is_asked(
    copied: Path, file: str, old: str, new: str, words: str, endpoint, judge_anew
) -> None:
    (copied / file).write_text((copied / file).read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=words):
        score_answers(BENCH, copied / "answers.jsonl", copied, judge=judge_anew())
    assert not endpoint.requests


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is no rule file"),
        ('{"llava_bench_conv": {"prompt": "x"}}', '"llava_bench_conv" must have the strings "role" and "prompt"'),
    ],
)
def test_a_broken_rule_file_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "rule.json").write_text(content)
    with pytest.raises(InputError, match=words):
        read_rules(tmp_path / "rule.json")


def test_a_judge_that_never_gives_ratings_gives_no_score(oracle: Path, endpoint, judge_anew) -> None:
    endpoint.respond = lambda body: "I can't see the image."
    with pytest.raises(
        InputError, match=r"none of the judge's 36 replies begins with two ratings; the first is \"I can't"
    ):
        score_answers(BENCH, oracle / "answers.jsonl", oracle, judge=judge_anew())


def test_what_a_judge_says_reaches_no_terminal_as_it_is(oracle: Path, endpoint, judge_anew) -> None:
    endpoint.respond = lambda body: "\x1b[31mred\x07\x00"
    with pytest.raises(InputError, match="begins with two ratings") as caught:
        score_answers(BENCH, oracle / "answers.jsonl", oracle, judge=judge_anew())
    assert str(caught.value).isprintable()


def test_the_offline_stand_in_is_labelled_wherever_its_number_appears(oracle: Path, tmp_path: Path) -> None:
    judge = make_judge("exact", None, tmp_path / "c.jsonl", BENCH)
    result = score_answers(BENCH, oracle / "answers.jsonl", oracle, judge=judge)
    assert result.offline_judge
    assert format_line(result).startswith("LLaVA-Bench (Wild) [judge: exact]\t")
    assert "offline stand-in" in result.judge
    assert 10 <= result.headline < 100
    assert result == score_answers(BENCH, oracle / "answers.jsonl", oracle, judge=judge)


def run_main(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    run_command(module.main)


def review_arguments(folder: Path, output: Path) -> list[object]:
    files = ["--question", folder / "questions.jsonl", "--context", folder / "context.jsonl", "--rule", OWN_RULE_FILE]
    answers = ["--answer-list", folder / "answers_gpt4.jsonl", folder / "answers.jsonl"]
    return [*files, *answers, "--output", output]


@pytest.mark.usefixtures("canned")
def test_the_published_commands_write_and_summarize_the_published_review_file(
    oracle: Path, endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "reviews" / "my-llava.jsonl"
    run_main(eval_gpt_review_bench, monkeypatch, *review_arguments(oracle, output))
    assert output.read_bytes() == (oracle / "expected_reviews.jsonl").read_bytes()
    capsys.readouterr()
    run_main(summarize_gpt_review, monkeypatch, "-f", output)
    lines = ["my-llava", "all 67.4 49.9 33.6", "llava_bench_complex 76.3 60.4 46.1", "llava_bench_conv 64.7 44.6 28.8"]
    lines += ["llava_bench_detail 51.4 41.1 21.1", "================================="]
    assert capsys.readouterr().out.splitlines() == lines
    run_main(summarize_gpt_review, monkeypatch, "-d", output.parent)
    assert capsys.readouterr().out.splitlines() == lines
    # Once more costs nothing.
    run_main(eval_gpt_review_bench, monkeypatch, *review_arguments(oracle, output))
    assert len(endpoint.requests) == 36


@pytest.mark.usefixtures("canned")
def test_reviews_of_other_answers_are_neither_mixed_in_nor_lost(
    copied: Path, endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "reviews" / "x.jsonl"
    output.parent.mkdir()
    output.write_text((copied / "expected_reviews.jsonl").read_text())
    rows = read_answers(copied / "answers.jsonl")
    write_jsonl(copied / "answers.jsonl", [row | {"answer_id": f"other{row['question_id']}"} for row in rows])
    with pytest.raises(SystemExit):
        run_main(eval_gpt_review_bench, monkeypatch, *review_arguments(copied, output))
    assert "has reviews of other answers" in capsys.readouterr().err
    assert output.read_text() == (copied / "expected_reviews.jsonl").read_text()
    assert not endpoint.requests


def test_summaries_choose_files_and_questions_by_the_published_options(
    oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    reviews = (oracle / "expected_reviews.jsonl").read_text()
    for name in ("gpt4_text_a.jsonl", "review_a-0613.jsonl", "answers.jsonl"):
        (tmp_path / name).write_text(reviews)
    folder = tmp_path.rename(tmp_path.with_name("judged"))

    def titles(*options: object) -> list[str]:
        run_main(summarize_gpt_review, monkeypatch, "--dir", folder, *options)
        printed = capsys.readouterr().out.split("=================================\n")
        return [block.splitlines()[0] for block in printed if block]

    assert titles() == ["a", "review_a-0613"]
    assert titles("--version", "0613") == ["review_a-0613"]
    assert titles("--version", "0314") == ["a"]
    assert titles("--select", "review", "a") == ["review_a-0613"]
    assert titles("--files", "answers.jsonl") == ["answers"]
    run_main(summarize_gpt_review, monkeypatch, "-f", folder / "gpt4_text_a.jsonl", "-i", *range(1, 36))
    assert capsys.readouterr().out.splitlines()[1] == "all 100.0 -10.0 -10.0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --files FILE ... or --dir FOLDER"),
        (["-d", "nowhere"], "no folder nowhere"),
        (["-d", "."], "has no review files"),
        (["-f", "bad.jsonl"], 'bad.jsonl, question 1: "tuple" must be two numbers'),
        (["-f", "odd.jsonl"], 'odd.jsonl, question [1]: "category" must be a string'),
        (["-f", "good.jsonl", "-i", "1"], "good.jsonl: no question is left"),
    ],
)
def test_summaries_of_nothing_end_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "bad.jsonl").write_text('{"question_id": 1, "score": 3}\n')
    (folder / "odd.jsonl").write_text('{"question_id": [1], "tuple": [8, 7], "category": ["conv"]}\n')
    (folder / "good.jsonl").write_text('{"question_id": 1, "tuple": [8, 7]}\n')
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        run_main(summarize_gpt_review, monkeypatch, *arguments)
    assert words in capsys.readouterr().err
