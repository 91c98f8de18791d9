# `make demo` trains on a year of flights; `make test` checks everything. Each installs what it
# needs into .venv on its first run; a second run touches no network.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=

.PHONY: demo test test-long bench bench-step bench-phases bench-operators bench-regressions \
	bench-start bench-predict bench-stream clean
.NOTPARALLEL:

demo: $(VENV)/demo
	$(RUN) -m backprop.demo $(ARGS)

test: $(VENV)/dev,demo
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m pytest -m "not long and not alone" -n logical --dist loadfile --max-worker-restart 1 $(ARGS)
	$(RUN) -m pytest -m "alone and not long" $(ARGS)

test-long: $(VENV)/dev,demo,torch
	$(RUN) -m pytest -o faulthandler_timeout=3600 $(ARGS)

bench: $(VENV)/demo,bench
	$(RUN) benchmarks/bench_flights.py $(ARGS)

bench-step: $(VENV)/demo,bench,torch
	$(RUN) benchmarks/bench_step.py $(ARGS)

bench-phases: $(VENV)/demo,bench,torch
	$(RUN) benchmarks/bench_step.py --phases $(ARGS)

bench-operators: $(VENV)/demo,bench
	for op in linear_forward linear_dgrad linear_wgrad sparse_input loss optimizer_step batch_norm layer_norm \
		gather_rows; do $(RUN) benchmarks/bench_$$op.py $(ARGS) || exit 1; done

# Fails where an operator's median is a fifth slower than in the last run here.
bench-regressions: $(VENV)/demo,bench
	$(RUN) -m pytest benchmarks/test_operators.py -q -o filterwarnings=default --benchmark-autosave --benchmark-storage=file://.benchmarks \
		--benchmark-compare --benchmark-compare-fail=median:20% --benchmark-columns=median,min $(ARGS)

bench-start: $(VENV)/demo,bench
	$(RUN) benchmarks/bench_start.py $(ARGS)

bench-predict: $(VENV)/demo,bench,torch
	$(RUN) benchmarks/bench_predict.py $(ARGS)

bench-stream: $(VENV)/demo,bench
	$(RUN) benchmarks/bench_stream.py $(ARGS)

# A stamp is named after the extras that were installed. Editable, so that it stays true when the
# sources change and no build folder with old copies is left in the checkout.
$(VENV)/dev,demo $(VENV)/demo $(VENV)/demo,bench $(VENV)/demo,bench,torch $(VENV)/dev,demo,torch: pyproject.toml | $(VENV)/made
	@echo "installing [$(@F)] into $(VENV), once"
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[$(@F)]"
	@touch $@

$(VENV)/made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, got " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
