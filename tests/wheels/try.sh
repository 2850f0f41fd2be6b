#!/usr/bin/env bash
# try.sh PYTHON WHEEL: installs a wheel into a new environment and runs check.py there, with that environment alone in PATH.
# torch is the newest that the wheel allows, or what TORCH says: TORCH="torch==2.13.0".
set -euo pipefail
cd "$(dirname "$0")/../.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$1" -m venv "$environment"
"$environment/bin/pip" install --quiet --disable-pip-version-check "$2" "${TORCH:-torch}"
check=$PWD/tests/wheels/check.py readme=$PWD/README.md
cd "$environment"
env -i HOME="$environment" PATH="$environment/bin" "$environment/bin/python" "$check" "$readme" --no-compiler
