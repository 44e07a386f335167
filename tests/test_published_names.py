"""Names that scripts import from LLaVA's and TRIM's code: each works as there, or says in one line what to use."""

import inspect
import io
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.errors import InputError
from llava.gone import GONE_MODULES, GONE_NAMES
from llava.image import load_image
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).parents[1]
CHECKPOINT = "llava-v1.5-tiny84"
WORKS = {
    "llava": "LlavaLlamaForCausalLM",
    "llava.constants": "CONTROLLER_HEART_BEAT_EXPIRATION WORKER_HEART_BEAT_INTERVAL LOGDIR IGNORE_INDEX "
    "IMAGE_TOKEN_INDEX DEFAULT_IMAGE_TOKEN DEFAULT_IMAGE_PATCH_TOKEN DEFAULT_IM_START_TOKEN DEFAULT_IM_END_TOKEN "
    "IMAGE_PLACEHOLDER",
    "llava.conversation": "Conversation SeparatorStyle conv_templates default_conversation",
    "llava.eval.eval_gpt_review_bench": "",
    "llava.eval.eval_pope": "",
    "llava.eval.eval_science_qa": "",
    "llava.eval.eval_textvqa": "eval_single",
    "llava.eval.m4c_evaluator": "EvalAIAnswerProcessor TextVQAAccuracyEvaluator",
    "llava.eval.model_vqa": "eval_model get_chunk split_list",
    "llava.eval.model_vqa_loader": "eval_model get_chunk split_list",
    "llava.eval.model_vqa_mmbench": "eval_model get_chunk split_list",
    "llava.eval.model_vqa_science": "eval_model get_chunk split_list",
    "llava.eval.run_llava": "eval_model image_parser load_image load_images",
    "llava.eval.summarize_gpt_review": "",
    "llava.mm_utils": "KeywordsStoppingCriteria divide_to_patches expand2square get_anyres_image_grid_shape "
    "get_model_name_from_path load_image_from_base64 process_anyres_image process_images resize_and_pad_image "
    "select_best_resolution tokenizer_image_token",
    "llava.model": "LlavaConfig LlavaLlamaForCausalLM LlavaMistralConfig LlavaMistralForCausalLM",
    "llava.model.builder": "load_pretrained_model",
    "llava.model.consolidate": "consolidate_ckpt",
    "llava.model.language_model.llava_llama": "LlavaConfig LlavaLlamaForCausalLM LlavaLlamaModel",
    "llava.model.language_model.llava_mistral": "LlavaMistralConfig LlavaMistralForCausalLM LlavaMistralModel",
    "llava.model.llava_arch": "LlavaMetaForCausalLM LlavaMetaModel get_anyres_image_grid_shape unpad_image",
    "llava.model.multimodal_encoder.builder": "build_vision_tower",
    "llava.model.multimodal_encoder.clip_encoder": "CLIPVisionTower",
    "llava.model.multimodal_projector.builder": "build_vision_projector",
    "llava.serve.cli": "load_image main",
    "llava.train.llava_trainer": "LLaVATrainer get_mm_adapter_state_maybe_zero_3",
    "llava.train.train": "DataArguments ModelArguments TrainingArguments find_all_linear_names "
    "get_mm_adapter_state_maybe_zero_3 train",
    "llava.train.train_mem": "",
    "llava.utils": "disable_torch_init",
}
GONE = {
    "llava.conversation": "conv_chatml_direct conv_llama_2 conv_llava_llama_2 conv_llava_plain conv_llava_v0 "
    "conv_llava_v0_mmtag conv_llava_v1 conv_llava_v1_mmtag conv_mistral_instruct conv_mpt conv_vicuna_v0 "
    "conv_vicuna_v1",
    "llava.eval.eval_gpt_review_bench": "get_eval parse_score",
    "llava.eval.eval_pope": "eval_pope",
    "llava.eval.eval_science_qa": "convert_caps get_args get_pred_idx",
    "llava.eval.eval_textvqa": "get_args prompt_processor",
    "llava.eval.m4c_evaluator": "STVQAANLSEvaluator STVQAAccuracyEvaluator TextCapsBleu4Evaluator",
    "llava.eval.model_vqa_loader": "CustomDataset collate_fn create_data_loader",
    "llava.eval.model_vqa_mmbench": "get_options is_none",
    "llava.eval.summarize_gpt_review": "parse_args",
    "llava.model": "LlavaMptConfig LlavaMptForCausalLM",
    "llava.model.multimodal_encoder.clip_encoder": "CLIPVisionTowerS2",
    "llava.model.multimodal_projector.builder": "IdentityMap SimpleResBlock",
    "llava.train.llava_trainer": "LengthGroupedSampler get_length_grouped_indices get_modality_length_grouped_indices "
    "maybe_zero_3 split_to_even_chunks",
    "llava.train.train": "DataCollatorForSupervisedDataset LazySupervisedDataset get_peft_state_maybe_zero_3 "
    "get_peft_state_non_lora_maybe_zero_3 make_supervised_data_module maybe_zero_3 preprocess preprocess_llama_2 "
    "preprocess_mpt preprocess_multimodal preprocess_plain preprocess_v1 rank0_print safe_save_model_for_hf_trainer "
    "smart_tokenizer_and_embedding_resize",
    "llava.utils": "StreamToLogger build_logger moderation_msg pretty_print_semaphore server_error_msg "
    "violates_moderation",
}
GONE_WHOLE = """llava.eval.eval_gpt_review llava.eval.eval_gpt_review_visual llava.eval.eval_science_qa_gpt4
    llava.eval.eval_science_qa_gpt4_requery llava.eval.generate_webpage_data_from_table llava.eval.model_qa
    llava.eval.qa_baseline_gpt35 llava.model.apply_delta
    llava.model.language_model.llava_mpt llava.model.make_delta llava.model.utils llava.serve.controller
    llava.serve.gradio_web_server llava.serve.model_worker llava.serve.register_worker llava.serve.sglang_worker
    llava.serve.test_message llava.train.llama_flash_attn_monkey_patch llava.train.llama_xformers_attn_monkey_patch
    llava.train.train_xformers"""
# LLaVA's parameters, in its order; ours may have more behind them.
PARAMETERS = {
    "llava.eval.eval_textvqa.eval_single": "annotation_file result_file",
    "llava.eval.model_vqa.eval_model": "args",
    "llava.eval.model_vqa.get_chunk": "lst n k",
    "llava.eval.model_vqa.split_list": "lst n",
    "llava.eval.model_vqa_loader.eval_model": "args",
    "llava.eval.model_vqa_mmbench.eval_model": "args",
    "llava.eval.model_vqa_science.eval_model": "args",
    "llava.eval.run_llava.eval_model": "args",
    "llava.eval.run_llava.image_parser": "args",
    "llava.eval.run_llava.load_image": "image_file",
    "llava.eval.run_llava.load_images": "image_files",
    "llava.mm_utils.KeywordsStoppingCriteria": "keywords tokenizer input_ids",
    "llava.mm_utils.divide_to_patches": "image patch_size",
    "llava.mm_utils.expand2square": "pil_img background_color",
    "llava.mm_utils.get_anyres_image_grid_shape": "image_size grid_pinpoints patch_size",
    "llava.mm_utils.get_model_name_from_path": "model_path",
    "llava.mm_utils.load_image_from_base64": "image",
    "llava.mm_utils.process_anyres_image": "image processor grid_pinpoints",
    "llava.mm_utils.process_images": "images image_processor model_cfg",
    "llava.mm_utils.resize_and_pad_image": "image target_resolution",
    "llava.mm_utils.select_best_resolution": "original_size possible_resolutions",
    "llava.mm_utils.tokenizer_image_token": "prompt tokenizer image_token_index return_tensors",
    "llava.model.LlavaLlamaForCausalLM.encode_images": "self images texts",
    "llava.model.LlavaLlamaForCausalLM.initialize_vision_tokenizer": "self model_args tokenizer",
    "llava.model.LlavaLlamaForCausalLM.prepare_inputs_labels_for_multimodal": "self input_ids position_ids "
    "attention_mask past_key_values labels images image_sizes texts",
    "llava.model.builder.load_pretrained_model": "model_path model_base model_name load_8bit load_4bit device_map "
    "device use_flash_attn",
    "llava.model.consolidate.consolidate_ckpt": "src_path dst_path",
    "llava.model.llava_arch.LlavaMetaModel.initialize_vision_modules": "self model_args fsdp",
    "llava.model.llava_arch.unpad_image": "tensor original_size",
    "llava.model.multimodal_encoder.builder.build_vision_tower": "vision_tower_cfg",
    "llava.model.multimodal_projector.builder.build_vision_projector": "config",
    "llava.serve.cli.load_image": "image_file",
    "llava.serve.cli.main": "args",
    "llava.train.train.find_all_linear_names": "model",
    "llava.train.train.get_mm_adapter_state_maybe_zero_3": "named_params keys_to_match",
}


def list_names(table: dict[str, str]) -> list[str]:
    return [f"{module}.{name}" for module, names in table.items() for name in names.split()]


def resolve(path: str) -> object:
    """Return what a dotted path names, by the longest module in front."""
    module, _, rest = path, "", []
    while True:
        try:
            found = import_module(module)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for name in rest:
        found = getattr(found, name)
    return found


@pytest.fixture(scope="module")
def model(golden):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden / "checkpoints")
        return load_pretrained_model(CHECKPOINT, device="cpu", dtype="float32")[1]


@pytest.fixture
def images():
    return torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def needs_datasets(request):
    """Skip names of the training code where the package that reads its records is absent."""
    if "llava.train" in request.node.name:
        pytest.importorskip("datasets")


# ------------------------------------------------------------------------------------------------------ the whole table
@pytest.mark.parametrize("module", WORKS)
def test_a_published_name_can_be_imported(module):
    scope = {}
    names = WORKS[module].split()
    exec(f"from {module} import {', '.join(names)}" if names else f"import {module}", scope)
    assert set(names) <= set(scope)


@pytest.mark.parametrize("path", PARAMETERS)
def test_a_published_function_takes_the_published_arguments(path):
    names = PARAMETERS[path].split()
    assert list(inspect.signature(resolve(path)).parameters)[: len(names)] == names


@pytest.mark.parametrize("path", list_names(GONE))
def test_a_name_that_is_gone_says_what_to_use(path):
    module, _, name = path.rpartition(".")
    with pytest.raises(ImportError) as told:
        exec(f"from {module} import {name}")
    assert str(told.value) == f"{path} is gone: {GONE_NAMES[path]}" and "\n" not in str(told.value)


@pytest.mark.parametrize("module", GONE_WHOLE.split())
def test_a_module_that_is_gone_says_what_to_use(module):
    package, _, name = module.rpartition(".")
    for statement in (f"import {module}", f"from {module} import main", f"from {package} import {name}"):
        with pytest.raises(ImportError) as told:
            exec(statement)
        assert str(told.value) == f"{module} is gone: {GONE_MODULES[module]}"


def test_a_command_that_is_gone_says_so_in_its_last_line():
    command = [sys.executable, "-m", "llava.serve.controller", "--port", "10000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "llava.serve.controller is gone: use python -m llava.serve.api, one process" in done.stderr


def test_nothing_is_gone_that_the_table_does_not_name():
    assert sorted(GONE_NAMES) == sorted(list_names(GONE)) and sorted(GONE_MODULES) == sorted(GONE_WHOLE.split())


def test_other_names_are_missing_as_python_says_it():
    with pytest.raises(ImportError, match=r"cannot import name 'no_such' from 'llava.utils'"):
        exec("from llava.utils import no_such")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'llava.serve.no_such'"):
        import_module("llava.serve.no_such")
    assert not hasattr(import_module("llava.model"), "no_such")


def test_what_is_to_be_used_instead_is_there():
    pytest.importorskip("datasets")
    words = " ".join([*GONE_NAMES.values(), *GONE_MODULES.values()])
    paths = set(re.findall(r"\bllava(?:\.\w+)+", words))
    assert len(paths) > 15
    for path in paths:
        assert resolve(path) is not None


def test_the_parity_document_lists_what_is_gone():
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    groups: dict[tuple[str, str], list[str]] = {}
    for path in sorted(GONE_NAMES):
        module, _, name = path.rpartition(".")
        groups.setdefault((module, GONE_NAMES[path]), []).append(f"`{name}`")
    for (module, words), names in groups.items():
        assert f"| `{module}`: {', '.join(names)} | {words} |" in text
    for words in GONE_MODULES.values():
        modules = ", ".join(f"`{module}`" for module in sorted(GONE_MODULES) if GONE_MODULES[module] == words)
        assert f"| {modules} | {words} |" in text


# ------------------------------------------------------------------------------------------------------------ the model
def test_encode_images_without_texts_gives_llavas_features(model, images):
    features = model.encode_images(images)
    assert features.shape == (2, 36, model.config.hidden_size)
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    assert torch.allclose(features, projector(tower(images)), atol=1e-5)


def test_encode_images_without_texts_gives_a_list_where_numbers_of_tokens_differ(model, images):
    crops = torch.cat([images, images])
    features = model.encode_images([images[0], crops])
    assert [image.shape[0] for image in features] == [36, 4 * 36]
    assert torch.equal(features[1], model.encode_images([crops], [""])[0].features)


def test_encode_images_without_texts_needs_a_reduction_that_reads_none(model, images, checkpoints):
    try:
        model.set_token_reduction("FasterVLM:9")
        assert model.encode_images(images).shape[:2] == (2, model.encode_images(images, ["", ""])[0].num_tokens)
        model.set_token_reduction("TRIM:9")
        with pytest.raises(InputError, match="TRIM:9 reads the question: give texts=, one for each image"):
            model.encode_images(images)
    finally:
        model.set_token_reduction(None)


def test_build_vision_tower_takes_a_config_and_loads_the_tower_unless_told_to_wait(model, images, checkpoints):
    from llava.model.multimodal_encoder.builder import build_vision_tower

    tower = build_vision_tower(model.config)
    assert tower.is_loaded and torch.equal(tower(images), model.get_vision_tower()(images))
    assert not build_vision_tower(model.config, delay_load=True).is_loaded


# ------------------------------------------------------------------------------------------------------------- training
def test_find_all_linear_names_names_the_decoders_layers_alone(model):
    pytest.importorskip("datasets")
    from llava.train.train import find_all_linear_names

    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert find_all_linear_names(model) == names


def test_the_adapters_state_is_a_copy_of_the_parameters_that_match(model):
    pytest.importorskip("datasets")
    from llava.train.train import get_mm_adapter_state_maybe_zero_3

    state = get_mm_adapter_state_maybe_zero_3(model.named_parameters(), ["mm_projector"])
    assert sorted(state) == [f"model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("bias", "weight")]
    own = dict(model.named_parameters())
    assert all(torch.equal(value, own[name]) and value is not own[name] for name, value in state.items())


# ----------------------------------------------------------------------------------------------------------- evaluation
def test_split_list_and_get_chunk_cut_as_llavas_do():
    from llava.eval.model_vqa import get_chunk, split_list

    assert split_list([1, 2, 3, 4, 5], 2) == [[1, 2, 3], [4, 5]] and split_list([1, 2], 5) == [[1], [2]]
    assert get_chunk([1, 2, 3, 4, 5], 2, 1) == [4, 5]


@pytest.mark.parametrize("name", ["model_vqa", "model_vqa_loader"])
def test_eval_model_answers_a_question_file_for_a_script(name, golden, checkpoints, tmp_path):
    """By any object with LLaVA's attributes; what is missing has the command's default."""
    data, file = golden / "data", tmp_path / "answers.jsonl"
    arguments = {
        "model_path": "llava-v1.5-tiny84-TRIM",
        "model_base": None,
        "question_file": str(data / "questions" / "vqa.jsonl"),
        "image_folder": str(data / "images"),
        "answers_file": str(file),
        "conv_mode": "vicuna_v1",
        "num_chunks": 3,
        "chunk_idx": 1,
        "temperature": 0,
        "max_new_tokens": 4,
    }
    import_module(f"llava.eval.{name}").eval_model(type("Args", (), arguments)())
    recorded = (golden / "cli" / "llava-v1.5-tiny84-TRIM.loader_chunk1of3.jsonl").read_text().splitlines()
    answered = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["question_id"] for row in answered] == [json.loads(line)["question_id"] for line in recorded]


@pytest.mark.parametrize(("name", "questions"), [("mmbench", "mmbench.tsv"), ("science", "science.json")])
def test_eval_model_answers_tables_and_problems_for_a_script(name, questions, golden, checkpoints, tmp_path):
    file = tmp_path / "answers.jsonl"
    arguments = SimpleNamespace(
        model_path="llava-v1.5-tiny84-TRIM",
        question_file=str(golden / "data" / "questions" / questions),
        image_folder=str(golden / "data" / "images"),
        answers_file=str(file),
        temperature=0,
        num_chunks=4,
        chunk_idx=0,
    )
    import_module(f"llava.eval.model_vqa_{name}").eval_model(arguments)
    assert all({"question_id", "prompt", "text"} <= set(json.loads(line)) for line in file.open())


def test_eval_model_names_an_option_that_it_cannot_do_without(checkpoints):
    from llava.eval.model_vqa_loader import eval_model

    with pytest.raises(InputError, match="question_file is missing: JSON Lines: question_id, image, text"):
        eval_model(SimpleNamespace(model_path="llava-v1.5-tiny84"))


def test_eval_single_scores_an_answers_file(tmp_path, capsys):
    from llava.eval.eval_textvqa import eval_single

    entry = {"image_id": "i", "question_id": 1, "question": "what is it?", "answers": ["bus"] * 10}
    (tmp_path / "val.json").write_text(json.dumps({"data": [entry]}))
    answer = {"question_id": "i", "prompt": "What is it?\nAnswer briefly.", "text": "Bus"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    eval_single(str(tmp_path / "val.json"), str(tmp_path / "answers.jsonl"))
    assert capsys.readouterr().out == "answers\nSamples: 1\nAccuracy: 100.00%\n\n"


def test_images_are_named_and_read_as_in_run_llava(golden):
    from llava.eval import run_llava
    from llava.serve import cli

    files = [str(golden / "data" / "images" / f"{name}.png") for name in ("noise", "sign")]
    assert run_llava.image_parser(SimpleNamespace(image_file=";".join(files), sep=";")) == files
    read = [load_image(file) for file in files]
    assert run_llava.load_images(files) == read and run_llava.load_image(files[0]) == read[0]
    assert cli.load_image(files[1]) == read[1]


def test_the_chat_runs_for_a_script(golden, checkpoints, monkeypatch, capsys):
    from llava.serve.cli import main

    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n\n"))
    image_file = str(golden / "data" / "images" / "noise.png")
    main(SimpleNamespace(model_path=CHECKPOINT, image_file=image_file, temperature=0, max_new_tokens=4))
    out = capsys.readouterr().out
    assert "visual tokens: 36 of 36 kept" in out and out.endswith("exit...\n")
