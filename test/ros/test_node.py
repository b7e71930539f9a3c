"""The node in its own process; images come from this one, over DDS."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("ros2_ood_seg.msg", reason="the messages are not built (colcon build)")

from harness import PATIENCE_S, Client, NodeProcess, scene
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.qos import qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from ros2_ood_seg import rle
from ros2_ood_seg.ros.images import array_to_image, image_to_rgb, image_to_scores, rgb_to_compressed
from ros2_ood_seg.ros.node import OodSegmenter
from ros2_ood_seg.ros.outputs import IMAGE_TOPICS, SMALL_TOPICS

pytestmark = pytest.mark.dds
StartNode = Callable[..., NodeProcess]
Running = tuple[NodeProcess, Client]
SECOND = 10**9


def header(stamp_ns: int) -> Header:
    made = Header(frame_id="front_camera_optical")
    made.stamp.sec, made.stamp.nanosec = divmod(stamp_ns, SECOND)
    return made


def send(client: Client, stamp_ns: int, image: np.ndarray, scores: np.ndarray) -> None:
    client.images.publish(array_to_image(image, "rgb8", header(stamp_ns)))
    client.maps.publish(array_to_image(scores, "32FC1", header(stamp_ns)))


def ask(client: Client, stamp_ns: int, *boxes: tuple[int, int, int, int]) -> None:
    """Sends a scene and waits until all topics have answered."""
    image, scores = scene(*boxes)
    send(client, stamp_ns, image, scores)
    topics = [name for name in (*SMALL_TOPICS, *IMAGE_TOPICS) if name != "semantic"]
    client.until(
        lambda: all(client.answer(name, stamp_ns) for name in topics),
        "all answers",
        again=lambda: send(client, stamp_ns, image, scores),
    )


def transition(client: Client, number: int) -> bool:
    request = ChangeState.Request(transition=Transition(id=number))
    return client.call(ChangeState, "change_state", request).success


def state(client: Client) -> str:
    return client.call(GetState, "get_state", GetState.Request()).current_state.label


def test_all_outputs_carry_the_stamp_and_agree(running: Running) -> None:
    _, client = running
    stamp_ns = SECOND + 123_456_789
    ask(client, stamp_ns, (10, 30, 40, 60), (70, 50, 110, 80))
    found = client.answer("instances", stamp_ns)
    labels_message = client.answer("instance_mask", stamp_ns)
    for name in SMALL_TOPICS | IMAGE_TOPICS:
        if name != "semantic":
            assert client.answer(name, stamp_ns).header == header(stamp_ns), name
    assert (found.profile, found.scorer) == ("external", "external")
    assert (labels_message.encoding, labels_message.is_bigendian) == ("mono16", int(sys.byteorder == "big"))
    labels = np.frombuffer(labels_message.data, np.uint16).reshape(96, 128)
    assert len(found.instances) == 2
    assert [instance.id for instance in found.instances] == [1, 2]
    for instance in found.instances:
        mask = rle.decode(instance.mask.counts, instance.mask.height, instance.mask.width)
        np.testing.assert_array_equal(mask, labels == instance.id)
        rows, columns = np.nonzero(mask)
        box = instance.box
        assert (box.x_min, box.y_min, box.x_max, box.y_max) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert instance.area == mask.sum()
        assert instance.track_id > 0
        # The cut finds the bright object that was drawn.
        truth = scene((10, 30, 40, 60))[1] > 0.5 if box.x_min < 64 else scene((70, 50, 110, 80))[1] > 0.5
        assert (mask & truth).sum() / (mask | truth).sum() > 0.9
    np.testing.assert_array_equal(labels > 0, np.isin(labels, [1, 2]))
    assert list(client.answer("boxes", stamp_ns).boxes) == [instance.box for instance in found.instances]
    refined = image_to_scores(client.answer("anomaly_map", stamp_ns))
    assert refined[labels > 0].min() > refined[labels == 0].max()
    overlay = image_to_rgb(client.answer("overlay", stamp_ns))
    assert overlay.shape == (96, 128, 3)
    assert np.any(overlay != scene((10, 30, 40, 60), (70, 50, 110, 80))[0])
    compressed = image_to_rgb(client.answer("overlay/compressed", stamp_ns))
    assert np.abs(compressed.astype(int) - overlay).mean() < 20
    timing = client.answer("timing", stamp_ns)
    assert {"decode", "score", "prompt", "segment", "fuse", "total"} <= set(timing.stages)
    assert len(timing.stages) == len(timing.duration_ms)
    assert timing.latency_ms > 0


def test_bad_frames_are_counted_and_the_next_one_is_answered(running: Running) -> None:
    node, client = running
    image, scores = scene((10, 30, 40, 60))
    good = array_to_image(image, "rgb8", header(0))
    not_finite = scores.copy()
    not_finite[3, 4] = np.nan
    cases = [
        (Image(height=96, width=128, encoding="infrared", step=384, data=good.data), scores, "'infrared' is not known: use one of rgb8"),
        (Image(height=96, width=128, encoding="rgb8", step=384, data=good.data[:1000]), scores, "image data has 1000 bytes"),
        (Image(height=96, width=128, encoding="rgb8", step=9, data=good.data), scores, "step 9 is too small"),
        (Image(encoding="rgb8"), scores, "got 0x0 px"),
        (good, not_finite, "1 of 12288 values are NaN or infinite"),
    ]
    for number, (bad, values, reason) in enumerate(cases, start=10):

        def send_bad(bad: Image = bad, values: np.ndarray = values, number: int = number) -> None:
            bad.header = header(number * SECOND)
            client.images.publish(bad)
            client.maps.publish(array_to_image(values, "32FC1", header(number * SECOND)))

        send_bad()
        client.until(
            lambda reason=reason: reason in client.diagnostics.get("last error", ""), f"a complaint about {reason}", again=send_bad
        )
        assert reason in client.diagnostics["message"]
    assert int(client.diagnostics["frames rejected"]) >= len(cases)
    assert not any(client.answer("instances", number * SECOND) for number in range(10, 10 + len(cases)))
    ask(client, 100 * SECOND, (10, 30, 40, 60))
    assert client.answer("timing", 100 * SECOND).rejected >= len(cases)
    assert "frame skipped: image encoding 'infrared' is not known" in node.output
    assert "Traceback" not in node.output


def test_parameters_change_while_running(running: Running) -> None:
    _, client = running
    ask(client, 200 * SECOND, (10, 30, 40, 60), (80, 50, 86, 56))
    assert len(client.answer("instances", 200 * SECOND).instances) == 2
    value = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=100)
    request = SetParameters.Request(parameters=[Parameter(name="prompts.boxes.min_area_px", value=value)])
    assert client.call(SetParameters, "set_parameters", request).results[0].successful
    ask(client, 201 * SECOND, (10, 30, 40, 60), (80, 50, 86, 56))
    assert len(client.answer("instances", 201 * SECOND).instances) == 1
    # The track is the one of before.
    before = {instance.box.x_min < 64: instance.track_id for instance in client.answer("instances", 200 * SECOND).instances}
    assert client.answer("instances", 201 * SECOND).instances[0].track_id == before[True]


def test_parameters_that_cannot_be_used_are_refused_and_frames_go_on(running: Running) -> None:
    node, client = running

    def put(name: str, **value: object) -> object:
        request = SetParameters.Request(parameters=[Parameter(name=name, value=ParameterValue(**value))])
        return client.call(SetParameters, "set_parameters", request).results[0]

    refused = put("fusion.name", type=ParameterType.PARAMETER_STRING, string_value="magic")
    assert not refused.successful
    assert "unknown fusion 'magic': use one of s2m" in refused.reason
    # Two that go together only turn out to contradict each other when the stage is made.
    assert put("scorer.external_low", type=ParameterType.PARAMETER_DOUBLE, double_value=2.0).successful
    ask(client, 220 * SECOND, (10, 30, 40, 60))
    ask(client, 221 * SECOND, (10, 30, 40, 60))
    complaint = "parameters cannot be used, those before them stay in force: scorer.external_low is 2.0"
    client.until(lambda: client.diagnostics.get("message", "").startswith(complaint), "the complaint")
    assert node.output.count(complaint) == 1
    assert put("scorer.external_low", type=ParameterType.PARAMETER_DOUBLE, double_value=0.0).successful
    ask(client, 222 * SECOND, (10, 30, 40, 60))
    assert len(client.answer("instances", 222 * SECOND).instances) == 1


def test_messages_stamped_before_1970_are_left_out(running: Running) -> None:
    node, client = running
    image, scores = scene((10, 30, 40, 60))
    client.until(
        lambda: "before 1970" in client.diagnostics.get("last error", ""), "a complaint", again=lambda: send(client, -SECOND, image, scores)
    )
    ask(client, 230 * SECOND, (10, 30, 40, 60))
    assert "Traceback" not in node.output


def test_tracks_start_anew_when_time_jumps_back(running: Running) -> None:
    _, client = running
    tracks = []
    for second, box in ((310, (10, 30, 40, 60)), (311, (12, 30, 42, 60)), (312, (80, 30, 110, 60)), (305, (80, 30, 110, 60))):
        ask(client, second * SECOND, box)
        tracks += [instance.track_id for instance in client.answer("instances", second * SECOND).instances]
    assert tracks[0] == tracks[1] != tracks[2]
    # No id means two objects, also to those who do not look at stamps.
    assert tracks[3] > max(tracks[:3])


def test_a_transition_that_does_not_fit_the_state_is_refused(running: Running) -> None:
    _, client = running
    assert not transition(client, Transition.TRANSITION_CONFIGURE)
    assert state(client) == "active"
    ask(client, 2_100 * SECOND, (10, 30, 40, 60))


def test_maps_in_any_order_leave_answers_and_tracks_in_order(running: Running) -> None:
    node, client = running
    image, scores = scene((10, 30, 40, 60))
    before = node.output.count("time jumped back")
    ask(client, 3_000 * SECOND, (10, 30, 40, 60))
    (first,) = client.answer("instances", 3_000 * SECOND).instances
    for k in (3_001, 3_002, 3_003):
        client.images.publish(array_to_image(image, "rgb8", header(k * SECOND)))
    client.spin(0.5)
    for k in (3_002, 3_001, 3_003):
        client.maps.publish(array_to_image(scores, "32FC1", header(k * SECOND)))
        client.spin(0.5)
    ask(client, 3_004 * SECOND, (10, 30, 40, 60))
    (last,) = client.answer("instances", 3_004 * SECOND).instances
    assert last.track_id == first.track_id
    assert node.output.count("time jumped back") == before
    answered = [message.header.stamp.sec for message in client.answers["instances"] if message.header.stamp.sec >= 3_000]
    assert answered == sorted(answered)


def test_maps_of_before_a_jump_back_do_not_stand_in_the_way(running: Running) -> None:
    _, client = running
    image, scores = scene((10, 30, 40, 60))
    ask(client, 5_000 * SECOND, (10, 30, 40, 60))
    client.images.publish(array_to_image(image, "rgb8", header(4_000 * SECOND)))
    client.spin(0.3)
    for k in range(4_990, 5_001):
        client.maps.publish(array_to_image(scores, "32FC1", header(k * SECOND)))
    client.spin(0.3)
    # As many maps of then as the queue holds would push out every map of now.
    ask(client, 4_001 * SECOND, (10, 30, 40, 60))


def test_sigterm_ends_the_node_cleanly(running: Running) -> None:
    node, _ = running
    assert node.end(signal.SIGTERM) == 0
    assert "Traceback" not in node.output


def test_a_slow_pipeline_works_on_the_newest_frame_and_ends_within_a_long_one(start_node: StartNode, client: Client) -> None:
    node = start_node(command=[sys.executable, str(Path(__file__).with_name("slow_node.py"))])
    client.connect()
    image, scores = scene((10, 30, 40, 60))
    image[0, 0] = 4
    for k in range(1, 31):
        send(client, k * SECOND, image, scores)
        client.spin(0.1)
    last = client.until(
        lambda: client.answer("timing", 30 * SECOND), "the last frame", again=lambda: send(client, 30 * SECOND, image, scores)
    )
    stamps = [message.header.stamp.sec for message in client.answers["instances"]]
    # Frames are skipped on the way, none comes late or out of turn, and nothing is left waiting behind the newest.
    assert stamps == sorted(stamps)
    assert last.replaced > 0
    # An image whose map is still on the way counts, too.
    assert 0 <= last.received - last.answered - last.replaced <= 2
    assert last.rejected == 0
    image[0, 0] = 255
    send(client, 40 * SECOND, image, scores)
    client.until(lambda: "long frame in work" in node.output, "a long frame", again=lambda: send(client, 41 * SECOND, image, scores))
    assert node.end(signal.SIGINT) == 0
    assert "Traceback" not in node.output


def test_lifecycle_from_a_failed_configuration_to_shutdown(start_node: StartNode, client: Client, tmp_path: Path) -> None:
    hood = tmp_path / "hood.png"
    node = start_node(runtime__ignore_mask=hood)
    client.until(lambda: "ignore mask" in client.diagnostics.get("last error", ""), "the reason")
    assert client.diagnostics["state"] == state(client) == "unconfigured"
    assert "hood.png' does not exist" in node.output
    assert cv2.imwrite(str(hood), np.zeros((96, 128), np.uint8))
    assert transition(client, Transition.TRANSITION_CONFIGURE)
    assert state(client) == "inactive"
    assert client.images.get_subscription_count() == 0
    for stamp_ns, box in ((1 * SECOND, (10, 30, 40, 60)), (2 * SECOND, (80, 30, 110, 60))):
        assert transition(client, Transition.TRANSITION_ACTIVATE)
        client.connect()
        ask(client, stamp_ns, box)
        # Between two activations anything may have happened: tracks start anew.
        assert [instance.track_id for instance in client.answer("instances", stamp_ns).instances] == [1]
        assert transition(client, Transition.TRANSITION_DEACTIVATE)
        client.until(lambda: client.images.get_subscription_count() == 0, "the node to unsubscribe")
    assert transition(client, Transition.TRANSITION_CLEANUP)
    client.until(lambda: client.node.count_publishers("ood_segmenter/instances") == 0, "the topics to go")
    assert transition(client, Transition.TRANSITION_CONFIGURE)
    assert transition(client, Transition.TRANSITION_INACTIVE_SHUTDOWN)
    assert state(client) == "finalized"
    assert node.end() == 0
    assert "Traceback" not in node.output


def test_refused_parameters_are_named_again_after_another_activation(start_node: StartNode, client: Client) -> None:
    start_node()
    client.connect()
    ask(client, 1 * SECOND, (10, 30, 40, 60))
    wrong = Parameter(name="scorer.external_low", value=ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=2.0))
    assert client.call(SetParameters, "set_parameters", SetParameters.Request(parameters=[wrong])).results[0].successful
    for stamp_ns in (2 * SECOND, 3 * SECOND):
        ask(client, stamp_ns, (10, 30, 40, 60))
        client.until(lambda: "parameters cannot be used" in client.diagnostics.get("message", ""), "the refusal")
        assert transition(client, Transition.TRANSITION_DEACTIVATE)
        assert transition(client, Transition.TRANSITION_ACTIVATE)
        client.until(lambda: "cannot be used" not in client.diagnostics.get("message", ""), "a fresh start")
        client.connect()


def test_an_error_that_ends_the_node_is_told_by_its_exit_code(start_node: StartNode) -> None:
    code = "import sys; from ros2_ood_seg.ros import node; node.rclpy.spin = lambda _: 1 / 0; sys.exit(node.main())"
    node = start_node(command=[sys.executable, "-c", code])
    assert node.process.wait(PATIENCE_S) == 1
    assert "ZeroDivisionError" in node.output


def shared_memory(process: int) -> set[Path]:
    """Segments of Fast DDS that a process has mapped; ports stay for other participants."""
    words = Path(f"/proc/{process}/maps").read_text().split()
    return {Path(word) for word in words if word.startswith("/dev/shm/fastrtps_") and "port" not in word}


@pytest.mark.parametrize("within_a_frame", [False, True])
def test_a_stop_leaves_no_shared_memory_behind(within_a_frame: bool, start_node: StartNode, client: Client) -> None:
    if not Path("/proc/self/maps").is_file() or os.environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp") != "rmw_fastrtps_cpp":
        pytest.skip("Fast DDS keeps no shared memory here")

    own = shared_memory(os.getpid())
    script = Path(__file__).with_name("slow_node.py") if within_a_frame else Path(__file__).parents[2] / "scripts" / "ood_seg_node"
    node = start_node(command=[sys.executable, str(script)])
    client.connect()
    ask(client, 1 * SECOND, (10, 30, 40, 60))
    segments = shared_memory(node.process.pid) - own
    if not segments:
        pytest.skip("this node uses no shared memory")
    if within_a_frame:
        image, scores = scene((10, 30, 40, 60))
        image[0, 0] = 255
        send(client, 2 * SECOND, image, scores)
        client.until(lambda: "long frame in work" in node.output, "a long frame", again=lambda: send(client, 3 * SECOND, image, scores))
    assert node.end(signal.SIGINT) == 0
    assert not [path for path in segments if path.exists()]


def test_a_quality_of_service_that_cannot_be_used_is_named(start_node: StartNode, client: Client) -> None:
    name = "qos_overrides./image.subscription.reliability"
    node = start_node(**{name: "relaible"})
    client.until(lambda: "cannot activate" in client.diagnostics.get("message", ""), "the reason")
    assert "relaible" in node.output
    assert client.diagnostics["state"] == state(client) == "inactive"
    assert client.images.get_subscription_count() == 0
    # It does not look well again as time goes by.
    client.spin(11.0)
    assert "cannot activate" in client.diagnostics["message"]
    broken = start_node(remaps=("__ns:=/other",), **{"qos_overrides./other/ood_segmenter/overlay.publisher.depth": "two"})
    client.until(lambda: "cannot configure" in broken.output, "the other's reason")
    assert client.node.count_publishers("/other/ood_segmenter/instances") == 0
    assert node.end() == broken.end() == 0


def test_a_camera_whose_quality_of_service_does_not_fit_is_named_until_it_goes(start_node: StartNode, client: Client) -> None:
    start_node(**{"qos_overrides./image.subscription.reliability": "reliable"})
    client.connect(client.images)
    camera = client.node.create_publisher(Image, "image", qos_profile_sensor_data)
    client.until(lambda: "incompatible quality" in client.diagnostics.get("message", ""), "the reason")
    # Errors that are over are forgotten after 10 s.
    client.spin(11.0)
    assert "a publisher of /image offers an incompatible quality of service (Best effort" in client.diagnostics["message"]
    client.node.destroy_publisher(camera)
    client.until(lambda: "no images arrive" in client.diagnostics["message"], "the camera to be forgotten")


def test_compressed_images_remapped_in_a_namespace_under_simulated_time(start_node: StartNode, dds: int) -> None:
    start_node(remaps=("__ns:=/front", "image:=/camera/image_raw"), image_transport="compressed", use_sim_time=True)
    client = Client(dds, "/front")
    images = client.node.create_publisher(CompressedImage, "/camera/image_raw/compressed", 5)
    clock = client.node.create_publisher(Clock, "/clock", 1)
    client.connect(images, client.maps, clock)
    image, scores = scene((10, 30, 40, 60))

    def send_compressed() -> None:
        # The clock is best effort: on a busy machine one message may get lost.
        for _ in range(5):
            clock.publish(Clock(clock=header(50 * SECOND + 250_000_000).stamp))
            client.spin(0.2)
        images.publish(rgb_to_compressed(image, 95, header(50 * SECOND)))
        client.maps.publish(array_to_image(scores, "32FC1", header(50 * SECOND)))

    send_compressed()
    timing = client.until(lambda: client.answer("timing", 50 * SECOND), "an answer", again=send_compressed)
    assert timing.latency_ms == pytest.approx(250.0)
    assert len(client.answer("instances", 50 * SECOND).instances) == 1
    client.close()


def test_a_parameter_that_cannot_be_used_ends_with_one_line(start_node: StartNode) -> None:
    node = start_node(profile="nonsense")
    assert node.process.wait(PATIENCE_S) == 2
    assert "ood_seg_node: unknown profile 'nonsense': use one of " in node.output
    assert "Traceback" not in node.output


def test_a_lost_gpu_does_not_keep_the_node_from_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    node = SimpleNamespace(_outputs=None, _pipeline="networks")
    OodSegmenter._free(node)  # type: ignore[arg-type]
    assert node._pipeline is None
