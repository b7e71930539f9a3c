"""The lifecycle node ``ood_segmenter``: camera images in, scored anomaly instances out."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from ros2_ood_seg.config import PipelineConfig
from ros2_ood_seg.errors import InputError
from ros2_ood_seg.pipeline import Pipeline
from ros2_ood_seg.ros.diagnostics import FrameStatistics
from ros2_ood_seg.ros.inputs import Frame, FrameSource
from ros2_ood_seg.ros.mailbox import Mailbox
from ros2_ood_seg.ros.outputs import Outputs
from ros2_ood_seg.ros.parameters import Parameters
from ros2_ood_seg.ros.transport import make_room_for_images

RCLError = rclpy_implementation.RCLError
_LOG_PERIOD_S = 2.0
_EXIT_PATIENCE_S = 1.0


class OodSegmenter(LifecycleNode):
    """Runs the pipeline on the newest image, in one worker thread.

    configure loads the networks and warms them up, activate subscribes and starts the worker, deactivate stops both, cleanup
    frees the networks.

    Args:
        kwargs: As for ``rclpy.node.Node``.

    Raises:
        InputError: A parameter that cannot be used; the message says what is allowed.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("ood_segmenter", **kwargs)
        self._settings = Parameters(self)
        self._statistics = FrameStatistics()
        self._state = "unconfigured"
        self._failure = ""
        self._refused: PipelineConfig | None = None
        self._pipeline: Pipeline | None = None
        self._outputs: Outputs | None = None
        self._source: FrameSource | None = None
        self._mailbox: Mailbox[Frame] = Mailbox()
        self._worker: threading.Thread | None = None
        self._epoch = 0
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # A steady clock: diagnostics go out even while simulated time stands still.
        period_s = self._settings.node_config.diagnostics_period_s
        self.create_timer(period_s, self._publish_diagnostics, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._survive_wrong_transitions()

    def autostart(self) -> None:
        """Configures and activates, unless the parameter ``autostart`` is off or the configuration fails."""
        if self._settings.node_config.autostart and self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Builds the pipeline, warms it up and creates the publishers."""
        warm_up = self._settings.node_config.warm_up
        try:
            pipeline = Pipeline(self._settings.pipeline_config)
            if warm_up.height and warm_up.width:
                pipeline.warm_up(warm_up.height, warm_up.width)
            self._outputs = Outputs(self, self._statistics)
        # rclpy drops exceptions of transitions without a word.
        except Exception as error:
            self._fail("cannot configure", error)
            return TransitionCallbackReturn.FAILURE
        self._pipeline = pipeline
        self.get_logger().info(f"profile '{pipeline.config.profile}' is ready on {pipeline.runtime.device}")
        return self._entered("inactive", super().on_configure(state))

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Starts the worker and subscribes."""
        assert self._pipeline is not None
        self._statistics.clear()
        self._epoch = 0
        # What kept a pipeline from being made may be gone by now.
        self._refused = None
        self._pipeline.reset()
        self._mailbox = Mailbox()
        external = self._settings.pipeline_config.scorer.name == "external"
        try:
            self._source = FrameSource(
                self,
                self._settings.node_config,
                external,
                on_image=self._statistics.received,
                on_late=self._statistics.replaced,
                on_frame=self._on_frame,
                on_problem=self._on_problem,
            )
        except Exception as error:
            self._fail("cannot activate", error)
            return TransitionCallbackReturn.FAILURE
        self._worker = threading.Thread(target=self._work, args=(self._mailbox,), name="worker", daemon=True)
        self._worker.start()
        return self._entered("active", super().on_activate(state))

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribes and waits for the frame in work, whose result is dropped."""
        self._stop()
        return self._entered("inactive", super().on_deactivate(state))

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Frees the networks and removes the publishers."""
        self._free()
        return self._entered("unconfigured", super().on_cleanup(state))

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stops and frees everything."""
        self._stop()
        self._free()
        return self._entered("finalized", super().on_shutdown(state))

    def abandon(self, patience_s: float) -> bool:
        """Closes the mailbox and waits a moment for the frame in work.

        Returns:
            Whether the worker has ended.
        """
        self._mailbox.close()
        if self._worker is None:
            return True
        self._worker.join(patience_s)
        return not self._worker.is_alive()

    def release(self) -> None:
        """Destroys the node and ends ROS, with the shared memory of Fast DDS, which stays behind when a process just ends."""
        self.destroy_node()
        # The state machine keeps the node's handle, and with it the DDS participant.
        self._state_machine = None
        with contextlib.suppress(Exception):
            rclpy.try_shutdown()
        gc.collect()

    def _survive_wrong_transitions(self) -> None:
        """Answers requests of transitions that do not fit the state with ``success: false``, as rclcpp does.

        Releases of rclpy up to Jazzy let the error out of the service's callback, which ends the process.
        """
        for service in self.services:
            if service.srv_name.endswith("/change_state"):
                service.callback = self._guarded(service.callback)

    def _guarded(self, change_state: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def answer(request: Any, response: Any) -> Any:
            try:
                return change_state(request, response)
            except RCLError as error:
                wanted = request.transition.label or request.transition.id
                self.get_logger().warning(f"no transition '{wanted}' from state '{self._state}': {error}")
                response.success = False
                return response

        return answer

    def _stop(self) -> None:
        if self._source is not None:
            self._source.destroy()
            self._source = None
        self._mailbox.close()
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def _free(self) -> None:
        if self._outputs is not None:
            self._outputs.destroy()
            self._outputs = None
        self._pipeline = None
        if torch.cuda.is_initialized():
            # A GPU that was lost says so here once more; the node leaves all the same.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def _entered(self, label: str, result: TransitionCallbackReturn) -> TransitionCallbackReturn:
        if result == TransitionCallbackReturn.SUCCESS:
            self._state, self._failure = label, ""
        return result

    def _on_frame(self, frame: Frame) -> None:
        if self._mailbox.put(frame):
            self._statistics.replaced()

    def _on_problem(self, text: str) -> None:
        self._statistics.failed(text)
        self.get_logger().warning(text, throttle_duration_sec=_LOG_PERIOD_S)

    def _work(self, mailbox: Mailbox[Frame]) -> None:
        while (frame := mailbox.take()) is not None:
            self._process(frame, mailbox)

    def _process(self, frame: Frame, mailbox: Mailbox[Frame]) -> None:
        try:
            self._answer(frame, mailbox)
        # Whatever a frame does, the next one gets its chance.
        except Exception as error:
            if not mailbox.closed:
                self._statistics.rejected(str(error))
                self.get_logger().warning(f"frame skipped: {_describe(error)}", throttle_duration_sec=_LOG_PERIOD_S)

    def _answer(self, frame: Frame, mailbox: Mailbox[Frame]) -> None:
        start = time.perf_counter()
        image, scores = frame.decode()
        decode_ms = (time.perf_counter() - start) * 1e3
        pipeline = self._current_pipeline()
        if frame.epoch != self._epoch:
            self.get_logger().info("time jumped back, tracks start anew")
            pipeline.forget()
        self._epoch = frame.epoch
        result = pipeline.run(image, scores)
        if not mailbox.closed and self._outputs is not None:
            result = replace(result, timings_ms={"decode": decode_ms, **result.timings_ms})
            self._outputs.publish(frame.header, image, result, self._settings.node_config)

    def _current_pipeline(self) -> Pipeline:
        """The pipeline with the parameters of this moment; stages whose settings are the same stay loaded.

        Parameters of which no pipeline can be made are refused, once, and the pipeline stays as it is.
        """
        assert self._pipeline is not None
        wanted = self._settings.pipeline_config
        if wanted == self._pipeline.config:
            self._failure, self._refused = "", None
        elif wanted != self._refused:
            try:
                self._pipeline = Pipeline(wanted, reuse=self._pipeline)
                self._failure, self._refused = "", None
            except Exception as error:
                self._refused = wanted
                self._fail("parameters cannot be used, those before them stay in force", error)
        return self._pipeline

    def _fail(self, what: str, error: Exception) -> None:
        text = f"{what}: {_describe(error)}"
        self._failure = text
        self._statistics.failed(text)
        self.get_logger().error(text)

    def _publish_diagnostics(self) -> None:
        config = self._settings.pipeline_config
        about = {"profile": config.profile, "scorer": config.scorer.name, "segmenter": config.segmenter.name}
        missing = unheard = ""
        if self._pipeline is not None:
            about["device"] = str(self._pipeline.runtime.device)
        if self._source is not None:
            unheard = self._source.unheard()
            if config.scorer.name == "external":
                about["images without anomaly_map"] = str(self._source.waiting)
                if not self._source.matched:
                    missing = f"no anomaly_map of their stamp within external.queue_size ({self._settings.node_config.external.queue_size})"
        status = self._statistics.status(self.get_fully_qualified_name(), self._state, about, self._failure, missing, unheard)
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else "".join(traceback.format_exception(error)).strip()


def main(args: Sequence[str] | None = None) -> int:
    """Runs the node until SIGINT or SIGTERM.

    Args:
        args: Command line, None for that of the process.

    Returns:
        0 after a signal, 2 when a parameter cannot be used, 1 after any other error.
    """
    # Also when a shell that starts it in the background has them ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    make_room_for_images()
    node: OodSegmenter | None = None
    code = 0
    try:
        rclpy.init(args=args)
        node = OodSegmenter()
        node.autostart()
        rclpy.spin(node)
    except InputError as error:
        print(f"ood_seg_node: {error}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except Exception:
        traceback.print_exc()
        code = 1
    ended = node is None or node.abandon(_EXIT_PATIENCE_S)
    if node is not None:
        node.release()
    with contextlib.suppress(Exception):
        rclpy.try_shutdown()
    if not ended:
        # A frame in work cannot be interrupted, and the interpreter must not be torn down below it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
