# shellcheck shell=bash
# Make sure that the packages are installed: in the Python that PYTHON names, else in the repository's .venv, which the
# first use creates. Source it and call `use_environment`, which exports PYTHON for the commands that follow.

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

use_environment() {
    if [[ -z ${PYTHON:-} ]]; then
        install_packages
        find_python
    else
        "$python" llava/packages.py || exit
    fi
    export PYTHON=$python
}

# Call it before `use_environment` where the user's active environment will do, if it has the packages: those that most
# commands need, and the named ones.
prefer_active_environment() { # [NAME...]
    local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if [[ -z ${PYTHON:-} && -n $active ]] && "$active/bin/python" llava/packages.py "$@" 2>/dev/null; then
        note "with the active environment, $active"
        python=$active/bin/python
        export PYTHON=$python
    fi
}

# Create .venv, or bring it up to date with pyproject.toml and constraints.txt.
install_packages() {
    local venv=$REPO_ROOT/.venv stamp=$REPO_ROOT/.venv/.installed base
    # One install at a time: a second script waits for the first, where the system has flock (macOS has not).
    exec 9>"$REPO_ROOT/.venv.lock"
    if command -v flock >/dev/null; then flock 9; fi
    if ! cat pyproject.toml constraints.txt | cmp -s - "$stamp"; then
        note "installing into .venv (once; about two minutes)"
        if [[ ! -x $venv/bin/python ]]; then
            base=$(find_base_python)
            "$base" -m venv "$venv"
        fi
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
        cat pyproject.toml constraints.txt >"$stamp"
    fi
    exec 9>&-
}

# Name the environment of a tier of its own, `venv`, by the script's first argument: name_environment "$@"; shift
name_environment() {
    if [[ $# -eq 0 || $1 == -* ]]; then
        die "name a folder for the environment: bash scripts/$(basename "$0") FOLDER [PYTEST ARGUMENTS]"
    fi
    venv=$(absolute_path "$1")
}

# Let `venv` hold the packages of a list, anew where the list or pyproject.toml has changed; COMMAND runs after that.
fill_environment() { # LIST [COMMAND]
    if cat pyproject.toml "$1" | cmp -s - "$venv/.installed"; then return; fi
    [[ -x $venv/bin/python ]] || "$(find_base_python)" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1"
    [[ $# -eq 1 ]] || "${@:2}"
    cat pyproject.toml "$1" >"$venv/.installed"
}

# The Python that creates .venv: the first on the PATH of a version that constraints.txt is for.
find_base_python() {
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && "$candidate" -c '
import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11, 3.12 or 3.13 with the venv module on the PATH: install one, or set PYTHON"
}
