# `make` lists the targets. Each one first makes the environment it needs (deploy/cpu/install.sh; a few minutes once).
VENV ?= .venv
PY = $(VENV)/bin/python
PYTEST_ARGS ?=
# Test files side by side, in their order: those with servers and engines first, not those with the most tests.
WORKERS ?= 2

# One thread per process unless the caller says otherwise: the tests and the demo run models of well under 1 M
# parameters, where more threads only wait for each other.
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED = 1

.DEFAULT_GOAL := help
.PHONY: help venv services cross demo serve test nightly lint docs bench bench-gpu load chaos release clean

help:
	@echo 'make demo     a conversation with and without memory, through kill -9, restart and deletion'
	@echo 'make serve    leave a server with the bundled model running on http://127.0.0.1:8000 (PORT=N for another)'
	@echo 'make test     all tests (PYTEST_ARGS="tests/ops -k paged" for some)'
	@echo 'make nightly  all tests with their campaigns at full size'
	@echo 'make lint     ruff and mypy'
	@echo 'make docs     the documentation as a site, in build/docs; parts that are made from the code are made anew'
	@echo 'make bench    operators, sessions, hooks, histories and vLLM with and without memory on this machine (about an hour)'
	@echo 'make load     vLLM alone and with memory under the same load of many sessions: percentiles, goodput, cold starts'
	@echo 'make chaos    replicas killed under load, the store cut, silent, slow, full, a soak: every version looked for afterwards'
	@echo 'make bench-gpu  build, check and measure everything on one NVIDIA GPU (PY=python3: torch, Triton and nvcc, not vLLM)'
	@echo 'make release  wheel, sdist and SBOM in dist/; the version is that of the newest git tag'
	@echo 'make venv     only the environment ($(VENV); VENV=DIR for another)'
	@echo 'make clean    remove the environment and everything that was built'

venv:
	@deploy/cpu/install.sh $(VENV)

demo: venv
	@exec $(PY) -m deltamem_vllm.demo

PORT ?= 8000
serve: venv
	@exec $(PY) -m deltamem_vllm.demo serve --port $(PORT)

# Tests start PostgreSQL, Redis, Chromium and a JavaScript client of their own, and check with Prometheus' promtool; where the
# programs are missing, Debian's packages are installed (root).
JAVASCRIPT = tests/server/javascript
services:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && \
	(for each in redis-server npm promtool chromium; do command -v $$each >/dev/null || exit 1; done) || \
	{ echo 'installing PostgreSQL, Redis, Prometheus, Chromium and Node.js (Debian packages)'; deploy/ci/install-services.sh >/dev/null; }
	@cmp -s $(JAVASCRIPT)/package-lock.json $(JAVASCRIPT)/node_modules/.from || \
	{ npm ci --prefix $(JAVASCRIPT) --prefer-offline --no-audit --no-fund --loglevel error >/dev/null && \
	  cp $(JAVASCRIPT)/package-lock.json $(JAVASCRIPT)/node_modules/.from || \
	  echo 'npm could not install the JavaScript client that a test wants: that test will fail'; }

test: venv services
	@exec $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What only the campaigns need: a compiler for aarch64 and an emulator.
cross:
	@command -v aarch64-linux-gnu-g++ qemu-aarch64 >/dev/null || \
	{ echo 'installing a cross-compiler and qemu (Debian packages)'; deploy/ci/install-cross.sh >/dev/null; }

nightly: venv services cross
	@exec env DELTAMEM_NIGHTLY=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --timeout 7200 $(PYTEST_ARGS)

lint: venv
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

# The variable: mkdocs-material's advertisement of what comes after mkdocs is no warning about these pages.
docs: venv
	@$(PY) -m docs.generate
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs --quiet build --strict --clean
	@echo 'build/docs/index.html'

bench: venv
	@exec $(PY) -m loadtests

# No environment of its own: the machine's torch is the one that fits its driver.
bench-gpu:
	@exec $(PY) -m loadtests.gpu $(BENCH_ARGS)

load: venv
	@exec $(PY) -m loadtests.slo

# Each campaign by itself: python -m loadtests.chaos replicas --sessions 100
chaos: venv services
	@for each in replicas cut silent slow full soak; do $(PY) -m loadtests.chaos $$each || failed=1; done; exit $${failed:-0}

release: venv
	@exec $(PY) deploy/release/release.py dist

clean:
	rm -rf $(VENV) .venv-ci build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find deltamem_vllm tests -name __pycache__ -type d -prune -exec rm -rf {} +
