# make demo    set up, simulate a small stack, reconstruct it with two processes, and say what came out
# make test    set up and run the tests; as root on Debian or Ubuntu it installs Slurm, which some of them need
# make venv    set up only: .venv with the package, its dependencies and the compiled core
# make lint    check style
# make docs    the documents as a site in build/docs, every link in it checked; needs no network once all is installed
# make gpu-wheels   collect in build/wheels what a GPU machine without network lacks, for GPU_PYTHON=3.12 there
# make gpu-checks   on a GPU machine: every check and measurement there is, into GPU_OUT=runs/gpu-checks; needs no venv
#                   (GPU_ARGS="--only 3 5 --budget 560" for some of them; python -m benchmarks.gpu_checks --help)
# make clean   remove what was compiled; .venv and runs/ stay
#
# PYTHON=python3.12 chooses the interpreter, 3.10 or newer. pip's own settings (PIP_FIND_LINKS, PIP_INDEX_URL) hold.
# Where nvcc is found the core gets its CUDA half too: CRYOSPLAT_CUDA_ARCH=90 for one architecture, =off without.
# On a machine without an NVIDIA GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves a download of 3 GB.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed.stamp
BUILT := .venv/built.stamp
DATA := runs/demo-data
SIMULATE := --box 96 --pixel-size 2 --images 3000 --snr 0.0007

GPU_PYTHON ?= 3.12
GPU_OUT ?= runs/gpu-checks
WHEELS := build/wheels
CARRIED := cryodrgn gemmi iniconfig mrcfile omegaconf plyfile pluggy pytest setuptools starfile submitit
PLATFORMS := $(patsubst %,--platform %_x86_64,manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014)

.PHONY: help demo test venv lint docs gpu-wheels gpu-checks clean

help:
	@sed -n 's/^# make/make/p' Makefile

demo: venv $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m cryosplat.train --config configs/demo.yaml

# The simulator writes the whole folder or none of it.
$(DATA): | $(BUILT)
	mkdir -p $(dir $(DATA))
	$(BIN)/cryosplat simulate $(SIMULATE) --out $(DATA)

# One thread a worker: the tests that need several processes start them themselves.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# From the checkout, not from docs/: pages link to files beside it, as they do on GitHub.
docs: venv
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/docs
	@echo "build/docs/index.html"

gpu-wheels: venv
	rm -rf $(WHEELS)
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
	  $(PLATFORMS) -c constraints.txt -d $(WHEELS) $(CARRIED)

# Not the venv's Python: there is none without network. The checks make an environment of their own.
gpu-checks:
	$(PYTHON) -m benchmarks.gpu_checks --output $(GPU_OUT) $(GPU_ARGS)

venv: $(BUILT)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.10; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,docs]'
	@touch $@

# Compiles only what has changed since the installation.
$(BUILT): $(INSTALLED) setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

clean:
	rm -rf build dist *.egg-info cryosplat/_C*.so .pytest_cache .ruff_cache .hypothesis
	rm -f $(BUILT)
	find cryosplat launch tests -name __pycache__ -prune -exec rm -rf {} +
