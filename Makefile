# In a fresh clone, run `make demo` or `make test` (needs Python 3.11+, g++ and cmake). Both create
# .venv, install the versions of constraints.txt and build the native module; both are idempotent.
# Settings: PYTHON (interpreter that creates the environment), VENV (its folder), ARGS (arguments
# that are passed to the command of the target).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Package groups that `make test` installs. Tests that need a missing package are skipped.
TEST_GROUPS ?= test
BIN := $(abspath $(VENV))/bin

export VENV
export OMP_WAIT_POLICY ?= passive

BOOTSTRAP := $(PYTHON) tools/bootstrap.py
# Without this, the tests would pass on the fallback if the native build fails.
STRICT := TOKFUSE_STRICT_BUILD=1
PYTEST := $(BIN)/pytest
# Distribute the test files over two processes, because the Python code around the kernels is serial.
WORKERS ?= 2
# Files in their order: xdist would begin with those of many tests, and end on one worker with the few that take minutes.
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Triton's interpreter and its compiler cannot run in the same process. The interpreter uses one
# thread, because each of its tensor operations is a small numpy call.
INTERPRETER := TRITON_INTERPRET=1 OMP_NUM_THREADS=1

# The folders with tests of kernels; collecting the others takes half of the time. tests/conftest.py has the same list.
# Files in ARGS replace them.
KERNEL_TESTS = $(if $(filter tests/%,$(ARGS)),,$(addprefix tests/,algorithms backends distributed ops))

# Run the CUDA kernels on the CPU. tests/support/cuda_module.py first builds the module with $(CXX) and
# prints its path.
CUDA_HOST := module="$$($(BIN)/python tests/support/cuda_module.py)" && \
	export OMP_NUM_THREADS=1 TOKFUSE_CUDA_HOST="$$module" &&

.PHONY: help demo test test-cpus test-slow test-triton test-cuda test-gpu bench-gpu first-gpu-run test-packaging \
	test-sanitize test-verl test-versions lint format docs wheel bench bench-release peers doctor clean

help:
	@echo "make demo            train a small model with a fused policy loss (installs the packages it needs)"
	@echo "make test            lint, then the tests"
	@echo "make test-cpus       the tests that have numeric bounds, restricted to older CPU instruction sets"
	@echo "make test-slow       long studies"
	@echo "make test-triton     the Triton kernels, interpreted and cross-compiled (make test includes this)"
	@echo "make test-cuda       the CUDA kernels on the CPU, and the resources of the compiled kernels"
	@echo "make test-gpu        the tests that need an NVIDIA GPU (OFFLINE=1: install nothing)"
	@echo "make bench-gpu       the benchmarks on a GPU, once per backend (OFFLINE=1: install nothing)"
	@echo "make first-gpu-run   build, test and benchmark on a GPU in 8 minutes, without network"
	@echo "make test-packaging  every way to install, in clean environments"
	@echo "make test-versions   the tests with the oldest and the newest packages (VERSIONS=oldest: only these)"
	@echo "make test-verl       compare the verl plug-in with verl's losses, in .venv-verl"
	@echo "make test-sanitize   the native module with AddressSanitizer and UBSan"
	@echo "make lint            check with ruff, clang-format and mypy"
	@echo "make format          fix the formatting"
	@echo "make wheel           sdist and manylinux wheel in dist/ (PYTHON and VENV select the Python version)"
	@echo "make docs            build the documentation into build/site; a warning is an error"
	@echo "make bench           the benchmark suite"
	@echo "make bench-release   measure bench/results again and rewrite the numbers of the documentation"
	@echo "make peers           compare with other libraries (PEERS=verl: those that need verl's packages)"
	@echo "make doctor          print what is built and usable on this machine"
	@echo "make clean           remove build results (keeps $(VENV))"

demo:
	@$(BOOTSTRAP) demo
	@$(BIN)/python examples/train_grpo.py $(ARGS)

test: lint
	@$(STRICT) $(BOOTSTRAP) $(TEST_GROUPS)
	@$(PYTEST) $(SPREAD) -m "not slow and not gpu and not interpreter and not cuda_host" $(ARGS)
	@$(INTERPRETER) $(PYTEST) $(SPREAD) -m "interpreter and not slow" $(KERNEL_TESTS) $(ARGS)
	@$(CUDA_HOST) $(PYTEST) $(SPREAD) -m "cuda_host and not slow" $(KERNEL_TESTS) $(ARGS)

test-cpus:
	@$(STRICT) $(BOOTSTRAP) $(TEST_GROUPS)
	@$(BIN)/python tools/older_cpus.py $(SPREAD) $(ARGS)

test-slow:
	@$(STRICT) $(BOOTSTRAP) test demo hosts
	@$(PYTEST) -m "slow" $(ARGS)

test-triton:
	@$(BOOTSTRAP) test
	@$(INTERPRETER) $(PYTEST) $(SPREAD) -m "interpreter" $(KERNEL_TESTS) $(ARGS)
	@$(PYTEST) -m "compiler" $(ARGS)
	@$(BIN)/python -m tokfuse kernels --check

test-cuda:
	@$(BOOTSTRAP) test
	@$(PYTEST) $(SPREAD) tests/backends/test_cuda_*.py $(ARGS)
	@$(CUDA_HOST) $(PYTEST) $(SPREAD) -m "cuda_host" $(KERNEL_TESTS) $(ARGS)

# Needs a GPU. Tests every CUDA and Triton kernel. Then runs the CUDA kernels under compute-sanitizer if
# it is installed (SANITIZER= skips this). OFFLINE=1 installs nothing: it builds with $(PYTHON) and runs
# steps of tools/first_gpu_run.sh, with a limit of 20 minutes.
SANITIZER ?= $(shell command -v compute-sanitizer)
OFFLINE ?=
FIRST_GPU_RUN := PYTHON=$(PYTHON) tools/first_gpu_run.sh
first-gpu-run:
	@$(FIRST_GPU_RUN) $(ARGS)

ifneq ($(OFFLINE),)
test-gpu:
	@$(FIRST_GPU_RUN) --only build,smoke,tests,memcheck,racecheck,synccheck,graph --minutes 20 $(ARGS)

bench-gpu:
	@$(FIRST_GPU_RUN) --only build,bench --minutes 20 $(ARGS)
else
test-gpu:
	@TOKFUSE_CUDA=ON $(STRICT) $(BOOTSTRAP) test gpu
	@$(PYTEST) -m "gpu" $(ARGS)
	@$(foreach backend,cuda triton,$(BIN)/python tests/support/smoke.py --backend $(backend) --options &&) true
	@$(foreach tool,$(if $(SANITIZER),memcheck racecheck synccheck),PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		$(SANITIZER) --tool $(tool) --error-exitcode 1 $(BIN)/python tests/support/smoke.py --backend cuda \
		--options &&) true

bench-gpu:
	@TOKFUSE_CUDA=ON $(STRICT) $(BOOTSTRAP) test bench gpu
	@$(foreach backend,cuda triton,TOKFUSE_BACKEND=$(backend) $(BIN)/python -m tokfuse bench \
		--device cuda $(or $(ARGS),all) &&) true
endif

test-packaging:
	@$(STRICT) $(BOOTSTRAP) test
	@$(PYTEST) -m "packaging" $(ARGS)

# Build the module a second time, with sanitizers, into a tree of links to the sources. PYTHONPATH puts
# this tree first, so child processes of the tests load it too. To stay within three minutes, this
# builds one instruction-set level and runs only the tests that pass all kinds of sizes to kernels and
# bindings. Leak detection is off, because Python does not free everything at exit. Reports go to
# files, because pytest captures the error stream.
SANITIZERS := address,undefined
SANITIZE_DIR := $(abspath build/sanitize)
SANITIZE_TESTS ?= $(addprefix tests/backends/test_,sanitizers.py native_binding.py native_fuzz.py eager.py) \
	$(addprefix tests/ops/test_,token_stats.py policy_step.py policy_step_hidden.py kept_token_stats.py \
	paired_divergence.py segment_moments.py gae.py offpolicy_weights.py)
test-sanitize:
	@$(STRICT) $(BOOTSTRAP) test
	@rm -f $(SANITIZE_DIR)/report*
	@$(BIN)/python tools/typing_tree.py $(SANITIZE_DIR)/tree
	@cmake -S . -B $(SANITIZE_DIR) -DCMAKE_BUILD_TYPE=Release -DTOKFUSE_SANITIZE=$(SANITIZERS) \
		-DTOKFUSE_CUDA=OFF -DTOKFUSE_OUTPUT_DIR=$(SANITIZE_DIR)/tree/tokfuse -DPython_EXECUTABLE=$(BIN)/python \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >/dev/null
	@cmake --build $(SANITIZE_DIR) -j $${MAX_JOBS:-2}
	@export PYTHONPATH=$(SANITIZE_DIR)/tree CI=true \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$(SANITIZE_DIR)/report \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=$(SANITIZE_DIR)/report; \
		$(BIN)/python -c 'import sys; from tokfuse.runtime.core import native; \
			sys.exit(native.module().sanitizers != "$(SANITIZERS)")' \
		&& $(PYTEST) -q $(SPREAD) -m "not slow and not gpu and not packaging and not interpreter" \
			$(SANITIZE_TESTS) $(ARGS) || { cat $(SANITIZE_DIR)/report* 2>/dev/null; exit 1; }

lint:
	@$(BOOTSTRAP) --no-native lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@find csrc tests/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | sort \
		| xargs --no-run-if-empty $(BIN)/clang-format --dry-run -Werror
	@$(BIN)/python tools/typing_tree.py
	@$(BIN)/mypy

format:
	@$(BOOTSTRAP) --no-native lint
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@find csrc tests/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
		| xargs --no-run-if-empty $(BIN)/clang-format -i

# A broken link, reference or docstring section is an error. mkdocs reads the sources through the
# links that tools/typing_tree.py creates.
docs:
	@$(BOOTSTRAP) --no-native docs
	@$(BIN)/python tools/typing_tree.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

bench:
	@$(BOOTSTRAP) test bench
	@$(BIN)/python -m tokfuse bench $(ARGS)

# Measure the rows of bench/results and rewrite the tables and pictures of the documentation. Run it on an idle
# machine. ARGS="--quick --out build/trial" only tries the commands; with ARGS the documentation is not changed.
bench-release:
	@$(BOOTSTRAP) test bench
	@$(MAKE) --no-print-directory peers ARGS=--list >/dev/null
	@$(MAKE) --no-print-directory peers PEERS=verl ARGS=--list >/dev/null
	@$(BIN)/python tools/bench_release.py $(ARGS)
	@$(if $(ARGS),,$(BIN)/python -m tokfuse bench numbers bench/results/*.jsonl --write README.md \
		--write docs/performance.md --pictures docs/pictures)
	@$(if $(ARGS),,$(BIN)/python -m tokfuse bench numbers bench/results/distillation/*.jsonl --write docs/distillation.md)
	@$(if $(ARGS),,$(BIN)/python -m tokfuse report bench/results/*.jsonl -o build/report.html)

# Build the source distribution, and a wheel from it in an isolated environment. The wheel runs on systems that have
# at least the glibc of this one. It does not contain libgomp: torch's wheels bundle libgomp.so.1, and a second copy
# would be a second thread pool in the process. TOKFUSE_CUDA=ON adds the CUDA kernels.
wheel: export TOKFUSE_CUDA ?= OFF
wheel:
	@$(BOOTSTRAP) --only release
	@rm -rf build/wheel
	@$(STRICT) $(BIN)/python -m build --outdir build/wheel .
	@PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	@cp build/wheel/*.tar.gz dist
	@ls -l dist

# Run the tests with versions other than those of constraints.txt: the lower bounds of pyproject.toml,
# and the newest versions of the package index. Each set has a separate environment.
VERSIONS ?= oldest newest
VERSION_TESTS ?= tests/ops tests/backends tests/algorithms tests/integrations
VERSION_TESTS_INTERPRETED ?= $(VERSION_TESTS)
# The first of these interpreters that starts. If none starts, $(PYTHON).
first_python = $(or $(firstword $(foreach p,$(1),$(shell $(p) -c 'print("$(p)")' 2>/dev/null))),$(PYTHON))
PYTHON_oldest ?= $(call first_python,python3.11)
PYTHON_newest ?= $(call first_python,python3.13 python3.12)
test-versions: $(addprefix test-versions-,$(VERSIONS))

test-versions-%:
	@VENV=.venv-$* $(STRICT) $(PYTHON_$*) tools/bootstrap.py --versions $* test
	@.venv-$*/bin/pytest -p no:cacheprovider $(SPREAD) \
		-m "not slow and not gpu and not interpreter and not cuda_host and not packaging" $(VERSION_TESTS) $(ARGS)
	@$(INTERPRETER) .venv-$*/bin/pytest -p no:cacheprovider $(SPREAD) -m "interpreter and not slow" \
		$(VERSION_TESTS_INTERPRETED) $(ARGS)

# Other libraries need their own package versions, so each list has a separate environment.
PEERS ?= peers
PEERS_PYTHON = $(abspath .venv-$(PEERS))/bin/python
PEERS_LIST = bench/peers$(if $(filter verl,$(PEERS)),-verl).txt
define PEERS_SETUP
$(if $(filter peers verl,$(PEERS)),,$(error PEERS must be peers or verl; got $(PEERS)))true
	@test -x $(PEERS_PYTHON) || $(PYTHON) -m venv .venv-$(PEERS)
	@$(PYTHON) tools/torch_build.py $(PEERS_PYTHON) -r $(PEERS_LIST)
	@$(PEERS_PYTHON) -m pip install --quiet -r $(PEERS_LIST)
	@$(STRICT) $(PEERS_PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
endef
test-verl: PEERS := verl
test-verl:
	@$(PEERS_SETUP)
	@$(abspath .venv-verl)/bin/pytest -p no:cacheprovider tests/integrations/verl $(ARGS)

peers:
	@$(PEERS_SETUP)
	@$(PEERS_PYTHON) -m tokfuse bench $(or $(ARGS),policy_step_hidden --peers all)

doctor:
	@$(BOOTSTRAP)
	@$(BIN)/python -m tokfuse doctor $(ARGS)

clean:
	rm -rf build dist .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks *.egg-info
	rm -f api/_native*.so
