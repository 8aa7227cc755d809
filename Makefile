# make demo, make test: each makes .venv and the kernels first, from nothing but Python, make and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv/.peers
HOSTS := .venv/.hosts
KERNELS := build/dev/.built
SOURCES := $(shell find csrc -type f)
# CUDA kernels for the GPU at hand, where there is one; `make wheel` compiles them for all.
CUDA := $(if $(shell nvidia-smi -L 2>/dev/null),-DPAPER_LAYERS_CUDA_ARCHITECTURES=native,-DPAPER_LAYERS_CUDA=off)
CMAKE = $(BIN)/cmake -G Ninja -S csrc -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python $(CUDA)

.PHONY: demo test hosts fuzz lint sweep overhead busy bench claims sanitize emulate compat wheel clean

demo: $(KERNELS)
	$(BIN)/python -m benchmarks.report

# Two processes of one thread each: threads that wait for each other take twice as long. Tests of threads set their number.
test: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Every swap on the models of other packages. `make test` runs the smallest of them.
hosts: $(KERNELS) $(HOSTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/hosts -m "hosts or not hosts"

# Random calls of all ops, against formulas in float64. FUZZ="--seed 7 --op knn" draws others.
fuzz: $(KERNELS)
	$(BIN)/python -m tests.fuzz $(FUZZ)

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m testing.sentences

# The modules of a folder that can be run: those with a main.
mains = $(basename $(notdir $(shell grep -l '__name__ == "__main__"' benchmarks/$(1)/*.py)))

sweep overhead busy: $(KERNELS)
	$(BIN)/python -m benchmarks.micro.$@ --json benchmarks/results/$@_cpu.json

bench: $(KERNELS) $(PEERS)
	set -e; for name in $(call mains,micro); do \
		$(BIN)/python -m benchmarks.micro.$$name --json benchmarks/results/$${name}_cpu.json; done

claims: $(KERNELS)
	set -e; for name in $(call mains,claims); do \
		$(BIN)/python -m benchmarks.claims.$$name --json benchmarks/results/claims_$$name.json; done

# Builds with an option, for tests of a copy of the package with these kernels alone: cmake would take libraries that
# were copied within a second of the build for its own.
define stage
	$(CMAKE) -B build/$@ -D$(1)=ON
	$(BIN)/cmake --build build/$@
	rm -rf build/$@/stage && mkdir -p build/$@/stage && cp -r paper_layers testing tests pyproject.toml build/$@/stage
	rm -f build/$@/stage/paper_layers/*.so
	$(BIN)/cmake --install build/$@ --prefix build/$@/stage
endef

# The CPU kernels under AddressSanitizer and UBSan, through the tests of the ops, on a copy of the package. Python is
# not instrumented, so the runtimes are loaded first, and leaks, which would be Python's, are not looked for. pytest
# leaves stderr alone, where reports are written. Times and memory are not the kernels' own here, so the tests of them,
# and of sizes that no memory holds, are left out.
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))
sanitize: $(INSTALLED)
	$(call stage,PAPER_LAYERS_SANITIZE)
	cd build/$@/stage && LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		OMP_NUM_THREADS=1 PAPER_LAYERS_EXAMPLES=10 $(CURDIR)/$(BIN)/python -m pytest -n 2 -q --capture=sys -p no:cacheprovider tests/ops \
		-k "not (compile or export or unusual_large or global_pools or sizes_without or determinism \
		or large_clouds and not float32-100 or steep_windows and 17)"

# The CUDA kernels on the CPU, threads one after the other, for want of a GPU: see csrc/emulation. They run the tests
# of the ops, those of CUDA with tensors of the CPU. pyproject.toml says what the markers leave out.
emulate: $(INSTALLED)
	$(call stage,PAPER_LAYERS_EMULATE_CUDA)
	cd build/$@/stage && OMP_NUM_THREADS=1 MALLOC_PERTURB_=1 PAPER_LAYERS_CPU_CAPABILITY=default PAPER_LAYERS_EXAMPLES=20 \
		PAPER_LAYERS_TEST_DEVICE=cpu $(CURDIR)/$(BIN)/python -m pytest -n 2 -p no:cacheprovider tests/ops \
		-m "not (needs_gpu or slow_emulated or cpu_only or tracing)"

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

# What is pinned for development stays as it is.
$(HOSTS): requirements-hosts.txt $(INSTALLED)
	$(BIN)/pip install --quiet --constraint requirements-dev.txt --requirement requirements-hosts.txt
	touch $@

clean:
	rm -rf .venv build dist out paper_layers/*.so
