#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: build for it, GPU tests, selftest, benchmark. The log and the tables
# (four files) go to $FFR_RESULTS_DIR (default: benchmarks/results/gpu), a short table comes last. Exits non-zero if any
# step failed.
#
#   benchmarks/gpu_check.sh [quick]      quick: no benchmark
#
# FFR_EXT_CUDA_ARCHS: architectures to build for; default: that of the first GPU. PYTHON: the interpreter (python3).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export FFR_RESULTS_DIR=${FFR_RESULTS_DIR:-$PWD/benchmarks/results/gpu}
mkdir -p "$FFR_RESULTS_DIR"
summary=$FFR_RESULTS_DIR/summary.txt
: >"$summary"
: >"$FFR_RESULTS_DIR/gpu_check.log"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed=0

step() {  # name, command ...
  local name=$1 began=$SECONDS status=ok
  shift
  "$@" >"$logs/$name.log" 2>&1 || { status="FAILED ($?)"; failed=1; }
  printf '%-16s %-12s %4d s  %s\n' "$name" "$status" $((SECONDS - began)) "$(tail -n 1 "$logs/$name.log" | cut -c1-90)" |
    tee -a "$summary"
  { echo "==== $name: $status"; cat "$logs/$name.log"; } >>"$FFR_RESULTS_DIR/gpu_check.log"
  [[ $status == ok ]] || tail -n 25 "$logs/$name.log"
}

arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
  echo "no usable GPU: torch.cuda.get_device_capability() failed" >&2
  exit 2
}
export FFR_EXT_CUDA_ARCHS=${FFR_EXT_CUDA_ARCHS:-$arch}

build() { FFR_EXT_BUILD=cuda "$python" -m pip install --no-deps --no-build-isolation -e . -v; }
test_gpu() { "$python" -m pytest -q -m gpu tests -p no:cacheprovider; }
sanitize() {  # the CUDA kernels' reads and writes, on the small cases
  compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py \
    -k "test_sums_signs_and_gradients and cuda and (tail or anywhere or misaligned)"
}

step build build
step info "$python" -m ffr_ext info
step selftest "$python" -m ffr_ext selftest
step test_gpu test_gpu
if command -v compute-sanitizer >/dev/null && [[ ${1:-} != quick ]]; then step sanitizer sanitize; fi
if [[ ${1:-} != quick ]]; then step gpu_loss "$python" -m benchmarks.bench_gpu_loss; fi

echo
[[ ${1:-} == quick ]] || grep -E "of copy|backward|forward|x eager|MiB.*(cuda|triton|compile)" "$logs/gpu_loss.log" | tail -n 70
echo
cat "$summary"
exit $failed
