"""``python -m raywb.view.history [--background] DIR``: reads a directory, answers its parent.

Requests come on the standard input, answers leave on the standard output, each four bytes of
length (big endian) and a message: a request is JSON, an answer a byte that is 1 when all went
well, and JSON. It ends when its input does, that is, with whoever started it. Between two
requests it reads on, and in between looks whether the outbox has grown.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import msgspec

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

_requests = msgspec.json.Decoder(SeriesRequest | PointsRequest | DirectoryRequest | ProgressRequest)


class _Answering:
    def __init__(self, directory: Path) -> None:
        live_rows = LiveRows()
        self.reader = OutboxReader(directory / "outbox", on_item=live_rows.take)
        self._left = LeftRuns(directory, self.reader, live_rows)

    def answer(self, message: bytes) -> bytes:
        """The answer to one request; an error becomes one sentence."""
        answer: object
        try:
            match _requests.decode(message):
                case SeriesRequest() as asked:
                    answer = answer_series(self.reader, asked)
                case PointsRequest() as request:
                    answer = answer_points(self.reader, request)
                case ProgressRequest(run):
                    answer = Progress(self.reader.reading(run), self.reader.seen())
                case DirectoryRequest():
                    answer = self._left.describe()
        except Exception as error:  # noqa: BLE001 - whoever asked is told, and others go on
            return b"\0" + msgspec.json.encode({"error": f"{type(error).__name__}: {error}"})
        return b"\1" + msgspec.json.encode(answer)


def main(directory: Path) -> None:
    """Read and answer until the standard input ends."""
    answering = _Answering(directory)
    reader = answering.reader
    requests, answers = sys.stdin.fileno(), sys.stdout.buffer
    more = reader.look()
    while True:
        ready = select.select([requests], [], [], 0 if more else LOOK_S)[0]
        # Nobody is answered before there is something, nor with less than there is by now.
        if not ready or reader.position == 0 or not more:
            more = (more or reader.look()) and reader.read_some()
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
        os.nice(10)
    main(Path(sys.argv[-1]))
