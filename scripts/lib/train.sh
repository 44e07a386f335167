# shellcheck shell=bash
# All that the training scripts share: recipes, whose settings the environment overrides, checks before anything loads, and
# one launcher (DeepSpeed's) for GPUs and, for small models, CPU ranks; on several machines too.
#
# A script reads its recipes with `read_recipe`, then calls `train_llava`. Relative paths in the environment and in RECIPE
# are relative to the user's folder, those of the script's recipes to the repository root.
#
# Environment (besides that of common.sh):
#   RECIPE          your recipe: a YAML file with any of the settings below, such as a copy of one of scripts/recipes/
#                   (docs/training.md). The environment wins over it, it wins over the script's own recipe
#   MODEL, DATA, IMAGES, VISION_TOWER, PROJECTOR, OUTPUT, VERSION, ZERO, BATCH_SIZE, LEARNING_RATE, EPOCHS, MAX_LENGTH,
#   ASPECT_RATIO, SAVE_STEPS, LOGGING_STEPS, GRADIENT_CHECKPOINTING, NUM_WORKERS, SEED, reduce_func, reduce_func_param,
#   PROJECTOR_LEARNING_RATE, LORA_RANK, LORA_ALPHA, BITS
#                   the trainer's flags of similar names; an empty VISION_TOWER, IMAGES or PROJECTOR leaves it out
#   ENGINE          deepspeed (default), with the settings of ZERO; or fsdp2, with those of scripts/fsdp2.json
#   NUM_GPUS        ranks on this machine (default: all visible GPUs). Without a GPU: ranks on the CPU
#   GLOBAL_BATCH    samples per optimizer step; accumulation follows from it, or set GRADIENT_ACCUMULATION
#   PRECISION       bf16, fp16 or fp32
#   REPORT_TO       none (default), or trackers such as tensorboard,wandb,trackio
#   EVAL_DATA       held-out records (default: none); EVAL_STEPS: measure their loss also every so many steps
#   LOG             log file, to which each run appends (default: OUTPUT.log; OUTPUT.machine1.log on the second machine)
#   VERBOSE         1: show all of the log on the screen, also what libraries print that concerns no user (default 0)
#   STOP_SECONDS    how long a stopped run may take to write its checkpoint before it is killed (default 60)
#   NUM_NODES       machines (default 1). The same command is started on each, with NODE_RANK (0 on the first) and
#                   MASTER_ADDR (the first one's address); or on the first alone, with HOSTFILE (machines reachable by ssh)
#   MASTER_PORT     port at which the ranks connect (default: a free one; 29500 on several machines)
#                   NUM_NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and NUM_GPUS that are not set come from torchrun's
#                   variables (NNODES, NPROC_PER_NODE, PET_NNODES, ...) or, under srun, from SLURM's

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SETTLED=" " # path variables that are already relative to the repository root
RECIPE_FLAGS=()
readonly HUB_NAME='^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$'

# default NAME VALUE: a variable that the environment may set, also to an empty value.
default() {
    [[ -n ${!1+set} ]] || printf -v "$1" '%s' "$2"
}

# default_source NAME VALUE: the same for an input path. A relative path stays relative, so that a checkpoint and the
# tower that it names can move together. A path that does not exist in the user's folder is relative to the repository
# root, or a name on the hub.
default_source() {
    if [[ -n ${!1:-} && $SETTLED != *" $1 "* ]] && [[ ${!1} == ./* || ${!1} == ../* || -e $CALLER_DIR/${!1} ]]; then
        printf -v "$1" '%s' "$(seen_from_root "${!1}")"
    fi
    default "$1" "$2"
    SETTLED+="$1 "
}

# default_output NAME VALUE: the same for an output path.
default_output() {
    if [[ -n ${!1:-} && $SETTLED != *" $1 "* ]]; then
        printf -v "$1" '%s' "$(seen_from_root "${!1}")"
    fi
    default "$1" "$2"
    SETTLED+="$1 "
}

# The user's path, relative to the repository root.
seen_from_root() {
    if [[ $1 == /* || $CALLER_DIR == "$REPO_ROOT" ]]; then
        printf '%s\n' "$1"
    else
        "$(python_command)" -c 'import os, sys; print(os.path.relpath(*sys.argv[1:]))' "$CALLER_DIR/$1" "$REPO_ROOT"
    fi
}

# read_recipe FILE [default]: take the settings that neither the environment nor an earlier recipe has set. `default` as
# the second argument leaves paths as those of the environment are. Flags are put before those of earlier recipes, which win.
read_recipe() {
    local lines line name value flags=()
    lines=$("$(python_command)" -c 'from llava.train.recipe import main; main()' "$1") || exit
    while IFS= read -r line; do
        name=${line%%=*}
        value=${line#*=}
        case $name in
        "") ;;
        --*) flags+=("$name" "$value") ;;
        MODEL | DATA | EVAL_DATA | IMAGES | VISION_TOWER | PROJECTOR | ZERO) "${2:-default_source}" "$name" "$value" ;;
        OUTPUT | LOG) "${2:-default_output}" "$name" "$value" ;;
        *) default "$name" "$value" ;;
        esac
    done <<<"$lines"
    RECIPE_FLAGS=(${flags[@]+"${flags[@]}"} ${RECIPE_FLAGS[@]+"${RECIPE_FLAGS[@]}"})
}

# What the recipes leave open: how this run is spread, saved and watched.
set_common_defaults() {
    default ENGINE deepspeed
    default NUM_GPUS ""
    default NODE_RANK ""
    default GRADIENT_ACCUMULATION ""
    default SAVE_STEPS 1000
    default LOGGING_STEPS 1
    default NUM_WORKERS 4
    default REPORT_TO none
    default_source EVAL_DATA ""
    default EVAL_STEPS ""
    default VERBOSE 0
    default STOP_SECONDS 60
    local machine=""
    [[ ${NODE_RANK:-0} == 0 ]] || machine=.machine$NODE_RANK # each has its own log
    default_output LOG "$OUTPUT$machine.log"
}

# train_llava [-- FLAGS...]: check, then start the training that the variables describe. Flags after -- go to the trainer
# unchanged and win.
train_llava() {
    local extra=()
    case ${1:-} in
    "") ;;
    --) extra=("${@:2}") ;;
    -h | --help) print_usage && exit 0 ;;
    *) die "options such as $1 go after --; settings are variables: NUM_GPUS=2 bash $0 -- $1 ..." ;;
    esac
    find_machines
    set_common_defaults
    check_numbers
    find_ranks
    set_engine
    check_files
    set_batch
    set_launcher
    TRAINER=(llava/train/train_mem.py
        "${ENGINE_FLAGS[@]}"
        --model_name_or_path "$MODEL"
        --version "$VERSION"
        --data_path "$DATA"
        ${IMAGES:+--image_folder "$IMAGES"}
        ${EVAL_DATA:+--eval_data_path "$EVAL_DATA"}
        ${EVAL_STEPS:+--eval_steps "$EVAL_STEPS"}
        --output_dir "$OUTPUT"
        --num_train_epochs "$EPOCHS"
        --per_device_train_batch_size "$BATCH_SIZE"
        --gradient_accumulation_steps "$GRADIENT_ACCUMULATION"
        --learning_rate "$LEARNING_RATE"
        ${PROJECTOR_LEARNING_RATE:+--mm_projector_lr "$PROJECTOR_LEARNING_RATE"}
        ${LORA_RANK:+--lora_r "$LORA_RANK"}
        ${LORA_ALPHA:+--lora_alpha "$LORA_ALPHA"}
        ${BITS:+--bits "$BITS"}
        --model_max_length "$MAX_LENGTH"
        --gradient_checkpointing "$GRADIENT_CHECKPOINTING"
        --save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 1
        --logging_steps "$LOGGING_STEPS"
        --dataloader_num_workers "$NUM_WORKERS"
        --seed "$SEED"
        --report_to "$REPORT_TO"
        --verbose_log True) # into the log; `to_screen` leaves out what is noise
    set_vision
    set_precision
    start_training "${LAUNCHER[@]}" "${TRAINER[@]}" ${RECIPE_FLAGS[@]+"${RECIPE_FLAGS[@]}"} ${extra[@]+"${extra[@]}"}
}

print_usage() {
    printf '%s\n' "usage: [NAME=VALUE ...] bash $0 [-- TRAINER FLAGS]" \
        "Settings are variables, listed at the top of scripts/lib/train.sh, or lines of your own recipe: RECIPE=my.yaml." \
        "scripts/recipes/ has those of the scripts; docs/training.md explains them." \
        "DRY_RUN=1 prints the command. Flags after -- go to the trainer and win over the script's:" \
        "python -m llava.train.train --help lists them."
}

# Vision flags. The reduction is TRIM:-1 for reduce_func=TRIM and reduce_func_param=-1; an empty reduce_func keeps that of
# the starting checkpoint.
set_vision() {
    [[ -n $VISION_TOWER ]] || return 0 # a language model alone
    TRAINER+=(
        --vision_tower "$VISION_TOWER"
        --mm_vision_select_layer -2
        --mm_projector_type mlp2x_gelu
        ${PROJECTOR:+--pretrain_mm_mlp_adapter "$PROJECTOR"}
        --image_aspect_ratio "$ASPECT_RATIO")
    if [[ $reduce_func == none ]]; then
        TRAINER+=(--mm_vision_token_reduce_func none)
    elif [[ -n $reduce_func ]]; then
        TRAINER+=(--mm_vision_token_reduce_func "$reduce_func${reduce_func_param:+:$reduce_func_param}")
    fi
}

# Where nothing else says so, the machines are those of torchrun's variables or, under srun, of SLURM's.
find_machines() {
    adopt NUM_NODES NNODES PET_NNODES
    adopt NODE_RANK PET_NODE_RANK
    adopt MASTER_ADDR PET_MASTER_ADDR
    adopt MASTER_PORT PET_MASTER_PORT
    adopt NUM_GPUS NPROC_PER_NODE PET_NPROC_PER_NODE
    # A shell of an allocation (salloc) has no rank, and is one machine.
    [[ -n ${HOSTFILE:-} || -z ${SLURM_NODEID:-${SLURM_PROCID:-}} ]] || adopt NUM_NODES SLURM_STEP_NUM_NODES SLURM_NNODES
    default NUM_NODES 1
    check_count NUM_NODES
    ((NUM_NODES > 1)) || return 0
    if [[ -z ${HOSTFILE:-} && -n ${SLURM_NNODES:-} ]]; then
        [[ ${SLURM_PROCID:-} == "${SLURM_NODEID:-${SLURM_PROCID:-}}" && ${SLURM_LOCALID:-0} == 0 ]] ||
            die "SLURM_PROCID=${SLURM_PROCID:-} on SLURM_NODEID=$SLURM_NODEID: the script starts the ranks of a machine, so start it once on each (--ntasks-per-node=1)"
        adopt NODE_RANK SLURM_NODEID SLURM_PROCID
        default MASTER_ADDR "$(first_host "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}")"
        if [[ -z ${MASTER_PORT:-} && ${SLURM_JOB_ID:-} =~ ^[1-9][0-9]{0,8}$ ]]; then
            MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # other jobs of the same machines have others
        fi
    fi
}

# adopt NAME OTHER...: the value of the first other variable that has one, unless NAME is set.
adopt() {
    local other
    for other in "${@:2}"; do
        [[ -z ${!other:-} ]] || default "$1" "${!other}"
    done
}

# The first machine of SLURM's list, such as node[03-07,12],login1.
first_host() {
    local rest=$1 host=""
    while [[ $rest =~ ^([^],[]*)\[([0-9]+)[^]]*\](.*)$ ]]; do
        host+=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
        rest=${BASH_REMATCH[3]}
    done
    printf '%s\n' "$host${rest%%,*}"
}

# Whether this command is one of several, one on each machine.
is_one_of_several() {
    ((NUM_NODES > 1)) && [[ -n $NODE_RANK ]]
}

# Set NUM_GPUS, GPUS (their ids) and ON_CPU (not empty: ranks run on the CPU).
find_ranks() {
    local gpu
    GPUS=()
    while IFS= read -r gpu; do GPUS+=("$gpu"); done < <(visible_gpus)
    ON_CPU=
    if ((${#GPUS[@]} == 0)) && [[ -n $NUM_GPUS ]]; then
        if ((NUM_NODES == 1)) || is_one_of_several; then ON_CPU=yes; fi
    fi
    if [[ -z $NUM_GPUS ]]; then
        NUM_GPUS=${#GPUS[@]}
        if ((NUM_GPUS == 0)); then
            [[ ${DRY_RUN:-0} == 1 ]] || die "no GPU is visible; NUM_GPUS=2 trains on two CPU ranks"
            NUM_GPUS=8
        fi
    fi
    if ((${#GPUS[@]} > 0 && NUM_GPUS > ${#GPUS[@]})); then
        die "NUM_GPUS=$NUM_GPUS, but only ${#GPUS[@]} GPUs are visible"
    fi
}

# Arithmetic takes a variable's text for an expression, which may run commands: only plain numbers get there.
check_numbers() {
    local name
    for name in NUM_NODES BATCH_SIZE GLOBAL_BATCH STOP_SECONDS; do check_count "$name"; done
    for name in NUM_GPUS GRADIENT_ACCUMULATION MASTER_PORT; do
        [[ -z ${!name:-} ]] || check_count "$name"
    done
    [[ ${NODE_RANK:-0} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "NODE_RANK must be a whole number from 0 on, not '$NODE_RANK'"
    is_one_of_several || return 0
    ((NODE_RANK < NUM_NODES)) || die "NODE_RANK=$NODE_RANK: the $NUM_NODES machines (NUM_NODES) are 0 to $((NUM_NODES - 1))"
    [[ -n ${MASTER_ADDR:-} ]] || die "NODE_RANK=$NODE_RANK needs MASTER_ADDR, the address of the first machine"
    [[ $MASTER_ADDR =~ ^[A-Za-z0-9:][A-Za-z0-9._:-]*$ ]] || die "MASTER_ADDR: '$MASTER_ADDR' is no address"
}

check_count() {
    [[ ${!1} =~ ^[1-9][0-9]{0,8}$ ]] || die "$1 must be a whole number from 1 on, not '${!1}'"
}

# Name what is missing before anything loads.
check_files() {
    local name
    for name in MODEL DATA OUTPUT LEARNING_RATE; do
        [[ -n ${!name} ]] || die "$name is empty"
    done
    for name in MODEL DATA EVAL_DATA OUTPUT ZERO VISION_TOWER IMAGES PROJECTOR LOG; do
        [[ ${!name} != -* && ! ${!name} =~ [[:cntrl:]] ]] ||
            die "$name: a path starts with no dash and has no control characters; write ./-name for a name with a dash"
    done
    [[ ! -e $OUTPUT || -d $OUTPUT ]] || die "OUTPUT: $OUTPUT is not a folder"
    [[ ! -e $LOG || -f $LOG || $LOG == /dev/null ]] || die "LOG: $LOG is not a regular file"
    [[ ${DRY_RUN:-0} == 1 ]] && return
    [[ $ENGINE != deepspeed || -f $ZERO ]] || die "ZERO: no DeepSpeed settings at $ZERO; scripts/ has zero2.json, zero3.json, zero3_offload.json"
    check_source MODEL "a checkpoint folder"
    [[ $VISION_TOWER == open_clip:* || -z $VISION_TOWER ]] || check_source VISION_TOWER "a CLIP folder"
    check_source DATA "a .json, .jsonl or .parquet file"
    [[ -z $EVAL_DATA ]] || check_source EVAL_DATA "a .json, .jsonl or .parquet file"
    [[ -z $IMAGES || -d $IMAGES ]] || die "IMAGES: no folder $IMAGES"
    [[ -z $PROJECTOR || -f $PROJECTOR ]] || die "PROJECTOR: no file $PROJECTOR; scripts/pretrain.sh makes one (mm_projector.bin)"
}

# check_source NAME WHAT: an existing path, or a name on the hub.
check_source() {
    [[ -e ${!1} ]] && return
    [[ ${!1} =~ $HUB_NAME && ! ${!1} =~ \.(json|jsonl|parquet)$ && ! -d ${!1%%/*} ]] ||
        die "$1: nothing at ${!1}; give $2, or a name on the hub (owner/name)"
}

# Keep the global batch for any number of ranks.
set_batch() {
    local together=$((NUM_GPUS * NUM_NODES * BATCH_SIZE))
    if [[ -z $GRADIENT_ACCUMULATION ]]; then
        ((GLOBAL_BATCH % together == 0)) ||
            die "GLOBAL_BATCH=$GLOBAL_BATCH is not a multiple of $together (NUM_GPUS x NUM_NODES x BATCH_SIZE); change BATCH_SIZE, or set GRADIENT_ACCUMULATION"
        GRADIENT_ACCUMULATION=$((GLOBAL_BATCH / together))
    fi
}

# Set ENGINE_FLAGS: what shards the training over the ranks. Both are started by the same launcher.
set_engine() {
    case $ENGINE in
    deepspeed)
        [[ -n $ZERO ]] || die "ZERO is empty"
        ENGINE_FLAGS=(--deepspeed "$ZERO")
        ;;
    fsdp2) ENGINE_FLAGS=(--fsdp True --fsdp_config scripts/fsdp2.json) ;;
    *) die "ENGINE=$ENGINE: expected deepspeed or fsdp2" ;;
    esac
}

set_precision() {
    case $PRECISION in
    bf16) TRAINER+=(--bf16 True --tf32 True) ;;
    fp16) TRAINER+=(--fp16 True --tf32 True) ;;
    fp32) ;;
    *) die "PRECISION=$PRECISION: expected bf16, fp16 or fp32" ;;
    esac
}

# Set LAUNCHER, with the ranks' environment in front.
set_launcher() {
    local places=()
    LAUNCHER=()
    if [[ -n $ON_CPU ]]; then
        # Ranks on the CPU share its cores; DeepSpeed does not look for a GPU.
        LAUNCHER=(DS_ACCELERATOR=cpu "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(share_of_cores)}")
    fi
    if is_one_of_several; then
        # The half of the launcher that the other half starts on each machine.
        LAUNCHER+=("$(python_command)" -m deepspeed.launcher.launch --world_info "$(describe_machines)"
            --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
        return
    fi
    LAUNCHER+=("$(python_command)" -m deepspeed.launcher.runner)
    if ((NUM_NODES > 1)); then
        [[ -n ${HOSTFILE:-} ]] ||
            die "NUM_NODES=$NUM_NODES needs HOSTFILE, with lines such as: node1 slots=$NUM_GPUS; or NODE_RANK and MASTER_ADDR, with the same command on each machine"
        LAUNCHER+=(--num_nodes "$NUM_NODES" --num_gpus "$NUM_GPUS" --master_port "${MASTER_PORT:-29500}"
            --hostfile "$(absolute_path "$HOSTFILE")")
        return
    fi
    if ((${#GPUS[@]} > 0)); then
        printf -v places '%s,' "${GPUS[@]:0:NUM_GPUS}"
        LAUNCHER+=(--include "localhost:${places%,}")
    else
        LAUNCHER+=(--num_gpus "$NUM_GPUS")
    fi
    LAUNCHER+=(--master_port "${MASTER_PORT:-$(free_port)}")
}

# The launcher's list of machines and ranks, of which it reads the number of all and the GPUs of its own.
describe_machines() {
    local places machines="" machine
    if ((${#GPUS[@]} > 0)); then
        printf -v places '%s,' "${GPUS[@]:0:NUM_GPUS}"
    else
        printf -v places '%s,' $(seq 0 $((NUM_GPUS - 1)))
    fi
    for ((machine = 0; machine < NUM_NODES; machine++)); do machines+="\"$machine\": [${places%,}], "; done
    printf '{%s}' "${machines%, }" | base64 | tr -d '\n' | tr '+/' '-_'
}

share_of_cores() {
    local cores
    cores=$(getconf _NPROCESSORS_ONLN)
    printf '%s\n' $((cores > NUM_GPUS ? cores / NUM_GPUS : 1))
}

free_port() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '29500\n'
    else
        "$(python_command)" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
    fi
}

# Run the command with its output on the screen and in the log, which has the time and the command of each run.
#
# The job is a process group of its own. A signal to this script becomes SIGUSR1 for the group, which the launchers ignore
# and the ranks answer with a checkpoint at the next step (llava/train/stopping.py).
start_training() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        print_command "$@"
        return
    fi
    mkdir -p "$(dirname "$LOG")"
    {
        printf '== %s\n' "$(date '+%Y-%m-%d %H:%M:%S')"
        print_command "$@"
    } >>"$LOG"
    LOG_BEGIN=$(($(wc -c <"$LOG") + 1))
    local code=0 tee pipes
    pipes=$(mktemp -d)
    mkfifo "$pipes/screen"
    # Signals to the terminal's group, and a screen that is gone, do not end the log.
    (
        trap '' INT TERM HUP PIPE
        tee -a "$LOG" <"$pipes/screen" | to_screen
    ) &
    tee=$!
    exec 3>"$pipes/screen"
    rm -r "$pipes"
    STOPPED_BY=
    trap 'ask_to_stop INT' INT
    trap 'ask_to_stop TERM' TERM
    trap 'ask_to_stop HUP' HUP
    set -m
    (
        trap '' USR1
        exec env "LLAVA_SCRIPT_PID=$(script_pid)" "STOP_SECONDS=$STOP_SECONDS" "$@" </dev/null >&3 2>&1 3>&-
    ) &
    TRAINING=$!
    set +m
    # A signal interrupts `wait`; the job's own code comes from the last one.
    while :; do
        code=0
        wait "$TRAINING" || code=$?
        kill -0 "$TRAINING" 2>/dev/null || break
        [[ -z $STOPPED_BY ]] || wait_for_checkpoint
    done
    kill -KILL -- "-$TRAINING" 2>/dev/null || true # nothing of it is left behind
    exec 3>&-
    wait "$tee" || true
    report_end "$code"
}

# Pass on what concerns the user.
to_screen() {
    if [[ $VERBOSE == 1 ]]; then
        cat
    else
        "$(python_command)" -c 'from llava.train.noise import main; main()'
    fi
}

ask_to_stop() {
    if [[ -n $STOPPED_BY ]]; then
        kill -KILL -- "-$TRAINING" 2>/dev/null || true
        return
    fi
    STOPPED_BY=$1
    note "stopping at the next step, with a checkpoint (within $STOP_SECONDS seconds; a second signal ends it at once)"
}

# Ask every second, as a rank that is just starting misses the first signal; after STOP_SECONDS kill what is left.
wait_for_checkpoint() {
    local seconds=0 signal=USR1
    # Ranks on machines reached by ssh are in no group here: the launcher ends them.
    if ((NUM_NODES > 1)) && [[ -z ${NODE_RANK:-} ]]; then signal=TERM; fi
    while kill -0 "$TRAINING" 2>/dev/null; do
        if ((seconds > STOP_SECONDS + 2)); then
            kill -KILL -- "-$TRAINING" 2>/dev/null || true
        elif [[ $signal == USR1 ]] || ((seconds == 0)); then
            kill "-$signal" -- "-$TRAINING" 2>/dev/null || true
        fi
        sleep 1
        seconds=$((seconds + 1))
    done
}

# report_end CODE: the last line says how the training ended.
report_end() {
    local code=$1
    if ((code == 0)); then
        note "$(last_line '^(trained|finished|checked)' "trained: $OUTPUT") (log: $LOG)"
        return
    fi
    case $STOPPED_BY in
    "") ;;
    INT) code=130 ;;
    HUP) code=129 ;;
    *) code=143 ;;
    esac
    case $code in
    129 | 130 | 143)
        note "$(last_line '^stopped' "stopped before a checkpoint was written") (log: $LOG)"
        exit "$code"
        ;;
    2) die "$(last_line '^error: ' "error: the trainer refused to start" | sed 's/^error: //') (log: $LOG)" ;;
    esac
    local checkpoint none=" (there is none yet)"
    for checkpoint in "$OUTPUT"/checkpoint-*/trainer_state.json; do
        [[ ! -f $checkpoint ]] || none=
    done
    die "training stopped with exit code $code (log: $LOG); the same command resumes at the last checkpoint in $OUTPUT$none"
}

# last_line PATTERN ELSE: the last line of this run that matches; each rank prints its own, among the launcher's lines.
last_line() {
    tail -c "+$LOG_BEGIN" "$LOG" | tr '\r' '\n' | grep -aE "$1" | tail -n 1 | grep . || printf '%s\n' "$2"
}

if [[ -n ${RECIPE:-} ]]; then read_recipe "$(absolute_path "$RECIPE")" default; fi
