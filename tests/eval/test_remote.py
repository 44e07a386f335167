"""A benchmark's questions to a server: the answers file of a model that is loaded here, resumed and refused alike."""

import base64
import gc
import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from llava import Llava
from llava.errors import InputError
from llava.eval.benchmark import Question
from llava.eval.remote import Client, RemoteModel
from llava.picture import Picture
from llava.sampling import Sampling
from tests.eval.conftest import SUFFIX
from tests.eval.test_commands import answer, run

NAME = "llava-tiny"


def ask_endpoint(folder: Path, answers: Path, endpoint, *options: object):
    return answer(folder, answers, NAME, "--endpoint", endpoint.address, *options)


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_parts(body: dict) -> list[Image.Image | str]:
    """Images and texts of a request."""
    (message,) = body["messages"]
    assert message["role"] == "user"
    return [
        Image.open(BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
        if part["type"] == "image_url"
        else part["text"]
        for part in message["content"]
    ]


@pytest.fixture
def make_client(endpoint):
    def make(reduce: str | None = None, **sampling: object) -> Client:
        model = RemoteModel(endpoint.address, NAME, reduce)
        return Client(model, Sampling(**sampling), first_pause_seconds=0.001, max_tries=2)

    return make


class Rows(list):
    """A sink in memory."""

    def append(self, rows: list[dict]) -> None:
        self.extend(rows)


def test_the_answers_are_those_of_the_same_model_loaded_here(endpoint, make_pope, tiny_checkpoint, tmp_path) -> None:
    folder, here, there = make_pope(), tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    done = answer(folder, here, tiny_checkpoint, "--reduce", "none", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    model = Llava.from_pretrained(tiny_checkpoint, reduce="none", device="cpu")

    def respond(body: dict) -> str:
        image, text = read_parts(body)
        assert body["model"] == NAME and body["temperature"] == 0
        return model.ask(image, text, max_new_tokens=body["max_tokens"]).text

    endpoint.respond = respond
    done = ask_endpoint(folder, there, endpoint)
    assert done.returncode == 0, done.stderr
    rows = read_rows(there)
    assert [row | {"metadata": {}} for row in read_rows(here)] == rows
    assert len(endpoint.requests) == len(rows) == 18
    scored = [run("score", "pope", "--root", folder, "--answers", file).stdout for file in (here, there)]
    assert scored[0] == scored[1] != ""


def test_a_run_goes_on_where_it_stopped_and_never_mixes_with_another(endpoint, make_pope, tmp_path) -> None:
    folder, answers = make_pope(), tmp_path / "answers.jsonl"
    assert ask_endpoint(folder, answers, endpoint, "--limit", 5).returncode == 0
    done = ask_endpoint(folder, answers, endpoint)
    assert done.returncode == 0 and "5 of 18 questions are answered already" in done.stderr
    assert len(endpoint.requests) == 18
    assert ask_endpoint(folder, answers, endpoint).returncode == 0 and len(endpoint.requests) == 18
    done = ask_endpoint(folder, answers, endpoint, "--reduce", "TRIM:0.5")
    assert "held answers of a run with other settings" in done.stderr and len(endpoint.requests) == 36
    described = json.loads((tmp_path / "answers.jsonl.run.json").read_text())
    place = f"{endpoint.address}/"
    assert described["endpoint"] in (endpoint.address, place) and described["reduce"] == "TRIM:0.5"
    assert "sk-made-up" not in json.dumps(described)


def test_workers_share_the_questions_of_a_server(endpoint, make_pope, tmp_path) -> None:
    folder, answers = make_pope(), tmp_path / "answers.jsonl"
    for worker in (0, 1):
        done = ask_endpoint(folder, answers, endpoint, "--workers", 2, "--worker", worker)
        assert done.returncode == 0, done.stderr
    assert len(endpoint.requests) == 18 == len(read_rows(answers))


def test_requests_of_one_run_after_the_other_all_come_back(endpoint, make_client) -> None:
    """Clients that are garbage take no connection of a later one with them."""
    for _ in range(12):
        rows = Rows()
        assert make_client().answer([Question(number, prompt="Hi") for number in range(18)], rows, NAME, 16) == []
        assert len(rows) == 18
        gc.collect()


def test_only_with_a_reduction_more_is_sent_than_openais_protocol_has(make_client) -> None:
    question = Question(1, prompt="Is it red?" + SUFFIX, query="Is it red?")
    plain = make_client().make_request(question)
    assert set(plain) == {"model", "messages", "max_tokens", "temperature"}
    ours = make_client("TRIM:-1", temperature=0.5, top_p=0.9).make_request(question)
    assert ours["extra_body"] == {"reduce": "TRIM:-1", "query": "Is it red?"} and ours["top_p"] == 0.9
    same = make_client("TRIM:-1").make_request(Question(1, prompt="Is it red?", query="Is it red?"))
    assert same["extra_body"] == {"reduce": "TRIM:-1"}


def test_images_are_sent_pixel_by_pixel_where_they_stand(make_client, tmp_path) -> None:
    first, second = Image.effect_noise((9, 5), 80).convert("RGB"), Image.new("RGB", (4, 4), (1, 2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side: the evaluation does not turn it
    second.save(tmp_path / "second.png", exif=exif)
    question = Question(
        1, prompt="One:\n<image>\nTwo:\n<image>\nWhich?", images=(Picture(first), tmp_path / "second.png")
    )
    one, shown, two, other, which = read_parts(make_client().make_request(question))
    assert (one, two, which) == ("One:", "Two:", "Which?")
    assert shown.tobytes() == first.tobytes() and other.tobytes() == second.tobytes()
    assert not other.getexif()
    shown, text = read_parts(make_client().make_request(Question(1, prompt="Which?", images=(Picture(first),))))
    assert isinstance(shown, Image.Image) and text == "Which?"


def test_image_tokens_are_noted_where_the_server_counts_them(endpoint, make_client, fault) -> None:
    details = {"image_tokens": 7, "image_patches": 36}
    message = {"role": "assistant", "content": " Yes. "}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11, "prompt_tokens_details": details}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": NAME, "choices": [choice], "usage": usage}
    endpoint.respond = lambda _: fault(body=json.dumps(body))
    rows = Rows()
    assert make_client().answer([Question(1, prompt="Hi")], rows, NAME, 2) == []
    assert (rows[0]["text"], rows[0]["metadata"]) == ("Yes.", {"num_tokens": 7, "num_patches": 36})


def test_a_question_that_the_server_refuses_stops_no_other(endpoint, make_client, fault, tmp_path) -> None:
    refused = fault(status=400, body='{"error": {"message": "too long"}}')
    endpoint.respond = lambda body: refused if "long" in read_parts(body)[-1] else "Yes"
    questions = [Question(number, prompt="long" if number % 3 == 0 else "Hi") for number in range(60)]
    questions.append(Question(60, prompt="Hi", images=(tmp_path / "nothing.png",)))
    rows = Rows()
    faults = make_client().answer(questions, rows, NAME, 1)
    assert len(rows) == 40 and len(faults) == 21
    assert "refuses: HTTP 400" in faults[0].reason and "nothing.png" in faults[-1].reason


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "HTTP 401"), (404, "HTTP 404"), (500, "gave no reply in 2 tries"), (400, "HTTP 400")]
)
def test_a_server_that_refuses_everything_ends_the_run_in_one_line(
    endpoint, make_client, fault, status, reason
) -> None:
    endpoint.respond = lambda _: fault(status=status, body='{"error": {"message": "no"}}')
    with pytest.raises(InputError, match=reason) as caught:
        make_client().answer([Question(number, prompt="Hi") for number in range(60)], Rows(), NAME, 4)
    assert "the same command goes on from there" in str(caught.value) and "\n" not in str(caught.value)
    assert len(endpoint.requests) < 30


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--endpoint", "localhost:8000"), "--endpoint must be an address"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--device", "cpu"), "--device is for a model that is loaded here"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--conv-mode", "llava_v0"), "the server has the template"),
    ],
)
def test_options_of_a_model_that_is_loaded_here_are_refused(make_pope, tmp_path, options, reason) -> None:
    done = answer(make_pope(), tmp_path / "answers.jsonl", NAME, *options)
    assert done.returncode == 2 and reason in done.stderr


def test_run_asks_a_server_and_scores(endpoint, make_pope, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LLAVA_EVAL_ROOT", str(make_pope().parent))
    monkeypatch.setenv("DRY_RUN", "1")
    done = run("run", "pope", "a-run", NAME, "--", "--endpoint", endpoint.address)
    assert done.returncode == 0, done.stderr
    assert f"--model-path {NAME}" in done.stdout and f"--endpoint {endpoint.address}" in done.stdout


def test_a_result_of_a_server_does_not_claim_what_its_text_tower_read(endpoint, make_pope, tmp_path) -> None:
    folder, answers, scores = make_pope(), tmp_path / "answers.jsonl", tmp_path / "scores.json"
    for options, query in (((), None), (("--reduce", "TRIM:0.5"), "the prompt")):
        assert ask_endpoint(folder, answers, endpoint, *options).returncode == 0
        done = run("score", "pope", "--root", folder, "--answers", answers, "--json", scores)
        assert done.returncode == 0, done.stderr
        protocol = json.loads(scores.read_text())["protocol"]
        assert protocol["query"] == query and protocol["template"] is None
