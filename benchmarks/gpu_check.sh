#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: build for it, GPU tests, selftest, benchmarks. The log and the tables
# go to $FFR_RESULTS_DIR (default: benchmarks/results/gpu), a short table comes last. Exits non-zero if any
# step failed.
#
#   benchmarks/gpu_check.sh [quick | STEP ...]      quick: no benchmark, no sanitizer
#
# Steps: build info selftest test_gpu sanitizer gpu_loss compaction training compiled; those named run, in this order, where time is short for all
# at once. The log grows while a step runs, so that a run that is cut off leaves what it has.
# FFR_EXT_CUDA_ARCHS: architectures to build for; default: that of the first GPU. PYTHON: the interpreter (python3).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
all="build info selftest test_gpu sanitizer gpu_loss compaction training compiled"
wanted=${*:-$all}
[[ $wanted == quick ]] && wanted="build info selftest test_gpu"
for name in $wanted; do
  [[ " $all " == *" $name "* ]] || { echo "no step $name; there are: $all" >&2; exit 2; }
done
export FFR_RESULTS_DIR=${FFR_RESULTS_DIR:-$PWD/benchmarks/results/gpu} PYTHONUNBUFFERED=1
mkdir -p "$FFR_RESULTS_DIR"
summary=$FFR_RESULTS_DIR/summary.txt
log=$FFR_RESULTS_DIR/gpu_check.log
: >"$summary"
: >"$log"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed=0

step() {  # name, command ...
  local name=$1 began=$SECONDS status=ok code
  [[ " $wanted " == *" $name "* ]] || return 0
  shift
  echo "==== $name" >>"$log"
  "$@" 2>&1 | tee -a "$log" >"$logs/$name.log"
  code=${PIPESTATUS[0]}
  [[ $code == 0 ]] || { status="FAILED ($code)"; failed=1; }
  echo "==== $name: $status" >>"$log"
  printf '%-16s %-12s %4d s  %s\n' "$name" "$status" $((SECONDS - began)) "$(tail -n 1 "$logs/$name.log" | cut -c1-90)" |
    tee -a "$summary"
  [[ $status == ok ]] || tail -n 25 "$logs/$name.log"
}

arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
  echo "no usable GPU: torch.cuda.get_device_capability() failed" >&2
  exit 2
}
export FFR_EXT_CUDA_ARCHS=${FFR_EXT_CUDA_ARCHS:-$arch}

build() { FFR_EXT_BUILD=cuda "$python" -m pip install --no-deps --no-build-isolation -e . -v; }
selftest() {  # by name: a backend that is not available is a failure here
  local code=0
  for backend in cuda triton; do "$python" -m ffr_ext selftest --backend $backend || code=$?; done
  return $code
}
test_gpu() {
  "$python" -m pytest -q -m gpu tests -p no:cacheprovider --durations=15 --continue-on-collection-errors
}
sanitize() {  # the CUDA kernels' reads and writes, on the small cases
  command -v compute-sanitizer >/dev/null || { echo "skipped: no compute-sanitizer on PATH"; return 0; }
  # Without torch's cache every tensor is an allocation of its own, whose end the sanitizer knows.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" -m pytest -q -p no:cacheprovider tests/native/test_gpu.py \
    -k "test_sums_signs_and_gradients and cuda and (tail or anywhere or misaligned)"
}

step build build
step info "$python" -m ffr_ext info
step selftest selftest
step test_gpu test_gpu
step sanitizer sanitize
step gpu_loss "$python" -m benchmarks.suites.gpu_loss
step compaction "$python" -m benchmarks compaction --device cuda
step training "$python" -m benchmarks step --device cuda
step compiled "$python" -m benchmarks step-compiled --device cuda --only resnet50 vit-tiny

echo
[[ ! -f $logs/gpu_loss.log ]] ||
  grep -E "of copy|backward|forward|x eager|(cuda|triton|eager|compile)( graph)?$" "$logs/gpu_loss.log" | tail -n 70
for name in compaction training compiled; do
  [[ ! -f $logs/$name.log ]] || grep -E "^[a-z0-9_/]+ .* ms \[" "$logs/$name.log"
done
echo
cat "$summary"
exit $failed
