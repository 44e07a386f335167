"""The text half of a CLIP in Hugging Face layout: questions into the joint space."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizerFast

from llava.errors import InputError
from llava.files import read_text
from llava.model.config_rules import read_tower_config
from llava.model.multimodal_encoder.loading import load_quietly
from llava.model.multimodal_encoder.text_reader import TextIds, TextReader, count_tokens, read_texts
from llava.model.stored_weights import find_file, first_line

# Stored weights that the text half has no place for.
OTHER_WEIGHTS = (r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$", r"\.position_ids$")

HIGHEST_ID = 2
"""An `eos_token_id` that means the highest id of a text (transformers, `CLIPTextModel`)."""


@dataclass(frozen=True)
class ClipTextReader(TextReader):
    """CLIP's tokenizer: texts keep their length, up to the context length."""

    tokenizer: CLIPTokenizerFast
    context: int

    def __call__(self, text: str) -> TextIds:
        return TextIds(tuple(self.tokenizer(text, truncation=True, max_length=self.context).input_ids))

    def count(self, texts: list[str]) -> list[int]:
        return count_tokens(self.tokenizer, texts)


class CLIPTextTower(nn.Module):
    """CLIP's text encoder, its projection and its tokenizer."""

    def __init__(self, model: CLIPTextModelWithProjection, tokenizer: CLIPTokenizerFast):
        """Take the parts; `load` reads them."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls, name: str, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> "CLIPTextTower":
        """Load the text half of a CLIP.

        Args:
            name: folder or hub id of a full CLIP (vision and text).
            device: where to put it.
            dtype: what to run it in.

        Returns:
            The tower.

        Raises:
            InputError: when the checkpoint holds no text half, or no tokenizer.
        """
        model, _ = load_quietly(
            CLIPTextModelWithProjection, name, dtype=dtype, what="text tower", ignored=OTHER_WEIGHTS
        )
        return cls(model.to(device), read_tokenizer(name, model.config))

    @property
    def reader(self) -> ClipTextReader:
        return ClipTextReader(self.tokenizer, self.model.config.max_position_embeddings)

    def forward(self, texts: list[str | TextIds]) -> Tensor:
        """Embed texts: S of them to `[S, P]`, in the tower's dtype, not normalised; cut at the context length."""
        rows = read_texts(texts, self.reader)
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)  # [S, T]
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        device = next(self.model.parameters()).device
        return self.model(
            input_ids=ids.to(device, non_blocking=True), attention_mask=mask.to(device, non_blocking=True)
        ).text_embeds


def read_reader(name: str) -> ClipTextReader:
    """Read what makes texts into ids for the text half of a CLIP, without its weights.

    Args:
        name: folder or hub id.

    Raises:
        InputError: no text half, or no tokenizer.
    """
    values = read_tower_config(name)
    if values["model_type"].endswith("_vision_model"):
        raise InputError(f"vision tower {name} has no text half: text-guided token reduction needs a full CLIP")
    config = CLIPTextConfig(**(values.get("text_config") or {}))
    return ClipTextReader(read_tokenizer(name, config), config.max_position_embeddings)


def read_tokenizer(name: str, config: CLIPTextConfig) -> CLIPTokenizerFast:
    """Read the tokenizer of a CLIP.

    Args:
        name: folder or hub id.
        config: of the text half.

    Raises:
        InputError: no tokenizer, an empty one, one with more ids than the text half, or one whose end token is not
            where the text half reads a text's embedding.
    """
    for file in (find_file(name, part) for part in ("merges.txt", "vocab.json", "tokenizer.json")):
        if file is not None and not read_text(Path(file)).strip():
            raise InputError(f"text tower {name}: {file} is empty; copy or download it again")
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(name)
        backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    except Exception as error:
        # Many kinds: whatever transformers and the tokenizers library raise for files that are not there or broken.
        reason = f"no CLIP tokenizer (vocab.json, merges.txt) there: {first_line(error)}"
        raise InputError(f"text tower {name}: {reason}") from error
    if not backend.get("merges"):
        raise InputError(f"text tower {name}: its tokenizer has no merges (merges.txt); copy or download it again")
    size = max(backend["vocab"].values(), default=0) + 1
    if size > config.vocab_size:
        raise InputError(f"text tower {name} knows {config.vocab_size} token ids, its tokenizer has {size}")
    # The embedding is read at the config's end token, or at the highest id where that is 2, as in OpenAI's configs. A
    # text without that token would be read at its first, which is the same for all texts.
    read_at = size - 1 if config.eos_token_id == HIGHEST_ID else config.eos_token_id
    if tokenizer.eos_token_id != read_at:
        raise InputError(
            f"text tower {name} reads texts at token {read_at} (eos_token_id {config.eos_token_id} of text_config), "
            f"its tokenizer ends them with {tokenizer.eos_token_id}: all texts would be alike; one of the two is wrong"
        )
    return tokenizer
