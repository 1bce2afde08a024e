# make run       teacher -> spiking student on CIFAR-10, without data (15 to 20 minutes on 2 cores)
# make test      the gradient checks and all other tests, in a few minutes
# make torture   the long ones: every generated mutant, 14,000 damaged files, 50 killed runs
# make ablation  bn, bn+rca, bn+tar, stars and the ceiling, two seeds (two to three hours on 2 cores)
# make bench     speed, beside PyTorch where make peer installed it
# make gpu       the tests and the benchmark of a GPU
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: run test torture ablation bench gpu peer clean

$(VENV)/ready: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) numpy pytest hypothesis
	touch $@

# matplotlib draws the pictures; CuPy, in the wheel of the driver's CUDA version, only where there is a driver
$(VENV)/extras: $(VENV)/ready
	$(PIP) matplotlib
	v=$$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p'); \
	if [ -n "$$v" ]; then $(PIP) "cupy-cuda$${v}x[ctk]"; fi
	touch $@

run: $(VENV)/extras
	$(RUN) stars.py --dataset cifar10 --download

test: $(VENV)/ready
	$(RUN) -m pytest -q test_stars.py

torture: $(VENV)/ready
	$(PIP) pillow safetensors
	STARS_TORTURE=1 $(RUN) -m pytest -q -s test_stars.py -k torture

ablation: $(VENV)/extras
	$(RUN) test_stars.py ablation --download --jobs 2 --schedule quick --distill-steps 80 --save runs/ablation/result

# On a machine with a GPU: the tests that need one, then speed beside PyTorch, and SpikingJelly if installed
# (pip install spikingjelly==0.0.0.0.14). Takes the packages of PYTHON as they are; no network.
gpu:
	$(PYTHON) -m pytest -q test_stars.py -k gpu
	for more in "" --tf32; do \
	$(PYTHON) test_stars.py bench --device gpu --batch 256 $$more && \
	$(PYTHON) test_stars.py bench --device gpu --batch 256 --arch resnet18 --rounds 1 $$more || exit 1; done

# PyTorch, only to compare with: its tests and its column in the benchmark are skipped without it
peer: $(VENV)/ready
	$(PIP) torch==2.13.0

bench: $(VENV)/ready
	$(RUN) test_stars.py bench

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis __pycache__
