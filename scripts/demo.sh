#!/usr/bin/env bash
# The twelve benchmarks on the embedded world of shapes, with the repository's pocket checkpoints: LLaVA without
# reduction, with TRIM training-free, finetuned with TRIM, and with as many random patches on the finetuned weights. Ends
# with one table, a table for POPE (also with random patches on the plain weights), both as JSON, images of the kept
# patches, and a command to go on with.
#   bash scripts/demo.sh
#   DEMO_IMAGES=200 DEMO_OUT=somewhere BENCHMARKS="pope gqa" bash scripts/demo.sh
# LLaVA-Bench and MM-Vet need a language model as judge; here an offline stand-in compares texts, as the table notes.
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
show_help "$@"
[[ $# -eq 0 ]] || die "demo.sh takes no arguments, not $1: DEMO_IMAGES, DEMO_OUT and BENCHMARKS are set before it"
prefer_active_environment matplotlib
use_environment

IMAGES=${DEMO_IMAGES:-60} # images per benchmark
OUT=$(absolute_path "${DEMO_OUT:-$REPO_ROOT/results/demo}")
BENCHMARKS=${BENCHMARKS:-vqav2 gqa vizwiz sqa textvqa pope mme mmbench mmbench_cn seed llavabench mmvet}
CHECKPOINTS=playground/shapes/checkpoints
PLAIN=$CHECKPOINTS/llava-shapes
TRIMMED=$CHECKPOINTS/llava-shapes-trim
DATA=$OUT/data
LOGS=$OUT/logs
export LLAVA_EVAL_ROOT=$DATA/eval HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
pass_signals_on
mkdir -p "$OUT" "$LOGS"

# Names of the runs in the table.
NONE="no reduction" FREE="TRIM:-1, training-free" TUNED="TRIM:-1, finetuned" RANDOM_RUN="Random, same budget"
RANDOM_FREE="Random, training-free"

answer_and_score() { # RUN BENCHMARK CHECKPOINT REDUCTION
    mkdir -p "$OUT/$1"
    rm -f "$OUT/$1/$2.json" # never report the score of an earlier run
    LLAVA_EVAL_JSON=$OUT/$1/$2.json bash "scripts/v1_5/eval/$2.sh" "$1" "$3" "$OUT/$1.txt" "" -- \
        --reduce "$4" --batch-size 32 --judge exact >"$LOGS/$1-$2.log" 2>&1 ||
        { tail -n 5 "$LOGS/$1-$2.log" >&2; echo "error: $2, $1: see $LOGS/$1-$2.log" >&2; return 1; }
}

mean_tokens() { # RESULT: the mean number of kept tokens, rounded up: Random never keeps fewer
    "$PYTHON" -c 'import json, math, sys; print(math.ceil(json.load(open(sys.argv[1]))["tokens"]["mean_tokens"]))' "$1"
}

both() { # PID...: wait for all; fail if one fails
    local pid failed=0
    for pid in "$@"; do wait "$pid" || failed=1; done
    return "$failed"
}

echo "== $IMAGES images each for: $BENCHMARKS"
"$PYTHON" -m playground.shapes.generate --out "$DATA" --train-images 0 --eval-images "$IMAGES" --seed 7 \
    --benchmarks "$BENCHMARKS pope"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two runs at a time, one core each
FILES=()
for benchmark in $BENCHMARKS; do
    echo "== $benchmark"
    answer_and_score plain "$benchmark" "$PLAIN" none & first=$!
    answer_and_score finetuned-trim "$benchmark" "$TRIMMED" TRIM:-1 & second=$!
    both "$first" "$second"
    budget=$(mean_tokens "$OUT/finetuned-trim/$benchmark.json")
    answer_and_score plain-trim "$benchmark" "$PLAIN" TRIM:-1 & first=$!
    answer_and_score finetuned-random "$benchmark" "$TRIMMED" "Random:$budget" & second=$!
    both "$first" "$second"
    if [[ $benchmark == pope ]]; then
        answer_and_score plain-random pope "$PLAIN" "Random:$budget" &
        wait $!
    fi
    FILES+=("$NONE=$OUT/plain/$benchmark.json" "$FREE=$OUT/plain-trim/$benchmark.json"
        "$TUNED=$OUT/finetuned-trim/$benchmark.json" "$RANDOM_RUN=$OUT/finetuned-random/$benchmark.json")
done

echo "== kept patches"
for number in 0 1 2; do
    "$PYTHON" -m playground.shapes.example --data "$DATA" --number "$number" >"$OUT/example.txt"
    { read -r image && read -r question; } <"$OUT/example.txt"
    "$PYTHON" -m llava.visualize --model-path "$TRIMMED" --image-file "$image" --query "$question" \
        --out "$OUT/kept_$number.png"
done
rm -f "$OUT/example.txt"

echo
"$PYTHON" -m llava.eval report --overview --json "$OUT/table.json" --markdown "$OUT/table.md" --latex "$OUT/table.tex" \
    --png "$OUT/table.png" "${FILES[@]}"
if [[ " $BENCHMARKS " == *" pope "* ]]; then
    echo
    "$PYTHON" -m llava.eval report --by-benchmark --json "$OUT/pope.json" "$NONE=$OUT/plain/pope.json" \
        "$FREE=$OUT/plain-trim/pope.json" "$TUNED=$OUT/finetuned-trim/pope.json" \
        "$RANDOM_RUN=$OUT/finetuned-random/pope.json" "$RANDOM_FREE=$OUT/plain-random/pope.json"
fi
echo
echo "The table as JSON: $OUT/table.json   as LaTeX: $OUT/table.tex   as an image: $OUT/table.png"
echo "Kept patches: $OUT/kept_0.png  $OUT/kept_1.png  $OUT/kept_2.png"
echo "These scores are about shapes only: a demonstration and a regression test (playground/shapes/README.md)"
echo
echo "Next, a photograph:"
[[ $CALLER_DIR == "$REPO_ROOT" ]] || printf 'cd %q && ' "$REPO_ROOT"
echo "$(printf '%q' "${PYTHON#"$REPO_ROOT"/}") -m llava.visualize --model-path $TRIMMED" \
    "--image-file playground/photos/coffee.jpg" \
    '--query "Is there a purple circle in the image?"' \
    "--answer --out $(printf '%q' "${OUT#"$REPO_ROOT"/}/coffee.png")"
