#!/usr/bin/env bash
# compat.sh PYTHON WHEEL: the wheel's kernels load and pass the tests of the ops on the oldest supported torch
# and on the newest of the index; and `pip install .` builds by itself, in isolation.
set -euo pipefail
python=$1 wheel=$(realpath "$2")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for torch in "torch==2.10.*" torch; do
  "$python" -m venv --clear "$work/venv"
  "$work/venv/bin/pip" install --quiet --upgrade --only-binary :all: "$torch" numpy pytest hypothesis expecttest onnx onnxscript
  "$work/venv/bin/pip" install --quiet --no-deps "$wheel"
  rm -rf "$work/run" && mkdir "$work/run" && cp -r "$root/pyproject.toml" "$root/testing" "$root/tests" "$work/run/"
  (cd "$work/run" && "$work/venv/bin/python" -c "import paper_layers; print(paper_layers.show_config())" &&
    "$work/venv/bin/python" -m pytest -q tests/ops)
done

"$python" -m venv --clear "$work/venv"
PAPER_LAYERS_BUILD=require "$work/venv/bin/pip" install --quiet "$root"
(cd "$work" && venv/bin/python -c "import paper_layers; print(paper_layers.show_config())" | tee config && grep "cpu kernels: loaded" config)
