"""The commands that ask about an image answer, chat and draw; a user's mistake ends in one line and exit code 2."""

import http.server
import io
import json
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from llava.cli import choose_run_template, choose_template, list_image_sources
from llava.errors import run_command
from llava.eval import run_llava
from llava.eval.run_llava import eval_model
from llava.serve import cli
from llava.visualize import main as visualize_main

ROOT = Path(__file__).parents[1]
# Runs each command as `python -m` or `python FILE` would, in one process; prints what went wrong.
RUN_EACH = """
import contextlib, io, json, os, runpy, sys
heavy = ("torch", "transformers", "matplotlib", "datasets", "openai")
for words, code in json.loads(sys.argv[1]):
    target, sys.argv = words[0], list(words)
    out, left = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            if target.endswith(".py"):
                runpy.run_path(target, run_name="__main__")
            else:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            left = end.code or 0
    loaded = [name for name in heavy if name in sys.modules]
    if left != code or not any(word in out.getvalue() for word in ("usage:", "error: ")) or loaded:
        print(words, "left with", left, "loaded", loaded, out.getvalue()[-300:], flush=True)
        os._exit(0)
"""


def list_commands() -> list[str]:
    """List the modules and scripts that are commands."""
    files = [file for folder in ("llava", "scripts", "playground") for file in ROOT.glob(f"{folder}/**/*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    commands = [path for path, text in texts.items() if "\n    run_command(" in text and "__main__" in text]
    names = [path.relative_to(ROOT) for path in commands]
    return [
        str(name) if name.parent == Path("scripts") else ".".join(name.with_suffix("").parts).removesuffix(".__main__")
        for name in names
    ]


def test_every_command_answers_help_and_mistaken_options_before_it_loads_a_library():
    commands = list_commands()
    assert {"llava.eval", "llava.efficiency", "scripts/merge_lora_weights.py", "scripts.bench.serve"} <= set(commands)
    runs = [([command, "--help"], 0) for command in commands]
    runs += [([command, "--no-such-option"], 2) for command in commands]
    runs += [
        (["llava.eval", name, "--help"], 0)
        for name in ("list", "download", "check", "run", "answer", "score", "wrong", "export", "report", "compare")
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, json.dumps(runs)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


TRIM, PLAIN = "llava-v1.5-tiny84-TRIM", "llava-v1.5-tiny84"
NOISE, SIGN, TALL = (f"../data/images/{name}.png" for name in ("noise", "sign", "tall_shapes"))
BUS = "What is the color of the bus?"
BRIEF = ["--max_new_tokens", "4", "--temperature", "0"]


@pytest.fixture
def command(checkpoints, monkeypatch, capsys):
    """Run a command; returns exit code, standard output and standard error."""

    def run(main, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            run_command(main)
        except SystemExit as left:
            code = left.code
        output = capsys.readouterr()
        # The template is named on stderr once the model is loaded; it is not part of what went wrong.
        told = [line for line in output.err.splitlines(keepends=True) if not line.startswith("conversation template ")]
        return code, output.out, "".join(told)

    return run


def ask_command(command, *arguments, model=TRIM, image=NOISE, query=BUS):
    return command(run_llava.main, "--model-path", model, "--image-file", image, "--query", query, *BRIEF, *arguments)


def test_image_lists_are_split_but_existing_files_are_not(tmp_path):
    odd = tmp_path / "a,b.png"
    odd.touch()
    assert list_image_sources(["x.png,y.png", str(odd)], ",") == ["x.png", "y.png", str(odd)]
    assert list_image_sources("x.png;y.png", ";") == ["x.png", "y.png"]
    assert list_image_sources("x.png", "") == ["x.png"]
    names = [f"image_{number}.png" for number in range(1000)]  # together too long for a name
    assert list_image_sources(",".join(names), ",") == names
    assert list_image_sources("half \ud83d.png,a\0b.png", ",") == ["half \ud83d.png", "a\0b.png"]


def test_the_template_option_beats_the_checkpoint_name():
    assert choose_template(SimpleNamespace(model_path="/a/llava-v1.5-7b")) == "llava_v1"
    assert choose_template(SimpleNamespace(model_path="/a/llava-v1.5-7b", conv_mode="vicuna_v1")) == "vicuna_v1"


def test_run_llava_prints_the_answer_and_tells_the_tokens_on_standard_error(command):
    code, out, err = ask_command(command)
    assert code == 0 and len(out.strip().splitlines()) == 1
    assert err.splitlines()[-1].startswith("visual tokens: 7 of 36 kept")


def test_run_llava_reduces_as_told(command):
    assert "9 of 36" in ask_command(command, "--reduce", "TextSim:0.25")[2]
    assert "36 of 36" in ask_command(command, "--reduce", "none")[2]
    assert "36 of 36" in ask_command(command, model=PLAIN)[2]
    assert "7 of 36" in ask_command(command, "--reduce", "TRIM:-1", model=PLAIN)[2]


def test_run_llava_takes_several_images_joined_or_repeated(command):
    joined = ask_command(command, image=f"{NOISE},{SIGN}")
    repeated = ask_command(command, "--image-file", SIGN)
    assert joined == repeated and "of 72 kept" in joined[2]


def test_run_llava_takes_an_address(command, golden):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=golden / "data/images")
    handler.func.log_message = lambda *arguments: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answered = ask_command(command, image=f"http://127.0.0.1:{server.server_port}/noise.png")
        server.shutdown()
    assert answered == ask_command(command)


def test_eval_model_takes_the_published_attributes(checkpoints, capsys):
    args = type("Args", (), {
        "model_path": TRIM, "model_base": None, "model_name": TRIM, "query": BUS, "conv_mode": None,
        "image_file": NOISE, "sep": ",", "temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": 4,
    })()  # fmt: skip
    answer = eval_model(args)
    assert capsys.readouterr().out == f"{answer}\n"


MISTAKES = [
    ({"image": "missing.png"}, (), "no such file: missing.png"),
    ({"image": "config.json"}, (), "no such file"),
    ({"image": f"{TRIM}/config.json"}, (), "not an image"),
    ({"query": " "}, (), "--query is empty"),
    ({"query": "<image> <image> which?"}, (), "2 <image> placeholders for 1 new images"),
    ({"query": "word " * 5000}, (), "positions"),
    ({"model": "./no-such-folder"}, (), "no-such-folder"),
    ({"model": "../data/images"}, (), "config.json"),
    ({}, ("--reduce", "TRIMM:-1"), 'did you mean "TRIM"'),
    ({}, ("--conv-mode", "vicuna"), "vicuna_v1"),
    ({}, ("--device", "gpu7"), "gpu7"),
    ({}, ("--dtype", "float8"), "float8"),
    ({}, ("--tower-dtype", "float9"), "float9"),
    ({}, ("--attn-implementation", "flashy"), "flashy"),
    ({}, ("--temperature", "-2"), "temperature -2.0"),
    ({}, ("--temperature", "nan"), "temperature nan: expected 0, or 0.001 to 100"),
    ({}, ("--temperature", "inf"), "temperature inf"),
    ({}, ("--num_beams", "0"), "num_beams 0"),
    ({}, ("--num_beams", "100000"), "num_beams 100000: expected 1 to 64"),
    ({}, ("--seed", str(2**64)), "seed 18446744073709551616: expected"),
    ({"image": "/dev/zero"}, (), "/dev/zero is a device, not a regular file"),
    ({"image": "x" * 300}, (), "File name too long"),
    (
        {"image": "http://user:secret@localhost:9/a.png"},
        (),
        "http://localhost:9/a.png: an address with a user",
    ),
    ({"query": "half \ud83d"}, (), r"character 6 of the text, '\ud83d', is half of a surrogate pair"),
    ({"query": "word " * 300_000}, (), "a text of 1,500,000 characters"),
]


@pytest.mark.parametrize(("changes", "arguments", "reason"), MISTAKES, ids=[reason for _, _, reason in MISTAKES])
def test_mistakes_end_in_one_line_and_code_two(command, changes, arguments, reason):
    code, out, err = ask_command(command, *arguments, **changes)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and reason in err


@pytest.mark.parametrize("query", ["这张图片里有什么？", "word " * 2000])
def test_unusual_questions_are_answered(command, query):
    code, _, err = ask_command(command, query=query)
    assert code == 0 and "of 36 kept" in err


def chat_command(command, stdin, *arguments):
    return command(
        cli.main, "--model-path", TRIM, "--image-file", NOISE, "--temperature", "0", "--max-new-tokens", "3",
        *arguments, stdin=stdin,
    )  # fmt: skip


def test_cli_answers_each_piped_line_and_says_what_it_kept(command):
    code, out, err = chat_command(command, f"{BUS}\nAnd the sign?\n")
    lines = [line for line in out.splitlines() if line.startswith("[visual tokens: ")]
    assert (code, err) == (0, "") and len(lines) == 2 and lines[0].startswith("[visual tokens: 7 of 36 kept")
    assert out.endswith("exit...\n")


def test_cli_ends_at_an_empty_line(command):
    out = chat_command(command, f"{BUS}\n\nnever asked\n")[1]
    assert out.count("[visual tokens") == 1 and out.endswith("exit...\n")


def test_cli_ends_at_once_without_input(command):
    code, out, _ = chat_command(command, "")
    assert code == 0 and "[visual tokens" not in out


def test_cli_reduces_as_told_and_shows_the_prompt_for_debugging(command):
    out = chat_command(command, f"{BUS}\n", "--reduce", "none", "--debug")[1]
    assert "36 of 36" in out and "USER: <image>\\nWhat is the color" in out


def test_a_piped_question_that_cannot_be_answered_ends_the_chat_with_one_line(command):
    code, _, err = chat_command(command, "word " * 5000 + "\n")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_commands_run_as_modules_from_a_shell(checkpoints, golden):
    root = golden.parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "llava.serve.cli", "--model-path", TRIM, "--image-file", NOISE, "--max-new-tokens", "2"],
        input=b"What \xff is this?\n", capture_output=True, check=False, env={"PYTHONPATH": str(root), "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 0 and b"of 36 kept" in done.stdout and b"Traceback" not in done.stderr


def test_a_draw_is_repeated_by_its_seed_and_help_says_that_there_is_one(command):
    draw = ["--temperature", "5", "--seed"]
    assert ask_command(command, *draw, "3") == ask_command(command, *draw, "3")
    assert len({ask_command(command, *draw, str(seed))[1] for seed in range(4)}) > 1
    text = " ".join(command(cli.main, "--help")[1].split())
    assert "default: 0.2; tokens are drawn, in each run others" in text and "--seed" in text


def test_run_llava_is_greedy_unless_a_temperature_is_given(command):
    arguments = ("--model-path", TRIM, "--image-file", NOISE, "--query", BUS, "--max_new_tokens", "4")
    assert command(run_llava.main, *arguments) == command(run_llava.main, *arguments, "--temperature", "0")
    assert len({command(run_llava.main, *arguments)[1] for _ in range(3)}) == 1
    text = " ".join(command(run_llava.main, "--help")[1].split())
    assert "0 is greedy (default: 0)" in text and "--seed" in text


@pytest.mark.parametrize("query", ["half \ud83d", "word " * 300_000])
def test_visualize_refuses_a_question_that_no_tokenizer_takes(command, tmp_path, query):
    code, _, err = command(
        visualize_main, "--model-path", TRIM, "--image-file", TALL, "--query", query, "--out", tmp_path / "a.png"
    )
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_visualize_writes_an_image(command, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new folder" / "kept.png"
    code, _, err = command(
        visualize_main, "--model-path", TRIM, "--image-file", TALL, "--query", f"{BUS} 这张", "--out", out
    )
    assert (code, err) == (0, "") and Image.open(out).format == "PNG"
    assert [path.name for path in out.parent.iterdir()] == ["kept.png"]


def test_visualize_refuses_a_checkpoint_that_keeps_everything(command, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ("--model-path", PLAIN, "--image-file", TALL, "--query", BUS, "--out", tmp_path / "a.png")
    code, _, err = command(visualize_main, *arguments)
    assert code == 2 and "--reduce" in err and not (tmp_path / "a.png").exists()
    assert command(visualize_main, *arguments, "--reduce", "Random:0.25")[0] == 0


VISUALIZE = ("--model-path", TRIM, "--image-file", TALL, "--query", BUS, "--conv-mode", "vicuna_v1")


def test_visualize_prints_the_answers_of_the_full_model_and_of_each_method(command, tmp_path):
    pytest.importorskip("matplotlib")
    options = (
        "--reduce",
        "TRIM:9",
        "FastV:0.5,layer=1",
        "--answer",
        "--max-new-tokens",
        "3",
        "--out",
        tmp_path / "a.png",
    )
    code, out, err = command(visualize_main, *VISUALIZE, *options)
    rows = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "") and [row[0] for row in rows] == ["full", "TRIM:9", "FastV:0.5,layer=1", "written"]
    assert out.splitlines()[0].endswith("36 tokens") and out.splitlines()[2].endswith("36, then 18 tokens")
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_visualize_prints_a_row_for_each_question_and_says_where_the_drawing_is(command, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "a.svg"
    options = ("--query", "And the sign?", "--reduce", "TRIM:9", "--answer", "--max-new-tokens", "2", "--out", out)
    code, lines, _ = command(visualize_main, *VISUALIZE, *options)
    assert code == 0 and out.read_bytes().startswith(b"<?xml")
    first, second, last = lines.splitlines()
    assert first.startswith(BUS) and second.startswith("And the sign?  ") and last == f"written to {out}"
    assert first.endswith("10 tokens") and second.endswith("10 tokens")


def test_visualize_prints_a_row_for_each_block_that_is_given_back(command, tmp_path):
    pytest.importorskip("matplotlib")
    options = (
        "--reduce",
        "Random:9",
        "--what-if",
        "--block",
        "3",
        "--max-new-tokens",
        "2",
        "--out",
        tmp_path / "a.png",
    )
    code, out, err = command(visualize_main, *VISUALIZE, *options)
    *lines, last = out.splitlines()
    assert last == f"written to {tmp_path / 'a.png'}"
    assert (code, err) == (0, "") and lines[0].split() == ["given", "back", "patches", "answer"]
    assert [line.split("  ")[0] for line in lines[3:-1]] == [
        f"rows {row}, columns {col}" for row in ("0-2", "3-5") for col in ("0-2", "3-5")
    ]
    assert sum(int(line.split("  ")[1]) for line in lines[3:-1]) == 27
    assert "of 4 blocks" in lines[-1] and Image.open(tmp_path / "a.png").format == "PNG"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--what-if", "--reduce", "TRIM:9", "Pool:9"], "--what-if tries one method, and --reduce names 2"),
        (["--what-if", "--answer"], "leave out --answer"),
        (["--what-if", "--block", "7"], "--block 7: an image has 6 x 6 patches; use 1 to 6"),
        (["--block", "2"], "--block has no effect without --what-if"),
        (["--query", "Why?", "--what-if"], "--what-if is about one question, and there are 2 --query"),
        (["--query", "Why?", "--reduce", "TRIM:9", "Pool:9"], "there are 2 --query, and --reduce names 2 methods"),
        (["--query", " "], "--query is empty"),
        (["--out", "a.gif"], "a.gif: a drawing is written as .png, .pdf, .svg, not .gif"),
        (["--max-new-tokens", "2"], "--max-new-tokens has no effect without --answer or --what-if"),
        (["--reduce", "TRIM:9", "TRIMM:9"], 'did you mean "TRIM"'),
        (["--reduce", "none", "--what-if"], "this checkpoint keeps every patch"),
        (["--answer", "--conv-mode", "vicuna_v2"], 'did you mean "vicuna_v1"'),
        (["--reduce", "TRIM:9", "TRIM:9"], "--reduce names TRIM:9 twice"),
        (["--reduce", "TRIM:9", "HiPrune:9,object_layer=40"], "HiPrune:9,object_layer=40: "),
    ],
)
def test_visualize_refuses_options_that_do_not_go_together_in_one_line(command, tmp_path, options, says):
    code, _, err = command(visualize_main, *VISUALIZE, "--out", tmp_path / "a.png", *options)
    assert code == 2 and says in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_the_template_is_the_options_the_stored_one_or_that_of_the_name_and_is_named(capsys):
    args = SimpleNamespace(model_path="/a/llava-v1.5-7b")
    assert choose_template(args) == "llava_v1"
    assert 'conversation template llava_v1, by the name "llava-v1.5-7b"' in capsys.readouterr().err
    assert choose_template(args, SimpleNamespace(conv_mode="vicuna_v1")) == "vicuna_v1"
    assert "conversation template vicuna_v1, from config.json" in capsys.readouterr().err
    args.conv_mode = "plain"
    assert choose_template(args, SimpleNamespace(conv_mode="vicuna_v1")) == "plain"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("stored", "chosen"),
    [(None, "llava_v1"), ("v1", "llava_v1"), ("chat_template", "chat_template"), ("qwen_2", "qwen_2")],
)
def test_an_evaluation_uses_the_template_of_training_where_that_is_not_llavas(
    stored: str | None, chosen: str, tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps({"conv_mode": stored} if stored else {}))
    args = SimpleNamespace(model_path=str(tmp_path), conv_mode=None, usual_conv_mode="llava_v1")
    assert choose_run_template(args) == chosen
    args.conv_mode = "plain"
    assert choose_run_template(args) == "plain"


@pytest.mark.parametrize("content", [None, "{", "[]", '{"conv_mode": 1}'])
def test_a_config_that_cannot_be_read_is_left_to_the_loader(content: str | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    args = SimpleNamespace(model_path=str(tmp_path), conv_mode=None, usual_conv_mode="vicuna_v1")
    assert choose_run_template(args) == "vicuna_v1"
