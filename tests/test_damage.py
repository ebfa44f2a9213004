"""Torn and flipped bytes, anywhere: never a crash, never a good frame thrown away, all counted.

Each property damages real files as a bad disk would, and then reads them as the shipping thread,
the sweep and a restarted service do. ``RAYWB_LONG=1`` tries many more examples.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from local_service import LocalService
from ray_cluster import until
from wandb_file import read_runs

from raywb.journal import Journal, Segments
from raywb.rows import HEADER, Frame, Row, encode, frame, scan
from raywb.service.ledger import Ledger
from raywb.service.merge import Merge
from raywb.service.outbox import Batch, Outbox, OutRow
from raywb.service.state import ServiceState, load_state, save_state

# Read here, since each test runs without such variables.
LONG = bool(os.environ.get("RAYWB_LONG"))

many = settings(
    max_examples=3000 if LONG else 100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

#: Payloads among which are some that look like the beginning of a frame.
payloads = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=40),
        st.just(HEADER.pack(0x5752, 30, 0) + b"like a frame"),
        st.just(b"RWRWRW"),
        st.binary(min_size=300, max_size=600),
    ),
    min_size=1,
    max_size=25,
)


@st.composite
def flips(draw: st.DrawFn, lengths: list[int], most: int = 3) -> list[tuple[int, int]]:
    """Bytes to change in pieces that lie one behind the other: where, and by which bits.

    Lengths are hit more often than they would be by chance: they lead a reader astray.
    """
    starts = itertools.accumulate(lengths[:-1], initial=0)
    anywhere = st.integers(0, sum(lengths) - 1)
    in_a_length = st.sampled_from([start + 2 for start in starts])
    places = draw(
        st.lists(st.one_of(anywhere, in_a_length), min_size=1, max_size=most, unique=True)
    )
    return [(place, draw(st.integers(1, 255))) for place in places]


def flip(paths: list[Path], changes: list[tuple[int, int]]) -> None:
    """Change bytes of several files, counted as if they were one."""
    for place, bits in changes:
        for path in paths:
            size = path.stat().st_size
            if place < size:
                content = bytearray(path.read_bytes())
                content[place] ^= bits
                path.write_bytes(content)
                break
            place -= size


def hit(lengths: list[int], changes: list[tuple[int, int]]) -> set[int]:
    """Which of several pieces that lie one behind the other the changes are in."""
    found = set()
    for place, _ in changes:
        for number, length in enumerate(lengths):
            if place < length:
                found.add(number)
                break
            place -= length
    return found


def read_all(segments: Segments, limit: int, *, final: bool) -> list[tuple[int, bytes]]:
    """The pieces that a shipper would send, each scanned by the service on its own."""
    offset, pieces = 0, []
    while True:
        begin, data = segments.read(offset, limit, final=final)
        if not data:
            return pieces
        assert begin >= offset
        pieces.append((begin, data))
        offset = begin + len(data)


def frames_in(pieces: list[tuple[int, bytes]]) -> tuple[list[bytes], int]:
    """Messages of whole frames, and how many stretches are damaged."""
    found, damaged = [], 0
    for _, data in pieces:
        for piece in scan(data):
            if isinstance(piece, Frame):
                found.append(bytes(piece.payload))
            else:
                damaged += 1
    return found, damaged


@many
@given(payloads, st.integers(20, 900), st.integers(30, 2000), st.booleans(), st.data())
def test_a_damaged_journal_costs_only_what_was_hit(
    tmp_path_factory: pytest.TempPathFactory,
    sent: list[bytes],
    segment_bytes: int,
    limit: int,
    final: bool,
    data: st.DataObject,
) -> None:
    """Flipped bytes lose the frames that they are in, and no other; each other one comes once.

    While its process lives, what follows the damage at the very end waits for the next frame.
    """
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory, segment_bytes=segment_bytes)
    for payload in sent:
        journal.append(payload)
    segments = journal.segments
    paths = [segments.path(start) for start in segments.starts()]
    lengths = [HEADER.size + len(payload) for payload in sent]
    changes = data.draw(flips(lengths))
    lost = hit(lengths, changes)
    flip(paths, changes)
    if not final:
        journal.append(b"one more")
        sent = [*sent, b"one more"]
    journal.close(keep=True)
    pieces = read_all(segments, limit, final=final)
    survivors = [payload for number, payload in enumerate(sent) if number not in lost]
    found, damaged = frames_in(pieces)
    # A byte that is changed may uncover a whole frame within a payload: not with these ones.
    assert found == survivors
    assert damaged >= 1
    end = 0
    for begin, piece in pieces:
        assert begin == end, "bytes were passed over"
        end = begin + len(piece)
    assert end == segments.end()
    event(f"{len(lost)} frames hit")
    shutil.rmtree(directory)


@many
@given(payloads, st.integers(20, 900), st.integers(30, 2000), st.data())
def test_a_torn_journal_keeps_what_is_whole(
    tmp_path_factory: pytest.TempPathFactory,
    sent: list[bytes],
    segment_bytes: int,
    limit: int,
    data: st.DataObject,
) -> None:
    """Cut off in any segment, every frame before the cut and in later segments is read once."""
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory, segment_bytes=segment_bytes)
    for payload in sent:
        journal.append(payload)
    segments = journal.segments
    start = data.draw(st.sampled_from(segments.starts()))
    size = segments.path(start).stat().st_size
    cut = data.draw(st.integers(0, size))
    os.truncate(segments.path(start), cut)
    journal.close(keep=True)
    survivors, position, torn = [], 0, False
    for payload in sent:
        end = position + HEADER.size + len(payload)
        torn = torn or position < start + cut < end
        if not start + cut < end <= start + size:
            survivors.append(payload)
        position = end
    for final in (False, True):
        found, damaged = frames_in(read_all(segments, limit, final=final))
        assert found == survivors
        seen = final or start != segments.starts()[-1]
        assert bool(damaged) == (torn and seen)
    shutil.rmtree(directory)


SOURCES = [digit * 32 for digit in "abc"]


def batch_of(first: int, count: int) -> list[bytes]:
    """Frames of numbered rows."""
    rows = [Row(0, 1.0, None, {"x": number}) for number in range(first, first + count)]
    return [frame(encode(row)) for row in rows]


def rows_of(ledger: Ledger) -> tuple[dict[str, list[int]], Merge]:
    """What the service makes of a ledger: the rows of each source, and its merge."""
    merge = Merge()
    merge.open_run(1)
    found: dict[str, list[int]] = {source: [] for source in SOURCES}
    for entry in ledger.read(0):
        batch = merge.consume(entry.source_id, entry.offset, entry.data, entry.next_position)
        for item in batch.items if batch else []:
            found[entry.source_id] += item.metrics.values()
    return found, merge


#: Batches in the order of their arrival: which source, and how many rows.
arrivals = st.lists(st.tuples(st.sampled_from(SOURCES), st.integers(1, 5)), min_size=1, max_size=12)


@many
@given(arrivals, st.integers(100, 2000), st.data())
def test_a_damaged_ledger_costs_only_what_was_hit(
    tmp_path_factory: pytest.TempPathFactory,
    batches: list[tuple[str, int]],
    segment_bytes: int,
    data: st.DataObject,
) -> None:
    """A flipped byte costs the row that it is in, though its whole batch fails the checksum.

    That holds for the last batch too, which was acknowledged like any other. Only a batch that
    has lost both of its edges is unreadable.
    """
    directory = tmp_path_factory.mktemp("ledger")
    ledger = Ledger(directory, segment_bytes=segment_bytes)
    lengths, owners, counts = [], [], dict.fromkeys(SOURCES, 0)
    for number, (source, count) in enumerate(batches):
        frames = batch_of(counts[source], count)
        ledger.append(source, ledger.end_of(source), b"".join(frames))
        lengths += [12, 36, *map(len, frames), 36]
        rows = [(number, source, counts[source] + row) for row in range(count)]
        owners += [(number, "record"), (number, "head"), *rows, (number, "tail")]
        counts[source] += count
    ends = {source: ledger.end_of(source) for source in SOURCES}
    ledger.close()
    changes = data.draw(flips(lengths))
    flip(sorted(directory.iterdir()), changes)
    touched = {owners[number] for number in hit(lengths, changes)}
    gone = {
        number for number in range(len(batches)) if {(number, "head"), (number, "tail")} <= touched
    }
    kept: dict[str, list[int]] = {source: [] for source in SOURCES}
    for owner in owners:
        if len(owner) == 3 and owner not in touched and owner[0] not in gone:
            kept[owner[1]].append(owner[2])
    ledger = Ledger(directory, segment_bytes=segment_bytes)
    found, merge = rows_of(ledger)
    assert found == kept
    # Without its edges, the last batch cannot be told from one that was never acknowledged.
    assert ledger.damaged > 0 or gone == {len(batches) - 1}
    assert ledger.unreadable <= len(gone)
    hurt = {owner for owner in touched if len(owner) == 3 and owner[0] not in gone}
    assert bool(merge.lost.get("damaged_frames")) == bool(hurt)
    if not gone:
        assert {source: ledger.end_of(source) for source in SOURCES} == ends
        assert ledger.missing_bytes == {}
    for source in SOURCES:
        end = ledger.end_of(source)
        more = b"".join(batch_of(counts[source], 2))
        assert ledger.append(source, end, more) == end + len(more)
        kept[source] += [counts[source], counts[source] + 1]
    assert rows_of(ledger)[0] == kept
    ledger.close()
    shutil.rmtree(directory)


@many
@given(arrivals, st.data())
def test_a_torn_ledger_keeps_what_is_whole(
    tmp_path_factory: pytest.TempPathFactory, batches: list[tuple[str, int]], data: st.DataObject
) -> None:
    """Cut off anywhere, every batch before the cut is there, and the rest is asked for again."""
    directory = tmp_path_factory.mktemp("ledger")
    ledger = Ledger(directory)
    sent: dict[str, list[bytes]] = {source: [] for source in SOURCES}
    positions = []
    for source, count in batches:
        frames = batch_of(len(sent[source]), count)
        ledger.append(source, ledger.end_of(source), b"".join(frames))
        sent[source] += frames
        positions.append(ledger.end)
    ledger.close()
    cut = data.draw(st.integers(0, positions[-1]))
    os.truncate(directory / f"{0:020d}.log", cut)
    ledger = Ledger(directory)
    whole = dict.fromkeys(SOURCES, 0)
    for (source, count), position in zip(batches, positions, strict=True):
        whole[source] += count * (position <= cut)
    found, merge = rows_of(ledger)
    assert found == {source: list(range(count)) for source, count in whole.items()}
    assert (ledger.damaged, merge.lost) == (0, {})
    for source in SOURCES:
        stream = b"".join(sent[source])
        ledger.append(source, ledger.end_of(source), stream[ledger.end_of(source) :])
    assert rows_of(ledger)[0] == {s: list(range(len(frames))) for s, frames in sent.items()}
    ledger.close()
    shutil.rmtree(directory)


def test_what_is_unreadable_is_counted(tmp_path: Path) -> None:
    """A batch without edges is counted as unreadable, and as bytes that its source lacks."""
    ledger = Ledger(tmp_path)
    batch = b"".join(batch_of(0, 3))
    for number in range(3):
        ledger.append(SOURCES[0], number * len(batch), batch)
    ledger.close()
    record = 12 + 36 + len(batch) + 36
    flip([tmp_path / f"{0:020d}.log"], [(record + 20, 1), (2 * record - 5, 1)])
    for _ in range(2):
        ledger = Ledger(tmp_path)
        assert (ledger.damaged, ledger.unreadable) == (1, 1)
        assert ledger.missing_bytes == {SOURCES[0]: len(batch)}
        assert rows_of(ledger)[0][SOURCES[0]] == [0, 1, 2] * 2
        assert (ledger.damaged, ledger.unreadable) == (1, 1), "counted again when read again"
        ledger.close()


@many
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.data())
def test_a_damaged_outbox_moves_no_other_row(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], data: st.DataObject
) -> None:
    """Every row that is read has the number that it was written with; the others are counted."""
    directory = tmp_path_factory.mktemp("outbox")
    outbox = Outbox(directory)
    written, lengths, before = 0, [], 0
    for count in counts:
        rows = [OutRow(1, 1.0, {"x": number}) for number in range(written, written + count)]
        outbox.append(Batch(1, 0, [], rows))
        written += count
        lengths.append(outbox.end - before)
        before = outbox.end
    outbox.close()
    flip([directory / f"{0:020d}.log"], data.draw(flips(lengths)))
    outbox = Outbox(directory)
    recovered = list(outbox.recover())
    outbox.append(Batch(1, 0, [], [OutRow(1, 1.0, {"x": outbox.rows_of(1)})]))
    first = data.draw(st.integers(0, outbox.rows_of(1) - 1))
    cursor = outbox.cursor(1, first)
    found = []
    while items := outbox.read(cursor, 3):
        found += items
    assert [number for number, _ in found] == list(range(first, outbox.rows_of(1)))
    lost = [item for _, item in found if isinstance(item, OutRow) and "x" not in item.metrics]
    for number, item in found:
        assert item in lost or item.metrics == {"x": number}
    if first == 0:
        assert outbox.lost_rows[1] == len(lost)
    assert len(recovered) < len(counts)
    outbox.close()
    shutil.rmtree(directory)


def a_state() -> ServiceState:
    return ServiceState(cluster_id="c" * 56, token="t", incarnation=3, port=1234)


@many
@given(st.data())
def test_a_damaged_state_is_read_from_its_copy(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Flipped or torn, service.json is never believed; its copy is, and the status says so."""
    directory = tmp_path_factory.mktemp("state")
    save_state(directory, a_state())
    path = directory / data.draw(st.sampled_from(["service.json", "service.json.copy"]))
    content = path.read_bytes()
    if data.draw(st.booleans()):
        flip([path], data.draw(flips([len(content)])))
    else:
        os.truncate(path, data.draw(st.integers(0, len(content) - 2)))
    state = load_state(directory)
    assert state is not None
    restored = int(path.name == "service.json" and path.read_bytes() != content)
    # A change that leaves the values as they are, of a blank for instance, is no damage.
    assert state.restored in (0, restored)
    state.restored = 0
    assert state == a_state()
    shutil.rmtree(directory)


def test_a_state_without_a_good_copy_is_an_error(tmp_path: Path) -> None:
    """Where both are damaged nothing is made up."""
    save_state(tmp_path, a_state())
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"1234", b"1235"))
    with pytest.raises(msgspec.DecodeError, match="checksum"):
        load_state(tmp_path)


def rows_of_wandb(service: LocalService) -> list[int]:
    return [x for run in read_runs(service.directory).values() for x in run.values("s/x")]


def test_damage_is_in_status_report_and_run(service: LocalService) -> None:
    """A service restarted on damaged files goes on, shows what it found, and counts what it cost.

    Rows that W&B had before stay as they are, and later ones come behind them.
    """
    service.up()
    service.start()
    client = service.client("s")
    for number in range(6):
        client.log({"x": number}, step=number)
        assert client.flush(20.0)
        service.wait_for(lambda status: status.outbox_rows > number)  # noqa: B023
    until("rows in W&B's file", lambda: len(rows_of_wandb(service)) == 6)
    service.down()
    ledger = service.directory / "ledger" / f"{0:020d}.log"
    place = ledger.read_bytes().rindex(b"RWEH")
    flip([ledger], [(place, 1), (ledger.stat().st_size // 2, 0)])
    outbox = service.directory / "outbox" / f"{0:020d}.log"
    flip([outbox], [(outbox.stat().st_size // 2, 1)])
    flip([service.directory / "service.json"], [(30, 1)])
    service.up()
    problems = " ".join(service.status().problems)
    assert "1 stretches of the ledger were damaged" in problems
    assert "1 stretches of the outbox were damaged" in problems
    assert "service.json was damaged on disk 1 times" in problems
    for number in range(6, 9):
        client.log({"x": number}, step=number)
    assert client.flush(20.0)
    report = service.service.finish(60.0, 0)
    assert report.complete, report
    assert report.lost == {"outbox_damaged": 1}
    # The row was with W&B before the damage; nobody can know that any more, so it counts as lost.
    assert report.received_rows + report.lost["outbox_damaged"] == 9
    assert report.delivered_rows == report.received_rows
    assert rows_of_wandb(service) == list(range(9))
    (run,) = read_runs(service.directory).values()
    assert run.summary["raywb/lost/outbox_damaged"] == 1
