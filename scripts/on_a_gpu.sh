#!/usr/bin/env bash
# Measures on a GPU, the most valuable first, in less than ten minutes: each stage has a time limit, its output goes
# into a file of its own as it comes, and a failed stage does not stop the next. It ends with an error if one failed.
#     bash scripts/on_a_gpu.sh [--device cpu] [FOLDER]
# FOLDER is $OUT or gpu_results if not given. It receives STAGE.txt for each stage, summary.txt with a line for each
# (name, seconds, exit code; 124 is that of the time limit), and all.txt with everything. `--device cpu` runs the same
# stages with sizes so small that they show only that each works. PYTHON names the interpreter; this checkout is what it
# imports, whether kd_lightning is installed or not.
set -uo pipefail

device=cuda
if [ "${1:-}" = "--device" ]; then
    device=${2:?"--device cuda or --device cpu"}
    shift 2
fi
results=${1:-${OUT:-gpu_results}}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

slower=1 # factor of the time limits
graphed=--cuda-graph graph="" epoch="" step="" overhead="" data="" colours="" tests=tests
if [ "$device" = cpu ]; then
    slower=10
    graphed="" # there is nothing to capture
    graph="--teacher resnet20 --images 64 --batch-size 8 --steps 1 --rounds 1 --variants eager graph"
    epoch="--teacher resnet20 --images 64 --batch-size 8"
    step="--teacher resnet20 --images 64 --batch-size 8 --steps 1 --rounds 1"
    overhead="--rounds 1 --steps 1"
    data="--batch-size 8 --batches 2 --rounds 1"
    colours="--size 32 --batch-size 2 --rounds 1"
    tests=tests/test_gpu.py
fi

# A stage is a line: seconds at most, name, arguments of python as the shell reads them. The limits add up to less than
# ten minutes. Later options replace earlier ones: those for a CPU come last.
stages=(
    "20 environment scripts/environment.py --device $device"
    "110 graph-128 scripts/bench_graph.py --device $device --batch-size 128 $graph"
    "50 epoch scripts/bench_epoch.py --device $device $epoch"
    "50 graphed-epoch scripts/bench_epoch.py --device $device $graphed $epoch"
    "60 step scripts/bench_step.py --device $device --teacher resnet34 --batch-size 128 --rounds 5 $step"
    "70 graph-512 scripts/bench_graph.py --device $device --batch-size 512 $graph"
    "110 tests -m pytest -m 'gpu and not slow' -q $tests"
    "30 graphed-step scripts/bench_step.py --device $device --teacher resnet34 --batch-size 128 --rounds 3 $graphed $step"
    "30 overhead scripts/bench_overhead.py --device $device --rounds 3 --steps 100 $overhead"
    "30 data scripts/bench_data.py --device $device $data"
    "30 augmentation scripts/bench_augmentation.py --device $device $colours"
)

: > "$results/summary.txt"
: > "$results/all.txt"
failed=0
for stage in "${stages[@]}"; do
    read -r limit name words <<< "$stage"
    eval "arguments=($words)"
    echo "== $name: ${arguments[*]}" | tee -a "$results/all.txt"
    start=$SECONDS
    # an interrupt, as from a keyboard: pytest then lists what has failed so far
    timeout -s INT -k 10 $((limit * slower)) "$python" -u "${arguments[@]}" > "$results/$name.txt" 2>&1 < /dev/null
    code=$?
    [ "$code" = 0 ] || failed=1
    printf '%-14s %4d s  exit %d\n' "$name" $((SECONDS - start)) "$code" >> "$results/summary.txt"
    { cat "$results/$name.txt" && tail -n 1 "$results/summary.txt"; } | tee -a "$results/all.txt"
done
exit $failed
