#!/usr/bin/env bash
# Choose the Python for the README's commands: $PYTHON if set, else the repository's own .venv, created on first use.
# Source this from the repository root.

use_environment() {
    if [[ -n "${PYTHON:-}" ]]; then
        export PYTHON
        return
    fi
    local venv="$PWD/.venv" stamp="$PWD/.venv/.installed"
    # One install at a time: a second script waits for the first.
    exec 9>"$PWD/.venv.lock"
    if command -v flock >/dev/null; then flock 9; fi
    if ! cat pyproject.toml constraints.txt | cmp -s - "$stamp"; then
        echo "installing into .venv (once; about two minutes)" >&2
        find_python
        [[ -x "$venv/bin/python" ]] || "$BASE_PYTHON" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
        cat pyproject.toml constraints.txt >"$stamp"
    fi
    exec 9>&-
    export PYTHON="$venv/bin/python"
}

# Find the interpreter that creates the environment: the first of version 3.10 or newer.
find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python3.10 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            BASE_PYTHON="$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 or newer with the venv module on the PATH: install one, or set PYTHON" >&2
    exit 2
}
