#!/usr/bin/env bash
# Makes a virtual environment with vLLM for the CPU, this package (compiled) and its tests and checks.
#
#     deploy/cpu/install.sh VENV
#
# Does nothing when VENV is up to date: a stamp in it holds the hash of everything the result depends on. PYTHON names
# the interpreter (else the first of python3.11, python3.12, python3.13 and python3 that vLLM's wheels support).
set -euo pipefail

venv=$(realpath -m "${1:?usage: deploy/cpu/install.sh VENV}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/deploy/cpu
started=$SECONDS
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '[%4ds] %s\n' "$((SECONDS - started))" "$*"; }
fail() { printf 'error: %s\n' "$@" >&2; exit 1; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13: vLLM 0.32 has no wheels for it"
    echo "$PYTHON"
    return
  fi
  for name in python3.11 python3.12 python3.13 python3; do
    if supported "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no Python 3.11, 3.12 or 3.13 found: install one (Debian: python3.11 and python3.11-venv), or set PYTHON"
}

# The editable install points at this checkout and a venv cannot be moved, so both paths count too.
fingerprint() {
  (
    cd "$root"
    find deploy/cpu csrc pyproject.toml -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    echo "$root" "$venv"
  ) | sha256sum | cut -d' ' -f1
}

stamp=$venv/.deltamem-installed
want=$(fingerprint)
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
  exit 0
fi

[ "$(uname -s)" = Linux ] || fail "this is $(uname -s): the CPU wheels of vLLM locked here are for Linux"
compiler=${CXX:-g++}
command -v "${compiler%% *}" >/dev/null ||
  fail "no C++ compiler ($compiler): csrc/ is compiled at install. Install g++ (Debian: apt-get install g++), or set CXX"

if ! { [ -x "$venv/bin/python" ] && supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
  python=$(find_python)
  say "making $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv" ||
    fail "$python cannot make a virtual environment (Debian: apt-get install python3-venv)"
fi
rm -f "$stamp"
log=$venv/install.log
: >"$log"

# pip with its output in a log; says now and then how far it is, and shows the log's end if it fails.
install() {
  local code=0 begun=$SECONDS total=$1 pid fetched
  shift
  "$venv/bin/python" -m pip install --no-input --progress-bar off --no-deps "$@" >"$log" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null; rm -rf "$work"' EXIT
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.5
    if [ $((SECONDS - begun)) -ge 15 ]; then
      begun=$SECONDS
      fetched=$(grep -c '^Collecting ' "$log" || true)
      if grep -q '^Installing collected' "$log"; then say "  … unpacking"
      elif [ "$fetched" -gt 0 ]; then say "  … $fetched of $total fetched"
      else say "  … building"; fi
    fi
  done
  wait "$pid" || code=$?
  trap 'rm -rf "$work"' EXIT
  if [ "$code" != 0 ]; then
    tail -n 25 "$log" >&2
    fail "pip failed, see above (all of it: $log)"
  fi
}

count() { grep -cvE '^(#|$)' "$1"; }
work=$(mktemp -d)

packages=$(count "$here/requirements.lock")
say "installing vLLM for the CPU: $packages pinned packages, about 2.5 GB on disk, a few minutes"
install "$packages" -r "$here/requirements.lock"
"$venv/bin/python" -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' 2>/dev/null ||
  fail "the torch that pip chose is not a CPU build, and the locked vLLM needs one:" \
    "let pip find torch's CPU wheels (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), then run this again"

say "installing build tools, pytest, ruff and mypy"
install "$(count "$here/requirements-dev.lock")" -r "$here/requirements-dev.lock"

say "putting Triton aside, for the tests of vLLM's second model runner"
install 1 --upgrade --target "$venv/triton" "$(grep -oE '^# *triton==[0-9.]+' "$here/requirements-dev.lock" | tr -d '# ')"

say "naming the CPU build of vLLM \`vllm\`"
cp -r "$here/vllm-metapackage" "$work/vllm"  # setuptools writes beside what it builds
install 1 --no-build-isolation "$work/vllm"

say "compiling csrc/ and installing deltamem_vllm"
install 1 --no-build-isolation --editable "$root"

say "checking the result"
(cd / && "$venv/bin/python" - <<'CHECK') || fail "the installed packages do not work together, see above; remove $venv and run this again"
from importlib.metadata import entry_points, version
from platform import python_version

import torch

from deltamem_vllm.ops.dispatch import select

kernels = select(torch.device("cpu"), "native")
for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
    [plugin] = entry_points(group=group, name="deltamem")
print(f"        Python {python_version()}, vLLM {version('vllm')}, torch {torch.__version__}, "
      f"deltamem_vllm {version('deltamem-vllm')}, operators {kernels.description}")
CHECK
echo "$want" >"$stamp"
say "$venv is ready"
