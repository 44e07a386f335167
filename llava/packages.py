"""The packages that llava needs: a command that starts without one of them says so in one line.

    python llava/packages.py [NAME ...]    leaves with code 2 if one is missing that most commands need, or is named

A Python that is too old for llava can read this module and `llava/__init__.py`, in order to say so.
"""

import sys
from importlib.util import find_spec

OLDEST_PYTHON = (3, 11)
"""`requires-python` of pyproject.toml."""
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "sentencepiece": "sentencepiece",
    "google.protobuf": "protobuf",
    "PIL": "pillow",
    "filelock": "filelock",
    "numpy": "numpy",
    "tqdm": "tqdm",
}
"""What most commands need: the name to import, the name to install."""
NEEDED_BY_SOME = {
    "accelerate": "accelerate",
    "peft": "peft",
    "deepspeed": "deepspeed",
    "open_clip": "open_clip_torch",
    "datasets": "datasets",
    "openai": "openai",
    "openpyxl": "openpyxl",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
}
"""What one command or one option needs."""


def start_command():
    """Make this command end in one line if a package of ours is missing, Python is too old, or Ctrl-C comes early.

    Nothing else changes: a missing part of an installed package, or a package of somebody else, is an error of the
    installation or of a program, and keeps its traceback. Once a command runs, `errors.run_command` sees to Ctrl-C.
    """
    refuse_old_python()
    usual = sys.excepthook

    def explain(kind, error, trace):
        if kind is ModuleNotFoundError and error.name in NEEDED:
            refuse_missing(list_missing())
        if kind is ModuleNotFoundError and error.name in NEEDED_BY_SOME:
            refuse_missing([error.name])
        if kind is KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return  # Python ends by the signal
        usual(kind, error, trace)

    sys.excepthook = explain


def refuse_old_python():
    if sys.version_info < OLDEST_PYTHON:
        version, oldest = (".".join(map(str, numbers[:2])) for numbers in (sys.version_info, OLDEST_PYTHON))
        leave(f"is version {version}; {oldest} or newer is needed")


def refuse_missing(names):
    """Leave if names to import are given: tell in one line what to install where."""
    if names:
        packages = ", ".join({**NEEDED, **NEEDED_BY_SOME}[name] for name in names)
        install = f"{sys.executable} -m pip install -c constraints.txt -e ."
        leave(f"lacks {packages}; run '{install}' in the repository, or set PYTHON to one that has them")


def list_missing():
    """List the names to import of what most commands need and this Python has not."""
    return [name for name in NEEDED if not is_installed(name)]


def is_installed(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # nor is the package that it is a part of
        return False


def leave(message):
    sys.stderr.write(f"error: Python at {sys.executable} {message}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    refuse_old_python()
    refuse_missing([*list_missing(), *(name for name in sys.argv[1:] if not is_installed(name))])
