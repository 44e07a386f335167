#!/usr/bin/env bash
# Every benchmark for every model, then one table.
#   bash eval_all_benchmarks.sh                          the models listed below
#   bash eval_all_benchmarks.sh plain=DIR trim=DIR@BASE  these models
#   bash eval_all_benchmarks.sh 'plain=DIR --reduce none' 'trim=DIR --reduce TRIM:-1' -- --batch-size 16
#
# A model is NAME=PATH[@BASE][ OPTIONS]: PATH a checkpoint folder or a hub id, BASE the base model of a LoRA or
# projector-only checkpoint, OPTIONS (from the first space before two dashes) for this model alone. Without NAME
# the last part of PATH names it. What comes after -- goes to every script, see `bash scripts/v1_5/eval/pope.sh --help`.
# The first model is the one that the others are compared with.
#
# Environment (besides that of scripts/lib/common.sh and of `bash scripts/v1_5/eval/pope.sh --help`):
#   BENCHMARKS="gqa pope"  only these (default: all twelve)
#   RESULTS=DIR            where everything goes (default: results/eval):
#                            NAME.txt               a line `benchmark<TAB>value` for each score
#                            NAME/BENCHMARK.json    every number of a score
#                            table.md .tex .png .json   the table
#   DRY_RUN=1              print the commands instead of running them
#
# A benchmark that fails does not stop the others; the failed ones are named at the end, and the exit code is 1. Ctrl-C
# and SIGTERM end everything within seconds, and a kill of this script does; the same command goes on from there.

MODELS=(
    "llava-v1.5-7b=liuhaotian/llava-v1.5-7b --reduce none"
    "llava-v1.5-7b-TRIM=liuhaotian/llava-v1.5-7b --reduce TRIM:-1"
)

ALL_BENCHMARKS="vqav2 gqa vizwiz sqa textvqa pope mme mmbench mmbench_cn seed llavabench mmvet"

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/lib/common.sh"

# Set NAMES, PATHS, BASES and OPTIONS (one string each), a model per index, and EXTRA (after --).
read_models() {
    local given=() entry path
    while (($# > 0)) && [[ $1 != -- ]]; do
        [[ $1 != -h && $1 != --help ]] || usage
        [[ $1 != -* ]] || die "options such as $1 go after --"
        given+=("$1")
        shift
    done
    (($# == 0)) || shift
    EXTRA=(${1+"$@"})
    ((${#given[@]} > 0)) || given=("${MODELS[@]}")
    NAMES=() PATHS=() BASES=() OPTIONS=()
    for entry in "${given[@]}"; do
        OPTIONS+=("$([[ $entry != *" --"* ]] || printf '%s' "--${entry#* --}")")
        entry=${entry%% --*}
        path=${entry#*=}
        [[ $path == *@* ]] && BASES+=("${path##*@}") || BASES+=("")
        path=${path%@*}
        path=${path%/}
        [[ $entry == *=* ]] && NAMES+=("${entry%%=*}") || NAMES+=("${path##*/}")
        PATHS+=("$path")
        check_model $((${#NAMES[@]} - 1))
    done
}

# See that a model has a name of its own and is there, and make its paths absolute.
check_model() {
    local name=${NAMES[$1]} other
    [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._+-]*$ ]] ||
        die "a model is NAME=PATH, and NAME, which names files, has letters, digits and . _ + - only: not \"${name//[[:cntrl:]]/?}\""
    for ((other = 0; other < $1; other++)); do
        [[ ${NAMES[other]} != "$name" ]] || die "two models are called $name; give each its own NAME=PATH"
    done
    PATHS[$1]=$(resolve_model "${PATHS[$1]}") || exit
    [[ -z ${BASES[$1]} ]] || BASES[$1]=$(resolve_model "${BASES[$1]}") || exit
}

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
}

check_benchmarks() {
    local benchmark
    for benchmark in $BENCHMARKS; do
        [[ " $ALL_BENCHMARKS " == *" $benchmark "* ]] || die "no benchmark $benchmark; known: $ALL_BENCHMARKS"
    done
    [[ -n ${BENCHMARKS// /} ]] || die "BENCHMARKS names no benchmark; known: $ALL_BENCHMARKS"
}

# Run the script of a benchmark for the model of an index; in a subshell, whose place it takes.
run_benchmark() {
    local benchmark=$1 index=$2 own=()
    read -ra own <<<"${OPTIONS[index]}"
    # From the user's folder, so that relative paths among the options mean what they say.
    cd "$CALLER_DIR"
    exec bash "$REPO_ROOT/scripts/v1_5/eval/$benchmark.sh" "${NAMES[index]}" "${PATHS[index]}" \
        "$RESULTS/${NAMES[index]}.txt" "${BASES[index]}" -- ${own[@]+"${own[@]}"} ${EXTRA[@]+"${EXTRA[@]}"}
}

# Leave, before any model is loaded, if an argument is wrong or no benchmark has its data; name those without.
check_data() {
    local benchmark problem found=0
    for benchmark in $BENCHMARKS; do
        if problem=$(LLAVA_EVAL_CHECK=1 run_benchmark "$benchmark" 0 2>&1 >/dev/null); then
            found=1
        else
            problem=$(tail -n 1 <<<"$problem")
            [[ $problem != "error: Python at "* ]] || die "${problem#error: }" # no benchmark's fault
            note "$benchmark: $problem"
        fi
    done
    ((found == 1)) || die "nothing to do: see above"
}

# Run every benchmark for every model; set FILES (NAME=JSON of each score), FAILED and UNSCORED (server only).
run_all() {
    local benchmark index json
    FILES=() FAILED=() UNSCORED=()
    for index in "${!NAMES[@]}"; do
        for benchmark in $BENCHMARKS; do
            json=$RESULTS/${NAMES[index]}/$benchmark.json
            note "== ${NAMES[index]}: $benchmark"
            # A number of an earlier run must not pass for this one's.
            run rm -f "$json"
            # In the background: only while it waits does the shell heed a signal at once.
            LLAVA_EVAL_JSON=$json LLAVA_SCRIPT_PID=$(script_pid) run_benchmark "$benchmark" "$index" &
            if ! wait $!; then
                FAILED+=("$benchmark of ${NAMES[index]}")
            elif [[ ! -e $json && ${DRY_RUN:-0} != 1 ]]; then
                UNSCORED+=("$benchmark of ${NAMES[index]}")
                continue
            fi
            [[ ! -e $json && ${DRY_RUN:-0} != 1 ]] || FILES+=("${NAMES[index]}=$json")
        done
    done
}

# Print the table of all scores, and write it.
report_all() {
    ((${#FILES[@]} > 0)) || return 0
    local table=$RESULTS/table
    local command=("$(python_command)" -m llava.eval report --overview --json "$table.json" --latex "$table.tex"
        --png "$table.png" --markdown "$table.md" "${FILES[@]}")
    [[ ${DRY_RUN:-0} == 1 ]] || echo
    run "${command[@]}"
}

pass_signals_on
read_models "$@"
BENCHMARKS=${BENCHMARKS:-$ALL_BENCHMARKS}
RESULTS=$(absolute_path "${RESULTS:-results/eval}")
check_benchmarks
export LLAVA_EVAL_ROOT
LLAVA_EVAL_ROOT=$(absolute_path "${LLAVA_EVAL_ROOT:-$REPO_ROOT/playground/data/eval}")
[[ -d $LLAVA_EVAL_ROOT || ${DRY_RUN:-0} == 1 ]] ||
    die "no folder $LLAVA_EVAL_ROOT: playground/data/eval/README.md lists what to download;" \
        "LLAVA_EVAL_ROOT names another place"
check_data
run_all
report_all
((${#UNSCORED[@]} == 0)) || note "for a server to score: $(printf '%s, ' "${UNSCORED[@]}" | sed 's/, $//')"
if ((${#FAILED[@]} > 0)); then
    note "error: failed: $(printf '%s, ' "${FAILED[@]}" | sed 's/, $//')"
    exit 1
fi
