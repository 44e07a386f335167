"""What a language-model engine of the server is: prompts with their image tokens in, pieces of answers out.

`llava.serve.front` makes a `Prompt` of messages and images: our towers, reducer and projector run there, whatever the
engine that answers. The engines are `torch_engine` (this repository's own loop) and `vllm_engine`.

Shape letters: `L` positions of a prompt, `E` width of the language model.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from llava.errors import InputError
from llava.sampling import Sampling

FINISHED_BY_STOP, FINISHED_BY_LENGTH = "stop", "length"
"""Why an answer ended, in OpenAI's words: its end token or a stop text came, or the length limit."""


@dataclass(frozen=True)
class ImageUse:
    """What one image became in a prompt.

    Attributes:
        num_tokens: positions that it takes in the prompt, after reduction.
        num_patches: patches that the vision tower made of it, over all crops.
    """

    num_tokens: int
    num_patches: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the language model reads it.

    Attributes:
        embeds: `[L, E]`, in the language model's dtype, on the CPU or the model's device.
        images: one record per image, in the order of the prompt.
        key: what the embeddings depend on, as text: the token ids, each image's content, its query, token reduction and
            budget. Prompts with the same key have the same embeddings, others may share no cache entry past what they
            have in common.
        end: text with which the template ends an answer, where that is no end token of the checkpoint: one more stop
            text of the search, or the name of a token of the tokenizer that ends this answer.
    """

    embeds: Tensor
    images: tuple[ImageUse, ...]
    key: str
    end: str | None = None

    @property
    def num_tokens(self) -> int:
        """Positions of the prompt, image tokens after reduction included."""
        return self.embeds.shape[0]


@dataclass(frozen=True)
class Search:
    """How an answer is searched for, as a request says it.

    Attributes:
        sampling: temperature, top_p, length limit and seed; beams are not served.
        stop: texts that end an answer besides the model's end tokens; they are not part of it.
        num_logprobs: so many likeliest tokens are named at each position, besides the chosen one; None: no
            probabilities at all.

    Raises:
        InputError: beams, an empty stop text, or more than 20 likeliest tokens (OpenAI's limit).
    """

    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.sampling.num_beams != 1:
            raise InputError(f"num_beams {self.sampling.num_beams}: a server searches without beams")
        if not all(self.stop):
            raise InputError("stop: an empty text ends every answer before its first token")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= 20:
            raise InputError(f"top_logprobs {self.num_logprobs}: expected 0 to 20")


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability, before temperature."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What has come of an answer since the piece before.

    Attributes:
        text: new text, never a part of a character, an end token or a stop text; may be empty.
        token_ids: new tokens, the end token included.
        logprobs: one record per new token, where the search asks for them.
        finish_reason: None until the last piece.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


class Engine(Protocol):
    """A language model that answers many prompts at a time. All methods belong to one event loop."""

    name: str
    max_positions: int
    """Positions of prompt and answer together."""

    async def start(self) -> None:
        """Load; afterwards `answer` is served without delay."""

    def answer(self, prompt: Prompt, search: Search) -> AsyncIterator[Piece]:
        """Answer one prompt beside whatever else is being answered; greedily, the answer is that of the prompt alone.

        Closing the iterator cancels the answer and frees its place.

        Raises:
            InputError: the prompt leaves no position for an answer.
        """

    def count_waiting(self) -> int:
        """Return how many answers have been asked for and not begun."""

    async def close(self) -> None:
        """Free what the engine holds; answers that are being written end."""
