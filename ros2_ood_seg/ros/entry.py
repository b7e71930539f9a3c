"""How the commands that talk to ROS begin and end."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable

import rclpy
from rclpy.executors import ExternalShutdownException

from ros2_ood_seg.errors import InputError, ProcessError, os_error_text


def run_command(name: str, work: Callable[[], None]) -> int:
    """Runs a command; SIGTERM ends it like an interrupt, so that it can clean up.

    Args:
        name: For its error messages.
        work: What it does.

    Returns:
        0 on success, 1 when another process failed, 2 when the input cannot be used, 130 after an interrupt.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work()
    except (InputError, ProcessError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:
        print(f"{name}: {os_error_text(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, ExternalShutdownException):
        return 130
    finally:
        with contextlib.suppress(Exception):
            rclpy.try_shutdown()
    return 0
