# make demo   the main job without a virtual machine and without root, every packet verified
# make test   all tests; as root it first installs the peers that they drive (QEMU, DPDK, a guest kernel)
# make build  virtual environment, compiled package and what the tests import
# make peers  the peers only
# make lint   ruff, cython-lint, mypy
# make docs   the documentation as HTML in build/docs
# make bench  the benchmarks; keeps each result under .benchmarks/
# make tuning the plots and tables of docs/tuning.md, measured on this machine in less than five minutes
# make clean  removes everything that these made
#
# Arguments for the program and for pytest: make demo DEMO="--size 1518 --duration 3", make test TESTS="tests/vq -k ring"

VENV := .venv
BIN := $(VENV)/bin
DEMO ?=
TESTS ?=
# Guests beside all else, where there are two processors; make test SIDES= has one after the other.
SIDES ?= $(if $(filter 1,$(shell nproc)),,-n 2)

# Compiling starts anew when one of these changes; nothing happens when none did.
SOURCES := $(shell find vq_core -name '*.pyx' -o -name '*.pxd' -o -name '*.h')

.PHONY: demo test build peers lint docs bench tuning clean
.DELETE_ON_ERROR:

build: $(VENV)/tested
	@:

demo: $(VENV)/built
	@$(BIN)/vq demo $(DEMO)

test: build
	@if [ "$$(id -u)" = 0 ]; then scripts/setup-peers.sh; \
	else echo "not root: tests that need the peers are skipped; sudo make peers brings them"; fi
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(SIDES) $(TESTS)

peers:
	@scripts/setup-peers.sh

lint: build
	@$(BIN)/ruff check .
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint vq_core
	@$(BIN)/mypy

docs: build
	@$(BIN)/python -m sphinx -q -W docs build/docs

bench: build
	@$(call EXTRA,bench)
	@$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-autosave --benchmark-columns=min,median $(TESTS)

# Each of them: a table, and the plot of the same runs.
TUNING := size ring window layout features queues latency
tuning_size := throughput
tuning_ring := sweep ring=32..4096 size=64,1518
tuning_window := sweep window=1..256 size=64,1518
tuning_layout := sweep descriptors=1,2,indirect layout=split,packed
tuning_features := sweep layout=split,packed log=off,on mergeable=on,off in_order=off,on
tuning_queues := sweep queues=1..8 poll=busy,adaptive
tuning_latency := latency

tuning: build
	@$(call EXTRA,plots)
	@mkdir -p docs/tuning
	@set -e; $(foreach name,$(TUNING),echo "docs/tuning/$(name).svg"; $(BIN)/vq bench $(tuning_$(name)) --seconds 0.3 \
	    --plot docs/tuning/$(name).svg > docs/tuning/$(name).txt;) $(BIN)/vq bench tune > docs/tuning/tune.txt

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find vq_core -name '*.so' -delete
	@find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/made: scripts/setup-venv.sh
	@scripts/setup-venv.sh $(VENV)
	@touch $@

# First the dependencies and the checkout itself in editable form; from then on only what has changed is compiled.
$(VENV)/built: $(VENV)/made pyproject.toml setup.py $(SOURCES)
	$(if $(filter-out $(SOURCES),$?),$(INSTALL),$(COMPILE))
	@touch $@

# What the tests import besides; compiles nothing.
$(VENV)/tested: $(VENV)/built pyproject.toml
	$(if $(filter-out $(VENV)/built,$?)$(if $(wildcard $@),,new),@$(call EXTRA,test))
	@touch $@

PROJECT := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))

define INSTALL
@$(BIN)/python -c '$(PROJECT); print(*project["build-system"]["requires"], sep="\n")' > $(VENV)/build-requirements.txt
@$(BIN)/python -m pip install --quiet --requirement $(VENV)/build-requirements.txt
@echo "compiling the engine: one to three minutes, only this first time"
@$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
endef

# An optional part of the project's requirements, by its name.
EXTRA = $(BIN)/python -c '$(PROJECT); print(*project["project"]["optional-dependencies"]["$1"], sep="\n")' \
    > $(VENV)/$1-requirements.txt && $(BIN)/python -m pip install --quiet --requirement $(VENV)/$1-requirements.txt

COMPILE = @$(BIN)/python setup.py --quiet build_ext --inplace
