#!/bin/sh
# Make .venv, with softcache and softcache-train editable in it, from nothing but a Python. `make` calls this.
#
#   PYTHON=python3.12   the interpreter of a new .venv (default: python3); one that exists keeps its own
#   UV=                 empty: use pip; otherwise uv is used when it can be had, being many times faster
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $python is missing or older than Python 3.11; name another: make PYTHON=python3.12 …" >&2
    exit 1
}

# An environment that runs is kept and brought up to date: somebody may be running tests in it.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv || {
    echo "setup: $python cannot make virtual environments (on Debian: apt install python3-venv)" >&2
    exit 1
}
touch .venv/installing  # of this moment: a pyproject.toml edited while we install is still newer

set -- --constraint constraints.txt --group dev \
    --editable '.[parquet,hdf5,torchvision,timm,onnx,hf,ultralytics,s3]' --editable './train[demo]'

with_uv() {
    .venv/bin/python -m pip install --quiet uv && .venv/bin/uv pip install --python .venv/bin/python "$@"
}

with_pip() {
    # --group is younger than the pip of Python 3.11, 3.12 and 3.13.
    .venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1' && .venv/bin/python -m pip install "$@"
}

# uv does not read pip's configuration, so a machine that only pip was told how to serve needs the second try.
if [ -z "${UV-uv}" ]; then
    with_pip "$@"
elif ! with_uv "$@"; then
    echo "setup: uv did not do; trying pip" >&2
    with_pip "$@"
fi

mv .venv/installing .venv/installed  # last: make takes this file as the word that all of the above is done
