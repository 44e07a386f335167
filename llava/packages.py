"""The packages that llava needs: a command that starts without one of them says so in one line.

    python llava/packages.py [NAME ...]    leaves with code 2 if one is missing that most commands need, or is named

A Python that is too old for llava can read this module and `llava/__init__.py`, in order to say so.
"""

import os
import sys
import sysconfig
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
    "yaml": "pyyaml",
    "tqdm": "tqdm",
}
"""What most commands need: the name to import, the name to install."""
NEEDED_BY_SOME = {
    "accelerate": "accelerate",
    "peft": "peft",
    "open_clip": "open_clip_torch",
    "datasets": "datasets",
    "openai": "openai",
    "openpyxl": "openpyxl",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
}
"""What one command or one option needs."""
EXTRAS = {
    "deepspeed": ("deepspeed", "train"),
    "bitsandbytes": ("bitsandbytes", "quantise"),
    "fastapi": ("fastapi", "serve"),
    "starlette": ("fastapi", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "prometheus_client": ("prometheus_client", "serve"),
}
"""What comes with an extra of llava: the name to import, the name to install, the extra."""
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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
        if kind is ModuleNotFoundError and (error.name in NEEDED_BY_SOME or error.name in EXTRAS):
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
        leave(explain_missing(names))


def explain_missing(names):
    """Tell what this Python lacks, by names to import, and how to install it."""
    packages = [name_package(name) for name in names]
    lacks = f"lacks {', '.join(packages)}"
    if not is_repository():
        return f"{lacks}; run '{sys.executable} -m pip install {' '.join(packages)}'"
    extra = "".join(sorted({f"[{EXTRAS[name][1]}]" for name in names if name in EXTRAS}))
    install = f"pip install -c constraints.txt -e .{extra}"
    if not is_managed():
        return f"{lacks}; run '{sys.executable} -m {install}' in the repository, or set PYTHON to one that has them"
    # pip refuses to install into the system's Python (PEP 668).
    has_own = os.path.isfile(os.path.join(REPOSITORY, ".venv", "pyvenv.cfg"))
    activate = "source .venv/bin/activate"
    first = activate if has_own else f"python3 -m venv .venv && {activate} && {install}"
    return f"{lacks}; run '{first}' in the repository, then this command again"


def name_package(name):
    """Return the name to install for a name to import."""
    return EXTRAS[name][0] if name in EXTRAS else {**NEEDED, **NEEDED_BY_SOME}.get(name, name)


def is_repository():
    """Whether this package lies in its repository; a wheel leaves pyproject.toml behind."""
    return os.path.isfile(os.path.join(REPOSITORY, "pyproject.toml"))


def is_managed():
    """Whether this is a Python that the system's package manager keeps to itself (PEP 668)."""
    marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    return sys.prefix == sys.base_prefix and os.path.isfile(marker)


def tell_install(name):
    """Tell how to install what one part needs, for a name of `NEEDED_BY_SOME` or `EXTRAS`."""
    if name in EXTRAS and is_repository():
        return f"pip install -e '.[{EXTRAS[name][1]}]'"
    return f"pip install {name_package(name)}"


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
