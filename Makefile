# Every target does its own set-up in .venv; the set-up runs again only when what it depends on has changed.
#   make demo      from a checkpoint to a conversation, on this machine
#   make test      lint, types and the tests that take seconds (what CI runs)
#   make test-all  the tests that take minutes too
#   make test-transformers VERSION=5.18.0   what depends on transformers, under another version of it
#   make test-triton VERSION=3.7.1   the same for Triton
#   make peers     tmlc beside llama.cpp, transformers, ONNX Runtime and OpenVINO; builds and installs them (docs/performance.md)
#   make onnx-node what examples/onnx_node needs, by npm; `make test` does it where npm is
#   make browser   Chromium for the test of the page, by apt; `make test` does it where that works
#   make clients   clients of the server that its tests talk to, by pip; `make test` does it where there is a network
#   make perf      measure; prints figures beside their targets and writes perf/results/<machine>.json

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml setup.py $(wildcard kernels/cpu/src/*)
ROOMS := passes kernels runtimes model_zoo
DEMO := out/demo
SCENES := talk time see
RECORDING = --audio examples/demo/$(1).wav $(addprefix --text ,$(wildcard examples/demo/$(1).yaml)) \
	$(addprefix --video ,$(wildcard examples/demo/$(1).mp4))

# PyTorch and the kernels' own pool would both take all cores.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: clients onnx-node browser demo test test-all test-transformers test-triton perf peers lint types clean
.DEFAULT_GOAL := test
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BUILD_INPUTS) | $(BIN)/python
	@echo "installing tmlc with [compile,media] into $(VENV) and building its kernels; the first time takes some minutes"
	$(BIN)/python -m pip install --quiet -e '.[compile,media]'
	@touch $@

$(VENV)/dev.stamp: $(BUILD_INPUTS) | $(BIN)/python
	@echo "installing tmlc with [dev] into $(VENV) and building its kernels; the first time takes some minutes"
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $(VENV)/demo.stamp $@

demo: $(VENV)/demo.stamp
	@mkdir -p $(DEMO)
	$(BIN)/tmlc zoo create interaction-nano -o $(DEMO)/interaction-nano --force
	$(BIN)/tmlc compile $(DEMO)/interaction-nano -o $(DEMO)/interaction-nano.tmlc --check --force
	$(BIN)/tmlc verify $(DEMO)/interaction-nano.tmlc
	$(foreach scene,$(SCENES),$(BIN)/tmlc run $(DEMO)/interaction-nano.tmlc $(call RECORDING,$(scene)) -o $(DEMO)/$(scene) --force &&) true
	$(BIN)/tmlc profile $(DEMO)/interaction-nano.tmlc $(call RECORDING,see) -o $(DEMO)/report --force
	$(BIN)/python examples/demo/read_along.py $(DEMO)
	@echo; echo "in $(DEMO): talk/ time/ see/ with output.wav transcript.txt timeline.jsonl; report.html report.json report.txt report.trace.json"

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .

# mypy does not follow the mapping of pyproject.toml: it gets the rooms where they are imported from, through links.
types: $(VENV)/dev.stamp
	@rm -rf build/types && mkdir -p build/types/tmlc
	@ln -s $(abspath $(filter-out %__pycache__,$(wildcard tmlc/*)) $(ROOMS)) build/types/tmlc/
	cd build/types && MYPYPATH=. $(abspath $(BIN)/mypy) --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache
	@# The programs that nothing imports: what they call in tmlc changes without them. Each folder is a path of its own.
	for folder in peers gpu; do MYPYPATH=build/types:perf/$$folder $(BIN)/mypy --config-file pyproject.toml \
		--cache-dir .mypy_cache perf/$$folder/run.py || exit 1; done

# Without npm, or without a network, the test of that example is skipped and says so. The scripts of the packages are not
# run: they would fetch libraries for GPUs.
ONNX_NODE := examples/onnx_node
onnx-node: $(ONNX_NODE)/node_modules/.stamp

$(ONNX_NODE)/node_modules/.stamp: $(ONNX_NODE)/package.json
	@if command -v npm > /dev/null; then npm install --silent --no-audit --no-fund --no-package-lock --ignore-scripts \
		--prefix $(ONNX_NODE) && touch $@ || echo "npm could not install onnxruntime-node"; \
		else echo "npm is not installed: examples/onnx_node is not tested"; fi

# The browser of the page's test. Where it is neither installed nor to be had, the test is skipped and says so.
browser:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
		&& { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } > /dev/null 2>&1 \
		|| echo "Chromium is not installed: the page is not tested"; }

# Clients of the server, each with what it needs in a folder of its own, unchanged. Without a network the tests of them are
# skipped and say so.
CLIENTS := $(patsubst tests/conformance/clients/%.txt,build/clients/%,$(wildcard tests/conformance/clients/*.txt))
clients: $(CLIENTS)

build/clients/%: tests/conformance/clients/%.txt | $(VENV)/dev.stamp
	@rm -rf $@ $@.new
	@mkdir -p build/clients
	@$(BIN)/python -m pip install --quiet --no-warn-conflicts --target $@.new -r $< && mv $@.new $@ && touch $@ \
		|| { rm -rf $@.new; echo "$* could not be installed: it is not tested"; }

# Tests of live servers keep an eye on the clock, so they run one after the other; all else is shared out among two processes.
CLOCKED := tests/background tests/bench tests/conformance/clients tests/conformance/test_live.py tests/faults tests/gateway \
	tests/cli/test_serve.py
PYTEST := $(BIN)/python -m pytest -q

test: lint types onnx-node browser clients
	$(PYTEST) -m "not slow" $(CLOCKED)
	$(PYTEST) -m "not slow" -n 2 --dist loadfile $(addprefix --ignore=,$(CLOCKED))

test-all: lint types onnx-node browser clients
	$(PYTEST) $(CLOCKED)
	$(PYTEST) -n 2 --dist loadfile $(addprefix --ignore=,$(CLOCKED))

# The version and what it needs are installed beside .venv and come first on the path.
define beside
$(BIN)/python -m pip install --quiet --target $@.new $(subst -,==,$(@F))
@mv $@.new $@
endef

build/transformers-%: | $(VENV)/dev.stamp
	$(beside)

build/triton-%: | $(VENV)/dev.stamp
	$(beside)

test-transformers: $(if $(VERSION),build/transformers-$(VERSION))
	@test -n "$(VERSION)" || { echo "give a version: make test-transformers VERSION=5.18.0"; exit 2; }
	PYTHONPATH=$(abspath $<) $(BIN)/python -c "import transformers as t; assert t.__version__ == '$(VERSION)', t.__version__"
	PYTHONPATH=$(abspath $<) $(BIN)/python -m pytest -q -m "not slow" tests/foreign tests/conformance/test_inkling*.py

test-triton: $(if $(VERSION),build/triton-$(VERSION))
	@test -n "$(VERSION)" || { echo "give a version: make test-triton VERSION=3.7.1"; exit 2; }
	PYTHONPATH=$(abspath $<) $(BIN)/python -c "import triton as t; assert t.__version__ == '$(VERSION)', t.__version__"
	PYTHONPATH=$(abspath $<) $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests/kernels_triton tests/gpu

perf: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q perf --record

# Two environments: the exporters need another version of transformers than the peer.
PEERS := build/peers
$(PEERS)/%.stamp: perf/peers/%.txt
	@echo "installing $< under $(PEERS); llama.cpp is built from source: this takes a while"
	@mkdir -p $(PEERS)
	$(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/python -m pip install --quiet -r $<
	@touch $@

peers: $(VENV)/dev.stamp $(PEERS)/requirements.stamp $(PEERS)/requirements-export.stamp
	$(BIN)/python perf/peers/run.py --base $(PEERS)/made --peers $(PEERS)/requirements/bin/python \
		--export $(PEERS)/requirements-export/bin/python $(ARGS)

clean:
	rm -rf build out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
