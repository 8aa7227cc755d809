#!/usr/bin/env bash
# On a machine with a GPU, from the repository's root: builds the kernels in place against that machine's own torch,
# runs the CUDA tests, once more under the memory checker where there is one, and then the GPU benchmark.
# PYTHON chooses the interpreter. Needs nvcc, cmake, ninja, pytest and hypothesis, and no network.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(command -v "${PYTHON:-python3}")
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
mapfile -t tests < <(find tests -name 'test_*_cuda.py' | sort)

cmake -S csrc -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
  -DPAPER_LAYERS_CUDA_ARCHITECTURES=native
cmake --build build/cuda
cmake --install build/cuda --prefix .
"$python" -c 'import paper_layers; print(paper_layers.show_config())'
# The tests skip themselves without a device: here that is a failure.
"$python" -c 'import torch; print(torch.cuda.get_device_name())'

"$python" -m pytest -q -rs "${tests[@]}"

if compute-sanitizer --error-exitcode 1 "$python" -c 'import torch; torch.zeros(1, device="cuda")' >/dev/null 2>&1; then
  # Every tensor an allocation of its own, so that a step over its end is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$python" -m pytest -q "${tests[@]}" -k 'many_blocks or extremes or empty'
else
  echo 'compute-sanitizer: missing, or it does not work on this device; memory was not checked'
fi

# The benchmarks that have an option --device.
for file in $(grep -l 'benchmarks.micro.command import .*main' benchmarks/micro/*.py); do
  name=$(basename "$file" .py)
  "$python" -m "benchmarks.micro.$name" --device cuda --json "benchmarks/results/${name}_cuda.json"
done
