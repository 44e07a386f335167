# shellcheck shell=bash
# Everything that the benchmark scripts share: arguments, one worker per visible GPU, failure, scoring.
#
# Environment (besides that of common.sh):
#   LLAVA_EVAL_ROOT      folder that holds the benchmarks' folders (default: playground/data/eval)
#   LLAVA_EVAL_WORKERS   number of workers, spread over the visible GPUs (default: one per GPU; without GPU one)
#   LLAVA_EVAL_JSON      file for every number of the score (default: beside the answers, *.scores.json)
#   LLAVA_EVAL_CHECK=1   only look whether the arguments are right and the data's folder is there

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

readonly EXIT_UNANSWERED=3  # of `llava.eval answer`: some questions could not be answered
readonly EXIT_SERVER_ONLY=4 # of `llava.eval score`: the annotations of this split are not public

# Answer and score one benchmark.
#   eval_benchmark [--export UPLOAD] TASK FOLDER ANSWERS CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# FOLDER: the benchmark's folder under the data root; of several, separated by blanks, the first that is there.
# ANSWERS: the answers file under FOLDER, with %s for CKPT. UPLOAD: folder under FOLDER, with %s for CKPT, for the
# files that the benchmark's server or official script reads; without it they are written only where nothing but a
# server can score, beside the answers.
eval_benchmark() {
    local upload=""
    if [[ $1 == --export ]]; then
        upload=$2
        shift 2
    fi
    local task=$1 folders=$2 pattern=$3
    shift 3
    parse_arguments "$task" "$@"
    local root answers
    root=$(find_root "$folders") || exit
    [[ ${LLAVA_EVAL_CHECK:-0} != 1 ]] || exit 0
    answers=$root/${pattern//%s/$CKPT}
    # Answers to the questions of another split do not mix with these.
    [[ -z $SPLIT ]] || answers=${answers%.jsonl}.${SPLIT//\//_}.jsonl
    upload=${upload:+$root/${upload//%s/$CKPT}}
    local answered=0
    answer_benchmark "$task" "$root" "$answers" || answered=$?
    if ((answered != 0)) && ! { ((answered == EXIT_UNANSWERED)) && ((${#ALLOW_PARTIAL[@]} > 0)); }; then
        note "$task: not scored; run the same command again to go on where it stopped"
        exit "$answered"
    fi
    score_benchmark "$task" "$root" "$answers" "$upload"
    exit "$answered"
}

# Score the answers and write the upload files, if any; leave if that fails.
score_benchmark() {
    local task=$1 root=$2 answers=$3 upload=$4 code=0 json
    json=${LLAVA_EVAL_JSON:+$(absolute_path "$LLAVA_EVAL_JSON")}
    local common=(--answers "$answers" --root "$root" ${COMMON_OPTIONS[@]+"${COMMON_OPTIONS[@]}"}
        ${ALLOW_PARTIAL[@]+"${ALLOW_PARTIAL[@]}"})
    if [[ -n $upload ]]; then
        run "$(python_command)" -m llava.eval export "$task" --out "$upload" "${common[@]}"
    fi
    run "$(python_command)" -m llava.eval score "$task" "${common[@]}" \
        --json "${json:-${answers%.jsonl}.scores.json}" \
        ${RESULTS:+--results "$RESULTS"} ${SCORE_OPTIONS[@]+"${SCORE_OPTIONS[@]}"} || code=$?
    if ((code == EXIT_SERVER_ONLY)); then
        code=0
        [[ -n $upload ]] ||
            run "$(python_command)" -m llava.eval export "$task" --out "${answers%.jsonl}.upload" "${common[@]}" || code=$?
    elif ((code != 0)); then
        note "$task: not scored; the answers are ready in $answers"
    fi
    ((code == 0)) || exit "$code"
}

# The first of some folders under the data root that is there.
find_root() {
    local base folder
    base=$(absolute_path "${LLAVA_EVAL_ROOT:-$REPO_ROOT/playground/data/eval}")
    for folder in $1; do
        if [[ -d $base/$folder ]]; then
            printf '%s\n' "$base/$folder"
            return
        fi
    done
    if [[ ${DRY_RUN:-0} != 1 && $FROM_HUB == 0 ]]; then
        die "no folder $base/${1%% *}: playground/data/eval/README.md lists what to download;" \
            "LLAVA_EVAL_ROOT names another place"
    fi
    printf '%s\n' "$base/${1%% *}"
}

# Set CKPT, MODEL_PATH, RESULTS, MODEL_BASE and what split_options sets from a script's arguments.
parse_arguments() {
    local task=$1 usage
    shift
    usage="usage: bash scripts/v1_5/eval/$task.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
  CKPT        name of the run; answers go to a folder of this name
  MODEL_DIR   the checkpoint's folder (or the folder that holds a checkpoint folder CKPT), or a hub id
  RESULTS     file to which the line NAME<TAB>VALUE is appended
  MODEL_BASE  base model, for LoRA and projector-only checkpoints
  OPTIONS     for \`python -m llava.eval answer\`, e.g. --batch-size 16 --reduce none --limit 100;
              --split NAME for another split; --source hub for the public dataset instead of local files;
              --allow-partial scores although answers are missing; --judge exact, --judge-model MODEL"
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

# Sort the options after -- by the commands they belong to; set ANSWER_OPTIONS, SCORE_OPTIONS, COMMON_OPTIONS (of all
# commands), ALLOW_PARTIAL, SPLIT and FROM_HUB.
split_options() {
    ANSWER_OPTIONS=() SCORE_OPTIONS=() COMMON_OPTIONS=() ALLOW_PARTIAL=() SPLIT="" FROM_HUB=0
    local name value
    while (($# > 0)); do
        name=${1%%=*}
        case $name in
        --allow-partial)
            ALLOW_PARTIAL=("$1")
            shift
            continue
            ;;
        --judge | --judge-model | --judge-runs | --judge-cache | --split | --source | --hub-dataset) ;;
        *)
            ANSWER_OPTIONS+=("$1")
            shift
            continue
            ;;
        esac
        if [[ $1 == *=* ]]; then
            value=${1#*=}
            shift
        else
            (($# > 1)) || die "$name needs a value"
            value=$2
            shift 2
        fi
        sort_option "$name" "$value"
    done
}

# Put an option that does not go to the `answer` command alone in its place.
sort_option() {
    local name=$1 value=$2
    case $name in
    --judge-cache) SCORE_OPTIONS+=("$name" "$(absolute_path "$value")") ;;
    --judge*) SCORE_OPTIONS+=("$name" "$value") ;;
    --hub-dataset)
        [[ ! -e $(absolute_path "$value") ]] || value=$(absolute_path "$value")
        COMMON_OPTIONS+=("$name" "$value")
        ;;
    *) COMMON_OPTIONS+=("$name" "$value") ;;
    esac
    if [[ $name == --split ]]; then SPLIT=$value; fi
    if [[ $name == --source && $value == hub ]]; then FROM_HUB=1; fi
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
        ${COMMON_OPTIONS[@]+"${COMMON_OPTIONS[@]}"} ${ANSWER_OPTIONS[@]+"${ANSWER_OPTIONS[@]}"})
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
