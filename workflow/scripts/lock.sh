#!/usr/bin/env bash
# Resolve pyproject.toml in a clean environment and write requirements.lock. torch is pinned to one release by name: on
# Linux the CPU build's version carries a local suffix that no index serves under that name, so it is cut off.
set -euo pipefail
torch="torch==2.13.0"
old="soupsieve<3" # 3.0 breaks the theme, later releases do not install on Python 3.11.0 to 3.11.4, which Debian 12 has
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
"${PYTHON:-python3}" -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet --disable-pip-version-check "$torch" "$old" ".[book,data,test]"
{
    echo "# Exact versions that the book is built and tested with: made by \`make lock\` from pyproject.toml."
    "$room/venv/bin/pip" freeze --disable-pip-version-check --exclude convergence-executed | grep -v '^nvidia-' | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'
} > requirements.lock
echo "wrote requirements.lock: $(grep -c == requirements.lock) packages"
"$room/venv/bin/python" -m workflow.scripts.environment
