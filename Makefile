# Every target sets up .venv by itself; nothing else has to be installed but Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

# What has to hold on every release of transformers that pyproject.toml admits.
RELEASE_TESTS = tests/test_auto.py tests/test_releases.py tests/modeling tests/test_linear_attention.py \
	tests/test_configuration.py tests/test_conversion.py

.PHONY: demo test test-slow test-releases test-all lint format bench clean always

demo: $(READY)
	$(BIN)/hydrahead demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-releases: $(VENV)-lowest/.ready $(VENV)-newest/.ready
	for release in lowest newest; do \
	  $(VENV)-$$release/bin/python -c 'import transformers; print("transformers", transformers.__version__)' && \
	  $(VENV)-$$release/bin/python -m pytest $(RELEASE_TESTS) || exit 1; \
	done

test-all: test test-slow test-releases

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter --no-progress configuration_hydrahead.py modeling_hydrahead.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The CPU's part; `python benchmarks/gpu.py` and the other scripts with `--device cuda` are the GPUs'.
bench: $(READY)
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/report.py

# Torch first: without it pip would let other packages choose a build, which may be another one of several gigabytes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "HydraHead needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)-newest/.ready: always  # there may be a newer one

# Beside .venv, what differs from it: everything else, torch above all, is borrowed.
$(VENV)-lowest/.ready $(VENV)-newest/.ready: $(READY) tests/releases.py
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import site, sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth
	$(@D)/bin/python -m pip install --quiet --upgrade $$($(BIN)/python tests/releases.py $(@D:$(VENV)-%=%))
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest runs build *.egg-info
