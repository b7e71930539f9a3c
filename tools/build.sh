#!/usr/bin/env bash
# colcon build of the checkout into build/ and install/, quiet unless it fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# By its real name: CMake refuses to export include folders that lie below the source folder, as a link's would.
venv=$(readlink -f .venv)
python=$("$venv/bin/python" -c 'import sys; print(sys.executable)')
prefix=$("$venv/bin/python" -c 'import sys; print(sys.prefix)')
if [[ -f $prefix/share/ament_cmake/package.xml ]]; then
  export AMENT_PREFIX_PATH=$prefix CMAKE_PREFIX_PATH=$prefix
fi
export PATH="$venv/bin:$PATH"

# A build tree of another environment, or of a checkout that was moved or copied here, cannot be reused.
stamp="$prefix $PWD"
if [[ -f build/.environment && $(<build/.environment) != "$stamp" ]]; then
  rm -rf build install log
fi
mkdir -p build log
echo "$stamp" >build/.environment
touch build/COLCON_IGNORE

echo "building messages and package with colcon"
if ! colcon build --base-paths . --packages-select ros2_ood_seg --event-handlers console_direct- \
  --cmake-args -DPython3_EXECUTABLE="$python" -DBUILD_TESTING=OFF >log/build.txt 2>&1; then
  cat log/build.txt >&2
  exit 1
fi
