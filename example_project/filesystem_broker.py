"""kombu's filesystem transport, except that a message appears whole.

kombu opens the message's file under its final name and then writes it. A worker that lists the folder in between takes an
empty file, stops with ``Unrecoverable error: JSONDecodeError``, and the message is gone: measured on kombu 5.7, one message in
2000 with a consumer that looks every 50 ms, and one in 11 on a busy machine with one that never pauses. Here it is written
under a name that no queue looks for, and renamed.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):  # type: ignore[misc]
    def _put(self, queue: str, payload: dict[str, Any], **_: Any) -> None:
        name = f"{round(time.monotonic() * 1000)}_{uuid.uuid4()}.{queue}"
        written = Path(self.data_folder_out, f"{name}.part")
        written.write_text(dumps(payload))
        written.rename(written.with_name(f"{name}.msg"))


class Transport(filesystem.Transport):  # type: ignore[misc]
    Channel = Channel
