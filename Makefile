# The whole of set-up: `make run`, `make test` and `make lab` bring it about by themselves.
# Another Python: make PYTHON=python3.12 run

PYTHON ?= python3
VENV   := .venv
OLDEST := .venv-oldest
TOOLS  := .venv-tools
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.set-up
# pip's progress is for a terminal, not for a log
QUIET  := $(shell test -t 2 || echo --quiet)

# OFFLINE=FOLDER: packages, engines and the model come from what `helpers course prepare FOLDER` left there.
# The shell finds it: make's own functions cut a name at its spaces (a stick is often mounted as "/media/ann/USB STICK"),
# and not every shell replaces the ~ of OFFLINE=~/folder.
ifdef OFFLINE
quoted = '$(subst ','\'',$(1))'
ROOM := $(shell cd $(call quoted,$(patsubst ~/%,$(HOME)/%,$(OFFLINE))) 2>/dev/null && test -d wheels && pwd)
ifeq ($(ROOM),)
$(error $(OFFLINE) has no wheels/. Fix, on a machine with a network: .venv/bin/helpers course prepare "$(OFFLINE)")
endif
NOTHING :=
export PIP_NO_INDEX := 1
export PIP_FIND_LINKS := file://$(subst $(NOTHING) ,%20,$(subst %,%25,$(ROOM)))/wheels
export HF_HUB_OFFLINE := 1
export COURSE_MODELS := $(or $(COURSE_MODELS),$(ROOM)/models)
export COURSE_ENGINES := $(or $(COURSE_ENGINES),$(CURDIR)/engines)$(shell cd $(call quoted,$(ROOM))/engines 2>/dev/null && echo ":$$PWD")
endif

.DEFAULT_GOAL := help
.PHONY: help kept setup run test chromium test-quick nightly test-gpu test-oldest gpu-check doctor lab lint format constraints clean check

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

setup: $(STAMP) ## install the course into .venv (the targets below do it when needed)

run: $(STAMP) ## run every notebook (or ONLY='00 03') from top to bottom; a web site in build/site
	$(PY) -m helpers run $(ONLY)

# Tests run side by side, at most four at a time: each process may hold an engine and a compiler.
PYTEST := $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

# For the tests in a browser: Debian's chromium, where it may be installed. Elsewhere they are skipped, with the reason.
chromium:
	@for browser in chromium google-chrome; do command -v $$browser >/dev/null && exit 0; done; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    timeout 240 sh -c "apt-get update && apt-get install -y --no-install-recommends chromium" >/dev/null 2>&1 && exit 0; fi; \
	  echo 'Going on without chromium. What needs it is skipped, and listed.'

test: $(STAMP) chromium ## all tests: style, types, helpers, notebooks; brings the model smollm2 (93 to 270 MB) first, once
	@$(PY) -m helpers model get smollm2 || echo 'Going on without smollm2. What needs it is skipped, and listed.'
	$(PYTEST) --nbmake --nbmake-timeout=1200 notebooks tests

test-quick: $(STAMP) ## the tests that take seconds: nothing is compiled, no notebook runs
	$(PYTEST) tests/unit

nightly: $(STAMP) ## what the course promises, each tried many times; one table at the end; two hours at most
	COURSE_NIGHTLY=1 $(PY) -m pytest -m promise --timeout=2400 --session-timeout=7200 tests

test-gpu: $(STAMP) ## only the tests that need an NVIDIA GPU
	$(PY) -m pytest -m gpu tests

test-oldest: $(OLDEST)/.set-up ## the helpers' tests with the oldest supported versions (Python 3.10 to 3.12)
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal tests

gpu-check: $(STAMP) ## on a machine with an NVIDIA GPU: run all of the course there; report in build/gpu-check/
	$(PY) -m helpers gpu-check $(if $(ONLY),--only '$(ONLY)') $(if $(JOBS),--jobs '$(JOBS)')

doctor: $(STAMP) ## is this machine ready? each check with the step that mends it
	$(PY) -m helpers doctor

lab: $(STAMP) ## open the course in JupyterLab: your own copies of the notebooks, in work/
	@$(PY) -m helpers course copy
	PATH="$$(cd "$(VENV)/bin" && pwd):$$PATH" $(PY) -m jupyterlab \
	  "$$($(PY) -c 'from helpers.course import learner; print(learner.work_folder())')/00_start_here.ipynb"

lint: $(STAMP) ## style, types, and the architecture: ruff, mypy, import-linter
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(STAMP) ## let ruff mend what it can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean: ## remove what make made; engines/ is kept (helpers remove deletes engines)
	rm -rf $(VENV) $(OLDEST) $(TOOLS) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# An environment that works is kept, whatever Python made it; only a new or broken one asks for $(PYTHON).
# The stamp comes last, so an interrupted set-up goes on where it stopped.
$(STAMP): pyproject.toml constraints/course.txt | kept
	@$(PY) -c '' 2>/dev/null || $(MAKE) --no-print-directory check PYTHON='$(PYTHON)' VERSIONS='3.10 3.11 3.12 3.13'
	@$(PY) -c 'import pip' 2>/dev/null || $(PY) -m ensurepip >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the course into $(VENV): 2 GB on disk, more with a CUDA build of torch; done once."
	$(PY) -m pip install $(QUIET) -c constraints/course.txt -e '.[test,browser]'
	@touch $@

# Who names a Python gets that one, or is told.
VERSION = 2>/dev/null -c 'import sys; print(*sys.version_info[:2])'
kept:
	@test '$(origin PYTHON)' != 'command line' || ! made=$$($(PY) $(VERSION)) || test "$$made" = "$$($(PYTHON) $(VERSION))" || { \
	  echo "$(VENV) is there, and not of $(PYTHON)."; echo "Fix: make clean, then this again; or leave PYTHON out."; exit 1; }

$(OLDEST)/.set-up: pyproject.toml constraints/oldest.txt
	@$(MAKE) --no-print-directory check PYTHON='$(PYTHON)' VERSIONS='3.10 3.11 3.12'
	@$(OLDEST)/bin/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install $(QUIET) -r constraints/oldest.txt
	$(OLDEST)/bin/python -m pip install $(QUIET) --no-deps -e .
	@touch $@

# What must be there before anything is installed: $(PYTHON) of a version in $(VERSIONS), with venv, and a C++ compiler.
HAVE = $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
check:
	@have=$$($(HAVE)); \
	case " $(VERSIONS) " in *" $${have:-none} "*) ;; *) \
	  echo "$(PYTHON) is Python $${have:-(not found)}; needed is one of: $(VERSIONS)."; \
	  echo "Fix: name one that you have, for example: make PYTHON=python3.12 setup"; exit 1;; esac
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments."; \
	  echo "Fix: install its venv package (Debian and Ubuntu: apt install python$$($(HAVE))-venv)."; exit 1; }
	@for cxx in "$${CXX:-g++}" g++ c++ clang++; do command -v $$cxx >/dev/null && exit 0; done; \
	  echo "No C++ compiler found (looked for g++, c++, clang++). The aot engine is compiled with one."; \
	  echo "Fix: install one (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)."; exit 1

# One file serves Python 3.10 to 3.13: versions that differ carry environment markers (uv's universal resolution).
# NVIDIA's libraries and triton are left out and torch is named without its build: which build of torch is
# taken (CPU or CUDA) is for this environment's pip configuration to say, and each brings its own libraries.
RESOLVE := $(TOOLS)/bin/uv pip compile --quiet --universal --no-header --no-annotate --python-version 3.10 --upgrade
PLAIN   := sed -E -e '/^(nvidia|cuda|triton)(-[a-z0-9-]*)?==/d' -e 's/^(torch==[0-9.]+)\+[a-z0-9.]+/\1/'
# TensorRT-LLM's torch is the build for CUDA 13, which is on PyTorch's own index and pins its own CUDA libraries.
CUDA13  := sed -E '/^(cuda-toolkit|nvidia-(cublas|cuda-[a-z]+|cudnn|cufft|cufile|curand|cusolver|cusparse|cusparselt|nccl|nvjitlink|nvshmem|nvtx)(-cu1[23])?)==/d'

constraints: ## resolve the newest versions anew and write constraints/
	@$(TOOLS)/bin/uv --version >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --clear $(TOOLS) && $(TOOLS)/bin/python -m pip install --quiet uv; }
	$(RESOLVE) pyproject.toml --extra test --extra browser -o $(TOOLS)/course.txt
	$(RESOLVE) constraints/oldest.in -o $(TOOLS)/oldest.txt
	$(RESOLVE) --config-file constraints/nvidia.toml constraints/trtllm.in -o $(TOOLS)/trtllm.txt
	$(RESOLVE) constraints/vllm.in -o $(TOOLS)/vllm.txt
	$(RESOLVE) constraints/edgellm.in -o $(TOOLS)/edgellm.txt
	@{ echo '# Written by `make constraints` from pyproject.toml, for Python 3.10 to 3.13.'; \
	  $(PLAIN) $(TOOLS)/course.txt; } > constraints/course.txt
	@{ echo '# Written by `make constraints` from oldest.in, for Python 3.10 to 3.12.'; \
	  $(PLAIN) $(TOOLS)/oldest.txt; } > constraints/oldest.txt
	@{ echo '# Written by `make constraints` from trtllm.in and nvidia.toml, for Python 3.10 and 3.12 on Linux.'; \
	  $(CUDA13) $(TOOLS)/trtllm.txt; } > constraints/trtllm.txt
	@{ echo '# Written by `make constraints` from vllm.in, for Python 3.10 to 3.13 on Linux.'; \
	  cat $(TOOLS)/vllm.txt; } > constraints/vllm.txt
	@{ echo '# Written by `make constraints` from edgellm.in, for Python 3.10 to 3.12 on Linux.'; \
	  sed -E '/^(nvidia-[a-z0-9-]*|cuda-toolkit|triton)==/d' $(TOOLS)/edgellm.txt; } > constraints/edgellm.txt
