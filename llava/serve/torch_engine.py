"""The engine without an extra: this repository's model in transformers, with a batch that answers join and leave.

One thread runs the model. Whenever a place is free, prompts that wait are read together and join; each pass then
writes one token of every answer; finished and cancelled ones leave. Every row reads what it would read alone, so a
greedy answer is that of the prompt alone, and draws come from a generator per answer, so a seeded one does not depend
on what is answered beside it.

Where memory does not last, all answers are read anew in fewer places; nothing of them is lost.

Shape letters: `S` rows, `L` positions of a prompt, `E` width of the language model, `V` vocabulary.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from threading import Condition, Thread
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava.errors import InputError
from llava.generation import PLAIN_KEYS
from llava.model.language_model.generation_settings import list_tokens
from llava.protocols import Tokenizer
from llava.sampling import Sampling
from llava.serve.answer_text import AnswerText, TokenNames, find_ends
from llava.serve.engine import FINISHED_BY_LENGTH, FINISHED_BY_STOP, Piece, Prompt, Search, TokenLogprob
from llava.serve.rows import Rows

if TYPE_CHECKING:
    from llava.model.language_model.causal import LlavaCausalLM


class TorchEngine:
    """Answers by `model`; see `engine.Engine`.

    Attributes:
        name: of the engine.
        max_positions: of prompt and answer together.
    """

    name = "torch"

    def __init__(self, model: "LlavaCausalLM", tokenizer: Tokenizer, *, max_batch: int = 16):
        """Take a loaded model.

        Args:
            model: its language model is used.
            tokenizer: of the language model.
            max_batch: answers that are written at a time, at most.

        Raises:
            InputError: no place, or the checkpoint asks for a search that is not this one.
        """
        if max_batch < 1:
            raise InputError(f"max_batch {max_batch}: expected 1 or more")
        unknown = sorted(set(model.generation_config.to_diff_dict()) - PLAIN_KEYS)
        if unknown:
            raise InputError(
                f"generation_config.json asks for {', '.join(unknown)}, which the torch engine does not do: remove it "
                "there, or ask llava.Llava in Python"
            )
        self.max_positions: int = model.config.max_position_embeddings
        self._model = model
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_vocab()
        self._max_batch = self._places = max_batch
        self._ends = frozenset(list_tokens(model.generation_config.eos_token_id))
        self._names = TokenNames(tokenizer)
        self._waiting: deque[_Answer] = deque()
        self._answers: list[_Answer] = []  # in the order of the rows
        self._rows: Rows | None = None
        self._changed = Condition()
        self._is_closing = False
        self._thread: Thread | None = None

    # The event loop's side ----------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Start the thread; the model is loaded already."""
        self._thread = Thread(target=self._serve, name="torch-engine", daemon=True)
        self._thread.start()

    async def answer(self, prompt: Prompt, search: Search) -> AsyncIterator[Piece]:
        """Answer one prompt; see `engine.Engine.answer`.

        Raises:
            InputError: the prompt leaves no position for an answer, or does not fit into memory even alone.
        """
        if prompt.num_tokens >= self.max_positions:
            raise InputError(
                f"the prompt takes {prompt.num_tokens} positions with its image tokens, the model has "
                f"{self.max_positions}: none is left for an answer"
            )
        answer = self._begin(prompt, search)
        with self._changed:
            if self._is_closing:
                return
            self._waiting.append(answer)
            self._changed.notify()
        try:
            while (piece := await answer.pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            answer.is_cancelled = True
            with self._changed:
                self._changed.notify()

    def count_waiting(self) -> int:
        """Return how many answers have been asked for and not begun."""
        return sum(not answer.is_cancelled and not answer.token_ids for answer in tuple(self._waiting))

    async def close(self) -> None:
        """Stop the thread; answers that are being written end where they are."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _begin(self, prompt: Prompt, search: Search) -> "_Answer":
        """Find out what ends an answer: tokens, texts, and the number of positions."""
        ends, stop = find_ends(prompt, search, self._ends, self._added)
        limit = min(search.sampling.max_new_tokens, self.max_positions - prompt.num_tokens)
        return _Answer(prompt, search, ends, AnswerText(self._tokenizer, stop), limit)

    # The thread's side --------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def _serve(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not self._answers:
                    self._places = self._max_batch  # whatever filled the memory is gone
                self._changed.wait_for(lambda: self._is_closing or self._waiting or self._answers)
                if self._is_closing:
                    break
            self._keep([not answer.is_cancelled for answer in self._answers])
            self._admit()
            if self._answers:
                self._try(self._step, self._answers)
        for answer in (*self._answers, *self._waiting):
            answer.send(None)

    def _admit(self) -> None:
        """Let prompts that wait join, up to the free places."""
        joining: list[_Answer] = []
        while self._waiting and len(self._answers) + len(joining) < self._places:
            answer = self._waiting.popleft()
            if not answer.is_cancelled:
                joining.append(answer)
        if joining and not self._try(lambda: self._join(joining), joining, is_last=len(joining) == 1):
            for answer in joining:
                self._try(lambda answer=answer: self._join([answer]), [answer])

    def _try(self, work: Callable[[], None], concerned: Sequence["_Answer"], *, is_last: bool = True) -> bool:
        """Do work for some answers.

        Where memory does not last, all answers, these and the others, wait to be read anew in fewer places; one that is
        alone is given up. Another error ends the answers concerned.

        Args:
            work: to do.
            concerned: by an error.
            is_last: False: answers with an error are left as they are.

        Returns:
            False for answers that were left.
        """
        fault: Exception | None = None
        try:
            work()
        except torch.OutOfMemoryError:
            fault = InputError(
                "the prompt and its answer do not fit into memory: shorten it, or reduce its images more"
            )
        except Exception as error:
            if not is_last:
                return False
            for answer in concerned:
                answer.send(error)
            self._keep([not answer.is_done for answer in self._answers])
        # Behind the handler: the error held on to what was being computed.
        if fault is not None:
            everyone = [*self._answers, *(answer for answer in concerned if answer not in self._answers)]
            self._answers, self._rows = [], None
            if len(everyone) == 1:
                everyone[0].send(fault)
            else:
                self._places = len(everyone) - 1
                self._waiting.extendleft(reversed(everyone))
        return True

    def _join(self, joining: Sequence["_Answer"]) -> None:
        """Read prompts, with what has been written of their answers, and begin or go on with these."""
        embeds = [self._embed(answer) for answer in joining]
        rows = Rows([len(each) for each in embeds], embeds[0].device)
        padded = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True, padding_side="left")  # [S, L, E]
        positions = (rows.mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = self._run(rows, inputs_embeds=padded, position_ids=positions)
        if self._rows is None:
            self._rows = rows
        else:
            self._rows.join(rows)
        self._answers += joining
        self._write(joining, logits)

    def _embed(self, answer: "_Answer") -> Tensor:
        """`[L, E]`: the prompt, and the tokens that were written before memory did not last."""
        table = self._model.get_input_embeddings()
        embeds = answer.prompt.embeds.to(device=self._model.device, dtype=table.weight.dtype)
        if not answer.token_ids:
            return embeds
        written = table(torch.tensor(answer.token_ids, device=table.weight.device))
        return torch.cat([embeds, written.to(embeds)])

    def _step(self) -> None:
        """Write one token of every answer."""
        last = torch.tensor([[answer.token_ids[-1]] for answer in self._answers], device=self._model.device)
        positions = self._rows.open_column()
        self._write(self._answers, self._run(self._rows, input_ids=last, position_ids=positions))

    def _run(self, rows: Rows, **inputs: Tensor) -> Tensor:
        """One pass; returns the logits behind the last column, `[S, V]`."""
        output = self._model(
            **inputs, attention_mask=rows.mask, past_key_values=rows.cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1]

    def _write(self, answers: Sequence["_Answer"], logits: Tensor) -> None:
        """Choose each answer's next token and send what comes of it; what has ended leaves."""
        likeliest = logits.argmax(dim=-1).tolist()  # waits for the device
        for row, answer in enumerate(tuple(answers)):
            try:
                token = likeliest[row] if answer.sampling.is_greedy else answer.draw(logits[row])
                answer.take(token, self._tell_logprob(answer, token, logits[row]))
            except Exception as error:
                answer.send(error)
        self._keep([not answer.is_done for answer in self._answers])

    def _tell_logprob(self, answer: "_Answer", token: int, logits: Tensor) -> tuple[TokenLogprob, ...]:
        num_top = answer.search.num_logprobs
        if num_top is None:
            return ()
        logprobs = logits.float().log_softmax(dim=-1)  # [V]
        values, ids = logprobs.topk(num_top)
        top = zip(ids.tolist(), map(self._names.__getitem__, ids.tolist()), values.tolist(), strict=True)
        return (TokenLogprob(token, self._names[token], float(logprobs[token]), tuple(top)),)

    def _keep(self, is_kept: Sequence[bool]) -> None:
        """Let answers leave."""
        places = [place for place, keeps in enumerate(is_kept) if keeps]
        if len(places) == len(is_kept):
            return
        self._answers = [self._answers[place] for place in places]
        if places:
            self._rows.keep(places)
        else:
            self._rows = None


class _Answer:
    """One answer, from its prompt to its last piece. Made on the event loop, written by the thread."""

    def __init__(self, prompt: Prompt, search: Search, ends: frozenset[int], text: AnswerText, limit: int):
        self.prompt = prompt
        self.search = search
        self.token_ids: list[int] = []
        self.pieces: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self.is_cancelled = self.is_done = False
        self._ends = ends
        self._text = text
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._generator = torch.Generator()
        if self.sampling.seed is None:
            self._generator.seed()
        else:
            # PyTorch's generators take a signed number.
            seed = self.sampling.seed
            self._generator.manual_seed(seed if seed < 2**63 else seed - 2**64)

    @property
    def sampling(self) -> Sampling:
        return self.search.sampling

    def draw(self, logits: Tensor) -> int:
        """Draw the next token from `[V]`."""
        probabilities = (logits.float() / self.sampling.temperature).softmax(dim=-1)
        if self.sampling.top_p is not None:
            ordered, order = probabilities.sort(descending=True, stable=True)
            is_out = ordered.cumsum(dim=-1) - ordered >= self.sampling.top_p
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered.masked_fill(is_out, 0))
        return int(torch.multinomial(probabilities.cpu(), 1, generator=self._generator))

    def take(self, token: int, logprobs: tuple[TokenLogprob, ...]) -> None:
        """Add a token, and send the text that it makes certain."""
        self.token_ids.append(token)
        is_end = token in self._ends
        text = "" if is_end else self._text.add(token)
        reason = None
        if is_end or self._text.is_stopped:
            reason = FINISHED_BY_STOP
        elif len(self.token_ids) == self._limit:
            reason = FINISHED_BY_LENGTH
        if reason is not None:
            text += self._text.finish()
            # A stop text may be complete only with what was held back for the rest of a character.
            reason = FINISHED_BY_STOP if self._text.is_stopped else reason
        self.send(Piece(text, (token,), logprobs, reason))

    def send(self, piece: Piece | Exception | None) -> None:
        """Hand a piece, the error that ends the answer, or None for an end without a reason to the event loop."""
        self.is_done = not isinstance(piece, Piece) or piece.finish_reason is not None
        try:
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed: nobody listens
            self.is_done = True
