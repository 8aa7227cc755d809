# make demo, make test: each makes .venv and the kernels first, from nothing but Python, make and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv/.peers
KERNELS := build/dev/.built
SOURCES := $(shell find csrc -type f)
# One GPU architecture, so that nvcc, where there is one, does not hold development up.
CMAKE = $(BIN)/cmake -G Ninja -S csrc -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DPAPER_LAYERS_CUDA_ARCHITECTURES=90-real

.PHONY: demo test lint bench claims sanitize compat wheel clean

demo: $(KERNELS)
	$(BIN)/python -m demo

# Two processes of one thread each: threads that wait for each other take twice as long. Tests of threads set their number.
test: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: $(KERNELS) $(PEERS)
	$(BIN)/python -m benchmarks.micro.lip --json benchmarks/results/lip_cpu.json
	$(BIN)/python -m benchmarks.micro.soft_triple --json benchmarks/results/soft_triple_cpu.json
	$(BIN)/python -m benchmarks.micro.knn --json benchmarks/results/knn_cpu.json
	$(BIN)/python -m benchmarks.micro.knn_growth --json benchmarks/results/knn_growth.json
	$(BIN)/python -m benchmarks.micro.graph_conv --json benchmarks/results/graph_conv_cpu.json
	$(BIN)/python -m benchmarks.micro.point_sample --json benchmarks/results/point_sample_cpu.json
	$(BIN)/python -m benchmarks.micro.uncertain_points --json benchmarks/results/uncertain_points_cpu.json
	$(BIN)/python -m benchmarks.micro.point_rend --json benchmarks/results/point_rend_cpu.json
	$(BIN)/python -m benchmarks.micro.big_bigan --json benchmarks/results/big_bigan_cpu.json

claims: $(KERNELS)
	$(BIN)/python -m benchmarks.claims.lip
	$(BIN)/python -m benchmarks.claims.deep_gcn --json benchmarks/results/claims_deep_gcn.json
	$(BIN)/python -m benchmarks.claims.soft_triple --json benchmarks/results/claims_soft_triple.json
	$(BIN)/python -m benchmarks.claims.adv_prop --json benchmarks/results/claims_adv_prop.json
	$(BIN)/python -m benchmarks.claims.point_rend --json benchmarks/results/claims_point_rend.json
	$(BIN)/python -m benchmarks.claims.big_bigan --json benchmarks/results/claims_big_bigan.json

# The CPU kernels under AddressSanitizer and UBSan, through the tests of the ops, on a copy of the package. Python is
# not instrumented, so the runtimes are loaded first, and leaks, which would be Python's, are not looked for.
STAGE := build/sanitize/stage
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))
sanitize: $(INSTALLED)
	$(CMAKE) -B build/sanitize -DPAPER_LAYERS_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	rm -rf $(STAGE) && mkdir -p $(STAGE) && cp -r paper_layers tests pyproject.toml $(STAGE)
	$(BIN)/cmake --install build/sanitize --prefix $(STAGE)
	cd $(STAGE) && LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 PAPER_LAYERS_EXAMPLES=20 \
		$(CURDIR)/$(BIN)/python -m pytest -q -p no:cacheprovider tests/ops -k "not compile and not export"

# One wheel, built with the pinned torch, through the tests of the ops on the oldest torch and the newest (downloads
# several GB), and a build in isolation.
compat: wheel
	tests/compat.sh $(BIN)/python dist/*.whl

wheel: $(INSTALLED)
	rm -rf dist
	PATH=$(CURDIR)/$(BIN):$$PATH PAPER_LAYERS_BUILD=require $(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

$(KERNELS): $(INSTALLED) $(SOURCES)
	$(CMAKE) -B build/dev
	$(BIN)/cmake --build build/dev
	$(BIN)/cmake --install build/dev --prefix .
	touch $@

$(INSTALLED): requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

$(PEERS): requirements-peers.txt $(INSTALLED)
	$(BIN)/pip install --quiet --no-build-isolation --requirement requirements-peers.txt
	touch $@

clean:
	rm -rf .venv build dist out paper_layers/*.so
