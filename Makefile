# `make` lists what there is. Every value can be given on the command line: make train NP=4
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
# What `make setup` was told last; a value on the command line comes first.
-include $(VENV)/choice.mk
FRAMEWORKS ?= torch,tensorflow,keras
MPI ?= pypi
GPU ?= 0
GPU_ARCH ?=

RECIPE ?= cnn
NP ?= 2
LAUNCHER ?= horovodrun
HOSTFILE ?=
ARGS ?=
EXAMPLES ?= 100000

comma := ,
empty :=
space := $(empty) $(empty)
wanted := $(subst $(comma),$(space),$(FRAMEWORKS))
buildable := $(filter torch tensorflow,$(wanted))
FRAMEWORK ?= $(firstword $(buildable))

# --- one line for a wrong value, before anything is done

refuse_unless = $(if $(filter $(2),$($(1))),,$(error $(1)=$($(1)): choose $(3)))

ifneq ($(filter setup train test test-all test-hosts test-gpu fuzz lint proof bench plan-check drills,$(MAKECMDGOALS)),)
  $(foreach name,$(filter-out torch tensorflow keras,$(wanted)),\
    $(error FRAMEWORKS=$(FRAMEWORKS): $(name) is none; choose among torch,tensorflow,keras))
  $(if $(buildable),,$(error FRAMEWORKS=$(FRAMEWORKS): name torch or tensorflow; keras runs on either))
  $(call refuse_unless,MPI,pypi system,pypi (Open MPI from PyPI) or system (the mpicxx on the PATH))
  $(call refuse_unless,GPU,0 1,0 (CPUs) or 1 (GPUs too$(comma) with CUDA and NCCL))
  ifneq ($(GPU_ARCH),)
    ifneq ($(shell [[ "$(GPU_ARCH)" =~ ^[1-9][0-9]{1,2}(,[1-9][0-9]{1,2})*$$ ]] && echo numbers),numbers)
      $(error GPU_ARCH=$(GPU_ARCH): give compute capabilities without the dot, as 90 or 80$(comma)90)
    endif
  endif
  ifeq ($(GPU),1)
    $(if $(word 2,$(buildable)),$(error GPU=1 FRAMEWORKS=$(FRAMEWORKS): PyPI has torch for CUDA 13 and TensorFlow for \
      CUDA 12$(comma) and one Horovod serves one: choose torch or tensorflow$(comma) each in a VENV of its own))
  else
    $(if $(filter command,$(origin GPU_ARCH)),$(if $(GPU_ARCH),$(error GPU_ARCH=$(GPU_ARCH) is for GPUs: give GPU=1 too)))
  endif
endif
ifneq ($(filter train,$(MAKECMDGOALS)),)
  $(call refuse_unless,RECIPE,cnn linear_regression synthetic,cnn$(comma) linear_regression or synthetic)
  $(call refuse_unless,FRAMEWORK,torch tensorflow keras,torch$(comma) tensorflow or keras)
  $(call refuse_unless,LAUNCHER,horovodrun mpirun none,horovodrun$(comma) mpirun or none (one process))
  $(if $(filter $(FRAMEWORK),$(wanted)),,$(error FRAMEWORK=$(FRAMEWORK) is not among those set up \
    ($(FRAMEWORKS)): run `make setup FRAMEWORKS=$(FRAMEWORKS)$(comma)$(FRAMEWORK)`))
  ifneq ($(shell [[ "$(NP)" =~ ^[1-9][0-9]{0,4}$$ ]] && echo whole),whole)
    $(error NP=$(NP): give the number of workers, 1 or more)
  endif
  ifneq ($(HOSTFILE),)
    $(if $(wildcard $(HOSTFILE)),,$(error HOSTFILE=$(HOSTFILE): there is no such file))
  endif
  ifeq ($(LAUNCHER),none)
    $(if $(filter command,$(word 1,$(origin NP))),$(if $(filter 1,$(NP)),,\
      $(error LAUNCHER=none starts one process: leave out NP=$(NP)$(comma) or choose horovodrun or mpirun)))
    $(if $(HOSTFILE),$(error LAUNCHER=none starts one process here: leave out HOSTFILE=$(HOSTFILE)))
  endif
endif

# --- targets

.PHONY: help setup train test test-all test-hosts test-gpu test-gpu-build fetched fuzz lint proof bench plan-check drills

help:
	@echo 'make train   train with 2 workers; RECIPE=cnn|linear_regression|synthetic  FRAMEWORK=torch|tensorflow|keras'
	@echo '             NP=2  LAUNCHER=horovodrun|mpirun|none  HOSTFILE=hostfiles/localhost  ARGS="--epochs 3"'
	@echo 'make test    set up, then lint and tests'
	@echo 'make test-all  the same with the tests marked long'
	@echo 'make test-hosts  on three hosts made of network namespaces: every recipe by every launcher, a cable that is pulled,'
	@echo '             slow links; without ARGS it writes tests/hosts/results.md: half an hour'
	@echo 'make test-gpu  on a machine with a GPU, set up with GPU=1: the adapters on it, and what a step costs, with limits'
	@echo 'make test-gpu-build  builds Horovod with CUDA and NCCL in build/, without a GPU too: some GB, some minutes;'
	@echo '             ARGS="--framework tensorflow"'
	@echo 'make fuzz    the tests on random input, with EXAMPLES=100000 each and other ones each time: some hours;'
	@echo '             ARGS=tests/single/test_hostfile.py: one'
	@echo 'make setup   once, and by itself before train and test: .venv with the frameworks, and Horovod built'
	@echo '             FRAMEWORKS=torch,tensorflow,keras  MPI=pypi|system  PYTHON=python3'
	@echo '             GPU=1 FRAMEWORKS=torch (or tensorflow): with CUDA and NCCL; GPU_ARCH=80,90: for GPUs that this host lacks'
	@echo 'make proof   every recipe on 1, 2 and 4 workers, compared with one and with the other frameworks: some minutes'
	@echo 'make bench   the speed beside that of its peers, where a step'"'"'s time goes, batches a second, what checkpoints,'
	@echo '             checks and --deterministic cost, and what compression gives on slow links: two hours;'
	@echo '             BENCH=speed|path|input|exactness|compression: one of them; ARGS="--only torch:cnn:2" or --short:'
	@echo '             less, written nowhere, or with --update into the results of speed that are there'
	@echo 'make plan-check  hvdkit plan against runs here, over slow links, and published figures: some minutes'
	@echo 'make drills  kill, stop, stall and corrupt real runs, and tell what came of it: some hours; ARGS="--share 0.1"'
	@echo 'make fetched  what tests use that this machine may lack, sshd and Slurm, unpacked in a cache; make test does it'
	@echo 'make lint    ruff and mypy'

# TensorFlow's build for GPUs is a package of its own; PyPI's torch is one.
packages := $(if $(filter 1,$(GPU)),$(patsubst tensorflow,tensorflow-gpu,$(wanted)),$(wanted))
extras := $(subst $(space),$(comma),$(strip $(packages) recipes test horovod-build $(if $(filter pypi,$(MPI)),mpi)))
gpu_name := $(if $(filter 1,$(GPU)),-gpu$(if $(GPU_ARCH),-$(subst $(comma),-,$(GPU_ARCH))))
gpu_flags := $(if $(filter 1,$(GPU)), --gpu$(if $(GPU_ARCH), --gpu-arch $(GPU_ARCH)))
stamp := $(VENV)/hvdkit-setup-$(subst $(space),-,$(sort $(wanted)))-$(MPI)$(gpu_name)
log := $(VENV)/setup.log

setup: $(stamp)
	$(if $(filter setup,$(MAKECMDGOALS)),@echo 'set up in $(VENV): $(FRAMEWORKS); MPI=$(MPI)$(if $(filter 1,$(GPU)),; GPU=1)',@:)

$(stamp): pyproject.toml $(wildcard toolkit/horovod_build/*.py toolkit/horovod_build/*.cmake)
	@command -v $(PYTHON) > /dev/null || { echo "PYTHON=$(PYTHON) is not found: name a Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("PYTHON=$(PYTHON) is Python %d.%d: name a 3.10 or newer" % sys.version_info[:2])'
	@$(PYTHON) -m toolkit.horovod_build --check-tools --mpi $(MPI)
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) \
	  || { echo "$(PYTHON) makes no virtual environment (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@rm -f $(VENV)/hvdkit-setup-*
	@printf 'installing   $(FRAMEWORKS) and the toolkit from PyPI; log $(log)'
	@$(VENV)/bin/python -m pip install --editable '.[$(extras)]' > $(log) 2>&1 && echo ' ✓' \
	  || { echo ' failed:'; $(PYTHON) -m toolkit.horovod_build.logged $(log); exit 1; }
	@$(VENV)/bin/python -m toolkit.horovod_build --frameworks $(subst $(space),$(comma),$(buildable)) --mpi $(MPI)$(gpu_flags)
	@printf 'FRAMEWORKS ?= $(FRAMEWORKS)\nMPI ?= $(MPI)\nGPU ?= $(GPU)\nGPU_ARCH ?= $(GPU_ARCH)\n' > $(VENV)/choice.mk
	@touch $@

# Keras takes TensorFlow unless told otherwise.
backend := $(if $(filter keras,$(FRAMEWORK)),$(if $(filter tensorflow,$(wanted)),,KERAS_BACKEND=torch ))
hosts := $(if $(HOSTFILE),--hostfile $(HOSTFILE) )
launch_horovodrun := horovodrun -np $(NP) $(hosts)
launch_mpirun := mpirun -np $(NP) $(hosts)
command := $(backend)$(launch_$(LAUNCHER))python recipes/$(RECIPE)_$(FRAMEWORK).py$(if $(ARGS), $(ARGS))

train: setup
	@echo 'source $(VENV)/bin/activate; $(command)'
	@source $(VENV)/bin/activate && $(command)

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

# An ssh server and Slurm's commands for tests, where the system has none; those are skipped where that fails.
fetched: setup
	@$(VENV)/bin/python -m tests.hosts.sshd
	@$(VENV)/bin/python -m tests.slurm

test: lint fetched
	@source $(VENV)/bin/activate && python -m pytest -m 'not long' $(ARGS)

test-all: lint fetched
	@source $(VENV)/bin/activate && python -m pytest $(ARGS)

# A part of the tests is no result to keep: "-" is the terminal.
test-hosts: setup
	@$(VENV)/bin/python -m tests.hosts.sshd --again
	@source $(VENV)/bin/activate && HVDKIT_HOSTS_RESULTS=$(if $(ARGS)$(PYTEST_ADDOPTS),-,tests/hosts/results.md) python -m pytest tests/hosts $(ARGS)

# What a step costs with one worker, and the memory that it takes with two on one GPU; without a GPU both refuse to start.
overhead = python -m tests.gpu.overhead --device gpu --framework

test-gpu: setup
	@source $(VENV)/bin/activate && python -m pytest tests/gpu $(ARGS) \
	  && export KERAS_BACKEND=$(firstword $(filter tensorflow,$(wanted)) torch) \
	  $(foreach name,$(wanted),&& $(overhead) $(name) && hvdkit launch -np 2 -- $(overhead) $(name) --share-gpus --rounds 3)

# An environment of its own: that of `make setup` stays as it is.
test-gpu-build:
	@$(PYTHON) -m tests.gpu_build $(ARGS)

fuzz: setup
	@source $(VENV)/bin/activate && HVDKIT_FUZZ=$(EXAMPLES) python -m pytest --hypothesis-profile=fuzz -m hypothesis \
	  --timeout 36000 --hypothesis-show-statistics $(or $(ARGS),tests/single)

proof: setup
	@source $(VENV)/bin/activate && python tests/proof.py $(ARGS)

drills: setup
	@source $(VENV)/bin/activate && python -m tests.drills $(ARGS)

# Some of the groups are asked for in --only, which is the speed's alone.
BENCHES = speed path input exactness compression
BENCH ?= $(if $(findstring --only,$(ARGS)),speed,$(BENCHES))

bench: setup $(if $(filter compression,$(BENCH)),fetched)
	$(foreach name,$(filter-out $(BENCHES),$(BENCH)),$(error BENCH=$(name): choose among $(BENCHES)))
	@$(VENV)/bin/python -c 'import matplotlib' 2> /dev/null || $(VENV)/bin/python -m pip install --editable '.[plot]' >> $(log) 2>&1 \
	  || { echo 'installing matplotlib failed:'; $(PYTHON) -m toolkit.horovod_build.logged $(log); exit 1; }
	@source $(VENV)/bin/activate $(foreach name,$(filter $(BENCH),$(BENCHES)),\
	  && python -m tests.benchmarks.$(name) $(if $(filter speed,$(name)),$(ARGS),$(filter --short,$(ARGS))))

plan-check: fetched
	@source $(VENV)/bin/activate && python -m tests.benchmarks.plan_check $(ARGS)
