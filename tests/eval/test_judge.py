"""Judges against a real HTTP server on this machine: what goes wrong on the way, and what is kept."""

import asyncio
import base64
import inspect
import json
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from llava.errors import InputError
from llava.eval.benchmark import Case
from llava.eval.benchmarks import BENCHMARKS, find_benchmark
from llava.eval.judge import ApiJudge, ExactJudge, ReplyCache, make_judge

MESSAGES = [{"role": "user", "content": "How good is it?"}]
LLAVABENCH, MMVET, POPE = find_benchmark("llavabench"), find_benchmark("mmvet"), find_benchmark("pope")
OPTIONAL = find_benchmark("mmbench")


def make_case(number: int = 0, task: str = "mmvet") -> Case:
    return Case(task=task, key=f"v1_{number}", question="What?", references=("a cat",), prediction="a cat")


@pytest.fixture
def cache_file(tmp_path: Path) -> Path:
    return tmp_path / "answers" / "run.judge.jsonl"


@pytest.fixture
def connect(endpoint, cache_file: Path) -> Callable[..., ApiJudge]:
    """Make a judge at the endpoint that loses no time between tries."""

    def make(**options: object) -> ApiJudge:
        options = {"address": endpoint.address, "key": "sk-made-up", "first_pause_seconds": 0.001, **options}
        return ApiJudge("gpt-4-0613", ReplyCache(cache_file), **options)

    return make


def answer_in_turn(endpoint, *answers: object) -> None:
    waiting = list(answers)
    endpoint.respond = lambda body: waiting.pop(0)


def test_the_request_is_the_protocols_with_the_benchmarks_settings(endpoint, connect) -> None:
    assert connect().ask(make_case(), MESSAGES, temperature=0.5, max_tokens=3) == "1.0"
    assert endpoint.requests == [
        {"model": "gpt-4-0613", "messages": MESSAGES, "temperature": 0.5, "max_tokens": 3},
    ]
    assert endpoint.headers[0]["authorization"] == "Bearer sk-made-up"


FAULTS = {
    "rate limit": {"status": 429, "body": '{"error": {"message": "slow down"}}'},
    "server error": {"status": 500, "body": "oops", "content_type": "text/plain"},
    "bad gateway": {"status": 502, "body": "<html>bad gateway</html>", "content_type": "text/html"},
    "overloaded": {"status": 529, "body": "{}"},
    "request timeout": {"status": 408, "body": "{}"},
    "empty body": {"body": ""},
    "web page": {"body": "<html>log in first</html>", "content_type": "text/html"},
    "torn JSON": {"body": '{"choices": [{"mess'},
    "a list": {"body": "[1, 2]"},
    "endless nesting": {"body": "[" * 100_000},
    "a number of 5,000 digits": {"body": "7" * 5000},
    "broken compression": {"body": "x", "headers": (("Content-Encoding", "gzip"),)},
    "a redirect to nowhere": {"status": 302, "headers": (("Location", "http://[::1/x"),)},
    "a number": {"body": "7"},
    "no choices": {"body": '{"choices": []}'},
    "choices of null": {"body": '{"choices": null}'},
    "another protocol": {"body": '{"text": "1.0"}'},
    "no message": {"body": '{"choices": [{"index": 0}]}'},
    "message of null": {"body": '{"choices": [{"message": null}]}'},
    "content of null": {"body": '{"choices": [{"message": {"role": "assistant", "content": null}}]}'},
    "content is a number": {"body": '{"choices": [{"message": {"role": "assistant", "content": 7}}]}'},
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_pass_is_tried_again_and_nothing_of_it_is_kept(
    name: str, endpoint, connect, fault, cache_file: Path
) -> None:
    answer_in_turn(endpoint, fault(**FAULTS[name]), fault(**FAULTS[name]), "0.7")
    assert connect().ask(make_case(), MESSAGES) == "0.7"
    assert len(endpoint.requests) == 3
    assert [json.loads(line)["reply"] for line in cache_file.read_text().splitlines()] == ["0.7"]


def test_a_connection_that_breaks_is_tried_again(endpoint, connect) -> None:
    answer_in_turn(endpoint, None, None, "0.7")
    assert connect().ask(make_case(), MESSAGES) == "0.7"


def test_a_silent_endpoint_is_given_up_after_its_time_and_tried_again(endpoint, connect, fault) -> None:
    answer_in_turn(endpoint, fault(delay_seconds=60), "0.7")
    started = time.monotonic()
    assert connect(timeout_seconds=1.5).ask(make_case(), MESSAGES) == "0.7"
    assert 1.4 < time.monotonic() - started < 50


def test_an_endpoint_that_stays_silent_ends_in_one_line(endpoint, connect, fault) -> None:
    endpoint.respond = lambda body: fault(delay_seconds=1)
    with pytest.raises(InputError, match=r"gave no reply in 2 tries, the last time: no answer within 0.1 seconds"):
        connect(timeout_seconds=0.1, max_tries=2).ask(make_case(), MESSAGES)


def test_an_empty_reply_is_a_reply(endpoint, connect) -> None:
    answer_in_turn(endpoint, "")
    assert connect().ask(make_case(), MESSAGES) == ""
    assert connect().ask(make_case(), MESSAGES) == ""


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_pause_that_the_endpoint_asks_for_is_kept(form: str, endpoint, connect, fault) -> None:
    now = time.time()
    due = now + 1 if form == "seconds" else int(now) + 2
    wanted = "1" if form == "seconds" else formatdate(due, usegmt=True)
    answer_in_turn(endpoint, fault(status=429, body="{}", headers=(("Retry-After", wanted),)), "0.7")
    assert connect().ask(make_case(), MESSAGES) == "0.7"
    assert time.time() > due - 0.1


def test_pauses_grow_up_to_a_limit(endpoint, connect, fault, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.respond = lambda body: fault(status=503, body="{}")
    judge, pauses = connect(first_pause_seconds=8.0), []

    async def wait_for(task: Awaitable, limit: float) -> object:
        if inspect.iscoroutine(task) and task.__qualname__ == "Event.wait":
            pauses.append(limit)
            limit = 0.01
        return await wait_for_real(task, limit)

    wait_for_real = asyncio.wait_for
    monkeypatch.setattr(asyncio, "wait_for", wait_for)
    with pytest.raises(InputError, match=r"gave no reply in 6 tries, the last time: HTTP 503"):
        judge.ask(make_case(3), MESSAGES)
    assert len(endpoint.requests) == 6
    assert [round(pause / full) for pause, full in zip(pauses, (8, 16, 30, 30, 30), strict=True)] == [1] * 5
    assert len({pause / full for pause, full in zip(pauses, (8, 16, 30, 30, 30), strict=True)}) > 1


@pytest.mark.parametrize(
    ("status", "body", "headers", "words"),
    [
        (401, '{"error": {"message": "wrong key"}}', (), r"refuses: HTTP 401 \(.*wrong key"),
        (404, '{"error": {"message": "no such model"}}', (), r"refuses: HTTP 404 \(.*no such model"),
        (400, '{"error": {"message": "too long"}}', (), r"refuses: HTTP 400 \(.*too long"),
        (429, '{"error": {"message": "pay", "code": "insufficient_quota"}}', (), r"refuses: HTTP 429 \(.*pay"),
        (429, '{"error": {"message": "tomorrow"}}', (("Retry-After", "86400"),), r"refuses: HTTP 429 \(.*tomorrow"),
    ],
)
def test_what_no_waiting_cures_is_told_at_once(
    status: int, body: str, headers: tuple, words: str, endpoint, connect, fault
) -> None:
    endpoint.respond = lambda request: fault(status=status, body=body, headers=headers)
    with pytest.raises(InputError, match=words) as error:
        connect().ask(make_case(5), MESSAGES)
    assert len(endpoint.requests) == 1
    assert "(mmvet, question v1_5)" in str(error.value)
    assert "the answers are ready, 0 replies are kept in" in str(error.value)


def test_a_server_that_wants_a_key_is_told_from_one_that_does_not(endpoint, connect, fault) -> None:
    assert connect(key=None).ask(make_case(), MESSAGES) == "1.0"
    endpoint.respond = lambda body: fault(status=401, body="{}")
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        connect(key=None).ask(make_case(1), MESSAGES)


def test_nobody_at_the_address_ends_in_one_line(cache_file: Path) -> None:
    pytest.importorskip("openai")
    judge = ApiJudge(
        "m", ReplyCache(cache_file), address="http://127.0.0.1:9/v1", first_pause_seconds=0.001, max_tries=2
    )
    with pytest.raises(InputError, match=r"judge m at http://127.0.0.1:9/v1/ gave no reply in 2 tries.*no connection"):
        judge.ask(make_case(), MESSAGES)


def test_a_reply_is_asked_for_once_and_found_again_by_all_that_it_depends_on(endpoint, connect) -> None:
    def ask(judge: ApiJudge, case: Case, text: str = "?", **options: float) -> None:
        judge.ask(case, [{"role": "user", "content": text}], **options)

    variants = [
        lambda judge: ask(judge, make_case()),
        lambda judge: ask(judge, make_case(1)),
        lambda judge: ask(judge, make_case(task="llavabench")),
        lambda judge: ask(judge, make_case(), "!"),
        lambda judge: ask(judge, make_case(), attempt=1),
        lambda judge: ask(judge, make_case(), temperature=0.5),
        lambda judge: ask(judge, make_case(), max_tokens=3),
    ]
    for variant in variants:
        variant(connect())
    assert len(endpoint.requests) == len(variants)
    for variant in variants:
        variant(connect())
    assert len(endpoint.requests) == len(variants)


def test_replies_of_one_model_are_not_another_models(endpoint, connect, cache_file: Path) -> None:
    connect().ask(make_case(), MESSAGES)
    ApiJudge("gpt-4o", ReplyCache(cache_file), address=endpoint.address).ask(make_case(), MESSAGES)
    assert [body["model"] for body in endpoint.requests] == ["gpt-4-0613", "gpt-4o"]


def test_items_are_judged_together_and_come_back_in_order(endpoint, connect) -> None:
    gate = threading.Barrier(4)

    def judge_one(number: int) -> str:
        gate.wait(60)
        return connect().ask(make_case(number), [{"role": "user", "content": str(number)}])

    endpoint.respond = lambda body: body["messages"][0]["content"]
    assert connect(num_threads=4).map(judge_one, range(8)) == [str(number) for number in range(8)]


def test_the_first_failure_stops_the_rest_and_what_came_before_is_not_asked_again(endpoint, connect, fault) -> None:
    broken = True

    def respond(body: dict) -> object:
        number = int(body["messages"][0]["content"])
        return fault(status=400, body="{}") if broken and number == 5 else str(number)

    def judge_one(number: int) -> str:
        return judge.ask(make_case(number), [{"role": "user", "content": str(number)}])

    endpoint.respond = respond
    judge = connect(num_threads=1)
    with pytest.raises(InputError, match=r"question v1_5.*5 replies are kept"):
        judge.map(judge_one, range(300))
    assert len(endpoint.requests) == 6
    broken, before = False, len(endpoint.requests)
    judge = connect(num_threads=1)
    assert judge.map(judge_one, range(12)) == [str(number) for number in range(12)]
    assert len(endpoint.requests) - before <= 7
    assert judge.map(judge_one, range(12)) == [str(number) for number in range(12)]


def test_threads_in_a_pause_stop_with_the_first_failure(endpoint, connect, fault) -> None:
    def respond(body: dict) -> object:
        fatal = body["messages"][0]["content"] == "0"
        return fault(status=403, body="{}") if fatal else fault(429, "{}", (("Retry-After", "60"),))

    endpoint.respond = respond
    judge, started = connect(num_threads=4), time.monotonic()
    with pytest.raises(InputError, match="refuses: HTTP 403"):
        judge.map(lambda number: judge.ask(make_case(number), [{"role": "user", "content": str(number)}]), [3, 2, 1, 0])
    assert time.monotonic() - started < 50


@pytest.mark.parametrize("cut", [1, 5, 9, 10, 60, 150])
def test_a_torn_last_line_is_asked_again_and_spoils_nothing(cut: int, endpoint, connect, cache_file: Path) -> None:
    endpoint.respond = lambda body: body["messages"][0]["content"]

    def ask_all() -> list[str]:
        judge = connect()
        return [judge.ask(make_case(number), [{"role": "user", "content": str(number)}]) for number in range(3)]

    assert ask_all() == ["0", "1", "2"]
    whole = cache_file.read_bytes()
    lines = whole.splitlines(keepends=True)
    cache_file.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
    assert ask_all() == ["0", "1", "2"]
    assert ask_all() == ["0", "1", "2"]
    assert len(endpoint.requests) == 4


def test_a_last_line_that_only_lacks_its_newline_counts(endpoint, connect, cache_file: Path) -> None:
    connect().ask(make_case(), MESSAGES)
    cache_file.write_bytes(cache_file.read_bytes().rstrip(b"\n"))
    judge = connect()
    judge.ask(make_case(), MESSAGES)
    judge.ask(make_case(1), MESSAGES)
    assert len(endpoint.requests) == 2
    assert len(ReplyCache(cache_file)) == 2


@pytest.mark.parametrize(
    "content", ['{"question_id": 1, "text": "x"}\n', "[1]\n", "hello\n", '{"key": "a", "reply": 1}\n']
)
def test_a_file_of_something_else_is_no_cache_and_stays_as_it_is(content: str, cache_file: Path) -> None:
    cache_file.parent.mkdir()
    cache_file.write_text(content)
    with pytest.raises(InputError, match=r"line 1 is no reply of a judge: give --judge-cache a file of its own"):
        ReplyCache(cache_file)
    assert cache_file.read_text() == content


def test_a_cache_that_cannot_be_read_or_written_ends_in_one_line(connect, cache_file: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read /dev/null/x\.jsonl: Not a directory"):
        ReplyCache(Path("/dev/null/x.jsonl"))
    judge = connect()
    cache_file.parent.write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*run\.judge\.jsonl: "):
        judge.ask(make_case(), MESSAGES)


def test_where_two_runs_asked_the_same_the_first_reply_stays(cache_file: Path) -> None:
    caches = ReplyCache(cache_file), ReplyCache(cache_file)
    assert [cache.keep("k", reply) for cache, reply in zip(caches, "ab", strict=True)] == ["a", "b"]
    assert caches[0].keep("k", "c") == "a"
    assert ReplyCache(cache_file).find("k") == "a"


def test_replies_of_any_text_come_back_as_they_were(cache_file: Path) -> None:
    replies = ["", "\n", "\u2028 \x85", "你好", "\ud83d", '"}\\']  # with a lone surrogate
    cache = ReplyCache(cache_file)
    for number, reply in enumerate(replies):
        cache.keep(str(number), reply)
    again = ReplyCache(cache_file)
    assert [again.find(str(number)) for number in range(len(replies))] == replies


SCRIPT = """
import sys
from pathlib import Path
from llava.eval.judge import ApiJudge, ReplyCache
from llava.eval.benchmark import Case
judge = ApiJudge("m", ReplyCache(Path(sys.argv[1])), address=sys.argv[2], num_threads=4)
def ask(number):
    return judge.ask(Case("mmvet", str(number), "", (), ""), [{"role": "user", "content": str(number)}])
print(judge.map(ask, range(40)))
"""


def test_a_killed_run_that_is_resumed_asks_only_what_is_missing(endpoint, cache_file: Path, fault) -> None:
    body = '{"choices": [{"index": 0, "message": {"role": "assistant", "content": "%s"}}]}'
    allowed = 0  # requests beyond this many get no reply, so that no run ends before it is killed

    def respond(request: dict) -> object:
        return fault(
            body=body % request["messages"][0]["content"], delay_seconds=60 * (len(endpoint.requests) > allowed)
        )

    endpoint.respond = respond
    command = [sys.executable, "-c", SCRIPT, str(cache_file), endpoint.address]
    for target in (5, 20):
        allowed = len(endpoint.requests) + target
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not cache_file.exists() or cache_file.read_bytes().count(b"\n") < target):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    kept = len(ReplyCache(cache_file))
    assert 20 <= kept < 40
    before = len(endpoint.requests)
    allowed = before + 40
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([str(number) for number in range(40)])
    assert len(endpoint.requests) - before == 40 - kept
    # Only what was under way at a kill, on four threads, was asked twice.
    asked = Counter(request["messages"][0]["content"] for request in endpoint.requests)
    assert sum(count - 1 for count in asked.values()) <= 8
    assert len(ReplyCache(cache_file)) == 40


@pytest.fixture
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.mark.parametrize("kind", [None, "api", "gpt-4o"])
@pytest.mark.usefixtures("no_endpoint")
def test_without_an_endpoint_one_line_says_what_is_missing_and_how_to_go_on(kind: str | None, cache_file: Path) -> None:
    with pytest.raises(InputError) as error:
        make_judge(kind, None, cache_file, LLAVABENCH)
    for words in ("the answers are ready", "OPENAI_API_KEY", "OPENAI_BASE_URL", "--judge exact", "offline stand-in"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not cache_file.parent.exists()


@pytest.mark.usefixtures("no_endpoint")
def test_a_benchmark_that_can_do_without_a_judge_does(cache_file: Path) -> None:
    assert make_judge(None, None, cache_file, OPTIONAL) is None
    assert make_judge(None, None, cache_file, POPE) is None
    assert isinstance(make_judge("exact", None, cache_file, OPTIONAL), ExactJudge)
    with pytest.raises(InputError, match="mmbench needs a language model"):
        make_judge("api", None, cache_file, OPTIONAL)
    with pytest.raises(InputError, match="mmbench needs a language model"):
        make_judge(None, "gpt-4o", cache_file, OPTIONAL)


def test_a_key_in_the_environment_alone_makes_no_benchmark_pay_for_a_judge_it_can_do_without(
    endpoint, cache_file: Path
) -> None:
    assert make_judge(None, None, cache_file, OPTIONAL) is None


@pytest.mark.parametrize(
    ("kind", "model", "task", "name"),
    [
        (None, None, LLAVABENCH, "gpt-4-0613"),
        ("api", None, MMVET, "gpt-4-0613"),
        ("api", None, OPTIONAL, "gpt-3.5-turbo-0613"),
        (None, "gpt-4o", MMVET, "gpt-4o"),
        ("gpt-4o", None, MMVET, "gpt-4o"),
        ("gpt-4o", "gpt-4o", MMVET, "gpt-4o"),
        ("exact", None, MMVET, "exact (offline stand-in)"),
    ],
)
def test_the_judge_is_the_published_one_unless_another_is_named(
    kind: str | None, model: str | None, task: object, name: str, endpoint, cache_file: Path
) -> None:
    judge = make_judge(kind, model, cache_file, task)
    assert judge.name == name
    assert judge.offline == (kind == "exact")
    assert judge.ask(make_case(), MESSAGES) == "1.0"
    assert len(endpoint.requests) == (0 if kind == "exact" else 1)


def test_options_that_contradict_are_refused(endpoint, cache_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--judge gpt-4 and --judge-model gpt-4o name two models"):
        make_judge("gpt-4", "gpt-4o", cache_file, MMVET)
    with pytest.raises(InputError, match="--judge exact compares texts: it takes no model"):
        make_judge("exact", "gpt-4o", cache_file, MMVET)
    with pytest.raises(InputError, match="pope is scored by rules"):
        make_judge("exact", None, cache_file, POPE)
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000/v1")
    with pytest.raises(InputError, match=r"OPENAI_BASE_URL must be an address .*'localhost:8000/v1'"):
        make_judge(None, None, cache_file, MMVET)


# Secrets ----------------------------------------------------------------------------------------------------------
KEY = "sk-made-up-Key/42+x"


@pytest.mark.parametrize("key", [f"{KEY}\nsk-other", f"{KEY} ", f"\t{KEY}", f"{KEY}\u200b", f"\u201c{KEY}\u201d"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_printed(
    key: str, endpoint, cache_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    if key.strip() == KEY:
        assert make_judge(None, None, cache_file, MMVET).ask(make_case(), MESSAGES) == "1.0"
        assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"
        return
    with pytest.raises(InputError, match="OPENAI_API_KEY holds a line break, a space or a special character") as error:
        make_judge(None, None, cache_file, MMVET)
    assert "made-up" not in str(error.value)
    with pytest.raises(InputError, match=r"no connection|no chat completion") as error:
        ApiJudge("m", ReplyCache(cache_file), address=endpoint.address, key=key, max_tries=1).ask(make_case(), MESSAGES)
    assert "made-up" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect key: {key}",
        "{key}{key}",
        "x" * 190 + "{key}",
        "got Authorization: Bearer {key}, quoted {quoted}, coded {coded}, upper {upper}",
        "\x1b[31m{key}\x1b]0;title\x07\r\x9b\u202e",
        "in two pieces: {split}",
    ],
)
@pytest.mark.parametrize("form", ["error", "text", "completion of a web page"])
def test_a_key_that_the_endpoint_echoes_is_not_printed_nor_its_control_characters(
    text: str, form: str, endpoint, connect, fault
) -> None:
    coded = base64.b64encode(KEY.encode()).decode()
    text = text.format(
        key=KEY, quoted=quote(KEY, ""), coded=coded, upper=KEY.upper(), split="\x00\u200b".join((KEY[:7], KEY[7:]))
    )
    if form == "error":
        answer = fault(401, json.dumps({"error": {"message": text}}))
    else:
        answer = fault(401 if form == "text" else 200, text, content_type="text/plain")
    endpoint.respond = lambda body: answer
    with pytest.raises(InputError, match=r"refuses: HTTP 401|no chat completion") as error:
        connect(key=KEY, max_tries=2).ask(make_case(), MESSAGES)
    said = str(error.value)
    for secret in (KEY, KEY.upper(), quote(KEY, ""), coded.rstrip("="), "made-up"):
        assert secret not in said
    assert said.isprintable()


def test_a_key_that_a_reply_echoes_is_not_stored(endpoint, connect, cache_file: Path) -> None:
    endpoint.respond = lambda body: f"8 7\nYour key is {KEY}."
    assert connect(key=KEY).ask(make_case(), MESSAGES) == "8 7\nYour key is ***."
    assert "made-up" not in cache_file.read_text()


def test_a_placeholder_key_does_not_change_replies(endpoint, connect) -> None:
    endpoint.respond = lambda body: "8 7\nAn EMPTY plate."
    assert connect(key="EMPTY").ask(make_case(), MESSAGES) == "8 7\nAn EMPTY plate."
    assert connect(key="8").ask(make_case(1), MESSAGES) == "8 7\nAn EMPTY plate."


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("user:SeCrEt-1@", ""),
        ("SeCrEt-1@", ""),
        ("user:SeCrEt%2D1@", ""),
        ("", "?api_key=SeCrEt-1"),
        ("", "?api-version=2&key=SeCrEt-1"),
        ("", "#SeCrEt-1"),
    ],
)
@pytest.mark.parametrize("form", ["status", "echo", "silence"])
def test_a_key_in_the_address_is_not_printed(before: str, after: str, form: str, endpoint, connect, fault) -> None:
    address = endpoint.address.replace("http://", f"http://{before}") + after
    body = json.dumps({"error": {"message": f"bad request to {address} SeCrEt-1 {quote('SeCrEt-1')}"}})
    endpoint.respond = lambda _: None if form == "silence" else fault(400, body if form == "echo" else "{}")
    with pytest.raises(InputError, match=rf"judge gpt-4-0613 at {endpoint.address}/ (refuses|gave no)") as error:
        connect(address=address, max_tries=2).ask(make_case(), MESSAGES)
    for secret in ("SeCrEt-1", "SeCrEt%2D1"):
        assert secret not in str(error.value)


def test_a_query_of_the_address_goes_with_every_request(endpoint, connect) -> None:
    endpoint.path = "/v1/chat/completions?api_key=a%2Bb&api-version=2"
    assert connect(address=f"{endpoint.address}?api_key=a%2Bb&api-version=2").ask(make_case(), MESSAGES) == "1.0"


@pytest.mark.parametrize(
    "address",
    [
        "user:SeCrEt@host/v1",
        "host/v1?api_key=SeCrEt",
        "ftp://user:SeCrEt@host",
        "http://user:Se/SeCrEt@host/v1",
        "http://user:Se?SeCrEt@host/v1",
        "http://host:SeCrEt@/v1",
        "https://user:SeCrEt@host:port/v1",
        "http://[SeCrEt@host",
        "http://SeCrEt@",
        "http://user:SeCrEt@ho\x1bst/v1",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_key(
    address: str, endpoint, cache_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(InputError, match="OPENAI_BASE_URL must be an address") as error:
        make_judge(None, None, cache_file, MMVET)
    assert "SeCrEt" not in str(error.value)
    assert str(error.value).isprintable()


# Time -------------------------------------------------------------------------------------------------------------
def trickle(fault: type) -> object:
    """A reply of a byte every now and then, without end."""
    return fault(body=" " * 10_000, seconds_per_byte=0.05)


def test_a_reply_that_trickles_is_given_up_after_its_time_and_tried_again(endpoint, connect, fault) -> None:
    answer_in_turn(endpoint, trickle(fault), "0.7")
    started = time.monotonic()
    assert connect(timeout_seconds=1).ask(make_case(), MESSAGES) == "0.7"
    assert 0.9 < time.monotonic() - started < 30


@pytest.mark.parametrize("kind", ["trickle", "silence", "overload"])
def test_a_question_has_a_deadline_over_all_tries(kind: str, endpoint, connect, fault) -> None:
    answers = {"trickle": trickle(fault), "silence": fault(delay_seconds=60), "overload": fault(503, "{}")}
    endpoint.respond = lambda body: answers[kind]
    started = time.monotonic()
    with pytest.raises(InputError, match=r"gave no reply in \d+ (try|tries), the last time: "):
        connect(timeout_seconds=0.4, deadline_seconds=1.5, max_tries=10_000, first_pause_seconds=0.1).ask(
            make_case(), MESSAGES
        )
    assert 0.3 < time.monotonic() - started < 30
    assert len(endpoint.requests) < 100


INTERRUPT = """
import sys
from pathlib import Path
from llava.errors import run_command
from llava.eval.benchmark import Case
from llava.eval.judge import ApiJudge, ReplyCache
def main():
    judge = ApiJudge("m", ReplyCache(Path(sys.argv[1])), address=sys.argv[2], num_threads=3)
    def ask(number):
        return judge.ask(Case("mmvet", str(number), "", (), ""), [{"role": "user", "content": str(number)}])
    ask(-1)
    print("asks", flush=True)
    judge.map(ask, range(40))
run_command(main)
"""


@pytest.mark.parametrize("kind", ["silence", "trickle", "pause", "failure of another question"])
def test_ctrl_c_ends_within_seconds_whatever_the_judge_does(kind: str, endpoint, cache_file: Path, fault) -> None:
    def respond(body: dict) -> object:
        number = int(body["messages"][0]["content"])
        if number < 2:
            return "1.0"
        if kind == "pause":
            return fault(429, "{}", (("Retry-After", "60"),))
        if kind.startswith("failure") and number == 4:
            return fault(403, "{}", delay_seconds=0.5)
        return trickle(fault) if kind == "trickle" else fault(delay_seconds=90)

    endpoint.respond = respond
    command = [sys.executable, "-c", INTERRUPT, str(cache_file), endpoint.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "asks\n"
    while len(endpoint.requests) < 6:
        time.sleep(0.01)
    time.sleep(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert len(ReplyCache(cache_file)) == 3


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_an_endpoint_with_a_certificate_of_its_own_making_is_not_trusted(cache_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "certificate.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", *files]
    subprocess.run(command, check=True, capture_output=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"https://127.0.0.1:{server.server_port}/v1"
    judge = ApiJudge("m", ReplyCache(cache_file), address=address, first_pause_seconds=0.001, max_tries=2)
    try:
        with pytest.raises(InputError, match=r"no connection \(.*CERTIFICATE_VERIFY_FAILED"):
            judge.ask(make_case(), MESSAGES)
    finally:
        server.shutdown()
        server.server_close()


def test_no_source_of_ours_switches_the_check_of_certificates_off(repository: Path) -> None:
    off = [path for path in (repository / "llava" / "eval").rglob("*.py") if "verify=" in path.read_text()]
    assert not off


@pytest.mark.parametrize(
    ("task", "references", "prediction", "options", "reply"),
    [
        ("mmvet", ("cat",), "It is a CAT.", None, "1.0"),
        ("mmvet", ("cat",), "It is a category.", None, "0.0"),
        ("mmvet", ("a cat<AND>a dog",), "a dog", None, "0.5"),
        ("mmvet", ("cat<AND>dog<AND>cow",), "cow and dog", None, "0.7"),
        ("mmvet", ("cat<OR>dog",), "a dog", None, "1.0"),
        ("mmvet", ("violin<AND>sofa<OR>ivory",), "ivory", None, "0.5"),
        ("mmbench", (), "I would say it is the red one", {"A": "a blue ball", "B": "a red ball"}, "B"),
        ("mmbench", (), "no idea", {"A": "blue", "B": "red"}, "Z"),
        ("mmbench_cn", (), "那是红色的", {"A": "蓝色", "B": "红色"}, "B"),
    ],
)
def test_the_offline_stand_in_compares_texts(
    task: str, references: tuple, prediction: str, options: dict | None, reply: str
) -> None:
    case = Case(task, "1", "What?", references, prediction, options)
    assert ExactJudge(find_benchmark(case.task)).ask(case, MESSAGES) == reply


def test_the_offline_stand_in_rates_llavabench_between_1_and_10_by_common_words() -> None:
    def rate(prediction: str) -> float:
        case = Case("llavabench", "1", "What?", ("A cat sits on a mat.",), prediction)
        first, second = map(float, ExactJudge(find_benchmark(case.task)).ask(case, MESSAGES).split("\n")[0].split(" "))
        assert first == 10
        return second

    assert rate("a cat sits on a mat") == 10
    assert rate("nothing of that") == 1
    assert 1 < rate("a cat") < rate("a cat on a mat") < 10


def test_every_judged_benchmark_has_an_offline_stand_in() -> None:
    judged = {name for name, task in BENCHMARKS.items() if task.uses_judge != "never"}
    for name in judged:
        case = Case(name, "1", "What?", ("a cat",), "a cat", {"A": "a cat", "B": "a dog"})
        assert BENCHMARKS[name].offline_reply(case)
