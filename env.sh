# Source this in bash: `. ./env.sh` gives ood-seg, ood_seg_node and a python that knows ros2_ood_seg.msg.
_ood_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -x $_ood_root/.venv/bin/python || ! -f $_ood_root/install/setup.bash ]]; then
  echo "env.sh: the environment is not built yet, run 'make env' in $_ood_root" >&2
  unset _ood_root
  return 1
fi
if [[ $PATH != "$_ood_root/.venv/bin:"* ]]; then
  export VIRTUAL_ENV="$_ood_root/.venv"
  export PATH="$_ood_root/.venv/bin:$PATH"
fi
if [[ -z ${ROS_DISTRO:-} || -f $_ood_root/.venv/share/ament_cmake/package.xml ]]; then
  # ROS 2 from wheels: its prefix is the environment itself.
  _ood_prefix=$("$_ood_root/.venv/bin/python" -c 'import sys; print(sys.prefix)')
  export AMENT_PREFIX_PATH="$_ood_prefix${AMENT_PREFIX_PATH:+:$AMENT_PREFIX_PATH}"
  export CMAKE_PREFIX_PATH="$_ood_prefix${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}"
  unset _ood_prefix
fi
. "$_ood_root/install/local_setup.bash"
export PATH="$_ood_root/install/ros2_ood_seg/lib/ros2_ood_seg:$PATH"
unset _ood_root
