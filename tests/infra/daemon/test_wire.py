"""The codec: what is written can be read, in whatever pieces it arrives, and nonsense is one typed error."""

import struct
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.daemon import BuildResult, BuildStatus, DaemonProtocolError
from infra.daemon.values import decode_path_info, encode_path_info, plain_text
from infra.daemon.wire import (
    MAX_ANNOUNCED_BYTES,
    MAX_ANNOUNCED_FIELDS,
    MAX_FIELD_BYTES,
    MAX_FIELDS,
    MAX_LIST_ITEMS,
    MAX_TEXT_BYTES,
    MAX_WORD_BYTES,
    RESULT_BUILD_LOG_LINE,
    RUN_BYTES,
    TAG_ERROR,
    TAG_LAST,
    TAG_NEXT,
    TAG_RESULT,
    TAG_START_ACTIVITY,
    TAG_STOP_ACTIVITY,
    ActivityStarted,
    ActivityStopped,
    Encoder,
    Inbox,
    IncompleteError,
    Last,
    LineRun,
    Message,
    Refusal,
    Result,
    Text,
)
from infra.nix.hashing import sha256_text
from infra.nix.path_info import PathInfo

integers = st.integers(0, 2**64 - 1)
strings = st.binary(max_size=40)
fields = st.lists(integers | strings, max_size=4).map(tuple)
messages = st.one_of(
    st.just(Last()),
    st.builds(Refusal, integers, strings),
    st.builds(Text, strings),
    st.builds(ActivityStarted, integers, integers, integers, strings, fields, integers),
    st.builds(ActivityStopped, integers),
    st.builds(Result, integers, integers, fields),
)
words = st.text(max_size=20)
infos = st.builds(
    PathInfo,
    store_path=words,
    nar_hash=st.binary(min_size=32, max_size=32).map(sha256_text),
    nar_size=integers,
    references=st.lists(words, max_size=4).map(lambda items: tuple(sorted(items))),
    deriver=words,
    sigs=st.lists(words, max_size=3).map(lambda items: tuple(sorted(items))),
    ca=words,
)


def encode_fields(out: Encoder, values: tuple[int | bytes, ...]) -> None:
    out.integer(len(values))
    for value in values:
        if isinstance(value, int):
            out.integer(0).integer(value)
        else:
            out.integer(1).string(value)


def encode_message(message: Message) -> bytes:
    """Write a message as the daemon does (infra/nix/FORMATS.md 5.2)."""
    out = Encoder()
    match message:
        case Last():
            out.integer(TAG_LAST)
        case Refusal(level, text):
            out.integer(TAG_ERROR).string("Error").integer(level).string("Error").string(text)
            out.integer(0).integer(2).integer(0).string("while doing").integer(0).string("while being")
        case Text(data):
            out.integer(TAG_NEXT).string(data)
        case ActivityStarted(activity, level, kind, text, values, parent):
            out.integer(TAG_START_ACTIVITY).integer(activity).integer(level).integer(kind).string(text)
            encode_fields(out, values)
            out.integer(parent)
        case ActivityStopped(activity):
            out.integer(TAG_STOP_ACTIVITY).integer(activity)
        case Result(activity, kind, values):
            out.integer(TAG_RESULT).integer(activity).integer(kind)
            encode_fields(out, values)
    return out.getvalue()


def encode_result(message: bytes = b"why", code: int = 3, outputs: int = 1) -> bytes:
    out = Encoder().integer(code).string(message).integer(1).integer(0).integer(10).integer(20)
    out.integer(0).integer(1).integer(1234).integer(outputs)
    for number in range(outputs):
        out.string(f"sha256:00!out{number}").string('{"outPath":"abc-x","signatures":[]}')
    return out.getvalue()


def read_in_pieces(data: bytes, cuts: list[int], read: Callable[[Inbox], object], count: int) -> list[object]:
    """Feed data cut at the given places and read `count` things, checking what an incomplete read promises."""
    inbox = Inbox()
    edges = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    arrivals = [data[a:b] for a, b in pairwise(edges)]
    found: list[object] = []
    while len(found) < count:
        before = len(inbox)
        try:
            found.append(read(inbox))
            continue
        except IncompleteError as error:
            missing = error.missing
        assert len(inbox) == before, "an incomplete read consumes nothing"
        assert 0 < missing <= sum(map(len, arrivals)), "never asks for more than the item has"
        inbox.feed(arrivals.pop(0))
    assert len(inbox) + sum(map(len, arrivals)) == 0
    return found


@given(st.lists(messages, max_size=8), st.lists(st.integers(0, 600), max_size=20))
def test_messages_are_read_as_they_were_written_in_whatever_pieces_they_arrive(
    sent: list[Message], cuts: list[int]
) -> None:
    data = b"".join(map(encode_message, sent))
    assert read_in_pieces(data, cuts, Inbox.read_message, len(sent)) == sent


#: Mostly what a busy builder sends: its lines, those of another one and a phase between.
busy = st.one_of(
    messages, *[st.builds(Result, st.integers(1, 2), st.just(RESULT_BUILD_LOG_LINE), st.tuples(strings))] * 4
)


@given(st.lists(busy, max_size=30), st.lists(st.integers(0, 2000), max_size=10))
def test_lines_that_are_read_in_runs_are_those_that_are_read_one_by_one(sent: list[Message], cuts: list[int]) -> None:
    def joined(read: list[object]) -> list[object]:
        """Put neighbouring lines of one activity together."""
        found: list[object] = []
        for each in read:
            run, last = each, found[-1] if found else None
            match each:
                case Result(activity, 101, (bytes() as text,)):
                    run = LineRun(activity, text + b"\n", 1)
            if isinstance(run, LineRun) and isinstance(last, LineRun) and last.activity == run.activity:
                found[-1] = LineRun(last.activity, last.data + run.data, last.count + run.count)
            else:
                found.append(run)
        return found

    inbox, read = Inbox(), list[object]()
    data = b"".join(map(encode_message, sent))
    for begin, end in pairwise(sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})):
        inbox.feed(data[begin:end])
        with suppress(IncompleteError):
            while True:
                read.append(inbox.read_lines() or inbox.read_message())
    assert joined(read) == joined(list(sent))
    assert not len(inbox)


def test_a_run_is_bounded_and_leaves_a_longer_line_to_be_cut() -> None:
    line, long = (encode_message(Result(1, RESULT_BUILD_LOG_LINE, (text,))) for text in (b"x" * 100, b"y" * RUN_BYTES))
    inbox = Inbox(line * 1000 + long + line)
    counts = []
    while (run := inbox.read_lines()) is not None:
        assert len(run.data) < RUN_BYTES
        counts.append(run.count)
    assert sum(counts) == 1000
    assert inbox.read_message() == Result(1, RESULT_BUILD_LOG_LINE, (b"y" * RUN_BYTES,))
    assert inbox.read_lines() == LineRun(1, b"x" * 100 + b"\n", 1)


def test_a_run_whose_padding_is_not_zero_is_refused() -> None:
    line = encode_message(Result(1, RESULT_BUILD_LOG_LINE, (b"abc",)))
    with pytest.raises(DaemonProtocolError, match="padding"):
        Inbox(line + line[:-1] + b"\x01").read_lines()


@pytest.mark.parametrize(
    "message",
    [
        Refusal(0, b"why"),
        Text(b"text"),
        ActivityStarted(1, 3, 105, b"building", (b"/nix/store/x.drv", b"", 1, 1), 0),
        ActivityStopped(1),
        Result(1, 101, (b"a line of a log",)),
        Result(1, 105, (1, 2, 3, 4)),
    ],
)
def test_every_beginning_of_a_message_is_incomplete_and_stays_where_it_is(message: Message) -> None:
    data = encode_message(message)
    for cut in range(len(data)):
        inbox = Inbox(data[:cut])
        with pytest.raises(IncompleteError):
            inbox.read_message()
        assert len(inbox) == cut
        inbox.feed(data[cut:])
        assert inbox.read_message() == message


@given(integers, strings, st.lists(words, max_size=5))
def test_integers_strings_and_lists_round_trip(number: int, string: bytes, items: list[str]) -> None:
    data = Encoder().integer(number).string(string).strings(items).getvalue()
    assert len(data) % 8 == 0
    inbox = Inbox(data)
    assert inbox.read_int() == number
    assert inbox.read_free_text("string") == string
    assert inbox.read_words("items") == tuple(items)
    assert len(inbox) == 0


@given(infos, st.lists(st.integers(0, 600), max_size=6))
def test_path_infos_round_trip(info: PathInfo, cuts: list[int]) -> None:
    out = Encoder()
    encode_path_info(info, out)
    data = out.getvalue()[len(Encoder().string(info.store_path).getvalue()) :]
    read = read_in_pieces(data, cuts, lambda i: i.attempt(lambda j: decode_path_info(info.store_path, j)), 1)
    assert read == [info]


def test_a_reference_into_another_store_directory_is_a_protocol_error() -> None:
    out = Encoder().string("").string("00" * 32).strings(["/other/store/x"])
    out.integer(0).integer(1).integer(0).strings([]).string("")
    with pytest.raises(DaemonProtocolError, match="another store directory"):
        decode_path_info("/nix/store/x", Inbox(out.getvalue()))


@given(st.data())
def test_changed_bytes_raise_protocol_errors_only(data: st.DataObject) -> None:
    info = Encoder()
    encode_path_info(data.draw(infos), info)
    kind = data.draw(st.sampled_from(["messages", "result", "info"]))
    original = {
        "messages": b"".join(map(encode_message, data.draw(st.lists(messages, min_size=1, max_size=4)))),
        "result": encode_result(),
        "info": info.getvalue(),
    }[kind]
    read: Callable[[Inbox], object] = {
        "messages": Inbox.read_message,
        "result": lambda inbox: BuildResult.decode(inbox, 38, "/nix/store"),
        "info": lambda inbox: decode_path_info("/nix/store/x", inbox),
    }[kind]
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    inbox = Inbox(bytes(mutated))
    try:
        while len(inbox):
            read(inbox)
    except (DaemonProtocolError, IncompleteError):
        pass  # the two answers that the shell knows; anything else fails the test


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_protocol_errors_only(data: bytes) -> None:
    inbox = Inbox(data)
    try:
        while len(inbox):
            inbox.read_message()
    except (DaemonProtocolError, IncompleteError):
        pass  # as above


@pytest.mark.parametrize(
    ("read", "limit"),
    [
        (lambda inbox: inbox.read_free_text("x"), MAX_ANNOUNCED_BYTES),
        (lambda inbox: inbox.read_word("x"), MAX_WORD_BYTES),
        (lambda inbox: inbox.read_words("x"), MAX_LIST_ITEMS),
    ],
)
def test_a_size_over_its_limit_is_refused_before_its_bytes_are_waited_for(
    read: Callable[[Inbox], object], limit: int
) -> None:
    with pytest.raises(DaemonProtocolError, match=f"the limit is {limit}"):
        read(Inbox(struct.pack("<Q", limit + 1)))
    with pytest.raises(IncompleteError):
        read(Inbox(struct.pack("<Q", limit)))


@pytest.mark.parametrize(
    ("data", "subject"),
    [
        (Encoder().integer(TAG_NEXT).integer(1).getvalue() + b"a\0\0\0\0\0\0\1", "padding"),
        (Encoder().integer(0x64617461).getvalue(), "unknown message"),
        (Encoder().integer(TAG_RESULT).integer(1).integer(101).integer(MAX_ANNOUNCED_FIELDS + 1).getvalue(), "fields"),
        (Encoder().integer(TAG_RESULT).integer(1).integer(101).integer(1).integer(2).getvalue(), "unknown kind 2"),
    ],
)
def test_bytes_that_the_protocol_does_not_allow_are_named(data: bytes, subject: str) -> None:
    with pytest.raises(DaemonProtocolError, match=subject):
        Inbox(data).read_message()


def _read_in_steps(data: bytes, step: int, held: int = 2**30) -> list[Message]:
    """Read messages that come `step` bytes at a time; at most `held` bytes besides are ever kept."""
    inbox = Inbox()
    read: list[Message] = []
    for start in range(0, len(data), step):
        inbox.feed(data[start : start + step])
        try:
            while True:
                read.append(inbox.read_message())
        except IncompleteError:
            pass  # more comes
        assert len(inbox) <= held + step, "what is cut is not held"
    return read


@given(
    kind=st.sampled_from(("log line", "text", "field", "activity", "refusal")),
    beyond=st.integers(-9, 40_000),
    step=st.integers(20_000, 300_000),
)
def test_a_text_of_any_length_is_cut_with_a_note_and_what_follows_is_read(kind: str, beyond: int, step: int) -> None:
    keep = MAX_TEXT_BYTES if kind in ("log line", "refusal") else MAX_FIELD_BYTES
    line = b"\xff\0\r\x1b]" + b"x" * (keep + beyond - 5)
    messages: dict[str, Message] = {
        "log line": Result(1, 101, (line,)),
        "text": Text(line),
        "field": Result(1, 7, (1, line, line)),
        "activity": ActivityStarted(1, 0, 101, line, (line,), 0),
        "refusal": Refusal(0, line),
    }
    data = encode_message(messages[kind]) + encode_message(Text(b"next"))
    first, second = _read_in_steps(data, step, held=4 * keep)
    assert second == Text(b"next")
    match first:
        case Result(fields=(*_, kept)) | ActivityStarted(fields=(*_, kept)):
            pass
        case Text(data=kept) | Refusal(message=kept):
            pass
        case _:
            pytest.fail(f"{first} is another message")
    assert isinstance(kept, bytes)
    if beyond <= 0:
        assert kept == line
    else:
        note = b" [drover: cut here, %d bytes in all]" % len(line)
        assert kept == line[: keep - len(note)] + note


@given(st.lists(integers | strings, min_size=MAX_FIELDS - 1, max_size=MAX_FIELDS + 30), st.integers(100, 900))
def test_of_any_number_of_fields_the_first_are_kept(values: list[int | bytes], step: int) -> None:
    data = encode_message(Result(1, 7, tuple(values))) + encode_message(Last())
    assert _read_in_steps(data, step) == [Result(1, 7, tuple(values[:MAX_FIELDS])), Last()]


def test_a_result_of_1_37_has_cpu_times_and_an_older_one_has_not() -> None:
    result = BuildResult.decode(Inbox(encode_result()), 38, "/store")
    assert result == BuildResult(
        BuildStatus.PERMANENT_FAILURE, "why", 1, 10, 20, None, 1234, (("out0", "/store/abc-x"),)
    )
    old = Encoder().integer(0).string("").integer(1).integer(0).integer(10).integer(20).integer(0).getvalue()
    assert BuildResult.decode(Inbox(old), 36, "/store").cpu_user_us is None


def test_every_status_of_the_table_is_known_and_an_unknown_one_is_no_success() -> None:
    successes = [code for code in range(16) if BuildStatus(code).is_success]
    assert successes == [0, 1, 2, 13]
    result = BuildResult.decode(Inbox(encode_result(b"new", code=99)), 38, "/store")
    assert (result.status, result.error_msg) == (BuildStatus.MISC_FAILURE, "unknown build status 99: new")


@pytest.mark.parametrize(
    "document", ["", "{", "[]", "{}", '{"outPath":1}', "[" * 5000, "1" * 5000, '{"outPath":"../x"}', '"\\ud800"']
)
def test_an_output_that_is_no_realisation_is_refused(document: str) -> None:
    out = Encoder().integer(0).string("").integer(1).integer(0).integer(1).integer(1)
    data = out.integer(1).string("sha256:00!out").string(document).getvalue()
    with pytest.raises(DaemonProtocolError, match="built output"):
        BuildResult.decode(Inbox(data), 34, "/store")


def test_terminal_escapes_are_removed_from_texts_and_bad_bytes_are_replaced() -> None:
    assert plain_text(b"\x1b[31;1merror:\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x1b\\ \xff") == "error: link �"
