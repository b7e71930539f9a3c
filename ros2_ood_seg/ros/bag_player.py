"""Plays the images of a bag into ROS: ``python -m ros2_ood_seg.ros.bag_player BAG --topic T``.

For homes without ``ros2 bag play``, and for machines slower than the recording: with ``--lockstep`` the next image goes out when the
node has answered the last one, so that it sees every frame.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import rclpy
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from ros2_ood_seg.errors import InputError
from ros2_ood_seg.evaluation.bag_messages import COMPRESSED_IMAGE, NS_PER_S, header_stamp_ns
from ros2_ood_seg.evaluation.bags import BagImage, BagReader
from ros2_ood_seg.evaluation.replayed import PlayedFrame, PlayReport
from ros2_ood_seg.msg import AnomalyInstanceArray
from ros2_ood_seg.ros.discovery import DiscoveredBy
from ros2_ood_seg.ros.entry import run_command
from ros2_ood_seg.ros.transport import make_room_for_images

_KINDS = {COMPRESSED_IMAGE: CompressedImage}
_AT_ONCE = 4
"""Answers taken between two images; more than one can only wait after a pause."""


class BagPlayer(Node):
    """Publishes recorded images as they are and listens for the answers.

    Args:
        kind: Message class of the images.
        topic: Where to publish them.
        answers: Topic of the instances.
    """

    def __init__(self, kind: type, topic: str, answers: str) -> None:
        super().__init__("bag_player")
        reliable = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=10, reliability=ReliabilityPolicy.RELIABLE)
        self._images = self.create_publisher(kind, topic, reliable)
        # Raw: the stamp is all that is wanted, and masks take time to deserialise.
        self._subscription = self.create_subscription(AnomalyInstanceArray, answers, self._on_answer, reliable, raw=True)
        self._discovered = DiscoveredBy(self, str(PurePosixPath(self._subscription.topic_name).parent))
        self._sent: dict[int, tuple[int, float]] = {}
        self._answered: dict[int, float] = {}

    @property
    def is_connected(self) -> bool:
        """Someone listens to the images, and the node that offers answers will send them here."""
        answers = bool(self._discovered) and self.count_publishers(self._subscription.topic_name) > 0
        return answers and self._images.get_subscription_count() > 0

    @property
    def frames(self) -> tuple[PlayedFrame, ...]:
        """The images that were sent, in order."""
        return tuple(
            PlayedFrame(stamp_ns, time_ns, sent_s, self._answered.get(stamp_ns)) for stamp_ns, (time_ns, sent_s) in self._sent.items()
        )

    def send(self, image: BagImage) -> None:
        """Publishes an image's recorded bytes."""
        self._sent.setdefault(image.stamp_ns, (image.time_ns, time.perf_counter()))
        self._images.publish(image.data)

    def catch_up(self) -> None:
        """Takes the answers that are there, without waiting."""
        for _ in range(_AT_ONCE):
            rclpy.spin_once(self, timeout_sec=0.0)

    def has_answer(self, stamp_ns: int) -> bool:
        """Whether the instances of that image came back."""
        return stamp_ns in self._answered

    def until(self, condition: Callable[[], bool], patience_s: float) -> bool:
        """Works until the condition holds; False when patience ran out first."""
        end = time.perf_counter() + patience_s
        while not condition():
            left = end - time.perf_counter()
            if left <= 0.0:
                return False
            rclpy.spin_once(self, timeout_sec=min(left, 0.1))
        return True

    def _on_answer(self, data: bytes) -> None:
        stamp_ns = header_stamp_ns(data)
        if stamp_ns in self._sent:
            self._answered.setdefault(stamp_ns, time.perf_counter())


def play(bag: BagReader, topic: str, player: BagPlayer, options: argparse.Namespace) -> bool:
    """Plays one topic of an open bag.

    Args:
        bag: The recording.
        topic: Full name of its image topic.
        player: Publishes.
        options: ``rate``, ``lockstep``, ``patience``, ``max_seconds`` and ``max_frames`` of the command line.

    Returns:
        Whether it was played to its end.

    Raises:
        InputError: The recording is damaged; what came before was played.
    """
    start = time.perf_counter()
    played, first_ns, newest_ns = 0, 0, 0
    complete = True
    for image in bag.iter_images(topic):
        if played and (time.perf_counter() - start > options.max_seconds or played == options.max_frames):
            complete = False
            break
        if played and not options.lockstep:
            due = start + (image.time_ns - first_ns) / NS_PER_S / options.rate
            player.until(lambda due=due: time.perf_counter() >= due, max(0.0, due - time.perf_counter()))
        # Also when the next image is late already: answers that wait would look late, too, or get lost.
        player.catch_up()
        player.send(image)
        if not played:
            # Time runs from the first image, however long it took to open the recording.
            start, first_ns = time.perf_counter(), image.time_ns
        played, newest_ns = played + 1, image.stamp_ns
        if options.lockstep and not player.until(lambda s=newest_ns: player.has_answer(s), options.patience):
            # Best effort lost it, or the frame cannot be used; one more try tells.
            player.send(image)
            player.until(lambda s=newest_ns: player.has_answer(s), options.patience)
    if not options.lockstep:
        # The newest image is still in work when a recording ends.
        player.until(lambda: player.has_answer(newest_ns), options.patience)
    return complete


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bag_player", description="Plays the images of a bag into ROS.")
    parser.add_argument("bag", type=Path, help="rosbag2 recording: folder, .mcap or .db3")
    parser.add_argument("--topic", help="image topic of the bag; may be left out when there is one")
    parser.add_argument("--as", dest="target", default="image", help="topic to publish on; compressed images go to TARGET/compressed")
    parser.add_argument("--answers", default="ood_segmenter/instances", help="topic of the instances (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.0, help="speed, 1 is as recorded (default: %(default)s)")
    parser.add_argument("--lockstep", action="store_true", help="send the next image when the last one is answered")
    parser.add_argument("--patience", type=float, default=20.0, metavar="S", help="lockstep: wait this long for an answer, then try again")
    parser.add_argument(
        "--wait-for-subscribers", type=float, default=60.0, metavar="S", help="wait this long for a node (default: %(default)s)"
    )
    parser.add_argument("--max-frames", type=int, default=0, metavar="N", help="stop after N images (default: all)")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), metavar="S", help="stop after this time (default: never)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was played, answered and how fast as JSON")
    options = parser.parse_args(arguments)
    if not options.rate > 0.0:
        parser.error(f"--rate is {options.rate:g}, it must be above 0")
    return options


def run(options: argparse.Namespace) -> None:
    """Plays and reports.

    Raises:
        InputError: The bag cannot be used, or no node is there.
    """
    with BagReader(options.bag) as bag:
        topic = bag.image_topic(options.topic)
        target = options.target + ("/compressed" if topic.msgtype == COMPRESSED_IMAGE else "")
        player = BagPlayer(_KINDS.get(topic.msgtype, Image), target, options.answers)
        try:
            if not player.until(lambda: player.is_connected, options.wait_for_subscribers):
                raise InputError(
                    f"no node listens to '{target}' and answers on '{options.answers}' after {options.wait_for_subscribers:g} s"
                )
            complete = False
            try:
                complete = play(bag, topic.name, player, options)
            finally:
                report = PlayReport(topic.count, complete, player.frames)
                if options.report:
                    report.save(options.report)
        finally:
            player.destroy_node()
    print(f"played {len(report.frames)} of {report.recorded} images, {report.answered} answered", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the player; see :func:`~ros2_ood_seg.ros.entry.run_command` for what it returns."""
    options = parse_arguments(arguments)

    def work() -> None:
        make_room_for_images()
        rclpy.init(args=[])
        run(options)

    return run_command("bag_player", work)


if __name__ == "__main__":
    sys.exit(main())
