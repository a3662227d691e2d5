"""Limits of roots in what the journal keeps: notes of before limits, and facts of before they had them."""

from __future__ import annotations

import pytest

from coordinator.engine.replay import with_limits
from coordinator.journal.codec import RootNote, StoredNote, SubmissionNote, decode_note, encode_note
from coordinator.journal.errors import CodecError
from scheduler.facts import StepAbandoned, SubmissionAccepted, SubmissionRestored
from scheduler.model import Instant, StepKey, SubmissionId
from scheduler.resource_limits import ResourceLimits


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
