#!/usr/bin/env bash
# All that a GPU has to do, in order of worth, for when one is at hand for minutes only:
#
#     benchmark/gpu.sh "Ant-v4__sdac__*" "HalfCheetah-v4__sdac__*"
#
# At first the tests that need a GPU and the speed; then the named runs of GRID (by default
# benchmark/million.toml), JOBS (by default 8) at a time. Before END seconds (by default 570) have
# passed they write checkpoints, and the results are in OUT (by default benchmark/runs/gpu), with
# the curves of unfinished runs. The same command with FIRST=no in front of it goes on with them.
# Python packages beside PyTorch: gymnasium, farama-notifications, mujoco, mujoco-core, glfw,
# pyopengl, tyro, docstring-parser, typeguard, tensorboard, tqdm, pytest and pytest-xdist.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmark/runs/gpu} END=${END:-570} FIRST=${FIRST:-yes} PYTHON=${PYTHON:-python3}
GRID=${GRID:-benchmark/million.toml}
name=$(basename "$GRID" .toml)
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
mkdir -p "$OUT"
say() { echo "[$SECONDS s] $*"; }

if [ "$FIRST" = yes ]; then
    timeout 60 "$PYTHON" -m pytest -q -n 4 tests/test_devices.py -k "graphs or another_device" \
        > "$OUT/tests.txt" 2>&1
    say "tests: $(tail -n 1 "$OUT/tests.txt")"
    timeout 120 "$PYTHON" benchmark/speed.py --cuda --seconds 0.4 > "$OUT/speed.txt" 2>&1
    say "speed: $(wc -l < "$OUT/speed.txt") lines"
    cp benchmark/results/speed-nvidia* "$OUT"
fi

# With this service the small kernels of several processes run at the same time.
export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps
mkdir -p /tmp/mps
nvidia-cuda-mps-control -d || unset CUDA_MPS_PIPE_DIRECTORY
timeout -s TERM $((END - SECONDS - 40)) "$PYTHON" benchmark/run.py "$GRID" \
    --jobs "${JOBS:-8}" --only "$@" 2>&1 | tee -a "$OUT/runs.txt"
[ -z "${CUDA_MPS_PIPE_DIRECTORY:-}" ] || echo quit | timeout 5 nvidia-cuda-mps-control

for run in "benchmark/runs/$name"/*/runs/*; do
    "$PYTHON" benchmark/record.py "$run" --into unfinished
done
(cd benchmark/results && ls -d "$name" unfinished) |
    tar -czf "$OUT/results.tar.gz" -C benchmark/results -T -
rm -rf benchmark/results/unfinished
say "end: $OUT/results.tar.gz"
