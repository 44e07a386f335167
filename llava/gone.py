"""Names of LLaVA's and TRIM's code that are not here any more, and what to use in their place.

Importing one ends in an `ImportError` of one line that says so. [parity](../docs/parity.md) has the same list.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MPT = "MPT is not a language model here: use Llama, Mistral or Qwen2"
_DELTA = "LLaVA-1.5 is published whole, not as deltas: make whole weights with the code that came with them"
_SERVER = "use python -m llava.serve.api, one process that is controller and worker"
_COUNTS = "python -m llava.serve.api counts requests under /metrics"
_ERRORS = "python -m llava.serve.api answers errors in OpenAI's form"
_TEMPLATE = "use llava.conversation.conv_templates[NAME]"
_RECORDS = "use llava.train.records.read_records and llava.train.dataset.ConversationDataset"
_TARGETS = "use llava.train.targets.render and build_targets"
_ADAPTER = "use llava.train.checkpoint.get_mm_adapter_state_maybe_zero_3"
_LENGTHS = "use llava.train.sampler.ModalityLengthSampler"
_ATTENTION = "use --attn_implementation"
_NO_REFERENCE = "ST-VQA and TextCaps are not benchmarks here: use their own scorers"
_REVIEW = "use llava.eval.eval_gpt_review_bench"
_SCIENCE = "answers are not joined with GPT-4's: use llava.eval.eval_science_qa"
_COMMAND = "run the command; its options are in --help"
_ANSWERS = "use llava.eval.predict.make_answers"

GONE_MODULES = {
    "llava.eval.eval_gpt_review": _REVIEW,
    "llava.eval.eval_gpt_review_visual": _REVIEW,
    "llava.eval.eval_science_qa_gpt4": _SCIENCE,
    "llava.eval.eval_science_qa_gpt4_requery": _SCIENCE,
    "llava.eval.generate_webpage_data_from_table": "use python -m llava.eval wrong TASK --answers FILE --draw DIR",
    "llava.eval.model_qa": "questions without images are the language model's own matter: use transformers",
    "llava.eval.qa_baseline_gpt35": _REVIEW,
    "llava.model.apply_delta": _DELTA,
    "llava.model.language_model.llava_mpt": _MPT,
    "llava.model.make_delta": _DELTA,
    "llava.model.utils": "configs of LLaVA-1.5 need no upgrade; those of LLaVA 0 are not read",
    "llava.serve.controller": _SERVER,
    "llava.serve.gradio_web_server": "use python -m llava.serve.demo, alone or with --endpoint",
    "llava.serve.model_worker": _SERVER,
    "llava.serve.register_worker": _SERVER,
    "llava.serve.sglang_worker": _SERVER,
    "llava.serve.test_message": "use python -m llava.serve.api, with any client of OpenAI's chat completions",
    "llava.train.llama_flash_attn_monkey_patch": f"{_ATTENTION} flash_attention_2",
    "llava.train.llama_xformers_attn_monkey_patch": f"{_ATTENTION} sdpa",
    "llava.train.train_xformers": f"use llava.train.train; {_ATTENTION} sdpa",
}
"""Modules; what was in them is gone as well."""

GONE_NAMES = {
    "llava.conversation.conv_chatml_direct": _TEMPLATE,
    "llava.conversation.conv_llama_2": _TEMPLATE,
    "llava.conversation.conv_llava_llama_2": _TEMPLATE,
    "llava.conversation.conv_llava_plain": _TEMPLATE,
    "llava.conversation.conv_llava_v0": _TEMPLATE,
    "llava.conversation.conv_llava_v0_mmtag": _TEMPLATE,
    "llava.conversation.conv_llava_v1": _TEMPLATE,
    "llava.conversation.conv_llava_v1_mmtag": _TEMPLATE,
    "llava.conversation.conv_mistral_instruct": _TEMPLATE,
    "llava.conversation.conv_mpt": _TEMPLATE,
    "llava.conversation.conv_vicuna_v0": _TEMPLATE,
    "llava.conversation.conv_vicuna_v1": _TEMPLATE,
    "llava.eval.eval_gpt_review_bench.get_eval": "use llava.eval.benchmarks.llavabench.ask_judge",
    "llava.eval.eval_gpt_review_bench.parse_score": "use llava.eval.benchmarks.llavabench.make_review",
    "llava.eval.eval_pope.eval_pope": "use llava.eval.benchmarks.pope.score_pope, which pairs by id",
    "llava.eval.eval_science_qa.convert_caps": "captions are no part of the scores: use python -m llava.eval score sqa",
    "llava.eval.eval_science_qa.get_args": _COMMAND,
    "llava.eval.eval_science_qa.get_pred_idx": "use llava.eval.benchmarks.sqa.find_option",
    "llava.eval.eval_textvqa.get_args": _COMMAND,
    "llava.eval.eval_textvqa.prompt_processor": "use llava.eval.benchmarks.textvqa.extract_question",
    "llava.eval.m4c_evaluator.STVQAANLSEvaluator": _NO_REFERENCE,
    "llava.eval.m4c_evaluator.STVQAAccuracyEvaluator": _NO_REFERENCE,
    "llava.eval.m4c_evaluator.TextCapsBleu4Evaluator": _NO_REFERENCE,
    "llava.eval.model_vqa_loader.CustomDataset": _ANSWERS,
    "llava.eval.model_vqa_loader.collate_fn": _ANSWERS,
    "llava.eval.model_vqa_loader.create_data_loader": _ANSWERS,
    "llava.eval.model_vqa_mmbench.get_options": "use llava.eval.benchmarks.mmbench.load_table_questions",
    "llava.eval.model_vqa_mmbench.is_none": "use llava.eval.benchmarks.mmbench.load_table_questions",
    "llava.eval.summarize_gpt_review.parse_args": _COMMAND,
    "llava.model.LlavaMptConfig": _MPT,
    "llava.model.LlavaMptForCausalLM": _MPT,
    "llava.model.multimodal_encoder.clip_encoder.CLIPVisionTowerS2": "towers of several scales are not built here",
    "llava.model.multimodal_projector.builder.IdentityMap": "use torch.nn.Identity",
    "llava.model.multimodal_projector.builder.SimpleResBlock": "no published projector has it: use torch.nn.Sequential",
    "llava.train.llava_trainer.LengthGroupedSampler": _LENGTHS,
    "llava.train.llava_trainer.get_length_grouped_indices": _LENGTHS,
    "llava.train.llava_trainer.get_modality_length_grouped_indices": _LENGTHS,
    "llava.train.llava_trainer.maybe_zero_3": _ADAPTER,
    "llava.train.llava_trainer.split_to_even_chunks": _LENGTHS,
    "llava.train.train.DataCollatorForSupervisedDataset": "use llava.train.collator.Collator",
    "llava.train.train.LazySupervisedDataset": _RECORDS,
    "llava.train.train.get_peft_state_maybe_zero_3": "PEFT's save_pretrained writes the adapter",
    "llava.train.train.get_peft_state_non_lora_maybe_zero_3": "use llava.train.checkpoint.save_lora_rest",
    "llava.train.train.make_supervised_data_module": f"{_RECORDS}, with llava.train.collator.Collator",
    "llava.train.train.maybe_zero_3": _ADAPTER,
    "llava.train.train.preprocess": _TARGETS,
    "llava.train.train.preprocess_llama_2": _TARGETS,
    "llava.train.train.preprocess_mpt": _TARGETS,
    "llava.train.train.preprocess_multimodal": _TARGETS,
    "llava.train.train.preprocess_plain": _TARGETS,
    "llava.train.train.preprocess_v1": _TARGETS,
    "llava.train.train.rank0_print": "use llava.train.train.say",
    "llava.train.train.safe_save_model_for_hf_trainer": "use LLaVATrainer.save_trained(only_projector=...)",
    "llava.train.train.smart_tokenizer_and_embedding_resize": (
        "use tokenizer.add_special_tokens, then model.add_token_rows(len(tokenizer))"
    ),
    "llava.utils.StreamToLogger": "use Python's logging",
    "llava.utils.build_logger": "use Python's logging",
    "llava.utils.moderation_msg": "no text is sent to a moderation service",
    "llava.utils.pretty_print_semaphore": _COUNTS,
    "llava.utils.server_error_msg": _ERRORS,
    "llava.utils.violates_moderation": "no text is sent to a moderation service",
}
"""Names in modules that are here."""


def look_up(module: str) -> Callable[[str], object]:
    """Make a module's `__getattr__`, which is asked for the names that the module does not have.

    It raises `ImportError` for one of `GONE_NAMES` (of an `AttributeError`, `from ... import` would not show the text),
    and Python's own error for all others.
    """

    def refuse(name: str) -> object:
        full = f"{module}.{name}"
        if full in GONE_NAMES:
            raise ImportError(f"{full} is gone: {GONE_NAMES[full]}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return refuse


def watch() -> None:
    """Make imports of `GONE_MODULES` say what to use; nothing else changes."""
    sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder):
    """Is asked last, for modules that no other finder has found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in GONE_MODULES:
            # Without the module's name: `from PACKAGE import MODULE` would take it for its own "cannot import name".
            raise ModuleNotFoundError(f"{fullname} is gone: {GONE_MODULES[fullname]}")
        return None
