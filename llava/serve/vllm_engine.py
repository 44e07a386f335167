"""vLLM behind the server: continuous batching, a paged cache, prefix caching and tensor parallelism for our prompts.

vLLM runs the language model alone, of the folder that `llava.serve.export` makes, in processes of its own; prompts come
to it as embeddings (`Prompt.embeds`), image tokens included, so that their lengths are known before they are scheduled.
Its prefix cache names each block by the tokens before it and by a SHA-256 of the embeddings in it: prompts share what
their embeddings have in common, such as a system prompt or an image reduced alike, and nothing else. docs/vllm.md says
how to install and to start it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import aclosing
from importlib.util import find_spec
from itertools import count, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from llava.errors import InputError, one_line
from llava.files import read_json
from llava.model.builder import read_config
from llava.model.config_rules import GENERATION_FILE
from llava.model.language_model.generation_settings import list_tokens
from llava.serve.answer_text import AnswerText, TokenNames, find_ends
from llava.serve.engine import FINISHED_BY_LENGTH, FINISHED_BY_STOP, Piece, Prompt, Search, TokenLogprob
from llava.serve.export import export_language_model

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

ENVIRONMENT = {
    # The towers' threads and device do not outlive a fork.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # It reports its use to its makers otherwise.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is the server's
}
"""Settings of vLLM where the user's environment has none."""
GPU_SHARE = 0.8
"""Of an accelerator's memory for weights and cache: vLLM's own 0.9 leaves the towers too little."""
FINISHED = {"stop": FINISHED_BY_STOP, "length": FINISHED_BY_LENGTH}


class VllmEngine:
    """Answers prompts with vLLM; see `llava.serve.engine.Engine`.

    Attributes:
        name: "vllm".
        max_positions: of prompt and answer together.
    """

    name = "vllm"

    def __init__(
        self,
        checkpoint: str,
        base: str | None = None,
        *,
        tensor_parallel_size: int = 1,
        max_positions: int | None = None,
        dtype: str | None = None,
        gpu_memory_utilization: float | None = None,
        options: Mapping[str, object] | None = None,
    ):
        """Check what can be checked before weights are read; `start` loads.

        Args:
            checkpoint: folder or hub id of the LLaVA checkpoint that the prompts are made with.
            base: base model of LoRA or projector weights.
            tensor_parallel_size: accelerators, or on a CPU processes, that share the weights; it divides the attention
                heads.
            max_positions: of prompt and answer together, at most the model's; None: the model's.
            dtype: "float16", "bfloat16" or "float32"; None: float16 on an accelerator, float32 on the CPU.
            gpu_memory_utilization: share of each accelerator's memory for weights and cache; None: `GPU_SHARE`.
            options: further arguments of vLLM's `AsyncEngineArgs`, by name; not those that are set here.

        Raises:
            InputError: vLLM is not installed, the checkpoint's config is wrong, or a value out of its range.
        """
        if find_spec("vllm") is None:
            raise InputError("the engine vllm needs the package vllm: pip install -e '.[vllm]' (docs/vllm.md)")
        config = read_config(checkpoint)
        limit, heads = config.max_position_embeddings, config.num_attention_heads
        if max_positions is not None and not 1 < max_positions <= limit:
            raise InputError(f"max_positions {max_positions}: expected 2 to {limit}, the positions of the model")
        if tensor_parallel_size < 1 or heads % tensor_parallel_size:
            raise InputError(f"tensor_parallel_size {tensor_parallel_size}: expected a divisor of {heads} heads")
        share = GPU_SHARE if gpu_memory_utilization is None else gpu_memory_utilization
        if not 0 < share <= 1:
            raise InputError(f"gpu_memory_utilization {share}: expected a number above 0, at most 1")
        self.max_positions = max_positions or limit
        self._checkpoint, self._base = checkpoint, base
        self._dtype = dtype or ("float16" if torch.accelerator.is_available() else "float32")
        self._settings = {
            "max_model_len": self.max_positions,
            "dtype": self._dtype,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": share,
            "enable_prompt_embeds": True,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        if taken := sorted(self._settings.keys() & (options or {}).keys()):
            raise InputError(f"options: {taken[0]} is not free: it has an argument of its own, or follows from others")
        self._settings |= options or {}
        self._llm: AsyncLLM | None = None
        self._ends: frozenset[int] = frozenset()
        self._numbers = count()
        self._open: set[str] = set()  # ids of the answers that are being written
        self._num_waiting = 0

    async def start(self) -> None:
        """Export the language model, if that was not done before, and start vLLM on it (a minute on a CPU).

        Raises:
            InputError: the checkpoint cannot be exported, or vLLM refuses it or a setting.
        """
        folder = await asyncio.to_thread(export_language_model, self._checkpoint, self._base, self._dtype)
        self._ends = frozenset(list_tokens(read_json(folder / GENERATION_FILE)["eos_token_id"]))
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._added = self._tokenizer.get_added_vocab()
        self._names = TokenNames(self._tokenizer)
        await asyncio.to_thread(self._load, folder)

    def _load(self, folder: Path) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # read as vLLM is imported, and by the processes that it starts
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **self._settings))
        except Exception as error:  # of many kinds; those of its processes are on stderr by now
            raise InputError(f"vLLM does not start: {one_line(str(error))[:300]}") from error

    async def answer(self, prompt: Prompt, search: Search) -> AsyncIterator[Piece]:
        """Answer one prompt; see `Engine.answer`.

        Raises:
            InputError: the prompt leaves no position for an answer, or vLLM refuses the search: temperatures go
                up to 2 there.
        """
        from vllm.inputs import embeds_input

        room = self.max_positions - prompt.num_tokens
        if room < 1:
            raise InputError(
                f"the prompt takes {prompt.num_tokens} positions with its image tokens, the engine has "
                f"{self.max_positions}: shorten the messages, give fewer images or reduce them more"
            )
        inputs = embeds_input(prompt_embeds=prompt.embeds.detach().cpu().contiguous())
        ends, stop = find_ends(prompt, search, self._ends, self._added)
        params = _make_params(search, ends, room)
        writer = _Writer(AnswerText(self._tokenizer, stop), self._names, ends, search.num_logprobs)
        name = str(next(self._numbers))
        is_waiting = True
        self._num_waiting += 1
        self._open.add(name)
        try:
            async with aclosing(self._llm.generate(inputs, params, name)) as outputs:
                async for output in outputs:
                    self._num_waiting -= is_waiting
                    is_waiting = False
                    piece = writer.take(output.outputs[0])
                    yield piece
                    if piece.finish_reason is not None:
                        break
        finally:
            self._num_waiting -= is_waiting
            self._open.discard(name)

    def count_waiting(self) -> int:
        """Return how many answers have been asked for and have no token yet."""
        return self._num_waiting

    async def close(self) -> None:
        """End the answers that are being written, and vLLM's processes."""
        if self._llm is not None:
            await self._llm.abort(list(self._open))
            # It blocks the loop for some seconds: in a thread, vLLM's own task would take the end of its processes for
            # a failure, and the thread's future would keep it alive until Python ends.
            self._llm.shutdown()
            self._llm = None


def _make_params(search: Search, ends: Collection[int], room: int) -> "SamplingParams":
    """Put a search in vLLM's terms, which writes tokens alone; end tokens are ours, not those that it would choose."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind

    sampling = search.sampling
    try:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            seed=None if sampling.seed is None else sampling.seed % 2**63,  # PyTorch's generators take no more
            max_tokens=min(sampling.max_new_tokens, room),
            stop_token_ids=sorted(ends),
            ignore_eos=True,
            logprobs=search.num_logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
    except VLLMValidationError as error:
        raise InputError(f"vLLM refuses the search: {one_line(str(error))}") from None


class _Writer:
    """Makes pieces of what vLLM writes of one answer."""

    def __init__(self, text: AnswerText, names: TokenNames, ends: Collection[int], num_logprobs: int | None):
        self._text = text
        self._names = names
        self._ends = ends
        self._num_logprobs = num_logprobs

    def take(self, output: "CompletionOutput") -> Piece:
        """Put new tokens in our terms; those behind a stop text are left out."""
        text, token_ids, logprobs = "", [], []
        for token, candidates in zip_longest(output.token_ids, output.logprobs or ()):
            token_ids.append(token)
            text += "" if token in self._ends else self._text.add(token)
            logprobs += [] if candidates is None else [self._rank(token, candidates)]
            if self._text.is_stopped:
                break
        reason = FINISHED.get(output.finish_reason)
        if reason is not None or self._text.is_stopped:
            text += self._text.finish()
            reason = FINISHED_BY_STOP if self._text.is_stopped else reason
        return Piece(text, tuple(token_ids), tuple(logprobs), reason)

    def _rank(self, token: int, candidates: Mapping[int, "Logprob"]) -> TokenLogprob:
        """Separate the chosen token from the likeliest ones, among which it may be as well."""
        likeliest = sorted(candidates.items(), key=lambda item: item[1].rank)[: self._num_logprobs]
        top = tuple((number, self._names[number], each.logprob) for number, each in likeliest)
        return TokenLogprob(token, self._names[token], candidates[token].logprob, top)
