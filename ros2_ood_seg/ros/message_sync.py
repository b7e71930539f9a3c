"""Stand-ins for what the node uses of message_filters, for environments without it: same names, arguments and results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from rclpy.node import Node


class SimpleFilter:
    """Passes what it gets on to the callbacks that were registered."""

    def __init__(self) -> None:
        self.callbacks: dict[int, tuple[Callable[..., None], tuple[Any, ...]]] = {}

    def registerCallback(self, cb: Callable[..., None], *args: Any) -> int:  # noqa: N802
        """Registers ``cb(*messages, *args)``, called in the order of registration."""
        number = len(self.callbacks)
        self.callbacks[number] = (cb, args)
        return number

    def signalMessage(self, *msg: Any) -> None:  # noqa: N802
        """Calls all callbacks."""
        for cb, args in self.callbacks.values():
            cb(*msg, *args)


class Subscriber(SimpleFilter):
    """A subscription as the source of a filter.

    Args:
        node: Who subscribes.
        msg_type: Message class.
        topic: Topic name.
        kwargs: As for ``node.create_subscription``.
    """

    def __init__(self, node: Node, msg_type: type, topic: str, **kwargs: Any) -> None:
        super().__init__()
        kwargs.setdefault("qos_profile", 10)
        self.node = node
        self.topic = topic
        self.sub = node.create_subscription(msg_type, topic, self.signalMessage, **kwargs)


class TimeSynchronizer(SimpleFilter):
    """Puts messages with equal stamps together.

    Args:
        fs: The filters to listen to.
        queue_size: Messages kept of each while waiting for the others; those with the oldest stamps go first.
    """

    def __init__(self, fs: Sequence[SimpleFilter], queue_size: int) -> None:
        super().__init__()
        self.queue_size = queue_size
        self.queues: list[dict[int, Any]] = [{} for _ in fs]
        for index, (source, queue) in enumerate(zip(fs, self.queues, strict=True)):
            source.registerCallback(self.add, queue, index)

    def add(self, msg: Any, my_queue: dict[int, Any], my_queue_index: int) -> None:
        """Takes a message and passes on the set that it completes."""
        stamp_ns = msg.header.stamp.sec * 1_000_000_000 + msg.header.stamp.nanosec
        my_queue[stamp_ns] = msg
        while len(my_queue) > self.queue_size:
            del my_queue[min(my_queue)]
        stamps_ns = self._match(stamp_ns, my_queue_index)
        if stamps_ns and all(t in queue for t, queue in zip(stamps_ns, self.queues, strict=True)):
            self.signalMessage(*(queue.pop(t) for t, queue in zip(stamps_ns, self.queues, strict=True)))

    def _match(self, stamp_ns: int, _index: int) -> tuple[int, ...]:
        return (stamp_ns,) * len(self.queues)


class ApproximateTimeSynchronizer(TimeSynchronizer):
    """Puts messages with the nearest stamps together.

    Args:
        fs: The filters to listen to.
        queue_size: Messages kept of each while waiting for the others.
        slop: The stamps of a set differ by less than this, s.
    """

    def __init__(self, fs: Sequence[SimpleFilter], queue_size: int, slop: float) -> None:
        super().__init__(fs, queue_size)
        self.slop_ns = round(slop * 1e9)

    def _match(self, stamp_ns: int, index: int) -> tuple[int, ...]:
        near = [sorted((t for t in queue if abs(t - stamp_ns) <= self.slop_ns), key=lambda t: abs(t - stamp_ns)) for queue in self.queues]
        near[index] = [stamp_ns]
        sets = (stamps for stamps in itertools.product(*near) if max(stamps) - min(stamps) < self.slop_ns)
        return next(sets, ())
