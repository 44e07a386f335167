"""Load a checkpoint's tokenizer, with the ids of LLaVA's code, and refuse one that cannot work.

`AutoTokenizer` of transformers 5 loses the leading space of Llama's sentencepiece vocabulary; the Llama class keeps it.
"""

from importlib import import_module
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from llava.errors import InputError
from llava.files import parse_record, read_text
from llava.model.config_rules import TOKENIZER_RULES, check_values
from llava.model.stored_weights import find_file, first_line

SETTINGS_FILE = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
LLAMA_START = "<s>"
TOKENIZERS = {"Llama": LlamaTokenizer, "Qwen2": Qwen2Tokenizer}
"""By the start of the class's name; others are `AutoTokenizer`'s."""


def has_tokenizer(model_path: str) -> bool:
    """Return whether a folder has a tokenizer of its own."""
    return any((Path(model_path) / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Args:
        model_path: checkpoint folder or hub id.

    Returns:
        The tokenizer; prompts start with the beginning-of-sequence token where it is Llama's.

    Raises:
        InputError: when there is none, it can't be read, is empty, or leaves Llama's `<s>` out.
    """
    # transformers 5 would make up an empty vocabulary here.
    if Path(model_path).is_dir() and not has_tokenizer(model_path):
        raise InputError(f"checkpoint {model_path} has no tokenizer: expected {' or '.join(TOKENIZER_FILES)} there")
    for file in (find_file(model_path, name) for name in TOKENIZER_FILES):
        if file is not None and Path(file).stat().st_size == 0:
            raise InputError(f"{file} is empty; copy or download it again")
    settings_file = find_file(model_path, SETTINGS_FILE)
    settings = {} if settings_file is None else parse_record(read_text(Path(settings_file)), settings_file)
    check_values(settings, TOKENIZER_RULES, str(settings_file))
    name = settings.get("tokenizer_class") or "LlamaTokenizer"
    is_llama = name.startswith("Llama")
    kind = next((kind for start, kind in TOKENIZERS.items() if name.startswith(start)), AutoTokenizer)
    # Llama's default for a bare tokenizer.model; transformers 5 has it the other way round.
    is_bare = is_llama and "add_bos_token" not in settings and find_file(model_path, "tokenizer.json") is None
    repair_sentencepiece()
    try:
        tokenizer = kind.from_pretrained(model_path, **({"add_bos_token": True} if is_bare else {}))
        ids = tokenizer("a").input_ids
        num_real = len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        has_words = bool(num_real and set(ids) - set(tokenizer.all_special_ids))
    except Exception as error:
        # Many kinds: OSError, sentencepiece and protobuf errors, broken JSON.
        raise InputError(
            f"tokenizer of {model_path} can't be loaded (tokenizer.model there?): {first_line(error)}"
        ) from error
    if not has_words:
        raise InputError(f"tokenizer of {model_path} has no vocabulary ({num_real} tokens); copy or download it again")
    _check_start(tokenizer, ids, settings, model_path)
    return tokenizer


def _check_start(tokenizer: PreTrainedTokenizerBase, ids: list[int], settings: dict, model_path: str) -> None:
    """Refuse a tokenizer whose prompts do not start as Llama was trained to read them.

    Qwen2 reads no start token. Models on Llama's architecture that were trained without one (Yi: `<|startoftext|>`, not
    added) have another one than `<s>`.
    """
    where = f"tokenizer of {model_path}"
    start = tokenizer.bos_token_id
    if start is None and (settings.get("tokenizer_class") or "").startswith("Qwen2"):
        return
    if start is None or start >= tokenizer.vocab_size:
        raise InputError(
            f"{where} has no beginning-of-sequence token; set bos_token in {SETTINGS_FILE} (Llama's: {LLAMA_START})"
        )
    if ids[0] != start and tokenizer.bos_token == LLAMA_START:
        right = ': set "add_bos_token": true' if settings.get("add_bos_token") is False else ""
        raise InputError(
            f"{where} leaves out {LLAMA_START} at the start of a prompt, which Llama needs; see {SETTINGS_FILE}{right}"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, model_path: str) -> None:
    """Refuse a tokenizer whose own vocabulary is larger than the model's table of embeddings.

    Args:
        tokenizer: of the checkpoint.
        vocab_size: rows of the table.
        model_path: for the message.

    Raises:
        InputError: it is.
    """
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"tokenizer of {model_path} has {tokenizer.vocab_size} tokens, config.json says vocab_size {vocab_size}: "
            "is it another model's?"
        )


def repair_sentencepiece() -> None:
    """Let transformers read `tokenizer.model` where sentencepiece and protobuf do not go together.

    sentencepiece 0.2.3 brings a generated module that only protobuf 7 accepts; under an older one transformers asks for
    `tiktoken` instead. transformers has the same module for all versions of protobuf.
    """
    import sentencepiece

    try:
        import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception:  # ImportError, or protobuf's VersionError
        sentencepiece.sentencepiece_model_pb2 = import_module("transformers.utils.sentencepiece_model_pb2_new")
