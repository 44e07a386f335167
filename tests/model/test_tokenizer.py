"""Reading `tokenizer.model`: bare, and where sentencepiece's own module cannot be imported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from llava.mm_utils import tokenize_texts
from llava.model.tokenizer import load_tokenizer

TEXT = "Hello <image> world\n"
# What protobuf 6 does to the module of sentencepiece 0.2.3.
BLOCKED = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "sentencepiece.sentencepiece_model_pb2":
            raise RuntimeError("Detected incompatible Protobuf Gencode/Runtime versions")
sys.meta_path.insert(0, Refuse())
"""


def test_a_folder_with_tokenizer_model_alone_loads_without_sentencepieces_own_module(golden: Path):
    folder = golden / "checkpoints/lmsys/vicuna-tiny-v1.5"
    assert not (folder / "tokenizer.json").exists()
    code = f"""{BLOCKED}
from llava.model.tokenizer import load_tokenizer
print(load_tokenizer({str(folder)!r})({TEXT!r}).input_ids)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(load_tokenizer(str(folder))(TEXT).input_ids)


def test_a_bare_tokenizer_model_starts_prompts_as_llama_does(golden: Path, tmp_path: Path):
    folder = golden / "checkpoints/lmsys/vicuna-tiny-v1.5"
    shutil.copy(folder / "tokenizer.model", tmp_path)
    assert load_tokenizer(str(tmp_path))(TEXT).input_ids == load_tokenizer(str(folder))(TEXT).input_ids


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", " a", "  a", "   two  spaces ", "\n", "a\n\nb", " \n What?", "\ttab", "x\r\ny", " ASSISTANT:"),
        *(
            "é è ñ",
            "e\u0301",
            "日本語のテキスト",
            "🙂 👩\u200d👧",
            "\u00a0nbsp",
            "ﬁ ligature",
            "İstanbul ẞ",
            "\x00\x01",
        ),
    ],
)
def test_a_folder_with_tokenizer_model_alone_gives_the_ids_of_sentencepiece(golden: Path, text: str):
    """Also where protobuf refuses sentencepiece's own module, as beside lmms-eval (`scripts/test_clients.sh`)."""
    folder = golden / "checkpoints/lmsys/vicuna-tiny-v1.5"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenize_texts([text], load_tokenizer(str(folder))) == [[1, *processor.encode(text)]]
