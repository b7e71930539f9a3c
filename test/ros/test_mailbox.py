from __future__ import annotations

import threading

from ros2_ood_seg.ros.mailbox import Mailbox


def test_only_the_newest_item_is_kept() -> None:
    mailbox: Mailbox[int] = Mailbox()
    assert [mailbox.put(k) for k in (1, 2, 3)] == [False, True, True]
    assert mailbox.take() == 3
    assert not mailbox.put(4)


def test_a_waiting_reader_gets_what_comes() -> None:
    mailbox: Mailbox[str] = Mailbox()
    taken: list[str | None] = []
    reader = threading.Thread(target=lambda: taken.append(mailbox.take()), daemon=True)
    reader.start()
    mailbox.put("frame")
    reader.join(30)
    assert taken == ["frame"]


def test_closing_wakes_the_reader_and_drops_the_item() -> None:
    mailbox: Mailbox[int] = Mailbox()
    taken: list[int | None] = []
    reader = threading.Thread(target=lambda: taken.append(mailbox.take()), daemon=True)
    reader.start()
    mailbox.close()
    reader.join(30)
    assert taken == [None]
    mailbox.put(1)
    assert mailbox.take() is None
    assert mailbox.closed
