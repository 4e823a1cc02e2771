# `make` alone prints what there is.
PYTHON ?= python3
VENV := .venv
VENV_DEMO := .venv-demo
VENV_TENSORFLOW := .venv-tensorflow
VENV_CLIENTS := .venv-clients
# Here, because a comma would end an argument of `call`.
TRITON_CLIENT := tritonclient[grpc,http]==2.73.0
PYTEST = $(VENV)/bin/python -m pytest
# What the tests start as real parts, and the Debian packages that bring it.
TOOLS := mosquitto mosquitto_pub docker-registry htpasswd skopeo umoci curl
PACKAGES := python3-venv mosquitto mosquitto-clients docker-registry apache2-utils skopeo umoci curl
# What the tests in a machine of their own need besides (make test-vm).
TOOLS_VM := nsenter runuser setpriv unshare systemd-analyze udevadm /usr/bin/python3.11 \
  qemu-system-x86_64 mkfs.ext4 debugfs cpio /bin/busybox
PACKAGES_VM := systemd udev util-linux python3 qemu-system-x86 e2fsprogs cpio busybox-static
export PATH := $(PATH):/usr/sbin:/sbin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PREFIX ?= /usr/local
export DESTDIR ?=
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help install install-system uninstall venv tools tools-vm lint format test test-vm test-long test-tensorflow test-clients bench demo deb protos clean

help: ## Print this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-24s %s\n", $$1, $$2}'

# A virtual environment in $(1) with `pip install $(2)`; made anew where an interrupted one was left behind.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is older than 3.11; use make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(call apt,python3-venv)
	@test -x $(1)/bin/pip || { rm -rf $(1); $(PYTHON) -m venv $(1); }
	@echo "make: installing into $(1) (a few minutes the first time)"
	@$(1)/bin/pip install -q $(2)
	@touch $(1)/.installed
endef

# Install Debian packages as root; tell what is missing otherwise.
apt = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "make: installing Debian packages: $(1)"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) >/dev/null; \
	  else \
	    echo "make: something is missing. On Debian or Ubuntu: sudo apt-get install $(1)" >&2; exit 1; \
	  fi

venv: $(VENV)/.installed ## Make .venv with slotd and what its development needs

$(VENV)/.installed: pyproject.toml
	$(call environment,$(VENV),-e '.[dev]')

$(VENV_DEMO)/.installed: pyproject.toml
	$(call environment,$(VENV_DEMO),-e '.[demo]')

$(VENV_TENSORFLOW)/.installed: Makefile
	$(call environment,$(VENV_TENSORFLOW),tensorflow-cpu==2.21.0 numpy simplejpeg pillow)

$(VENV_CLIENTS)/.installed: Makefile
	$(call environment,$(VENV_CLIENTS),'$(TRITON_CLIENT)')

# Without what it depends on, which would be TensorFlow once more.
$(VENV_TENSORFLOW)/.serving: $(VENV_TENSORFLOW)/.installed
	@$(VENV_TENSORFLOW)/bin/pip install -q --no-deps tensorflow-serving-api==2.21.0
	@touch $@

tools: ## Install the real broker, registry and tools that tests start
	@for tool in $(TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	  if [ -n "$$missing" ]; then echo "make: not found:$$missing"; $(call apt,$(PACKAGES)); fi

lint: venv ## ruff, mypy --strict, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy packaging/versions.py packaging/build.py
	$(VENV)/bin/lint-imports

format: venv ## Format the sources
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

test: venv tools lint $(VENV_CLIENTS)/.installed ## Everything that must pass before anything lands
	$(PYTEST) -q -n 3 --dist worksteal --durations 25 -m "not long and not tensorflow and not clients and not vm and not alone"
	$(PYTEST) -q -m "alone and not long"

tools-vm: ## Install what boots the machines that tests run in
	@for tool in $(TOOLS_VM); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	  test -x /lib/systemd/systemd || missing="$$missing systemd"; \
	  if [ -n "$$missing" ]; then echo "make: not found:$$missing"; $(call apt,$(PACKAGES_VM)); fi

test-vm: venv tools tools-vm ## Tests with real systemd as PID 1, in machines of their own; needs root
	$(PYTEST) -q -m "vm and not long" tests/vm

test-long: venv tools ## The tests that take minutes
	$(PYTEST) -q -m long

test-tensorflow: venv $(VENV_TENSORFLOW)/.installed ## Preprocessing against real TensorFlow, in an environment of its own
	SLOTD_TENSORFLOW=$(CURDIR)/$(VENV_TENSORFLOW)/bin/python $(PYTEST) -q -m tensorflow

test-clients: venv $(VENV_CLIENTS)/.installed $(VENV_TENSORFLOW)/.serving ## Clients that are not ours, in their own environments
	$(PYTEST) -q tests/clients

bench: venv ## Figures as ratios in one run, with the machine's noise beside them (minutes; on a quiet machine)
	$(VENV)/bin/python tests/bench/run.py

demo: $(VENV_DEMO)/.installed ## Two real models, swapped under load, on this machine alone
	@$(VENV_DEMO)/bin/slotd demo

# With Debian's Python, since that is what runs it.
deb: ## Build the Debian package, build/deb/slotd_VERSION_ARCHITECTURE.deb
	@/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || $(call apt,python3 python3-venv)
	@/usr/bin/python3 packaging/build.py

install: ## Install slotd on this host: PREFIX (/usr/local), DESTDIR
	@PYTHON=$(PYTHON) packaging/install.sh program
	@packaging/install.sh system

install-system: ## Only units, users, rules and settings, without the program
	@packaging/install.sh system

uninstall: ## Take it away again; settings, models and state stay
	@packaging/install.sh uninstall

protos: venv ## Compile the .proto files
	cd agent/serving/protos && $(CURDIR)/$(VENV)/bin/python -m grpc_tools.protoc -I. --include_imports \
	  --descriptor_set_out=slotd.binpb tensorflow.proto signature.proto prediction_service.proto model_service.proto \
	  grpc_predict_v2.proto

clean: ## Remove environments, caches and builds
	rm -rf $(VENV) $(VENV_DEMO) $(VENV_TENSORFLOW) $(VENV_CLIENTS) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache
	find agent drivers tests -name __pycache__ -type d -prune -exec rm -rf {} +
