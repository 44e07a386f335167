"""An answer's tokens to its text, as they come: whole characters, and nothing of a text that ends the answer.

What is handed out adds up to what decoding all tokens at once gives, up to the first stop text.
"""

from collections.abc import Mapping, Sequence

from llava.protocols import Tokenizer
from llava.serve.engine import Prompt, Search

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes a part of a character to."""


class AnswerText:
    """The text of one answer.

    Attributes:
        is_stopped: a stop text has come; nothing follows.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        """Begin an answer that any of these texts ends."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._first = self._read = 0  # tokens before `_read` are decoded; those from `_first` on say how it goes on
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take the next token; returns the text that is certain now, often that of tokens before it."""
        self._ids.append(token)
        new = self._decode_new()
        # A token without text, such as a special one, says nothing about the space before the next.
        if not new or new.endswith(INCOMPLETE):
            return ""
        self._first, self._read = self._read, len(self._ids)
        self._held += new
        return self._release(is_last=False)

    def finish(self) -> str:
        """End the answer; returns what was held back."""
        if not self.is_stopped:
            self._held += self._decode_new()
        self._ids, self._first, self._read = [], 0, 0
        return self._release(is_last=True)

    def _decode_new(self) -> str:
        """Decode what is behind `_read`, with tokens before it: some tokenizers drop the space of a first token."""
        before, both = (
            self._tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (self._ids[self._first : self._read], self._ids[self._first :])
        )
        return both[len(before) :]

    def _release(self, *, is_last: bool) -> str:
        """Hand out held text up to a stop text, or up to what may become one."""
        held = self._held
        found = [place for place in map(held.find, self._stop) if place >= 0]
        if found:
            self.is_stopped = True
        size = min(found) if found else len(held) if is_last else len(held) - self._count_begun(held)
        self._held = "" if found else held[size:]
        return held[:size]

    def _count_begun(self, text: str) -> int:
        """Count the characters at the end of a text with which a stop text may begin."""
        longest = max(map(len, self._stop), default=1) - 1
        return next((n for n in range(min(longest, len(text)), 0, -1) if self._begins_stop(text[-n:])), 0)

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)


class TokenNames:
    """Texts of single tokens as they are inside an answer: with a space that some tokenizers drop at its beginning."""

    def __init__(self, tokenizer: Tokenizer):
        """Name the tokens of a tokenizer; texts are remembered."""
        self._tokenizer = tokenizer
        self._anchor = list(tokenizer("a", add_special_tokens=False).input_ids)
        self._start = len(tokenizer.decode(self._anchor, skip_special_tokens=False))
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        """Return the text of a token."""
        if token not in self._known:
            both = self._tokenizer.decode([*self._anchor, token], skip_special_tokens=False)
            self._known[token] = both[self._start :]
        return self._known[token]


def find_ends(
    prompt: Prompt, search: Search, ends: frozenset[int], added: Mapping[str, int]
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Find out what ends an answer.

    Args:
        prompt: whose template may have an end of its own.
        search: with stop texts.
        ends: end tokens of the checkpoint.
        added: tokens of the tokenizer that its texts do not show, by name.

    Returns:
        Tokens, and texts.
    """
    if prompt.end in added:
        return ends | {added[prompt.end]}, search.stop
    return ends, search.stop if prompt.end is None else (*search.stop, prompt.end)
