"""Trackers by name: what `--report_to` may name, and whether each can start, known before anything loads."""

import configparser
import importlib.util
import netrc
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from llava.errors import InputError
from llava.files import explain_errors

# The packages that transformers' trackers need; where there are several, any of them.
TRACKERS = {
    "azure_ml": ("azureml",), "clearml": ("clearml",), "codecarbon": ("codecarbon",), "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",), "dvclive": ("dvclive",), "flyte": ("flytekit",), "kubeflow": ("kubeflow",),
    "mlflow": ("mlflow",), "neptune": ("neptune",), "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",),
    "wandb": ("wandb",),
}  # fmt: skip
WANDB_ADDRESS = "https://api.wandb.ai"
WANDB_SECRETS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
WANDB_AWAY = ("offline", "disabled", "dryrun")
HUB_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
YES = ("1", "true", "yes", "on")


def split_names(names: Sequence[str]) -> list[str]:
    """Split `tensorboard,wandb`, in one word or several, into names."""
    return [name for word in names for name in word.split(",") if name]


def check_trackers(names: Sequence[str], output: str, space: str | None = None) -> None:
    """Refuse trackers that do not exist, are not installed, or cannot start as things stand.

    Only the first rank reports, so only there is more looked for than the package.

    Args:
        names: of `--report_to`, as `split_names` gives them; none: no tracker, all: those that are installed.
        output: of `--output_dir`.
        space: of `--trackio_space_id`.

    Raises:
        InputError: one line with the mend.
    """
    if len(names) > 1 and {"none", "all"} & set(names):
        raise InputError(f"--report_to {','.join(names)}: none and all stand alone")
    for name in names:
        if name not in TRACKERS and name not in ("none", "all"):
            raise InputError(f"--report_to {name}: expected none, all, {', '.join(TRACKERS)}")
        if name in TRACKERS and not is_installed(name):
            raise InputError(f"--report_to {name}: {name} is not installed: pip install {TRACKERS[name][0]}")
    chosen = [name for name in TRACKERS if is_installed(name)] if "all" in names else names
    if os.environ.get("RANK", "0") != "0":
        return
    if "wandb" in chosen:
        check_wandb(os.environ)
    if "trackio" in chosen and space is not None:
        check_space(space, os.environ)
    if "tensorboard" in chosen:
        check_folder(Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or output).expanduser())


def is_installed(name: str) -> bool:
    """Whether a tracker's package is there."""
    return any(importlib.util.find_spec(package) for package in TRACKERS[name])


def check_wandb(environment: Mapping[str, str]) -> None:
    """Refuse Weights & Biases where it would ask for a key, in the environment, netrc file or its own settings.

    Raises:
        InputError: it has no key, and is not offline.
    """
    settings = _read_wandb_settings(environment)
    mode = environment.get("WANDB_MODE") or settings.get("mode", "online")
    is_disabled = environment.get("WANDB_DISABLED", "").lower() in YES
    if is_disabled or mode in WANDB_AWAY or settings.get("disabled", "").lower() in YES:
        return
    if any(environment.get(name) for name in WANDB_SECRETS):
        return
    address = environment.get("WANDB_BASE_URL") or settings.get("base_url", WANDB_ADDRESS)
    host = urlsplit(address).hostname or address
    if not _is_in_netrc(host, environment):
        raise InputError(
            f"--report_to wandb: no key for {host}: run `wandb login`, set WANDB_API_KEY, "
            "or WANDB_MODE=offline to keep the figures here"
        )


def check_space(space: str, environment: Mapping[str, str]) -> None:
    """Refuse a Space on the hub where nobody is logged in; trackio on this machine needs no login.

    Raises:
        InputError: there is no token.
    """
    home = Path(environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    token = Path(environment.get("HF_TOKEN_PATH") or home / "token").expanduser()
    if not any(environment.get(name) for name in HUB_SECRETS) and not token.is_file():
        raise InputError(
            f"--trackio_space_id {space}: no token of the hub: run `hf auth login`, set HF_TOKEN, "
            "or leave it out to keep the figures here"
        )


def check_folder(folder: Path) -> None:
    """Refuse a folder for TensorBoard that cannot be made.

    Raises:
        InputError: something else is in its place, or it cannot be written to.
    """
    with explain_errors("write", folder):
        above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--report_to tensorboard: cannot write {folder}: {above} is not a folder to write into")


def _read_wandb_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Read what `wandb login`, `wandb offline` and `wandb disabled` leave: the user's file, then this folder's."""
    own = Path(environment.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    here = Path(environment.get("WANDB_DIR") or ".").expanduser()
    parser = configparser.ConfigParser(default_section="", interpolation=None)
    try:
        parser.read([own / "settings", here / "wandb" / "settings"], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}  # wandb itself passes over such files
    return dict(parser["default"]) if parser.has_section("default") else {}


def _is_in_netrc(host: str, environment: Mapping[str, str]) -> bool:
    named = environment.get("NETRC")
    for file in [named] if named else ["~/.netrc", "~/_netrc"]:
        path = Path(file).expanduser()
        if path.is_file():
            with suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError):
                return netrc.netrc(str(path)).authenticators(host) is not None
    return False
