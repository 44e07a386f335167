# shellcheck shell=bash
# Which split a benchmark script answers, for benchmarks whose test answers are not public. Source it after eval.sh.

# Print the split that the arguments of a script name with --split; else the one that can be scored here, where its
# annotations are at hand; else the one that only a server scores. (`llava.eval` chooses in the same way.)
#   choose_split SCORED SERVER ANNOTATIONS ARGUMENTS...
# SCORED, SERVER: names of the two splits, which `val` and `test` stand for. ANNOTATIONS: files under the data root,
# separated by blanks, any of which will do.
choose_split() {
    local scored=$1 server=$2 base file named=""
    base=$(absolute_path "${LLAVA_EVAL_ROOT:-$REPO_ROOT/playground/data/eval}")
    local annotations=$3
    shift 3
    while (($# > 0)); do
        case $1 in
        --split) named=${2:-} ;;
        --split=*) named=${1#*=} ;;
        esac
        shift
    done
    case $named in
    val) named=$scored ;;
    test) named=$server ;;
    "")
        named=$server
        for file in $annotations; do
            [[ ! -f $base/$file ]] || named=$scored
        done
        ;;
    esac
    printf '%s\n' "$named"
}
