#!/usr/bin/env bash
# The one rule for the Python of all scripts: $PYTHON; else the repository's .venv; else python or python3 on the PATH.
#   bash scripts/lib/python.sh -m llava.eval ...   runs it, from any folder, with the package importable
#   source scripts/lib/python.sh                   sets $python, CALLER_DIR (the user's folder) and REPO_ROOT
set -euo pipefail

unset CDPATH # with it, `cd` prints
CALLER_DIR=$PWD
REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Print an error (what is wrong, where, and what would be right) and exit with 2, the code of a user's mistake.
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Set $python; a relative PYTHON is resolved from the user's folder.
find_python() {
    local candidate
    python=${PYTHON:-}
    if [[ $python == */* && $python != /* ]]; then
        python=$CALLER_DIR/${python#./}
    fi
    for candidate in "$REPO_ROOT/.venv/bin/python" "$REPO_ROOT/.venv/Scripts/python.exe" python python3; do
        [[ -n $python ]] || python=$(command -v "$candidate") || true
    done
    [[ -n $python ]] || die "no Python on the PATH: install one, or set PYTHON"
    command -v "$python" >/dev/null || die "PYTHON=$PYTHON is no program: unset it, or name a Python"
}

find_python
[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0
export PYTHONPATH=$REPO_ROOT${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$@"
