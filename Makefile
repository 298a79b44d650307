# `make demo` and `make test` need python3 (3.10 or later) with venv, and nothing else.
PYTHON ?= python3
VENV ?= .venv
# torch without CUDA (a tenth of the size). For a GPU: make demo TORCH_INDEX=https://pypi.org/simple
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Two files of tests at a time, on one thread each
PYTEST_ARGS ?= -q -n 2 --dist loadfile --no-loadscope-reorder
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Neither nipype nor a plot may ask for the network or a screen.
export NO_ET := 1
export MPLBACKEND := Agg
# An activated conda environment or PYTHONPATH must not leak in.
unexport PYTHONPATH
export PYTHONNOUSERSITE := 1

# Of `make validate`: development data, an ensemble's name or folder, and where labels and tables go
DATA ?= ../shared/data
ENSEMBLE ?= aseg31
VALIDATION ?= work/validation-$(notdir $(ENSEMBLE))

.PHONY: help demo test lint docs quality validate clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo   segment the MNI152 template at 1 mm, then a simulated cohort; group report"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make docs   build the documentation site into docs/_build/html"
	@echo "make quality    calibrate the expected Dice of ENSEMBLE on synthetic heads (an hour); writes its manifest"
	@echo "make validate   segment real heads (hours); tables for docs/experiments. Resumes where it stopped"
	@echo "make clean  remove what these made (distclean: the virtual environment too)"

demo: $(VENV)/.demo
	$(BIN)/python examples/make_demo_dataset.py demo/bids
	$(BIN)/bids_varaug demo/bids demo/derivatives participant -w demo/work $(DEMO_ARGS)
	@test -s demo/derivatives/sub-mni152.html
	@test -d demo/cohort || { rm -rf demo/cohort.part && $(BIN)/python \
		examples/make_ageing_cohort.py demo/derivatives/sub-mni152/anat/*_desc-consensus_dseg.nii.gz \
		demo/cohort.part --n 12 --size 2 && mv demo/cohort.part demo/cohort; }
	$(BIN)/bids_varaug demo/cohort demo/cohort_derivatives participant --sloppy \
		--n-members 5 -w demo/work
	$(BIN)/bids_varaug demo/cohort demo/cohort_derivatives group
	@echo "Open the reports: $(CURDIR)/demo/derivatives/sub-mni152.html"
	@echo "                  $(CURDIR)/demo/cohort_derivatives/group_quality.html"
	@echo "                  $(CURDIR)/demo/cohort_derivatives/group_brainage.html"

test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.test
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# The tutorials run; any warning is an error.
docs: $(VENV)/.docs
	@$(BIN)/sphinx-build -q -W --keep-going docs docs/_build/html
	@echo "Open $(CURDIR)/docs/_build/html/index.html"

# Five members of each family, and cheap rivals of the ensemble. To be published: $(VALIDATION)/tables.md
SYNTHETIC := $(addprefix $(VALIDATION)/synthetic/,t1 sharp any inverted t2)
$(SYNTHETIC): $(VALIDATION)/synthetic/%: | $(VENV)/.test
	$(BIN)/python benchmarks/synthetic_heads.py $(DATA)/synthseg_label_maps $@.part --kinds $*
	mv $@.part $@
T1_HEADS := $(VALIDATION)/synthetic/t1 $(VALIDATION)/synthetic/sharp
SEGMENT_T1_HEADS = $(BIN)/python benchmarks/segment_heads.py $(T1_HEADS) --cache $(VALIDATION)/quality --ensemble $(ENSEMBLE)
quality: $(VENV)/.test $(T1_HEADS)
	$(SEGMENT_T1_HEADS)
	$(BIN)/python benchmarks/expected_dice.py $(VALIDATION)/quality --write $(ENSEMBLE)
REAL_HEADS = $(DATA)/t1w $(addprefix $(DATA)/bids/,fs-training miccai2012 nichart-old)
validate: $(VENV)/.test $(SYNTHETIC)
	$(BIN)/python benchmarks/segment_heads.py $(REAL_HEADS) --cache $(VALIDATION) --ensemble $(ENSEMBLE) \
		--n-members 5 --rr 5 --shifts 5 --noise 5
	$(BIN)/python benchmarks/validate_heads.py $(VALIDATION) \
		--adults $(DATA)/brain_age/fcon1000_freesurfer.tsv > $(VALIDATION)/accuracy.md
	$(BIN)/python benchmarks/spread.py $(VALIDATION) > $(VALIDATION)/spread.md
	$(SEGMENT_T1_HEADS)
	$(BIN)/python benchmarks/expected_dice.py $(VALIDATION)/quality $(VALIDATION) > $(VALIDATION)/expected_dice.md
	$(BIN)/python benchmarks/minimum_dice.py $(VALIDATION) $(DATA)/paper_tables > $(VALIDATION)/minimum_dice.md
	$(BIN)/python benchmarks/segment_heads.py $(SYNTHETIC) --cache $(VALIDATION)/synthetic/cache \
		--ensemble $(ENSEMBLE) --n-members 5
	$(BIN)/python benchmarks/validate_heads.py $(VALIDATION)/synthetic/cache \
		--title "Accuracy on synthetic heads" > $(VALIDATION)/synthetic.md
	$(PIP) install --quiet bidsgate
	$(BIN)/python benchmarks/atrophy.py $(DATA)/bids/miccai2012 --cache $(VALIDATION) --ensemble $(ENSEMBLE) \
		--n-members 5 --targets 17 --factors 0.9 0.95 --rescans 1 > $(VALIDATION)/atrophy.md
	{ echo '# Validation of `$(notdir $(ENSEMBLE))`' && echo && sed 's/^#/##/' $(foreach \
		part,accuracy synthetic spread minimum_dice atrophy,$(VALIDATION)/$(part).md); } > $(VALIDATION)/tables.md

# The stamps hold what was installed; a changed pyproject.toml or constraints.txt installs again.
$(VENV)/.demo $(VENV)/.docs $(VENV)/.test: $(VENV)/.%: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet -c constraints.txt -e '.[$*]'
	@touch $@

# torch alone first: should its own index not answer, PyPI has it too.
$(VENV)/.torch: constraints.txt | $(VENV)/.python
	@echo "Installing into $(VENV), two minutes or so"
	$(PIP) install --quiet --no-deps --retries 0 -c constraints.txt \
		--extra-index-url $(TORCH_INDEX) torch \
	|| $(PIP) install --quiet --no-deps -c constraints.txt torch
	@touch $@

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "$(PYTHON) is older than 3.10: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf demo build dist docs/_build docs/tutorials/notebooks bids_varaug.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bids_varaug tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
