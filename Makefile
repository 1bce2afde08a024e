# make test      the gradient checks and all other tests, in a few minutes
# make torture   the long ones: every generated mutant
# make bench     speed, beside PyTorch where it is installed (make peer)
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: test torture bench peer clean

$(VENV)/ready: Makefile
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check numpy pytest hypothesis
	touch $@

test: $(VENV)/ready
	$(RUN) -m pytest -q test_stars.py

torture: $(VENV)/ready
	STARS_TORTURE=1 $(RUN) -m pytest -q -s test_stars.py -k torture

bench: $(VENV)/ready
	$(RUN) test_stars.py bench

# PyTorch, only to compare with: its tests and its column in the benchmark are skipped without it
peer: $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check torch==2.13.0

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis __pycache__
