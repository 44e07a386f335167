"""The text half of a CLIP in Hugging Face layout: questions into the joint space."""

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizerFast

from llava.errors import InputError
from llava.model.multimodal_encoder.loading import load_quietly


class CLIPTextTower(nn.Module):
    """CLIP's text encoder, its projection and its tokenizer."""

    def __init__(self, name: str, *, device: object = None, dtype: torch.dtype = torch.float32):
        """Load the text half of a CLIP.

        Args:
            name: folder or hub id of a full CLIP (vision and text).
            device: where to put it.
            dtype: what to run it in.

        Raises:
            InputError: when the checkpoint holds no text half, or no tokenizer.
        """
        super().__init__()
        model, _ = load_quietly(CLIPTextModelWithProjection, name, dtype=dtype, what="text tower")
        self.model = model.to(device)
        try:
            self.tokenizer = CLIPTokenizerFast.from_pretrained(name)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"text tower {name}: no CLIP tokenizer (vocab.json, merges.txt) there: {error}") from None

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
