"""Which limit holds for a step that several submissions want."""

from __future__ import annotations

import pytest

from coordinator.api.limits import StepLimits, in_force
from coordinator.engine.limits import limit_was_raised
from coordinator.journal.codec import CodecError, RootNote, StoredNote, SubmissionNote, decode_note, encode_note
from scheduler.model import FailureKind, StepKey

DEFAULT = StepLimits(timeout_s=100, silence_s=0, log_bytes=1000, output_bytes=0)


def test_without_a_word_the_farms_defaults_hold() -> None:
    assert in_force([], DEFAULT) == DEFAULT
    assert in_force([None], DEFAULT) == DEFAULT


def test_what_a_submission_says_of_its_root_holds_be_it_shorter_or_longer() -> None:
    assert in_force([StepLimits(timeout_s=5, silence_s=3)], DEFAULT) == StepLimits(5, 3, 1000, 0)
    assert in_force([StepLimits(timeout_s=500)], DEFAULT).timeout_s == 500


def test_of_several_submissions_the_most_generous_holds_field_by_field() -> None:
    short, other = StepLimits(timeout_s=5, output_bytes=10), StepLimits(timeout_s=7, silence_s=1, output_bytes=9)
    assert in_force([short, other], DEFAULT) == StepLimits(7, 0, 1000, 10)


def test_a_short_limit_on_a_root_does_not_hold_where_it_is_somebody_elses_dependency() -> None:
    assert in_force([StepLimits(timeout_s=5, silence_s=3), None], DEFAULT) == DEFAULT


def test_a_submission_can_only_lower_how_much_log_is_kept() -> None:
    assert in_force([StepLimits(log_bytes=10)], DEFAULT).log_bytes == 10
    assert in_force([StepLimits(log_bytes=10_000)], DEFAULT).log_bytes == 1000


def test_a_build_takes_as_much_memory_as_anybody_says_it_does() -> None:
    assert in_force([StepLimits(memory_bytes=5), None, StepLimits(memory_bytes=7)], DEFAULT).memory_bytes == 7


def test_a_build_that_ended_at_a_limit_which_is_higher_by_now_ended_at_none() -> None:
    assert limit_was_raised(FailureKind.TIMEOUT, 5, StepLimits(timeout_s=0))
    assert limit_was_raised(FailureKind.SILENCE, 5, StepLimits(silence_s=6))
    assert not limit_was_raised(FailureKind.TIMEOUT, 5, StepLimits(timeout_s=5))
    assert not limit_was_raised(FailureKind.OUTPUT_SIZE, 0, StepLimits())
    assert not limit_was_raised(FailureKind.PERMANENT, 5, StepLimits())


def test_notes_of_before_limits_are_readable() -> None:
    note = SubmissionNote("x", (RootNote("a", "/d", StepKey("s"), (("out", "/o"),), StepLimits(5)),), 1)
    assert decode_note(encode_note(note)) == note
    old = b'{"label":"x","roots":[{"attr":"a","drv":"/d","step":"s","outputs":[["out","/o"]]}],"derivations":1}'
    assert decode_note(StoredNote(old)).roots[0].limits is None
    said = b'"limits":{"timeout_s":5,"silence_s":0,"log_bytes":0,"output_bytes":0}}'
    assert decode_note(StoredNote(old.replace(b"}", b"," + said, 1))).roots[0].limits == StepLimits(timeout_s=5)
    with pytest.raises(CodecError):
        decode_note(StoredNote(old.replace(b'"attr":"a",', b"")))
    with pytest.raises(CodecError):
        decode_note(StoredNote(old.replace(b'"attr":"a",', b'"attr":"a","colour":"red",')))
