# Everything a developer or a first-time user runs. `make help` lists the goals.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEED ?= 0
SCHEDULES ?= 10
RUN ?=
GPU := $(wildcard /dev/nvidiactl /dev/kfd /dev/dxg)
# On Linux, PyPI's torch is the CUDA build with gigabytes of libraries. Empty: what pip finds by itself.
TORCH_INDEX ?= $(if $(GPU),,https://download.pytorch.org/whl/cpu)
REACH := import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=4)
FIND_INDEX = index="$(TORCH_INDEX)"; \
	if [ -n "$$index" ] && ! timeout 8 $(BIN)/python -c '$(REACH)' "$$index" 2>/dev/null; then \
	  echo "$$index cannot be reached: torch comes from where pip finds it"; index=; fi
# The launcher warns on every start where it has to find out that there is no GPU.
LAUNCHER := PATH="$(CURDIR)/$(BIN):$$PATH" $(if $(GPU),,DS_ACCELERATOR=cpu) $(BIN)/deepspeed
WHEELS := build/wheels
GPU_PYTHON ?= 3.12
CARRIED := hjson py-cpuinfo msgpack einops ninja psutil tqdm pydantic pydantic_core annotated-types typing-inspection \
  typing_extensions webdataset braceexpand pytest pytest-timeout pluggy iniconfig Pygments liger-kernel
# The small real model, and what one calls a run of it.
DATA ?=
FORMAT ?= mind
MODEL ?= $(HOME)/.cache/trsr_dist/smollm2-135m-instruct
SERVER ?= $(HOME)/.cache/trsr_dist/vllm
KERNELS ?= $(HOME)/.cache/trsr_dist/kernels
STORES ?= $(HOME)/.cache/trsr_dist/s3fs
REAL_RUN ?= runs/real-$(FORMAT)
# As many ranks as configs/smollm2.yaml has rows in a step, at most.
DEVICES := $(if $(GPU),$(or $(filter 1 2,$(shell nvidia-smi --list-gpus 2>/dev/null | head -n 2 | wc -l)),1),2)
REAL = --config configs/smollm2.yaml "run.dir=$(REAL_RUN)" run.seed=$(SEED) data.format=$(FORMAT) "data.path=$(DATA)" \
  "model.name_or_path=$(MODEL)" $(SET)

.PHONY: help env quickstart real real-server test test-long test-slurm test-stores test-kernels test-real test-serve soak chaos mutants fuzz lint format bench wheels gpu-check clean

help:  ## list the goals
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

env: $(STAMP)  ## virtual environment with the pinned install

# torch first: of equal versions pip prefers the one with a label, such as 2.13.0+cpu. ensurepip is missing on a bare
# Debian. Where the index cannot be reached, pip would try it for minutes.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(FIND_INDEX); \
	set -x; $(BIN)/pip install --quiet $${index:+--extra-index-url $$index} -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

quickstart: env  ## the whole method on built-in data, on 2 CPU cores (SEED=1 for other data)
	@$(BIN)/python launch/quickstart.py --seed $(SEED) $(if $(RUN),--run "$(RUN)")

real: env  ## the whole method with a small real model: DATA=DIR FORMAT=mind|amazon_m2|jsonl, SET="key=value ..."
	@test -n "$(DATA)" || { echo "make real DATA=DIR [FORMAT=mind|amazon_m2|jsonl]: DIR holds the raw files"; exit 2; }
	@$(BIN)/python tools/fetch_smollm2.py --output "$(MODEL)"
	@$(BIN)/python tools/prepare_data.py $(REAL)
	@OMP_NUM_THREADS=$(DEVICES) $(BIN)/python tools/evaluate.py $(REAL)
	@$(BIN)/python launch/summarize.py $(REAL)
	@$(BIN)/python tools/plan.py $(REAL) --hardware here --devices-per-node $(DEVICES) --stage train --stage evaluate
	@OMP_NUM_THREADS=1 $(LAUNCHER) --quiet --num_gpus $(DEVICES) launch/train.py $(REAL)
	@$(BIN)/python tools/merge_lora.py --checkpoint "$(REAL_RUN)" --output "$(REAL_RUN)/merged"
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node $(DEVICES) tools/evaluate.py $(REAL) --model "$(REAL_RUN)/merged"

real-server: env  ## vLLM for CPUs, in a separate environment: the server of test-real (3.4 GB)
	@$(FIND_INDEX); \
	bash tests/real/install_vllm.sh "$(SERVER)" $(BIN)/python $${index:+--extra-index-url $$index}

test: env  ## what needs neither a GPU nor Slurm, under 10 minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slurm and not soak and not real and not long"

test-long: env  ## faults and memory over whole jobs, about 4 minutes; CI runs them too
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "long and not soak"

test-slurm: env  ## the tests on a real Slurm cluster of this machine (Linux, root)
	$(BIN)/python -m pytest -m "slurm and not soak" tests/slurm

test-real: env  ## the tests on real weights, texts and tokenizers (TRSR_REAL_MODEL, _TOKENIZERS, _DATA: their folders)
	TRSR_REAL_MODEL="$${TRSR_REAL_MODEL:-$(MODEL)}" $(BIN)/python -m pytest -rs -n 2 --dist loadfile -m real \
	  tests/real tests/prompts

test-serve: env  ## what vLLM serves against our scores (make real-server installs it; TRSR_VLLM: its command)
	TRSR_REAL_MODEL="$${TRSR_REAL_MODEL:-$(MODEL)}" TRSR_VLLM="$${TRSR_VLLM:-$(SERVER)/bin/vllm}" \
	  $(BIN)/python -m pytest -rs -m real $(wildcard tests/real/test_serving_*.py)

test-stores: env  ## raw files and shards on moto's S3: s3fs wants an older python-dateutil, so it lies in a folder
	$(BIN)/pip install --quiet --target "$(STORES)" s3fs==2026.9.0 'moto[s3]==5.2.5' flask==3.1.3 flask-cors==6.0.5
	PYTHONPATH="$(STORES)" $(BIN)/python -m pytest -rs $(wildcard tests/*/test_stores.py)

test-kernels: env  ## Liger's kernels in Triton's interpreter on the CPU (1 GB, in a folder: PyTorch for CPUs brings no Triton)
	$(BIN)/pip install --quiet --no-deps --target "$(KERNELS)" -c constraints.txt liger-kernel triton==3.9.0
	TRITON_INTERPRET=1 PYTHONPATH="$(KERNELS)" $(BIN)/python -m pytest -rs tests/model/test_liger.py

soak: env  ## the long fault runs
	$(BIN)/python -m pytest -m soak

chaos: env  ## 50 random faults a schedule over the whole chain on a Slurm cluster of this machine (SEED=0 SCHEDULES=10)
	$(BIN)/python -m tests.chaos --seed $(SEED) --schedules $(SCHEDULES) --output build/chaos.json

mutants: env  ## faults planted in the modules that decide numbers, up to 2 hours (MODULES=shards for some)
	$(BIN)/python -m tests.mutants $(MODULES)

fuzz: env  ## 2,900 damaged, odd and hostile inputs, about 7 minutes (SEED=1 for others)
	$(BIN)/python -m tests.fuzz --seed $(SEED) --output build/fuzz.json

lint: env  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: env  ## the benchmark suites, side by side with the alternatives
	$(BIN)/python tools/benchmark.py --suite all

wheels: env  ## what gpu-check needs beside torch, transformers and peft on a machine without network, to build/wheels
	$(BIN)/pip wheel --quiet --no-deps -c constraints.txt -w $(WHEELS) deepspeed
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	  --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 -c constraints.txt -d $(WHEELS) $(CARRIED)

gpu-check:  ## every check and benchmark that needs a GPU, in the current environment
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON) tools/gpu_check.py --note "$(NOTE)"

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs
