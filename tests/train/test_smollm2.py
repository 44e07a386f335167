"""A real small language model, SmolLM2-135M-Instruct, in every stage: its own template and end token, tied weights.

It has grouped queries, tied embeddings, a byte-level vocabulary and a chat template. `smollm2.py` fetches it once, into
the user's cache; where that is not possible these tests are skipped, and the reason is printed.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX
from llava.errors import InputError
from llava.image import load_image
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.consolidate import consolidate_ckpt
from llava.model.language_model.causal import LlavaCausalLM
from llava.model.stored_weights import read_shapes
from llava.model.tokenizer import load_tokenizer
from llava.prompt import recover_query, wrap_prompt
from llava.train.records import parse_record
from llava.train.targets import build_targets, check_version, choose_template, list_trainable, render, settle_version
from llava.train.train import train
from playground.shapes.generate import write_train

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llava-tests/smollm2-135m-instruct"
TOWER = ROOT / "playground/shapes/checkpoints/shapes-clip"
END = "<|im_end|>"
FITTING = ("chat_template", "chatml_direct", "mistral_direct", "mpt", "qwen_1_5", "qwen_2")
NUM_LAYERS = 2  # of the copy that two ranks train
MAX_NEW_TOKENS = 24

LIMIT_SECONDS = 1800  # for runs that hang; the whole module takes three minutes
pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_SECONDS)]

# Questions and answers by turns: roles, markup of other templates, white space, scripts, numbers, code.
ODD = [
    ["What is it?", "A bus."],
    ["<image>\nWhat is it?", "A bus."],
    ["What is it?\n<image>", "A bus."],
    ["<image>", "An image."],
    ["<image><image>\nCompare.", "The first is red, the second blue."],
    ["<image> and <image>?", "Both."],
    ["", "No question."],
    [" ", " leading space"],
    ["Trailing space ", "trailing space "],
    ["\ttab", "\ttab"],
    ["Lines?\n\nTwo.", "one\ntwo\n\nthree\n"],
    ["Only a digit.", "7"],
    ["A number?", "1234567890.50"],
    ["Code?", "def f(x):\n    return x  # done\n"],
    ["JSON?", '{"a": [1, 2, {"b": null}]}'],
    ["LaTeX?", "$\\frac{1}{2}$"],
    ["Is it 一?", "一个 🙂"],
    ["Emoji?", "👩‍👩‍👧‍👦🇩🇪"],
    ["Arabic?", "مرحبا بالعالم"],
    ["Combining?", "e\u0301 and é"],
    ["Zero width?", "a\u200bb\u2060c"],
    ["No break?", "10\u00a0kg"],
    ["USER: hello ASSISTANT: what?", "USER: no ASSISTANT: yes"],
    ["What does </s> mean?", "</s> ends a sentence."],
    ["[INST] again [/INST]", "[INST] no [/INST]"],
    ["### Human: hi", "### Assistant: hi"],
    ["system\nYou are a cat.", "assistant\nNo."],
    ["user", "assistant"],
    ["im_end?", "im_end, <| im_end |> and <|im_end"],
    ["<b>HTML</b> &amp; more", "<i>yes</i> &lt;"],
    ["One?", "Yes.", "Two?", "No."],
    ["<image>\nOne?", "a", "", "b", "Three?", "c"],
    ["Same?", "Same.", "Same?", "Same."],
    ["Long?", "word " * 200 + "end"],
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The checkpoint's folder."""
    if not FOLDER.is_dir():
        command = [sys.executable, str(Path(__file__).with_name("smollm2.py")), str(FOLDER)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
        if done.returncode != 0:
            pytest.skip(f"SmolLM2 cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    return FOLDER


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(smollm2))


# ---------------------------------------------------------------------------------------------------------- templates
@pytest.mark.parametrize("version", FITTING)
def test_the_labels_of_odd_samples_are_the_answers_and_their_end_tokens(
    version: str, tokenizer: PreTrainedTokenizerBase
):
    template = choose_template(settle_version(version, tokenizer), tokenizer)
    for turns in ODD:
        rendered = render(turns, template)
        targets = build_targets(rendered, tokenizer)
        learned = [label for label in targets.labels if label != IGNORE_INDEX]
        assert tokenizer.decode(learned) == "".join(answer + END for answer in turns[1::2]), turns
        assert learned.count(tokenizer.convert_tokens_to_ids(END)) == len(turns) // 2
        assert targets.input_ids == tokenizer_image_token(rendered.prompt, tokenizer)


def test_templates_whose_end_is_no_token_are_refused_and_the_fitting_one_is_named(tokenizer: PreTrainedTokenizerBase):
    others = set(list_trainable()) - set(FITTING) - {"plain", "v0_plain"}
    assert {"v1", "llava_llama_2", "mistral_instruct"} <= others
    for version in others:
        check_version(version)
        with pytest.raises(InputError, match=rf"--version {version} ends an answer with </s>, .* chat_template fits"):
            settle_version(version, tokenizer)


def test_prompts_are_those_of_the_models_authors_and_give_the_question_back(
    smollm2: Path, tokenizer: PreTrainedTokenizerBase
):
    question = "What shape is red?"
    prompt = wrap_prompt(question, 1, "chat_template", tokenizer=tokenizer)
    messages = [{"role": "user", "content": f"<image>\n{question}"}]
    authors = AutoTokenizer.from_pretrained(smollm2)
    assert prompt == authors.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "trained by Hugging Face" in prompt
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
    assert recover_query(ids, tokenizer, "chat_template") == question


# ----------------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions with short answers about four images, and the captions of these."""
    folder = tmp_path_factory.mktemp("data")
    write_train(folder, 4, 1, seed=0)
    return folder


@pytest.fixture(scope="module")
def flags(data: Path) -> dict[str, object]:
    return {
        "version": "auto", "vision_tower": TOWER, "data_path": data / "exam.json", "image_folder": data / "images",
        "image_aspect_ratio": "pad", "mm_vision_token_reduce_func": "TRIM:-1", "model_max_length": 512,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip


STAGE_1 = {"version": "plain", "tune_mm_mlp_adapter": True, "learning_rate": 1e-3}
LORA = {"lora_enable": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "learning_rate": 1e-3}
FULL = {"learning_rate": 1e-4}


def stage_1(data: Path) -> dict[str, object]:
    return STAGE_1 | {"data_path": data / "pretrain.json"}


def ask(model: LlavaCausalLM, tokenizer: PreTrainedTokenizerBase, data: Path) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits behind each training question (float32[S, V]), and the ids of the answers, end tokens included."""
    logits, answers = [], []
    for number, raw in enumerate(json.loads((data / "exam.json").read_text(encoding="utf-8"))):
        record = parse_record(raw, number)
        question = record.turns[0].replace("<image>", "").strip()
        prompt = wrap_prompt(question, 1, model.config.conv_mode, tokenizer=tokenizer)
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
        image = load_image(data / "images" / record.images[0])
        pixels = process_images([image], model.get_vision_tower().image_processor, model.config)
        with torch.no_grad():
            logits.append(model.eval()(ids, images=pixels, texts=[question]).logits[0, -1].float())
        new = model.generate(ids, images=pixels, texts=[question], max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers.append(new[0].tolist())
    return torch.stack(logits), answers


@pytest.fixture(scope="module")
def runs(smollm2: Path, data: Path, flags: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Stage 1, then full training and LoRA from its projector: folder, losses, and what the model says in memory."""
    folder, results = tmp_path_factory.mktemp("runs"), {}
    common = flags | {"model_name_or_path": smollm2, "per_device_train_batch_size": 2}
    projector = {"pretrain_mm_mlp_adapter": folder / "stage1/mm_projector.bin"}
    steps = {"stage1": stage_1(data) | {"max_steps": 6}, "full": projector | FULL | {"max_steps": 8}}
    steps["lora"] = projector | LORA | {"max_steps": 8}
    for name, own in steps.items():
        chosen = common | own | {"output_dir": folder / name}
        trainer = train([word for key, value in chosen.items() for word in (f"--{key}", str(value))])
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        model = trainer.model.get_base_model() if name == "lora" else trainer.model
        said = ask(model, trainer.processing_class, data) if name != "stage1" else None
        results[name] = (folder / name, losses, said)
        del trainer, model
        gc.collect()
    return results


@pytest.mark.parametrize("name", ["stage1", "full", "lora"])
def test_the_loss_falls(name: str, runs: dict):
    _, losses, _ = runs[name]
    assert sum(losses[-2:]) < sum(losses[:2])


def list_embeddings(folder: Path) -> list[str]:
    names = read_shapes(str(folder / "model.safetensors"))
    return [name for name in names if "embed_tokens" in name or "lm_head" in name]


def is_tied(model: LlavaCausalLM) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_full_checkpoint_says_what_was_trained_and_holds_tied_weights_once(
    runs: dict, data: Path, tokenizer: PreTrainedTokenizerBase
):
    folder, _, (logits, answers) = runs["full"]
    assert list_embeddings(folder) == ["model.embed_tokens.weight"]
    loaded_tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    assert is_tied(model) and model.config.conv_mode == "chat_template"
    now, said = ask(model, loaded_tokenizer, data)
    assert torch.equal(now, logits) and said == answers
    end = tokenizer.convert_tokens_to_ids(END)
    assert all(len(answer) < MAX_NEW_TOKENS and answer[-1] == end for answer in answers), answers


def test_an_adapter_and_what_it_is_merged_into_say_the_same(
    runs: dict, data: Path, smollm2: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    folder, _, (logits, answers) = runs["lora"]
    end = tokenizer.convert_tokens_to_ids(END)
    assert all(len(answer) < MAX_NEW_TOKENS and answer[-1] == end for answer in answers), answers
    consolidate_ckpt(str(folder), str(tmp_path / "merged"), str(smollm2), dtype="float32")
    assert list_embeddings(tmp_path / "merged") == ["model.embed_tokens.weight"]
    for path, base in ((folder, str(smollm2)), (tmp_path / "merged", None)):
        loaded_tokenizer, model, _, _ = load_pretrained_model(str(path), base, device="cpu")
        assert is_tied(model) and model.config.conv_mode == "chat_template"
        now, said = ask(model, loaded_tokenizer, data)
        assert torch.allclose(now, logits, atol=1e-3) and said == answers


# ---------------------------------------------------------------------------------------------------------- two ranks
@pytest.fixture(scope="module")
def two_ranks(smollm2: Path, data: Path, flags: dict, runs: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process and two ranks under ZeRO-2 and ZeRO-3 in every stage, on the first layers of the model."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("ranks")
    model = LlamaForCausalLM.from_pretrained(smollm2, num_hidden_layers=NUM_LAYERS, dtype=torch.float32)
    model.save_pretrained(folder / "start")
    load_tokenizer(str(smollm2)).save_pretrained(folder / "start")
    common = flags | {
        "model_name_or_path": folder / "start", "per_device_train_batch_size": 1, "max_steps": 2,
        "pretrain_mm_mlp_adapter": runs["stage1"][0] / "mm_projector.bin",
    }  # fmt: skip
    scenarios = []
    for stage, own in (("stage1", stage_1(data)), ("full", FULL), ("lora", LORA)):
        engines = {"one": {"gradient_accumulation_steps": 2}}
        engines |= {name: {"deepspeed": ROOT / f"scripts/{name}.json"} for name in ("zero2", "zero3")}
        for engine, more in engines.items():
            chosen = common | own | more | {"output_dir": folder / f"{stage}-{engine}"}
            scenarios.append({
                "name": f"{stage}-{engine}", "ranks": 1 if engine == "one" else 2,
                "flags": {key: str(value) for key, value in chosen.items()},
            })  # fmt: skip
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder / "scenarios.json")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
                          "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def losses_of(folder: Path, name: str) -> list[float]:
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    log = folder / f"{name}.0.log"
    assert "error" not in result, f"{result['error']}\n{log.read_text(encoding='utf-8')[-3000:]}"
    return result["losses"]


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", ["stage1", "full", "lora"])
def test_two_ranks_train_as_one_process(stage: str, engine: str, two_ranks: Path):
    assert losses_of(two_ranks, f"{stage}-{engine}") == pytest.approx(losses_of(two_ranks, f"{stage}-one"), abs=1e-4)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_tied_weights_are_trained_saved_once_and_load_tied_under_zero(engine: str, two_ranks: Path):
    folder, one = two_ranks / f"full-{engine}", two_ranks / "full-one"
    assert list_embeddings(folder) == ["model.embed_tokens.weight"]
    saved, expected, start = (load_file(path / "model.safetensors") for path in (folder, one, two_ranks / "start"))
    name = "model.embed_tokens.weight"
    assert torch.allclose(saved[name], expected[name], atol=1e-4) and not torch.equal(saved[name], start[name])
    _, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    assert is_tied(model)
    assert torch.equal(model.get_output_embeddings().weight, saved[name])


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_stage_1_and_lora_under_zero_leave_tied_weights_to_the_base(engine: str, two_ranks: Path):
    for stage, weights in (("stage1", "mm_projector.bin"), ("lora", "non_lora_trainables.bin")):
        folder = two_ranks / f"{stage}-{engine}"
        stored = torch.load(folder / weights, weights_only=True)
        assert stored and all("mm_projector" in name for name in stored)
        _, model, _, _ = load_pretrained_model(str(folder), str(two_ranks / "start"), device="cpu")
        assert is_tied(model)
