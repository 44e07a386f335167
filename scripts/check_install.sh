#!/usr/bin/env bash
# See that the Python versions of README.md can install constraints.txt: every pin has a wheel for them, and the pins agree
# with each other and with pyproject.toml. Nothing is installed; pip downloads what it must look into (gigabytes).
#   bash scripts/check_install.sh         3.11, 3.12 and 3.13
#   bash scripts/check_install.sh 3.12    this one
# A line per version; the exit code is 1 if one of them fails.

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

# What pyproject.toml and constraints.txt ask for, without DeepSpeed: it has no wheels, its source is for all versions, and
# what it depends on is pinned.
list_requirements() {
    "$python" -c '
import pathlib, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
lines = sum(project["optional-dependencies"].values(), project["dependencies"])
lines += pathlib.Path("constraints.txt").read_text(encoding="utf-8").splitlines()
print("\n".join(line for line in lines if not line.startswith(("deepspeed", "llava["))))'
}

FOLDER=$(mktemp -d "${TMPDIR:-/tmp}/check_install.XXXXXX")
trap 'rm -rf "$FOLDER"' EXIT
list_requirements >"$FOLDER/requirements.txt"
(($# > 0)) || set -- 3.11 3.12 3.13
failed=0
for version in "$@"; do
    # Reads requirements for the given version, but their markers for the version that pip itself runs with.
    if "$python" -m pip install --dry-run --quiet --quiet --disable-pip-version-check --ignore-installed \
        --python-version "$version" --only-binary=:all: --target "$FOLDER/target" -r "$FOLDER/requirements.txt"; then
        echo "Python $version: constraints.txt can be installed"
    else
        echo "Python $version: constraints.txt cannot be installed"
        failed=1
    fi
done
exit "$failed"
