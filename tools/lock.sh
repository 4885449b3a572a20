#!/bin/sh
# Choose the versions of all Python packages anew: tools/requirements/*.txt, with the hash of each
# file, for every Python from 3.11 on. Needs the network; `make setup` installs exactly these files.
#
#   wheel.txt  what pyvmm takes at run time
#   run.txt    also building pyvmm in a checkout, pytest
#   dev.txt    also tests, lint, documentation, releases
#   fuzz.txt   also `make fuzz`
set -eu
cd "$(dirname "$0")/.."
[ -x build/lock/bin/uv ] || {
	python3 -m venv build/lock
	build/lock/bin/pip install -q --disable-pip-version-check uv
}
python3 -c '
import tomllib
with open("pyproject.toml", "rb") as f:
    print("\n".join(tomllib.load(f)["build-system"]["requires"]))' >build/lock/build.in

compile() { # OUTPUT OPTIONS...: the packages of pyproject.toml
	output=tools/requirements/$1; shift
	build/lock/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
		--no-annotate --custom-compile-command "make lock" "$@" -o "$output" \
		pyproject.toml
}

rm -f tools/requirements/*.txt
compile dev.txt --extra pytest --extra dev --extra docs --extra release build/lock/build.in
compile fuzz.txt --extra pytest --extra dev --extra docs --extra release --extra fuzz \
	-c tools/requirements/dev.txt build/lock/build.in
compile run.txt --extra pytest -c tools/requirements/dev.txt build/lock/build.in
compile wheel.txt -c tools/requirements/dev.txt
