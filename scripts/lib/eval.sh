# shellcheck shell=bash
# Everything that the benchmark scripts share: arguments, one worker per visible GPU, failure, scoring.
#
# Environment (besides that of common.sh):
#   LLAVA_EVAL_ROOT      folder that holds the benchmarks' folders (default: playground/data/eval)
#   LLAVA_EVAL_WORKERS   number of workers, spread over the visible GPUs (default: one per GPU; without GPU one)

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

readonly EXIT_UNANSWERED=3 # of `llava.eval answer`: some questions could not be answered

# Answer and score one benchmark.
#   eval_benchmark TASK FOLDER ANSWERS CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# FOLDER: the benchmark's folder under the data root. ANSWERS: the answers file under FOLDER, with %s for CKPT.
eval_benchmark() {
    local task=$1 folder=$2 pattern=$3
    shift 3
    parse_arguments "$task" "$@"
    local root answers
    root=$(absolute_path "${LLAVA_EVAL_ROOT:-$REPO_ROOT/playground/data/eval}")/$folder
    answers=$root/${pattern//%s/$CKPT}
    if [[ ! -d $root && ${DRY_RUN:-0} != 1 ]]; then
        die "no folder $root: playground/data/eval/README.md tells what to download; LLAVA_EVAL_ROOT names another place"
    fi
    local answered=0
    answer_benchmark "$task" "$root" "$answers" || answered=$?
    if ((answered != 0)) && ! { ((answered == EXIT_UNANSWERED)) && ((${#SCORE_OPTIONS[@]} > 0)); }; then
        note "$task: not scored; run the same command again to go on where it stopped"
        exit "$answered"
    fi
    run "$(python_command)" -m llava.eval score "$task" --answers "$answers" --root "$root" \
        --json "${answers%.jsonl}.scores.json" \
        ${RESULTS:+--results "$RESULTS"} ${SCORE_OPTIONS[@]+"${SCORE_OPTIONS[@]}"}
    exit "$answered"
}

# Set CKPT, MODEL_PATH, RESULTS, MODEL_BASE, ANSWER_OPTIONS and SCORE_OPTIONS from a script's arguments.
parse_arguments() {
    local task=$1 usage
    shift
    usage="usage: bash scripts/v1_5/eval/$task.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
  CKPT        name of the run; answers go to a folder of this name
  MODEL_DIR   the checkpoint's folder (or the folder that holds a checkpoint folder CKPT), or a hub id
  RESULTS     file to which the line NAME<TAB>VALUE is appended
  MODEL_BASE  base model, for LoRA and projector-only checkpoints
  OPTIONS     for \`python -m llava.eval answer\`, e.g. --batch-size 16 --reduce none --limit 100;
              --allow-partial scores although answers are missing"
    local positional=()
    while (($# > 0)) && [[ $1 != -- ]]; do
        case $1 in
        -h | --help)
            printf '%s\n' "$usage"
            exit 0
            ;;
        -*)
            note "$usage"
            die "options such as $1 go after --"
            ;;
        esac
        positional+=("$1")
        shift
    done
    if ((${#positional[@]} < 2 || ${#positional[@]} > 4)); then
        note "$usage"
        die "two to four arguments are needed, not ${#positional[@]}"
    fi
    CKPT=${positional[0]}
    [[ -n $CKPT && -n ${positional[1]} ]] || die "CKPT and MODEL_DIR must not be empty"
    MODEL_PATH=$(find_checkpoint "$CKPT" "${positional[1]}")
    RESULTS=${positional[2]:-}
    [[ -z $RESULTS ]] || RESULTS=$(absolute_path "$RESULTS")
    MODEL_BASE=${positional[3]:-}
    [[ -z $MODEL_BASE ]] || MODEL_BASE=$(resolve_model "$MODEL_BASE")
    split_options "${@:2}"
}

# Options go to the `answer` command, except the one that belongs to `score`.
split_options() {
    ANSWER_OPTIONS=()
    SCORE_OPTIONS=()
    local option
    for option in "$@"; do
        if [[ $option == --allow-partial ]]; then
            SCORE_OPTIONS+=("$option")
        else
            ANSWER_OPTIONS+=("$option")
        fi
    done
}

# MODEL_DIR is the checkpoint itself, as published; a folder of checkpoints works too, CKPT is looked up in it.
find_checkpoint() {
    local model
    model=$(resolve_model "$2") || exit # a function in $(...) does not stop by itself
    if [[ -d $model && ! -e $model/config.json && ! -e $model/adapter_config.json && -d $model/$1 ]]; then
        model=$model/$1
    fi
    printf '%s\n' "$model"
}

# Run one worker per visible GPU; they share the questions among themselves. A failed worker is named, its part can be
# answered by running again.
answer_benchmark() {
    local task=$1 root=$2 answers=$3
    local gpus=() workers
    mapfile -t gpus < <(visible_gpus)
    workers=${LLAVA_EVAL_WORKERS:-$((${#gpus[@]} > 0 ? ${#gpus[@]} : 1))}
    [[ $workers =~ ^[1-9][0-9]*$ ]] || die "LLAVA_EVAL_WORKERS must be a number from 1 on, not $workers"
    local command=("$(python_command)" -m llava.eval answer "$task" --root "$root" --answers "$answers"
        --model-path "$MODEL_PATH" ${MODEL_BASE:+--model-base "$MODEL_BASE"}
        ${ANSWER_OPTIONS[@]+"${ANSWER_OPTIONS[@]}"})
    local pids=() names=() logs=() number gpu log place
    for ((number = 0; number < workers; number++)); do
        place=() gpu=CPU
        if ((${#gpus[@]} > 0)); then
            gpu="GPU ${gpus[number % ${#gpus[@]}]}"
            place=("CUDA_VISIBLE_DEVICES=${gpus[number % ${#gpus[@]}]}")
        fi
        local worker=(${place[@]+"${place[@]}"} "${command[@]}")
        ((workers == 1)) || worker+=(--workers "$workers" --worker "$number")
        if [[ ${DRY_RUN:-0} == 1 ]]; then
            print_command "${worker[@]}"
            continue
        fi
        names+=("$task worker $number ($gpu)")
        # Worker 0 shows its progress, which counts all workers' answers; the others write to a log each.
        if ((number == 0)); then
            logs+=("")
            env "${worker[@]}" &
        else
            log=$answers.worker_$number.log
            mkdir -p "$(dirname "$log")"
            logs+=("$log")
            env "${worker[@]}" >"$log" 2>&1 &
        fi
        pids+=($!)
    done
    wait_for_workers
}

# Wait for all of answer_benchmark's workers; return the code of the worst, after naming each that failed.
wait_for_workers() {
    local index code worst=0
    # shellcheck disable=SC2064 # the ids as they are now
    trap "kill ${pids[*]:-} 2>/dev/null || true" INT TERM
    for index in "${!pids[@]}"; do
        code=0
        wait "${pids[index]}" || code=$?
        ((code == 0)) && continue
        if [[ -n ${logs[index]} ]]; then
            note "last lines of ${logs[index]}:"
            tail -n 20 "${logs[index]}" >&2
        fi
        if ((code == EXIT_UNANSWERED)); then
            note "error: ${names[index]} could not answer some questions (named above)"
            ((worst != 0)) || worst=$code
        else
            note "error: ${names[index]} failed with exit code $code"
            worst=$code
        fi
    done
    trap - INT TERM
    return "$worst"
}
