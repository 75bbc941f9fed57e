#!/usr/bin/env bash
# Makes an environment in which ffr_ext is built, and says which Python to use on the last line of stdout.
#
#   tools/bootstrap.sh demo|test|dev ...        what requirements/NAME.txt name, and the package itself, editable
#
# PYTHON  an interpreter to use as it is (its torch and triton are never replaced); without it .venv is made
# TORCH   what to install in .venv as torch, default torch==2.13.0 from the CPU index
# Everything else (g++, Python.h, venv) comes from Debian's packages if it is missing and this is root.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "bootstrap: $*" >&2; }
die() { say "$*"; exit 1; }

# apt_get "reason" package...: installs Debian packages, or says which ones are needed.
apt_get() {
  local reason=$1; shift
  command -v apt-get >/dev/null || die "$reason, and there is no apt-get here: install the equivalent of: $*"
  [ "$(id -u)" = 0 ] || die "$reason: run   sudo apt-get install $*   and try again"
  say "$reason: installing $*"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"; } >&2
}

good_python() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' 2>/dev/null; }

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10; do
    if command -v "$name" >/dev/null && good_python "$name"; then echo "$name"; return; fi
  done
  return 1
}

own=${PYTHON:-}
if [ -n "$own" ]; then
  good_python "$own" || die "PYTHON=$own is not a Python 3.10 or newer"
  python=$own
else
  python=.venv/bin/python
  if ! good_python "$python"; then
    base=$(find_python) || { apt_get "no Python 3.10 or newer found" python3 python3-venv python3-dev; base=$(find_python) || die "no Python 3.10 or newer found"; }
    "$base" -c 'import ensurepip, venv' 2>/dev/null || apt_get "$base has no venv" python3-venv
    rm -rf .venv
    "$base" -m venv .venv >&2
  fi
fi

command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || [ -n "${CXX:-}" ] ||
  apt_get "no C++ compiler found" g++
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
[ -f "$header" ] || apt_get "no $header" python3-dev

# Tests that count a kernel's instructions are skipped without valgrind, so this is no reason to stop.
case " $* " in *" test "*)
  command -v valgrind >/dev/null || (apt_get "no valgrind found" valgrind) || say "going on without valgrind" ;;
esac

# Nothing to do if the same files were installed by the same command before.
stamp=.venv/.ffr_ext.$(IFS=_; echo "$*")
state=$(cat requirements/*.txt pyproject.toml tools/bootstrap.sh; echo "${TORCH:-} $("$python" --version)")
pip() { "$python" -m pip --disable-pip-version-check "$@" >&2; }
if [ -n "$own" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
  if ! "$python" tools/find_torch.py >/dev/null 2>&1; then
    # The CPU build: PyPI's own wheel of this version brings CUDA along, gigabytes that nobody asked for. --no-deps, so
    # that this index is asked for torch alone; what torch requires comes below.
    pip install --no-deps --retries 2 ${TORCH:-torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu}
  fi
  pins=$(mktemp)
  trap 'rm -f "$pins"' EXIT
  torch=$("$python" tools/find_torch.py | sed -n 's/^version=/torch==/p')
  files=(-r requirements/build.txt)
  for name in "$@"; do files+=(-r "requirements/$name.txt"); done
  if [ -n "$own" ]; then
    echo "$torch" >"$pins"
    "$python" -m pip freeze --all 2>/dev/null | grep -E '^(pytorch-)?triton==' >>"$pins" || true
  else
    grep -v '^torch==' requirements/constraints.txt >"$pins"
    echo "$torch" >>"$pins"
  fi
  pip install --quiet -c "$pins" torch "${files[@]}"
  # Their tests are skipped without them. In a folder of their own, see there; the pinned torchvision fits the pinned torch.
  if [ -z "$own" ] && [[ " $* " = *" test "* ]]; then
    rm -rf .venv/vision
    if grep -qxF "${torch%%+*}" requirements/constraints.txt; then
      pip install --quiet --no-deps --target .venv/vision -c "$pins" -r requirements/vision.txt ||
        say "going on without torchvision and timm"
    fi
  fi
  [ -n "$own" ] || echo "$state" >"$stamp"
fi

# Always: it costs two seconds if no source has changed. Without --no-deps pip would look torch's own requirements over.
pip install --quiet --no-deps --no-build-isolation -e .
echo "$python"
