"""A benchmark's questions to a model behind an OpenAI-compatible server: the answers file of `llava.eval.predict`.

Images are decoded here, as for a model in this process, and sent as PNG: the server sees the same pixels. Runs resume,
share their questions among workers and are told apart by the same rules; what a server loads is known by its address
and the model's name alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError
from llava.eval.benchmark import ImageSource, Question, index_questions
from llava.eval.endpoint import Endpoint, EndpointFault, read_variables, show
from llava.eval.identity import identify_questions
from llava.eval.predict import MIN_UNIT, Fault, Outcome, Sink, claim_units, keep_answers, plan_units
from llava.eval.predictions import check_workers, make_row
from llava.image import load_image, to_data_url
from llava.picture import Picture
from llava.prompt import place_images, query_of
from llava.sampling import Sampling

REFUSED_QUESTION = (400, 413, 415, 422)
"""HTTP statuses that are about a question, not about the server: the others are asked."""
MAX_REFUSED = 16
"""So many refusals before the first answer mean that the server refuses what all questions have in common."""


@dataclass(frozen=True)
class RemoteModel:
    """A model behind a server.

    Attributes:
        address: of the server, such as http://localhost:8000/v1.
        name: of the model there.
        reduce: token reduction, for `llava.serve`, which then also reads what the CLIP text tower shall read; None: the
            server's own, and nothing is sent that OpenAI's protocol lacks.
        takes_query: whether the server reads what the CLIP text tower shall read without a `reduce`, too.
    """

    address: str
    name: str
    reduce: str | None = None
    takes_query: bool = False

    def describe(self) -> dict[str, object]:
        """What answers depend on, of what can be known."""
        place = show(self.address)
        return {"path": self.name, "endpoint": place, "checkpoint": f"{self.name} at {place}", "reduce": self.reduce}


def ask_server(
    model: RemoteModel,
    questions: Sequence[Question],
    answers_file: Path,
    sampling: Sampling,
    key_fields: Sequence[str],
    *,
    batch_size: int,
    num_workers: int = 1,
    limit: int | None = None,
    worker: int = 0,
    notify: Callable[[str], None],
) -> Outcome:
    """Answer questions into a file, as `predict.make_answers` does.

    Args:
        model: where and what to ask; a key comes from `OPENAI_API_KEY`.
        questions: all questions of the file.
        answers_file: where the answers go.
        sampling: how answers are searched for.
        key_fields: columns that together name a question.
        batch_size: requests under way at a time.
        num_workers: workers that share the questions.
        limit: answer only this number of questions, from the start.
        worker: number of this worker.
        notify: is given, in one line each, what a person should know.

    Raises:
        InputError: as `make_answers`; beams; the server is not there or refuses what all questions have in common.
    """
    if sampling.num_beams != 1:
        raise InputError(f"--num-beams {sampling.num_beams}: a server searches without beams")
    check_workers(num_workers)
    index_questions(questions, key_fields)
    run = {
        **model.describe(),
        "questions": identify_questions(questions, key_fields),
        "model_id": model.name,
        **asdict(sampling),
    }

    return keep_answers(
        run, questions, answers_file, key_fields, limit=limit, worker=worker, notify=notify,
        load=lambda: Client(model, sampling),
        ask=partial(ask_by_units, batch_size=batch_size, num_workers=num_workers),
    )  # fmt: skip


def ask_by_units(
    client: "Client", asked: Sequence[Question], sink: Sink, model_id: str, *, batch_size: int, num_workers: int
) -> list[Fault]:
    """Ask all questions that the sink does not have, unit by unit, where several workers share them.

    Args:
        client: asks.
        asked: all questions, answered or not.
        sink: takes the answers.
        model_id: name of the model in the answers file.
        batch_size: requests under way at a time.
        num_workers: workers that share the questions.

    Raises:
        InputError: as `Client.answer`.
    """
    faults = [Fault(question, question.fault) for question in asked if question.fault]
    sound = [question for question in asked if not question.fault]
    size = MIN_UNIT if num_workers > 1 else max(1, len(sound))
    for todo in claim_units(plan_units(sound, size, num_workers), sink):
        faults += client.answer(todo, sink, model_id, batch_size)
    return faults


class Client:
    """Sends questions, several at a time."""

    def __init__(self, model: RemoteModel, sampling: Sampling, **patience: float):
        """Connect to nothing yet; `patience` as for `Endpoint`."""
        key, _ = read_variables()
        self._model, self._sampling = model, sampling
        self._endpoint = Endpoint(model.address, key, **patience)
        self._lock = Lock()
        self._num_answered = self._num_refused = 0

    def answer(self, questions: Sequence[Question], sink: Sink, model_id: str, num_threads: int) -> list[Fault]:
        """Ask questions, and hand each answer to the sink as it comes.

        Returns:
            The questions that have an unreadable image, or that the server refuses.

        Raises:
            InputError: the server is not there, or refuses what all questions have in common.
        """

        def ask(question: Question) -> Fault | None:
            try:
                request = self.make_request(question)
            except (ValueError, OSError) as error:  # InputError is a ValueError
                return Fault(question, str(error))
            try:
                completion = self._endpoint.complete(request)
            except EndpointFault as fault:
                return self._refuse(question, fault)
            text = completion.choices[0].message.content.strip()
            with self._lock:
                self._num_answered += 1
                sink.append([make_row(question, text, model_id, read_usage(completion.usage))])
            return None

        results = self._endpoint.map(ask, questions, num_threads, model_id)
        return [fault for fault in results if fault is not None]

    def make_request(self, question: Question) -> dict[str, Any]:
        """Write a question in OpenAI's words: its images as PNG, where they stand in the prompt.

        Raises:
            InputError: an image cannot be read, or placeholders do not fit the images.
        """
        texts = place_images(question.prompt, len(question.images)).split(DEFAULT_IMAGE_TOKEN)
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(texts):
            if number:
                url = encode_image(question.images[number - 1])
                parts.append({"type": "image_url", "image_url": {"url": url}})
                text = text.removeprefix("\n")  # the server puts each part on a line of its own
            if number < len(texts) - 1:
                text = text.removesuffix("\n")
            if text:
                parts.append({"type": "text", "text": text})
        sampling = self._sampling
        request: dict[str, Any] = {
            "model": self._model.name,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.top_p is not None and sampling.temperature:
            request["top_p"] = sampling.top_p
        model = self._model
        own = {} if model.reduce is None else {"reduce": model.reduce}
        has_own_query = question.query.strip() != query_of(question.prompt).strip()
        if has_own_query and (own or model.takes_query):
            own["query"] = question.query
        return request | ({"extra_body": own} if own else {})

    def _refuse(self, question: Question, fault: EndpointFault) -> Fault:
        """Tell a fault of one question from one that every question would meet."""
        with self._lock:
            self._num_refused += 1
            is_everyones = not self._num_answered and self._num_refused >= MAX_REFUSED
        if fault.status not in REFUSED_QUESTION or is_everyones:
            raise InputError(
                f"{self._model.name} at {self._endpoint.place} {fault} (question {question.id}); answers so far are "
                "kept: the same command goes on from there"
            )
        return Fault(question, f"the server {fault}")


def encode_image(source: ImageSource) -> str:
    """Decode an image and write it as a PNG inside an address.

    Raises:
        InputError: it cannot be read.
    """
    image = source.load() if isinstance(source, Picture) else load_image(source)
    return to_data_url(image, compress_level=1)


def read_usage(usage: object) -> dict[str, int]:
    """Read how many image tokens a prompt has after and before reduction, where the server says so."""
    details = getattr(usage, "prompt_tokens_details", None)
    counts = {
        "num_tokens": getattr(details, "image_tokens", None),
        "num_patches": getattr(details, "image_patches", None),
    }
    return counts if all(isinstance(count, int) for count in counts.values()) else {}
