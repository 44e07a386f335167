"""The loss of a causal language model without logits for positions that teach nothing.

Labels are known before the output head runs, so the head reads those positions alone whose next token has a label, and
not all of them at a time: `[S, L, V]` logits, in a batch of long prompts most of the memory of a step, are never made.

Shape letters: `S` samples, `L` positions, `K` positions with a label, `E` width, `V` vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.model.splice import Targets

MOST_LOGITS = 2**25
"""Logits that are made at a time, K * V: 128 MiB of float32."""


@dataclass
class LossOutput(CausalLMOutputWithPast):
    """What a pass gives that is asked for its loss alone; there are no logits.

    Attributes:
        num_targets: `int64[S]` how many positions of each sample the loss covers, on the CPU.
        loss_sums: `float32[S]` the sum of the losses of these positions, without gradients.
    """

    num_targets: Tensor | None = None
    loss_sums: Tensor | None = None


def compute_loss(
    head: nn.Module,
    hidden: Tensor,
    targets: Targets,
    most_rows: int | None = None,
    num_items: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of the labelled positions, in float32.

    Args:
        head: maps `[K, E]` to `[K, V]`; called as a module, so that DeepSpeed can gather its weights (ZeRO-3).
        hidden: `[S, L, E]` the last layer's output.
        targets: which positions.
        most_rows: positions that the head reads at a time; their logits are then made a second time for the gradients.
            None: all at once.
        num_items: what the sum is divided by; None: K.

    Returns:
        `float32[]`, 0, with gradients of 0, where nothing is labelled (the head is called in that case too); and
        `float32[S]` the sum of each sample, without gradients.
    """
    chosen = hidden.flatten(0, 1).index_select(0, targets.places.to(hidden.device))  # [K, E]
    labels = targets.labels.to(hidden.device)  # int64[K]
    size = max(1, len(labels) if most_rows is None else most_rows)
    parts = list(zip(chosen.split(size), labels.split(size), strict=True))

    def compute_part(rows: Tensor, answers: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), answers, reduction="none")

    if len(parts) == 1:
        losses = compute_part(*parts[0])  # float32[K]
    else:
        losses = torch.cat([checkpoint(compute_part, *part, use_reentrant=False) for part in parts])
    total = losses.sum()
    sums = losses.new_zeros(len(targets.counts)).index_add(0, targets.owners.to(losses.device), losses.detach())
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    return total / (max(1, len(labels)) if num_items is None else num_items), sums


def pass_for_loss(
    model: PreTrainedModel,
    targets: Targets,
    inputs: Mapping[str, object],
    most_logits: int | None = MOST_LOGITS,
    num_items: Tensor | int | None = None,
) -> LossOutput:
    """Run a causal language model for its loss alone.

    Args:
        model: with a decoder `model`, and an output head.
        targets: which positions the loss covers.
        inputs: the decoder's arguments.
        most_logits: made at a time; None: all at once.
        num_items: see `compute_loss`.
    """
    inputs = {name: value for name, value in inputs.items() if name != "return_dict"}
    outputs = model.model(**inputs, use_cache=False)
    most_rows = None if most_logits is None else max(1, most_logits // model.config.vocab_size)
    loss, sums = compute_loss(model.get_output_embeddings(), outputs.last_hidden_state, targets, most_rows, num_items)
    return LossOutput(
        loss=loss,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        num_targets=targets.counts,
        loss_sums=sums,
    )


def take_only_loss(model: PreTrainedModel, most_logits: int | None = MOST_LOGITS) -> None:
    """Let a language model of transformers take `only_loss=True`, as LLaVA's models do; other calls stay as they are.

    Args:
        model: its `forward` is replaced.
        most_logits: see `pass_for_loss`.
    """
    forward = model.forward

    @wraps(forward)
    def forward_or_loss(
        input_ids: Tensor | None = None, *arguments: object, only_loss: bool = False, **inputs: object
    ) -> CausalLMOutputWithPast:
        if not only_loss:
            return forward(input_ids, *arguments, **inputs)
        inputs["input_ids"] = input_ids
        labels, num_items = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        inputs.pop("use_cache", None)
        targets = Targets.of(labels, model.get_input_embeddings().weight.device)
        return pass_for_loss(model, targets, inputs, most_logits, num_items)

    model.forward = forward_or_loss
