# shellcheck shell=bash
# Shared by all scripts: errors, paths, the Python interpreter, GPUs, dry runs. Source it. It changes to the repository
# root; pass paths from the user through `absolute_path`, which resolves them from the user's folder.
#
# Environment:
#   PYTHON     the interpreter (default: see python.sh)
#   DRY_RUN=1  print the commands instead of running them

! declare -F note >/dev/null || return 0 # sourced already

# shellcheck source=scripts/lib/python.sh
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
readonly CALLER_DIR REPO_ROOT
cd "$REPO_ROOT"

note() {
    printf '%s\n' "$*" >&2
}

# Where the first argument asks for help, print the comment at the top of the running script: show_help "$@"
show_help() {
    [[ ${1:-} == -h || ${1:-} == --help ]] || return 0
    sed -n -e '1d' -e '/^[^#]/q' -e '/^# shellcheck/q' -e 's/^# \{0,1\}//p' "${BASH_SOURCE[1]}"
    exit 0
}

# From here on a signal to this script ends what it has started in the background, each in a process group of its own, and
# then the script. Start what takes long with `&`, and `wait` for it: bash hears no signal while another command runs.
pass_signals_on() {
    set -m
    trap 'end_jobs 1 HUP' HUP
    trap 'end_jobs 2 INT' INT
    trap 'end_jobs 15 TERM' TERM
}

end_jobs() { # NUMBER NAME of the signal
    local group
    trap '' HUP INT TERM
    for group in $(jobs -p); do kill -TERM -- "-$group" 2>/dev/null || true; done
    { wait || true; } 2>/dev/null
    note "error: stopped by SIG$2; the same command goes on where it stopped"
    exit $((128 + $1))
}

# A path resolved from the user's folder; it need not exist.
absolute_path() {
    if [[ $1 == /* ]]; then
        printf '%s\n' "$1"
    else
        printf '%s\n' "$CALLER_DIR/${1#./}"
    fi
}

# A checkpoint: an existing path becomes absolute; `owner/name` is a hub id and stays, unless `owner` is a local folder.
resolve_model() {
    local candidate
    for candidate in "$(absolute_path "$1")" "$REPO_ROOT/$1"; do
        if [[ -e $candidate ]]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ && ! -d $(absolute_path "${1%%/*}") ]] || die "no model at $1: give a checkpoint folder or a hub id"
    printf '%s\n' "$1"
}

# The interpreter, see python.sh.
python_command() {
    printf '%s\n' "$python"
}

# The system's number of this script, which its workers watch (LLAVA_SCRIPT_PID); $$ is another one on Windows.
script_pid() {
    cat "/proc/$$/winpid" 2>/dev/null || printf '%s\n' "$$"
}

# The ids of the visible GPUs, one per line; nothing on a machine without a GPU.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | tr -d ' ' | grep -v -e '^$' -e '^-1$' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true
    fi
}

# Run a command, or with DRY_RUN=1 print it, quoted for pasting. Leading NAME=value arguments are its environment.
run() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        print_command "$@"
    else
        env "$@"
    fi
}

print_command() {
    local word line=""
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            line+="$word "
        else
            line+="$(printf '%q' "$word") "
        fi
    done
    printf '%s\n' "${line% }"
}
