"""The text half of a SigLIP in Hugging Face layout: questions into the joint space."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, SiglipTextConfig, SiglipTextModel

from llava.errors import InputError
from llava.files import read_text
from llava.model.config_rules import read_tower_config
from llava.model.multimodal_encoder.loading import load_quietly, quiet_loading
from llava.model.multimodal_encoder.text_reader import TextIds, TextReader, count_tokens, read_texts
from llava.model.stored_weights import find_file

# Stored weights that the text half has no place for.
OTHER_WEIGHTS = (r"^vision_model\.", r"^logit_(scale|bias)$", r"\.position_ids$")
NAMES = {r"^text_model\.": ""}


@dataclass(frozen=True)
class SiglipTextReader(TextReader):
    """SigLIP's tokenizer: lower case, and every text is padded to the context length."""

    tokenizer: PreTrainedTokenizerBase
    context: int

    def __call__(self, text: str) -> TextIds:
        tokens = self.tokenizer(
            lower(self.tokenizer, [text]),
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        )
        return TextIds(tuple(tokens.input_ids[0].tolist()))

    def count(self, texts: list[str]) -> list[int]:
        return count_tokens(self.tokenizer, lower(self.tokenizer, texts))


class SiglipTextTower(nn.Module):
    """SigLIP's text encoder, its head and its tokenizer.

    Text is embedded as SigLIP was trained: lower case, padded to the context length, and without a mask. The embedding
    is read at the last position, which is padding for all but the longest texts.
    """

    def __init__(self, model: SiglipTextModel, tokenizer: PreTrainedTokenizerBase):
        """Take the parts; `load` reads them."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls, name: str, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> "SiglipTextTower":
        """Load the text half of a SigLIP.

        Args:
            name: folder or hub id of a full SigLIP (vision and text).
            device: where to put it.
            dtype: what to run it in.

        Returns:
            The tower.

        Raises:
            InputError: when the checkpoint holds no text half, or no tokenizer.
        """
        model, _ = load_quietly(
            SiglipTextModel, name, dtype=dtype, what="SigLIP text tower", ignored=OTHER_WEIGHTS, names=NAMES
        )
        return cls(model.to(device), read_tokenizer(name, model.config.vocab_size))

    @property
    def reader(self) -> SiglipTextReader:
        return SiglipTextReader(self.tokenizer, self.model.config.max_position_embeddings)

    def forward(self, texts: list[str | TextIds]) -> Tensor:
        """Embed texts: S of them to `[S, P]`, in the tower's dtype, not normalised; cut at the context length."""
        ids = torch.stack(read_texts(texts, self.reader))  # [S, T]
        device = next(self.model.parameters()).device
        return self.model(input_ids=ids.to(device, non_blocking=True)).pooler_output


def lower(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
    """Return texts in lower case, where a SigLIP reads them so: SigLIP 2's tokenizer, Gemma's, keeps capitals."""
    return [text.lower() for text in texts] if getattr(tokenizer, "do_lower_case", True) else texts


def read_reader(name: str) -> SiglipTextReader:
    """Read what makes texts into ids for the text half of a SigLIP, without its weights.

    Args:
        name: folder or hub id.

    Raises:
        InputError: no text half, or no tokenizer.
    """
    values = read_tower_config(name, is_siglip=True)
    if values["model_type"].endswith("_vision_model"):
        raise InputError(f"vision tower {name} has no text half: text-guided token reduction needs a full SigLIP")
    config = SiglipTextConfig(**(values.get("text_config") or {}))
    return SiglipTextReader(read_tokenizer(name, config.vocab_size), config.max_position_embeddings)


def read_tokenizer(name: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a SigLIP: sentencepiece (`spiece.model`), or `tokenizer.json` for SigLIP 2.

    Args:
        name: folder or hub id.
        vocab_size: how many ids the text half knows.

    Raises:
        InputError: no tokenizer, an empty one, one without padding, or one with more ids than the text half.
    """
    file = find_file(name, "tokenizer.json")
    if file is not None and not read_text(Path(file)).strip():
        raise InputError(f"text tower {name}: {file} is empty; copy or download it again")
    with quiet_loading(f"text tower {name}: its tokenizer (spiece.model or tokenizer.json)"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        raise InputError(f"text tower {name}: its tokenizer has no pad_token, and SigLIP reads padded texts")
    if len(tokenizer) > vocab_size:
        raise InputError(f"text tower {name} knows {vocab_size} token ids, its tokenizer has {len(tokenizer)}")
    return tokenizer
