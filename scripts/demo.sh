#!/usr/bin/env bash
# The main job, small and real: the twelve benchmarks on the embedded world of shapes, with the checkpoints that the
# repository keeps. Runs the pocket LLaVA without reduction, with TRIM training-free, finetuned with TRIM, and with as
# many random patches on the same weights; ends with one table, POPE by itself (also with random patches on the plain
# weights), the same as JSON, and pictures of the patches kept.
#   bash scripts/demo.sh
#   DEMO_IMAGES=200 DEMO_OUT=somewhere BENCHMARKS="pope gqa" bash scripts/demo.sh
# LLaVA-Bench and MM-Vet want a language model as judge; here an offline stand-in compares texts, and the table says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/environment.sh
source scripts/lib/environment.sh
use_environment

IMAGES=${DEMO_IMAGES:-60} # pictures per benchmark
OUT=${DEMO_OUT:-results/demo}
BENCHMARKS=${BENCHMARKS:-vqav2 gqa vizwiz sqa textvqa pope mme mmbench mmbench_cn seed llavabench mmvet}
CHECKPOINTS=playground/shapes/checkpoints
PLAIN=$CHECKPOINTS/llava-shapes
TRIMMED=$CHECKPOINTS/llava-shapes-trim
[[ $OUT == /* ]] || OUT=$PWD/$OUT
DATA=$OUT/data
LOGS=$OUT/logs
export LLAVA_EVAL_ROOT=$DATA/eval HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT" "$LOGS"

# Names of the runs, also in the table.
NONE="no reduction" FREE="TRIM:-1, training-free" TUNED="TRIM:-1, finetuned" RANDOM_RUN="Random, same budget"
RANDOM_FREE="Random, training-free"

answer_and_score() { # RUN BENCHMARK CHECKPOINT REDUCTION
    mkdir -p "$OUT/$1"
    rm -f "$OUT/$1/$2.json" # a number of an earlier run must not pass for this one's
    LLAVA_EVAL_JSON=$OUT/$1/$2.json bash "scripts/v1_5/eval/$2.sh" "$1" "$3" "$OUT/$1.txt" "" -- \
        --reduce "$4" --batch-size 32 --judge exact >"$LOGS/$1-$2.log" 2>&1 ||
        { tail -n 5 "$LOGS/$1-$2.log" >&2; echo "error: $2, $1: see $LOGS/$1-$2.log" >&2; return 1; }
}

mean_tokens() { # RESULT: the mean number of tokens kept, rounded up, so that random patches are never fewer
    "$PYTHON" -c 'import json, math, sys; print(math.ceil(json.load(open(sys.argv[1]))["tokens"]["mean_tokens"]))' "$1"
}

both() { # PID...: wait for all; fail if one failed
    local pid failed=0
    for pid in "$@"; do wait "$pid" || failed=1; done
    return "$failed"
}

echo "== $IMAGES pictures for each of: $BENCHMARKS"
"$PYTHON" -m playground.shapes.generate --out "$DATA" --train-images 0 --eval-images "$IMAGES" --seed 7 \
    --benchmarks "$BENCHMARKS pope"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two runs at a time, a core each
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
    [[ $benchmark != pope ]] || answer_and_score plain-random pope "$PLAIN" "Random:$budget"
    FILES+=("$NONE=$OUT/plain/$benchmark.json" "$FREE=$OUT/plain-trim/$benchmark.json"
        "$TUNED=$OUT/finetuned-trim/$benchmark.json" "$RANDOM_RUN=$OUT/finetuned-random/$benchmark.json")
done

echo "== what was kept"
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
echo "The same as JSON: $OUT/table.json   as LaTeX: $OUT/table.tex   as a picture: $OUT/table.png"
echo "What was kept:    $OUT/kept_0.png  $OUT/kept_1.png  $OUT/kept_2.png"
echo "These scores speak of shapes only: a demonstration and a regression instrument, see playground/shapes/README.md"
