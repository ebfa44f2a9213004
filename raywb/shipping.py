"""From the journal to the service, over HTTP: the sender, and the thread that uses it.

Nothing here calls Ray. A Ray call from a background thread ends the user's process in the
middle of its exit handlers, and after ``ray.shutdown()`` silently starts a new cluster.
"""

from __future__ import annotations

import http.client
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec

from raywb.blobs import BlobLane, BlobRefused, PieceAnswer
from raywb.journal import Journal, Segments
from raywb.rows import PROTOCOL

__all__ = ["Answer", "Endpoint", "Sender", "Shipper"]

_log = logging.getLogger(__name__)

_AnswerT = TypeVar("_AnswerT")

#: Most bytes in one request; the service reads up to four times that.
BATCH_BYTES = 2 * 1024 * 1024

#: Time between two looks at the journal until the service has told its pace, in seconds.
FIRST_PACE_S = 0.25

#: Longest pause after failures, in seconds.
LONGEST_PAUSE_S = 10.0

#: Pause after a piece of a blob was not taken, in seconds.
BLOB_PAUSE_S = 2.0
#: Most requests for other processes' journals between two of our own.
REQUESTS_FOR_OTHERS = 4

#: Longest wait for one answer, in seconds.
REQUEST_TIMEOUT_S = 15.0


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where the service listens and what it wants to be shown."""

    address: str
    token: str
    cluster_id: str

    def __repr__(self) -> str:
        return f"Endpoint(address={self.address!r}, token='***')"


class Answer(msgspec.Struct, frozen=True):
    """What the service says to a request.

    Attributes:
        end: where this source's journal ends there.
        durable: what lies before it may be deleted here.
        pace_s: how long to wait before the next request.
        keep_alive_s: longest time without a request, also when there is nothing to send.
        ended: the last that the service has of this source is its end.
        home: that end was written in its place, so its journal has nothing more to give.
        run_closed: the last run is finished, and W&B has closed it.
    """

    end: int
    durable: int
    pace_s: float
    keep_alive_s: float = 10.0
    ended: bool = False
    home: bool = False
    run_closed: bool = False


class Sender:
    """One persistent connection to the service; not for several threads at once."""

    def __init__(self, endpoint: Endpoint, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self.endpoint = endpoint
        host, _, port = endpoint.address.rpartition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
        self._headers = {
            "Authorization": f"Bearer {endpoint.token}",
            "X-Raywb-Cluster": endpoint.cluster_id,
            "X-Raywb-Protocol": str(PROTOCOL),
            "Content-Type": "application/octet-stream",
        }

    def send(
        self,
        source_id: str,
        offset: int,
        data: bytes,
        *,
        gap: bool = False,
        rows: int | None = None,
    ) -> Answer:
        """Offer bytes to the service.

        Args:
            source_id: whose journal they are from.
            offset: where they begin in it.
            data: whole frames, or nothing, to ask where the service is.
            gap: what lies before is no longer there.
            rows: how many rows the source has logged; only the source itself says that.

        Raises:
            OSError: no answer, or one that is no acceptance; its text says which.
        """
        path = f"/v1/frames?source={source_id}&offset={offset}{'&gap=1' if gap else ''}"
        if rows is not None:
            path += f"&rows={rows}"
        return self._request("POST", path, data, Answer)

    def send_piece(self, digest: str, size: int, offset: int, data: bytes) -> PieceAnswer:
        """Offer a piece of a blob; an empty one asks how far it has come.

        Raises:
            BlobRefused: the service will never take this blob.
            OSError: no answer, or one that is no acceptance; its text says which.
        """
        path = f"/v1/blobs/{digest}?offset={offset}&size={size}"
        return self._request("PUT", path, data, PieceAnswer)

    def _request(self, method: str, path: str, data: bytes, expected: type[_AnswerT]) -> _AnswerT:
        try:
            self._connection.request(method, path, body=data, headers=self._headers)
            response = self._connection.getresponse()
            body = response.read()
        except http.client.HTTPException as error:
            self.close()
            raise ConnectionError(f"no HTTP answer: {error!r}") from error
        except OSError:
            self.close()
            raise
        if response.status != 200:
            text = f"HTTP {response.status}: {body[:200].decode(errors='replace')}"
            raise BlobRefused(text) if response.status in (409, 413) else ConnectionError(text)
        try:
            return msgspec.json.decode(body, type=expected)
        except msgspec.DecodeError as error:
            raise ConnectionError(f"an answer that makes no sense: {error}") from error

    def deliver(
        self,
        source_id: str,
        segments: Segments,
        offset: int,
        *,
        batch_bytes: int = BATCH_BYTES,
        rows: int | None = None,
        final: bool = False,
    ) -> Delivered:
        """Offer one batch from ``offset`` on, or ask where the service is when there is none."""
        begin, data = segments.read(offset, batch_bytes, final=final)
        answer = self.send(source_id, begin, data, gap=begin > offset, rows=rows)
        return Delivered(answer, begin, len(data))

    def close(self) -> None:
        """Close the connection; the next request opens it again."""
        self._connection.close()


class Delivered(NamedTuple):
    """One request: what was answered, and which bytes were offered."""

    answer: Answer
    offset: int
    length: int


def spread(pause_s: float) -> float:
    """A pause of about this length: sources that came up together shall not stay together."""
    return pause_s * random.uniform(0.8, 1.2)


class Shipper:
    """The background thread of a process: ships its journal at the service's pace.

    Args:
        journal: what to ship.
        endpoint: where to; None while nobody knows, which :meth:`use` changes.
        before_request: called in the thread before each look at the journal.
        blobs: frozen files that are sent as well, in pieces between the rows.
        for_others: makes one request for another process's journal, and says whether there is
            more to do at once; called when ours is shipped.
    """

    def __init__(
        self,
        journal: Journal,
        endpoint: Endpoint | None,
        before_request: Callable[[], None],
        blobs: BlobLane,
        for_others: Callable[[Sender], bool] = lambda sender: False,
    ) -> None:
        #: The contents of artifacts that are to go.
        self.blobs = blobs
        self._journal = journal
        self._endpoint = endpoint
        #: The thread's own: another one only says, in ``_endpoint``, where it is to lead.
        self._sender: Sender | None = None
        self._before_request = before_request
        self._for_others = for_others
        self._pace_s = FIRST_PACE_S
        self._keep_alive_s = math.inf
        self._heard_at = time.monotonic()
        self._offset = 0
        self._stopping = False
        self._wake = threading.Event()
        self._progress = threading.Condition()
        #: Requests that failed, also those for others; and what our last one said.
        self.failures = 0
        self.last_error: str | None = None
        #: The same of the files of artifacts.
        self.blob_error: str | None = None
        self._blobs_at = 0.0
        self._thread = threading.Thread(target=self._run, name="raywb-shipper", daemon=True)

    def start(self) -> None:
        """Begin to ship."""
        self._thread.start()

    @property
    def failing(self) -> bool:
        """The last request failed, or there is no address to send to."""
        return self._endpoint is None or self.last_error is not None

    def use(self, endpoint: Endpoint) -> None:
        """Send to this address from now on."""
        self._endpoint = endpoint
        self._wake.set()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the service has everything that is in the journal now, artifacts included.

        Returns:
            False when the time was over before.
        """
        target = self._journal.end
        blobs = self.blobs.added

        def is_home() -> bool:
            return self._journal.acknowledged >= target and self.blobs.gone >= blobs

        self._wake.set()
        with self._progress:
            return self._progress.wait_for(lambda: is_home() or self._stopping, timeout_s) and (
                is_home()
            )

    def wake(self) -> None:
        """There is something that need not wait for the pace."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread after the request that is under way."""
        self._stopping = True
        self._wake.set()
        with self._progress:
            self._progress.notify_all()

    def _run(self) -> None:
        pause_s = self._pace_s
        while True:
            self._wake.wait(spread(pause_s))
            self._wake.clear()
            if self._stopping:
                return
            try:
                began = time.monotonic()
                self._before_request()
                self._ship()
                self.last_error = None
                self._ship_blobs()
                self._ship_for_others()
                pause_s = max(self._pace_s - (time.monotonic() - began), 0.0)
            except OSError as error:
                self.failures += 1
                if self.last_error is None:
                    _log.info("raywb: the service does not answer (%s); rows wait on disk", error)
                self.last_error = str(error) or type(error).__name__
                pause_s = min(max(pause_s, self._pace_s) * 2, LONGEST_PAUSE_S)

    def _ship(self) -> None:
        endpoint = self._endpoint
        if endpoint is None:
            return
        if self._sender is None or self._sender.endpoint != endpoint:
            self._sender = Sender(endpoint)
        journal = self._journal
        while not self._stopping and journal.acknowledged < journal.end:
            delivered = self._sender.deliver(
                journal.source_id, journal.segments, self._offset, rows=journal.rows
            )
            self._take(delivered.answer)
            if delivered.length < BATCH_BYTES // 2 and self._offset >= delivered.offset:
                break  # what came meanwhile waits for its time, so that the pace is kept
        silent_s = time.monotonic() - self._heard_at
        if not self._stopping and (journal.wants_room or silent_s >= self._keep_alive_s):
            # Whoever has nothing to log says that it lives, or its node would be swept. And no
            # row brings news of what may be deleted, as long as none can be written.
            rows = journal.rows
            self._take(self._sender.send(journal.source_id, self._offset, b"", rows=rows))

    def _take(self, answer: Answer) -> None:
        self._heard_at = time.monotonic()
        self._pace_s = answer.pace_s
        self._keep_alive_s = answer.keep_alive_s
        self._offset = answer.end
        with self._progress:
            self._journal.acknowledge(answer.end, answer.durable)
            self._progress.notify_all()

    def _ship_blobs(self) -> None:
        """Send blobs piece by piece; whenever it is time for rows, these go first.

        A service that takes no blobs may still take rows: these do not wait for better times.
        """
        rows_at = time.monotonic() + self._pace_s
        while self._sender is not None and not self._stopping:
            if time.monotonic() < self._blobs_at:
                return
            try:
                more = self.blobs.send_piece(self._sender, self._journal.acknowledged)
                self.blob_error = None
            except OSError as error:
                self.failures += 1
                self.blob_error = str(error) or type(error).__name__
                self._blobs_at = time.monotonic() + BLOB_PAUSE_S
                return
            if not more:
                return
            with self._progress:
                self._progress.notify_all()
            if time.monotonic() >= rows_at:
                self._before_request()
                self._ship()
                rows_at = time.monotonic() + self._pace_s

    def _ship_for_others(self) -> None:
        """A few requests for others, unless somebody waits for ours."""
        try:
            for _ in range(REQUESTS_FOR_OTHERS):
                if self._sender is None or self._stopping or self._wake.is_set():
                    return
                if not self._for_others(self._sender):
                    return
        except OSError as error:
            self.failures += 1
            _log.info("raywb: the journal of a dead process is not home yet: %s", error)
