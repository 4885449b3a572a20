# Targets are described by the comment after the colon; `make` alone shows them.
PYVMM := .venv/bin/pyvmm
PYTEST := .venv/bin/python -m pytest

.PHONY: help setup demo image check check-intel check-install check-docs lint bench clean
.PHONY: check-kunit
.PHONY: bench-native docs fuzz man lock release
.PHONY: soak soak-boot soak-bounds soak-kills soak-options soak-share

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

setup: ## install what is missing: system packages (as root), .venv, C extension, testbed
	@tools/setup.sh $(SETUP)

image: setup ## build the guest image
	@$(PYVMM) image build

demo: image ## boot a Linux guest with a virtio-net card, show what it does, leave nothing behind
	@$(PYVMM) demo

check lint bench bench-native soak soak-kills: SETUP = --tests
soak-share: SETUP = --tests --trees
fuzz: SETUP = --fuzz
# By two workers, file by file: what the tests of a file share, such as a guest, is made once.
check: image ## lint and all tests: unit, host (/dev/kvm), boot (testbed), the quick part of intel
	@$(PYVMM) testbed setup --cpu intel
	@$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "(intel_quick or not intel) and not thorough" \
		tests/lint tests/unit tests/fuzz tests/host tests/boot tests/intel $(ARGS)

check-intel: SETUP = --tests
check-intel: image ## tests under kvm_intel on an emulated Intel processor (ARGS="-m intel_quick")
	@$(PYVMM) testbed setup --cpu intel
	@$(PYVMM) testbed setup --cpu intel --kernel-version 6.12
	@$(PYTEST) tests/intel --durations=0 $(ARGS)

check-install: ## the README's commands in bare trees of Debian 12 and 13 (root, debootstrap)
	@tools/setup.sh --tests --trees --no-testbed
	@$(PYTEST) tests/install $(ARGS)

check-docs: SETUP = --tests
check-docs: image ## run the command blocks of README and docs as written (on a quiet machine)
	@$(PYTEST) tests/docs $(ARGS)

docs: ## the documentation as a site: build/site/index.html
	@tools/setup.sh --tests --no-testbed
	@.venv/bin/python -m tools.site.build

man: setup ## the man pages: build/man
	@.venv/bin/python -m tools.site.man build/man

release: ## wheel, source, bill of materials, checksums of this commit: build/release
	@tools/setup.sh --tests --no-testbed
	@.venv/bin/python tools/release.py

lock: ## choose the versions of all Python packages anew (tools/requirements)
	@tools/lock.sh

lint: setup ## style, types, C warnings, sanitizer build, import rule
	@$(PYTEST) -q tests/lint $(ARGS)

bench: image ## measure against QEMU, in the testbed where KVM does not run Linux
	@.venv/bin/python -m tests.perf $(ARGS)

bench-native: setup ## packets per second of pyvmm backend beside DPDK's net_vhost, without a guest
	@.venv/bin/python -m tests.perf.bench_native $(ARGS)

SWITCHES ?= 1000
soak: image ## switch a guest's data path SWITCHES times (1000) under traffic, count what is lost
	@.venv/bin/python -m tests.perf.soak --switches $(SWITCHES) $(ARGS)

KILLS ?= 1000
soak-kills: image ## kill the vhost-user back-end KILLS times (1000) under a guest that sends: nothing lost, nothing twice
	@.venv/bin/python -m tests.perf.soak_kills --kills $(KILLS) $(ARGS)

soak-bounds: setup ## endless reboots, reconnects, clients: memory, descriptors and disk stay flat
	@.venv/bin/python -m tests.perf.soak_bounds $(ARGS)

MINUTES ?= 10
fuzz: setup ## all fuzz targets for MINUTES (10) with SEED (today's); a table and JSON
	@.venv/bin/python -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

soak-options: image ## boot Linux with each row of docs/kernel-options.md, in the testbed
	@PYVMM_KERNEL_OPTIONS=all $(PYTEST) -q tests/boot/test_kernel_options.py $(ARGS)

soak-boot: image ## the boot tests that take minutes, which `make check` leaves out
	@$(PYTEST) -m thorough tests/boot $(ARGS)

soak-share: image ## shares at their limits, the Rust virtiofsd, a whole Debian with systemd (root)
	@PYVMM_SHARE=all $(PYTEST) -q tests/boot/test_share.py tests/boot/test_tree.py $(ARGS)

check-kunit: setup ## the kunit.py of the kernel tree TREE, by pyvmm (/dev/kvm, no compiling)
	@PYVMM_KERNEL_TREE=$(abspath $(TREE)) $(PYTEST) -q tests/host/test_kunit.py $(ARGS)

clean: ## remove what was built here (not the caches in ~/.cache/pyvmm)
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis pyvmm/_ext.c pyvmm/_ext*.so *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
