"""``python -m raywb.view.history [--background] DIR``: reads a directory, answers its parent.

Requests come on the standard input, answers leave on the standard output, each four bytes of
length (big endian) and a message: a request is JSON, an answer a byte that is 1 when all went
well, and JSON. It ends when its input does, that is, with whoever started it. Between two
requests it reads on, and in between looks whether the outbox has grown. When that fails, whoever
asks is told why, and it tries again, after longer and longer pauses.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

import msgspec

from raywb.errors import RaywbError
from raywb.service.live_rows import LiveRows
from raywb.view.history.answers import answer_points, answer_series
from raywb.view.history.directory import LeftRuns
from raywb.view.history.history_process import LENGTH
from raywb.view.history.outbox_reader import OutboxReader
from raywb.view.history.requests import (
    DirectoryRequest,
    PointsRequest,
    Progress,
    ProgressRequest,
    SeriesRequest,
)

__all__ = ["main"]

#: How often it is looked whether the outbox has grown, in seconds.
LOOK_S = 0.5

#: Pause before it is tried again what failed, at first and at most, in seconds.
AGAIN_S = (1.0, 30.0)

#: Beside a service it makes way for the work, and yet gets a share where every CPU is taken.
NICE = 5

_requests = msgspec.json.Decoder(SeriesRequest | PointsRequest | DirectoryRequest | ProgressRequest)


class _Answering:
    """Reads one directory, and answers.

    Attributes:
        reader: reads its outbox.
        more: whether there is more to read at once.
        trouble: why it cannot be read at present, in one sentence.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.more = False
        self.trouble: str | None = None
        self._pause_s = AGAIN_S[0]
        self._again_at = 0.0
        self._begin()

    def _begin(self) -> None:
        live_rows = LiveRows()
        self.reader = OutboxReader(self._directory / "outbox", on_item=live_rows.take)
        self._left = LeftRuns(self._directory, self.reader, live_rows)

    def read_on(self) -> None:
        """Read a piece of what is new; what fails is tried again after a pause."""
        if self.trouble is not None and time.monotonic() < self._again_at:
            return
        try:
            self.more = (self.more or self.reader.look()) and self.reader.read_some()
        except Exception as error:  # noqa: BLE001 - whoever asks is told, and it is tried again
            self.trouble = f"the outbox cannot be read ({_told(error)}); it is tried again"
            self.more = False
            self._again_at = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, AGAIN_S[1])
            if not isinstance(error, OSError):
                self._begin()  # of what it was about to take in, some may be in already
        else:
            self.trouble, self._pause_s = None, AGAIN_S[0]

    def answer(self, message: bytes) -> bytes:
        """The answer to one request; an error becomes one sentence."""
        answer: object
        try:
            match _requests.decode(message):
                case DirectoryRequest():
                    answer = self._left.describe(self.trouble)
                case _ if self.trouble is not None:
                    return _refusal(self.trouble)
                case SeriesRequest() as asked:
                    answer = answer_series(self.reader, asked)
                case PointsRequest() as request:
                    answer = answer_points(self.reader, request)
                case ProgressRequest(run):
                    answer = Progress(self.reader.reading(run), self.reader.seen())
        except Exception as error:  # noqa: BLE001 - whoever asked is told, and others go on
            return _refusal(_told(error))
        return b"\1" + msgspec.json.encode(answer)


def _refusal(sentence: str) -> bytes:
    return b"\0" + msgspec.json.encode({"error": sentence})


def _told(error: Exception) -> str:
    """What is told of an error; those of ours are sentences already."""
    return str(error) if isinstance(error, RaywbError) else f"{type(error).__name__}: {error}"


def main(directory: Path) -> None:
    """Read and answer until the standard input ends."""
    answering = _Answering(directory)
    requests, answers = sys.stdin.fileno(), sys.stdout.buffer
    while True:
        ready = select.select([requests], [], [], 0 if answering.more else LOOK_S)[0]
        # Nobody is answered before there is something, nor with less than there is by now.
        if not ready or answering.reader.position == 0 or not answering.more:
            answering.read_on()
        if not ready:
            continue
        header = _read(requests, LENGTH.size)
        if header is None:
            return
        message = _read(requests, LENGTH.unpack(header)[0])
        if message is None:
            return
        reply = answering.answer(message)
        answers.write(LENGTH.pack(len(reply)) + reply)
        answers.flush()


def _read(fd: int, length: int) -> bytes | None:
    """So many bytes; None when the input ends before."""
    data = b""
    while len(data) < length:
        more = os.read(fd, length - len(data))
        if not more:
            return None
        data += more
    return data


if __name__ == "__main__":
    # Ctrl-C is for whoever started it, and ends its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "--background" in sys.argv[1:-1]:
        os.nice(NICE)
    main(Path(sys.argv[-1]))
