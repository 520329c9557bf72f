# Needs python3 (3.11 or newer, with venv) and make; everything else is installed into .venv.

VENV := .venv
PY := $(VENV)/bin/python
RUN_TIME := $(VENV)/installed-run-time
DEV := $(VENV)/installed-dev
FUZZ := $(VENV)/installed-fuzz
SECONDS ?= 600
CLIENTS := .venv-clients
QUALITY := .quality
REFERENCE := smollm2-135m-instruct
# On a terminal pip shows its progress; in CI only what goes wrong.
PIP_INSTALL := $(PY) -m pip install $(if $(CI),--quiet) --disable-pip-version-check --constraint constraints.txt --editable

# A GPU's price is found by its name.
CPU_PRICE = $(if $(shell command -v nvidia-smi),,cpu-4vcpu)

.PHONY: help serve test test-load test-clients lint format bench-cpu bench-serve bench-quality fuzz clean
.DEFAULT_GOAL := help

help:
	@echo "make serve         install into .venv and serve a model on http://127.0.0.1:8000"
	@echo "                   MODEL=name-or-path  PORT=8000  ARGS='--dtype float32 --max-num-seqs 16'"
	@echo "                   PRICE=cpu-4vcpu  what the device costs: a name of seeds/prices.toml, or US$$ an hour"
	@echo "make test          every test that this machine can run; ARGS='-k scheduler' narrows it"
	@echo "make test-load     a server under more load than it can take, at full size: some minutes"
	@echo "make test-clients  real clients against a live server; they are installed into .venv-clients"
	@echo "make lint          ruff, mypy, and the number of lines of engine/ and kernels/"
	@echo "make format        let ruff rewrite the files"
	@echo "make bench-cpu     this engine beside llama.cpp and transformers, on this CPU"
	@echo "make fuzz          ten minutes of damaged checkpoints against the parsers; SECONDS=60 is a minute"
	@echo "make bench-serve   load on a server of its own: latencies, tokens a second, US\$$ per million tokens"
	@echo "make bench-quality  what each smaller form of SmolLM2 costs in quality: rounds it seven times, compares them"
	@echo "make clean         remove the environments and every cache"

serve: $(RUN_TIME)
	@exec $(VENV)/bin/fen serve $(if $(MODEL),--model "$(MODEL)") $(if $(PORT),--port $(PORT)) \
		$(if $(or $(PRICE),$(CPU_PRICE)),--price $(or $(PRICE),$(CPU_PRICE))) $(ARGS)

test: $(DEV)
	@$(PY) tests/run.py $(ARGS)

# --confcutdir: tests/conftest.py needs Fen's own libraries.
test-load: $(DEV)
	@$(PY) -m pytest -q tests/load $(ARGS)

test-clients: $(RUN_TIME) $(CLIENTS)/installed
	@$(CLIENTS)/bin/python -m pytest --confcutdir tests/clients tests/clients $(ARGS)

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@$(PY) tests/size.py

format: $(DEV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench-cpu: $(DEV)
	@$(PY) -m bench.compare_cpu $(ARGS)

bench-serve: $(DEV)
	@$(VENV)/bin/fen bench serve --launch "$(if $(MODEL),--model '$(MODEL)') $(if $(CPU_PRICE),--price $(CPU_PRICE))" \
		--random-input-len 256 --random-output-len 64 --num-prompts 16 --num-warmups 2 --temperature 0 \
		--max-concurrency 1,4,16 $(ARGS)

# Each form is named by its folder; plain rounding keeps --method rtn in its name, and groups their size.
bench-quality: $(DEV)
	@rm -rf $(QUALITY) && mkdir $(QUALITY)
	@cd $(QUALITY) && quantize() { ../$(VENV)/bin/fen quantize $(REFERENCE) "$$@" || exit 1; } && \
		for size in 64 32; do for method in rtn gptq; do \
			quantize --to w4a16 --method $$method --group-size $$size --output w4a16-$$method-$$size; done; done && \
		for to in w8a16 w8a8 fp8; do quantize --to $$to --output $$to; done && \
		../$(VENV)/bin/fen compare $(REFERENCE) w4a16-rtn-64 w4a16-gptq-64 w4a16-rtn-32 w4a16-gptq-32 w8a16 w8a8 fp8 \
			$(REFERENCE):kv_cache_dtype=int8 $(REFERENCE):kv_cache_dtype=fp8 --price cpu-4vcpu \
			--json ../bench/results/compare.json $(ARGS)

fuzz: $(FUZZ)
	@for target in gguf safetensors index config tokenizer; do \
		$(PY) -m tests.fuzz.checkpoints $$target --seconds $$(($(SECONDS) / 5)) || exit 1; \
	done

clean:
	rm -rf $(VENV) $(CLIENTS) $(QUALITY) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_TIME): pyproject.toml constraints.txt
	@$(create_venv)
	$(PIP_INSTALL) .
	@touch $@

$(DEV): $(RUN_TIME)
	$(PIP_INSTALL) '.[dev]'
	@touch $@

$(CLIENTS)/installed: tests/clients/requirements.txt tests/clients/constraints.txt $(RUN_TIME)
	@$(CLIENTS)/bin/python -m pip --version >/dev/null 2>&1 || $(PY) -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install $(if $(CI),--quiet) --disable-pip-version-check --requirement $< \
		--constraint tests/clients/constraints.txt
	@touch $@

$(FUZZ): $(DEV)
	$(PIP_INSTALL) '.[fuzz]'
	@touch $@

# A .venv that works is kept; a missing, moved or half-made one is made anew by the first Python that can.
define create_venv
$(PY) -m pip --version >/dev/null 2>&1 && exit 0; \
for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	recent=$$python; \
	$$python -c 'import venv, ensurepip' 2>/dev/null || continue; \
	echo "Creating $(VENV) with $$($$python --version); PyTorch is the large part of what follows, and only the first time."; \
	$$python -m venv --clear $(VENV) && exit 0; \
	exit 1; \
done; \
if [ -n "$$recent" ]; then \
	echo "$$recent cannot create virtual environments: install its venv module (Debian and Ubuntu: apt install python3-venv)." >&2; \
else \
	echo "Fen needs Python 3.11 or newer, and none was found as python3, python3.13, python3.12 or python3.11: install one." >&2; \
fi; \
exit 1
endef
