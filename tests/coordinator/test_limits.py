"""Limits of builds: the same in every record, readable in old notes and facts, and on the wire as old agents read."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest

from coordinator.api.root_limits import RootLimits
from coordinator.engine.replay import with_limits
from coordinator.journal.codec import RootNote, StoredNote, SubmissionNote, decode_note, encode_note
from coordinator.journal.errors import CodecError
from scheduler.facts import StepAbandoned, SubmissionAccepted, SubmissionRestored
from scheduler.model import Instant, StepKey, SubmissionId
from scheduler.resource_limits import ResourceLimits
from workers.wire.messages import ORDERS, PROTOCOL_VERSION, BuildLimits, LeaseOrder


def test_notes_of_before_limits_are_readable() -> None:
    note = SubmissionNote("x", (RootNote("a", "/d", StepKey("s"), (("out", "/o"),), ResourceLimits(5)),), 1)
    assert decode_note(encode_note(note)) == note
    old = b'{"label":"x","roots":[{"attr":"a","drv":"/d","step":"s","outputs":[["out","/o"]]}],"derivations":1}'
    assert decode_note(StoredNote(old)).roots[0].limits is None
    said = b'"limits":{"timeout_s":5,"silence_s":0,"log_bytes":0,"output_bytes":0}}'
    assert decode_note(StoredNote(old.replace(b"}", b"," + said, 1))).roots[0].limits == ResourceLimits(timeout_s=5)
    with pytest.raises(CodecError):
        decode_note(StoredNote(old.replace(b'"attr":"a",', b"")))
    with pytest.raises(CodecError):
        decode_note(StoredNote(old.replace(b'"attr":"a",', b'"attr":"a","colour":"red",')))


def test_a_journal_whose_facts_have_no_limits_gets_those_of_its_notes() -> None:
    name, other, root, limits = SubmissionId("s"), SubmissionId("t"), StepKey("r"), ResourceLimits(timeout_s=5)
    notes = {name: SubmissionNote("x", (RootNote("a", "/d", root, (), limits), RootNote("b", "/e", root, ())), 1)}
    accepted = [SubmissionAccepted(each, Instant(0.0), (root,), (), (), ()) for each in (name, other)]
    completed = list(with_limits([*accepted, StepAbandoned(root), SubmissionRestored(name, (root,))], notes))
    assert [getattr(fact, "limits", None) for fact in completed] == [((root, limits),), (), None, ((root, limits),)]


def test_limits_have_the_same_names_in_a_request_in_the_core_and_in_an_order() -> None:
    """They are converted by name, so one that is left out of a record would be lost on the way."""
    names = [field.name for field in fields(ResourceLimits)]
    assert [field.name for field in fields(RootLimits)] == list(BuildLimits.model_fields) == names


def test_limits_of_an_order_stand_where_an_agent_of_protocol_2_reads_them() -> None:
    assert PROTOCOL_VERSION == 2
    limits = BuildLimits.model_validate(asdict(ResourceLimits(1, 2, 3, 4, 5)))
    made = LeaseOrder(step="s", attempt=1, drv_path="/d", derivation=b"", inputs=(), limits=limits)
    flat = {"timeout_s": 1, "max_silent_s": 2, "max_log_bytes": 3, "max_output_bytes": 4, "memory_bytes": 5}
    wire = made.dump()
    assert {name: wire.get(name) for name in flat} == flat
    # An agent of before 2026-11-30 refuses what it does not know.
    assert wire.keys().isdisjoint({"limits", "cores"})
    assert made.model_copy(update={"cores": 3}).dump()["cores"] == 3
    assert ORDERS.validate_python((wire,)) == (made,)
    # A coordinator of before says nothing of some of them.
    del wire["memory_bytes"], wire["max_log_bytes"]
    assert ORDERS.validate_python((wire,))[0].limits == BuildLimits(timeout_s=1, silence_s=2, output_bytes=4)
