"""Budgets that vary in training: another token reduction for each optimizer step."""

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.token_reduction import TrainingReduction


class DrawReduction(TrainerCallback):
    """Draws a model's token reduction for each optimizer step, for all of its samples on all ranks.

    Args:
        model: is about to be trained; not wrapped. Its config keeps the middle of the ranges.
        reduction: with ranges.
        seed: of the draws.
    """

    def __init__(self, model: LlavaMetaForCausalLM, reduction: TrainingReduction, seed: int):
        self.model = model
        self.reduction = reduction
        self.seed = seed

    def on_step_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.model.take_reduction(self.reduction.draw(self.seed, state.global_step))

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        # What is measured or saved between steps is the middle.
        self.model.take_reduction(self.reduction.middle)
