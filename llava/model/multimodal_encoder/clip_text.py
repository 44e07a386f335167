"""The text half of a CLIP in Hugging Face layout: questions into the joint space."""

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizerFast

from llava.errors import InputError
from llava.model.multimodal_encoder.loading import load_quietly


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
        model, _ = load_quietly(CLIPTextModelWithProjection, name, dtype=dtype, what="text tower")
        try:
            tokenizer = CLIPTokenizerFast.from_pretrained(name)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"text tower {name}: no CLIP tokenizer (vocab.json, merges.txt) there: {error}") from None
        return cls(model.to(device), tokenizer)

    def forward(self, texts: list[str]) -> Tensor:
        """Embed texts: S strings to `[S, P]`, in the tower's dtype, not normalised; cut at the context length."""
        tokens = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.model.config.max_position_embeddings,
            return_tensors="pt",
        )
        device = next(self.model.parameters()).device
        return self.model(
            input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)
        ).text_embeds
