# Everything below happens in the checkout's own virtual environment; nothing outside is touched.
#   make PYTHON=python3.12 demo      with another Python (3.11 or newer; after `make clean`)
#   make VENV=/scratch/me/venv test  with the environment elsewhere
#   make test PYTEST_ARGS="-x -k adam"
#   make sif BASE=tree OUT=/scratch/me/nanogpt.sif    see docs/container.md

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
.DEFAULT_GOAL := help

# The image. FLAVOUR: cuda or cpu; BASE: tree, a directory, an image or a name in a registry (default: Debian from a registry).
FLAVOUR ?= cuda
BASE ?=
WHEELS ?=
CACHE ?=
KERNELS ?= all
COMPRESSION ?=
# If the site has a file (see slurm/sites/example.sh), recipes run in a shell that sources it.
ifneq ($(NANOGPT_SITE)$(wildcard slurm/site.sh),)
SHELL := slurm/use_site.sh
SITE_SIF := $(shell printf %s "$$NANOGPT_SIF")
endif
OUT ?= $(if $(filter cuda,$(FLAVOUR)),$(or $(SITE_SIF),nanogpt.sif),nanogpt-$(FLAVOUR).sif)
SIF ?= $(OUT)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
# Stamps, newer than pyproject.toml once its packages are installed.
DEMO_READY := $(READY)/demo
TEST_READY := $(READY)/test
TRITON := $(READY)/triton
TRANSFORMERS := $(READY)/transformers

.PHONY: help demo test test-export lint mutations bench-cli format schema clean sif sif-diff lock sign verify push pull shell test-cluster need-python

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO_READY) ## Train a small model on the embedded prose, in minutes, without a GPU
	@$(BIN)/nanogpt demo

# One process more than cores, since some tests wait for their own processes. PYTEST_ARGS="-n 0": in this one.
test: $(TEST_READY) $(TRITON)/.ready ## Run the tests (PYTEST_ARGS="-k adam" passes arguments on)
	@$(BIN)/python -m pytest -n "$$($(BIN)/python -c 'import os; print(len(os.sched_getaffinity(0)) + 1)')" $(PYTEST_ARGS)

lint: $(TEST_READY) ## Check style, types, shell scripts, workflows and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	@scripts=$$(git -c safe.directory='*' ls-files '*.sh' .ci/run) && set -x && $(BIN)/shellcheck $$scripts
	@files=$$(git -c safe.directory='*' ls-files) && echo "$(BIN)/codespell, on all tracked files" && $(BIN)/codespell $$files
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

mutations: $(TEST_READY) ## Break each mechanism on purpose and check that a test notices; some 10 CPU minutes
	$(BIN)/python tests/mutations/run.py

bench-cli: $(TEST_READY) ## Time the start of everyday commands, relative to Python's
	@$(BIN)/python tests/cli/bench_cli.py

format: $(TEST_READY) ## Format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: $(DEMO_READY) ## Regenerate recipes/schema.json after a change of nanogpt/spec.py
	$(BIN)/nanogpt schema > recipes/schema.json.new && mv recipes/schema.json.new recipes/schema.json

# Needs only Python and Apptainer, no virtual environment: it runs on login nodes.
sif: need-python ## Build the image, nanogpt.sif (FLAVOUR=cpu, BASE=tree, OUT=FILE, WHEELS=DIR, COMPRESSION=gzip, CACHE=FILE)
	@$(PYTHON) -m nanogpt.image.build --flavour '$(FLAVOUR)' --base '$(BASE)' --wheels '$(WHEELS)' \
	  --kernels '$(KERNELS)' --compression='$(COMPRESSION)' --cache '$(CACHE)' --out '$(OUT)'

sif-diff: need-python ## Compare two images or directories: make sif-diff A=old.sif B=new.sif
	@$(PYTHON) -m nanogpt.image.tree '$(A)' '$(B)'

lock: $(DEMO_READY) ## Regenerate containers/*.lock after a change of pyproject.toml or containers/*.in
	@$(PIP) install --quiet uv
	@$(BIN)/python containers/lock.py --uv $(BIN)/uv

sign: ## Sign the image with your key (apptainer key newpair makes one), or with KEY=PRIVATE.pem
	apptainer sign $(if $(KEY),--key '$(KEY)') '$(SIF)'

verify: ## Check the image's signature with your keyring or KEY=PUBLIC.pem
	apptainer verify $(if $(KEY),--key '$(KEY)') '$(SIF)'

push: ## Upload the image to a registry: TO=oras://REGISTRY/NAME:TAG
	@$(if $(KEY),NANOGPT_SIF_KEY='$(KEY)') containers/push.sh '$(SIF)' '$(TO)'

pull: ## Download an image: FROM=oras://REGISTRY/NAME:TAG, KEY=PUBLIC.pem, SHA256=HEX
	@$(if $(KEY),NANOGPT_SIF_KEY='$(KEY)') $(if $(SHA256),NANOGPT_SIF_SHA256='$(SHA256)') \
	  containers/pull.sh '$(FROM)' '$(OUT)'

shell: ## Open a shell in the image that runs this checkout's code
	@test -e '$(SIF)' || { echo "make: there is no $(SIF); make sif builds it, make pull fetches one, SIF=FILE names another" >&2; exit 2; }
	@echo "In the image, running the code of $(CURDIR); leave with exit" >&2
	@NANOGPT_SRC='$(CURDIR)' apptainer shell $$(test -e /dev/nvidiactl && echo --nv) --bind '$(CURDIR)' '$(SIF)'

# Three at a time, even on two cores: much of it is waiting. The tests of a file stay in order, and so do files: one of
# few tests takes minutes, and would come last if they were sorted by their number.
test-cluster: $(TEST_READY) ## Run the tests with real Apptainer and Slurm (tests/cluster/setup-*.sh install them)
	@$(BIN)/python -m pytest tests/cluster -n 3 --dist loadfile --no-loadscope-reorder --durations=12 $(PYTEST_ARGS)

test-export: $(TRANSFORMERS)/.ready ## Load exports with Hugging Face transformers, and measure them with lm-eval
	@NANOGPT_TEST_TRANSFORMERS='$(abspath $(TRANSFORMERS)/bin/python)' \
	  $(BIN)/python -m pytest tests/transformers $(PYTEST_ARGS)

clean: ## Remove the virtual environment and the tools' caches
	@test ! -e $(VENV) -o -e $(VENV)/pyvenv.cfg || { echo "make: $(VENV) is not a virtual environment, not removed" >&2; exit 1; }
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

need-python:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "make: there is no $(PYTHON). On Debian or Ubuntu: apt install python3 python3-venv." \
	    "On a cluster: module load miniforge. Or name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.11 or newer is needed." \
	    "Try module load miniforge, or another module that brings one; or name it: make PYTHON=python3.12." \
	    "An image that is built elsewhere needs none: make pull FROM=oras://..." >&2; exit 1; }

$(READY)/venv: | need-python
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(READY) && touch $@

$(DEMO_READY): pyproject.toml $(READY)/venv
	@echo "Installing into $(VENV), about a minute"
	@$(PIP) install --quiet --editable '.[cpu]'
	@touch $@

# After the demo's, so that `make -j demo test` never runs two pips in one environment.
$(TEST_READY): pyproject.toml $(DEMO_READY)
	@echo "Installing the tools for tests into $(VENV)"
	@$(PIP) install --quiet --editable '.[cpu,text,dev,trackers]'
	@touch $@

# The image's Triton, which the test that compiles the kernels puts before whatever Triton the environment's torch brings.
$(TRITON)/.ready: containers/cuda.lock $(READY)/venv | $(TEST_READY)
	@rm -rf $(TRITON) && mkdir -p $(TRITON)
	@test $$(uname) != Linux || \
	  $(PIP) install --quiet --no-deps --target $(TRITON) $$(sed -n 's/^\(triton==[^ ]*\).*/\1/p' containers/cuda.lock)
	@touch $@

# An environment of its own, without nanogpt: a .pth file lends it the packages of the tests' (torch among them).
$(TRANSFORMERS)/.ready: tests/transformers/requirements.txt | $(TEST_READY)
	@rm -rf $(TRANSFORMERS) && $(BIN)/python -m venv --without-pip $(TRANSFORMERS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(TRANSFORMERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	@echo "Installing transformers and lm-eval into $(TRANSFORMERS)"
	@$(PIP) --python $(TRANSFORMERS)/bin/python install --quiet --requirement $<
	@touch $@
