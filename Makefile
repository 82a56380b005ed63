# `make help` lists the targets.  Every target that needs the environment makes or completes it.

PYTHON ?= python3
VENV ?= .venv
# A requirement for pip, such as torch==2.14.1.  Empty: keep the torch that is there, or install
# the CPU build that scripts/environment.py names.
TORCH ?=
# 1: build the CUDA kernels too, for the GPUs in JACOBIAN_OPS_CUDA_ARCHS.
CUDA ?= 0
export JACOBIAN_OPS_CUDA = $(CUDA)
# Worker processes of pytest, and options for it (-k softmax, -x).
WORKERS ?= 2
PYTEST_FLAGS ?=
# Threads of a worker that wait must not keep those of the other one from running.
PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) $(PYTEST_FLAGS)
# Options of the bench, and of its limits.
BENCH_FLAGS ?= $(if $(filter 1,$(CUDA)),--device cuda) \
  --json results/bench.json --csv results/bench.csv --plot results/bench.png
LIMITS_FLAGS ?= --sweep --json results/limits.json --markdown results/limits.md --plots results

PY := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.environment
BUILT := $(VENV)/.built
NATIVE := CMakeLists.txt setup.py $(shell find csrc cmake -type f 2>/dev/null)
CXX_SOURCES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu*' 'examples/*.cpp' \
  'tests/cuda_on_host/*.h' 'tests/cuda_on_host/*.cpp' 'tests/cuda_on_host/*.cu')

.DEFAULT_GOAL := help
.PHONY: help build demo examples test test-models test-cuda-on-host sanitize-cuda-on-host sanitize cuda-gate bench limits lint format wheel check-wheel cpp check-aarch64 clean FORCE

help:  ## list the targets
	@echo "make TARGET [PYTHON=python3.12] [TORCH=torch==2.14.1] [VENV=.venv] [CUDA=1]"
	@grep -hE '^[a-z0-9-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(ENVIRONMENT): pyproject.toml scripts/environment.py $(if $(TORCH),FORCE)
	$(PYTHON) scripts/environment.py $(VENV) --torch '$(TORCH)'
	@touch $@

# An editable install: Python sources are used in place, the native module is rebuilt in build/, for
# the instruction sets that this machine runs (a wheel has all of them).
$(BUILT): $(ENVIRONMENT) $(NATIVE) $(if $(filter 1,$(CUDA)),FORCE)
	@echo "Building: the kernels are compiled once for each instruction set (a minute or two)."
	@$(if $(filter 1,$(CUDA)),eval "$$($(PY) scripts/cuda_toolkit.py)" &&) \
	PATH="$(abspath $(VENV))/bin:$$PATH" PYTHONWARNINGS=ignore \
	JACOBIAN_OPS_ISAS="$${JACOBIAN_OPS_ISAS:-native}" \
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

build: $(BUILT)  ## make the environment and build the package in place
	@$(PY) -m jacobian_ops.info

demo: $(BUILT)  ## train a small transformer on real digits, native and ours, and compare
	$(PY) -m examples.digits

EXAMPLES = gradient_flow backprop newton_krylov flow hvp meanflow
examples: $(BUILT)  ## what Jacobian products are for: MeanFlow, Hessians, flows, solvers
	@set -e; for example in $(EXAMPLES); do \
	  echo "== python -m examples.$$example"; $(PY) -m examples.$$example; \
	done

# Twice: with every call going to our own kernels, then as users run it, where tiny calls and some
# matrix products go to torch.  Both passes run, even when the first fails; the second one leaves out
# ops and tests in which nothing can go to torch, and those of compiled graphs and of single
# dispatcher ops, which are ours however small they are.
WITHOUT_TORCH = --routed $(patsubst %,--ignore=tests/test_%.py, \
  attention bench compile cross_entropy cuda_gate dispatcher distributed dropout ecosystem gated \
  group_norm host_memory info limits norm packaging products rotary runtime) --ignore-glob='tests/test_jacobian_*.py' \
  $(patsubst %,--ignore=tests/test_%.py,checkpointing examples_jacobian geometry hutchinson implicit \
  newton_krylov report)
test: $(BUILT)  ## run the tests, with and without what is left to torch
	@status=0; \
	echo "== every call through our own kernels"; \
	JACOBIAN_OPS_NATIVE_BELOW=0 JACOBIAN_OPS_GEMM=own \
	$(PYTEST) || status=1; \
	echo "== as installed"; \
	JACOBIAN_OPS_NATIVE_BELOW=32768 JACOBIAN_OPS_GEMM=auto \
	$(PYTEST) $(WITHOUT_TORCH) || status=1; \
	exit $$status

# On models of transformers, timm and torchvision, which the other tests do not need.
$(VENV)/.models: $(BUILT) pyproject.toml
	$(PY) scripts/environment.py $(VENV) --extra models
	@touch $@

test-models: $(VENV)/.models  ## run the tests of whole models, and of docs/use_with.md
	OMP_NUM_THREADS=1 $(PYTEST) tests/test_models.py tests/test_use_with.py

# The CUDA kernels without a GPU: compiled for the host, a fiber for every thread
# (tests/cuda_on_host/README.md), and sent every CPU tensor of the suite.
build/cuda_on_host-%: $(BUILT) FORCE
	PATH="$(abspath $(VENV))/bin:$$PATH" && \
	cmake -S . -B $@ -G Ninja -DCMAKE_BUILD_TYPE=None -DJACOBIAN_OPS_PYTHON=ON \
	  -DJACOBIAN_OPS_TOOLS=OFF -DJACOBIAN_OPS_CUDA=OFF -DJACOBIAN_OPS_CUDA_ON_HOST=$* \
	  -DPython_EXECUTABLE="$(abspath $(PY))" -Dpybind11_DIR="$$(pybind11-config --cmakedir)" && \
	cmake --build $@ --target _cuda_on_host _broken _words

test-cuda-on-host: build/cuda_on_host-checked  ## run the tests on the CUDA kernels, without a GPU
	JACOBIAN_OPS_TEST_BACKEND="$$(echo $(abspath $<)/_cuda_on_host*.so)" $(PYTEST)

# With the address and undefined-behaviour sanitizers, which must be loaded first.
SANITIZERS = $(foreach lib,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(lib).so))
sanitize-cuda-on-host: build/cuda_on_host-sanitize  ## the same with sanitizers, small sizes
	JACOBIAN_OPS_TEST_BACKEND="$$(echo $(abspath $<)/_cuda_on_host*.so)" \
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
	$(PYTEST) tests/test_kernels.py \
	  tests/test_accuracy.py tests/test_layouts.py tests/test_dropout.py \
	  tests/cuda_on_host

# For these GPUs, or ARCHS=all.
ARCHS ?= 80 90 120
empty :=
space := $(empty) $(empty)
cuda-gate: build/cuda_on_host-checked  ## compile the CUDA kernels and check what nvcc made of them
	PATH="$(abspath $(VENV))/bin:$$PATH" && \
	eval "$$($(PY) scripts/cuda_toolkit.py)" && \
	cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DJACOBIAN_OPS_PYTHON=ON \
	  -DJACOBIAN_OPS_TOOLS=OFF -DJACOBIAN_OPS_CUDA=ON \
	  $(if $(filter all,$(ARCHS)),-UJACOBIAN_OPS_CUDA_ARCHS, \
	    -DJACOBIAN_OPS_CUDA_ARCHS="$(subst $(space),;,$(strip $(ARCHS)))") \
	  -DPython_EXECUTABLE="$(abspath $(PY))" -Dpybind11_DIR="$$(pybind11-config --cmakedir)" && \
	cmake --build build/cuda --target _cuda && \
	$(PY) scripts/cuda_gate.py build/cuda/_cuda*.so --host $</_cuda_on_host*.so $(GATE_FLAGS)

# The CPU's kernels for one instruction set, in a module of their own beside the ordinary one.  Left
# out is what runs the ordinary one (programs of its own, compiled graphs), what measures, and what
# limits memory or asks for too much of it: the sanitizers reserve more, and end the process.
SANITIZED_ISA ?= avx2
build/sanitize: $(BUILT) FORCE
	PATH="$(abspath $(VENV))/bin:$$PATH" && \
	cmake -S . -B $@ -G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 \
	  -DJACOBIAN_OPS_PYTHON=ON -DJACOBIAN_OPS_TOOLS=OFF -DJACOBIAN_OPS_CUDA=OFF \
	  -DJACOBIAN_OPS_SANITIZE=ON \
	  -DJACOBIAN_OPS_ISAS="$(SANITIZED_ISA)" \
	  -DPython_EXECUTABLE="$(abspath $(PY))" -Dpybind11_DIR="$$(pybind11-config --cmakedir)" && \
	cmake --build $@ --target _cpu

sanitize: build/sanitize  ## run the tests on the CPU's kernels with sanitizers
	JACOBIAN_OPS_TEST_BACKEND="$$(echo $(abspath $<)/_cpu*.so)" \
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
	$(PYTEST) -k "not test_memory_is_linear and not test_more_elements_than_memory_has" \
	  $(patsubst %,--ignore=tests/test_%.py, bench compile cuda_gate distributed ecosystem \
	  examples examples_jacobian host_memory limits packaging runtime)

bench: $(BUILT)  ## measure against native autograd (python -m bench has the options)
	$(PY) -m bench $(BENCH_FLAGS)

limits: $(BUILT)  ## measure every op against its target and the machine's limit
	$(PY) -m bench limits $(LIMITS_FLAGS)

lint: $(ENVIRONMENT)  ## check the style of Python and C++
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(ENVIRONMENT)  ## rewrite Python and C++ in that style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

wheel: $(ENVIRONMENT)  ## build a wheel into dist/
	$(PY) scripts/check_wheel.py --build-only dist

check-wheel: $(ENVIRONMENT)  ## install one wheel beside two torch versions (TORCHES=) and test it
	$(PY) scripts/check_wheel.py $(TORCHES)

# In the folder of the Python module, whose library is compiled already; without Python the build is
# only configured.
cpp: $(BUILT)  ## build the example in C++ and the library's self-check, and run them
	PATH="$(abspath $(VENV))/bin:$$PATH" && \
	tree=build/python-$$($(PY) -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))') && \
	cmake -S . -B build/cpp -G Ninja && \
	cmake -S . -B $$tree -DJACOBIAN_OPS_TOOLS=ON -DPython_EXECUTABLE="$(abspath $(PY))" \
	  -Dpybind11_DIR="$$(pybind11-config --cmakedir)" && cmake --build $$tree && \
	ctest --test-dir $$tree --output-on-failure

check-aarch64: $(ENVIRONMENT)  ## cross-compile for aarch64 and run the C++ self-check under qemu
	PATH="$(abspath $(VENV))/bin:$$PATH" scripts/check_aarch64.sh

clean:  ## remove what was built; the environment stays
	rm -rf build dist *.egg-info jacobian_ops/*.so $(BUILT)
