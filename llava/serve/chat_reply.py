"""Answers as OpenAI's JSON: one completion, or the chunks of a stream."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.serve.engine import Piece, Prompt, TokenLogprob


@dataclass
class Choice:
    """One of the answers to a request, as far as it has come."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def num_tokens(self) -> int:
        """All tokens so far, the end token included."""
        return sum(len(piece.token_ids) for piece in self.pieces)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """All probabilities so far."""
        return [each for piece in self.pieces for each in piece.logprobs]

    @property
    def finish_reason(self) -> str | None:
        """None until the answer has ended."""
        return self.pieces[-1].finish_reason if self.pieces else None


class Completion:
    """The answers to one request.

    Attributes:
        choices: one for each answer that was asked for.
    """

    def __init__(self, model: str, prompt: Prompt, num_choices: int, has_logprobs: bool):
        """Start without text.

        Args:
            model: its name.
            prompt: what is answered.
            num_choices: how many answers there will be.
            has_logprobs: whether probabilities were asked for.
        """
        self.choices = [Choice() for _ in range(num_choices)]
        self._prompt = prompt
        self._has_logprobs = has_logprobs
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def add(self, index: int, piece: Piece) -> None:
        """Take in a piece of one answer."""
        self.choices[index].pieces.append(piece)

    def to_json(self) -> dict[str, Any]:
        """Return the completion."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._show_logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": self.count_usage()}

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Return the chunk that says who writes an answer."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece."""
        delta = {"content": piece.text} if piece.text or piece.logprobs else {}
        return self._chunk(index, delta, self._show_logprobs(piece.logprobs), piece.finish_reason)

    def last_chunk(self) -> dict[str, Any]:
        """Return the chunk that says what was used."""
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self.count_usage()}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def count_usage(self) -> dict[str, Any]:
        """Count tokens; those of the prompt after reduction, with what its images take of them and took before."""
        written = sum(choice.num_tokens for choice in self.choices)
        details = {
            "image_tokens": sum(image.num_tokens for image in self._prompt.images),
            "image_patches": sum(image.num_patches for image in self._prompt.images),
        }
        return {
            "prompt_tokens": self._prompt.num_tokens,
            "completion_tokens": written,
            "total_tokens": self._prompt.num_tokens + written,
            "prompt_tokens_details": details,
        }

    def _show_logprobs(self, records: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        content = [
            _show_token(each.text, each.logprob)
            | {"top_logprobs": [_show_token(text, logprob) for _, text, logprob in each.top]}
            for each in records
        ]
        return {"content": content, "refusal": None}


def _show_token(text: str, logprob: float) -> dict[str, Any]:
    # A token may be a part of a character, which is no text: its bytes are not known here.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": known}


def list_models(names: Iterable[str], created: int, **details: Any) -> dict[str, Any]:
    """Return the list of models, each with what else is told of it."""
    models = [{"id": name, "object": "model", "created": created, "owned_by": "llava", **details} for name in names]
    return {"object": "list", "data": models}
