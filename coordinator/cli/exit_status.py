"""Exit statuses of the `drover` command, and which of them each kind of error leads to.

The table is by the errors' codes, which are those of HTTP answers too, so that a refusal by the coordinator and one
of the client's own errors end alike, and so that nothing slow is imported to fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from coordinator.api.models import SubmissionState

OK: Final = 0
BUILD_FAILED: Final = 1
USAGE: Final = 2
EVALUATION_FAILED: Final = 3
INFRASTRUCTURE: Final = 4
#: A submission ended before its builds did.
CANCELLED: Final = 5
SUPERSEDED: Final = 6
EXPIRED: Final = 7
#: Of a wish list: something could not be had or proven; a derivation makes another path than the list names.
NOT_WHOLE: Final = 8
DRIFTED: Final = 9
INTERRUPTED: Final = 130

#: Code of an error -> exit status. What the caller can change by calling otherwise is 2, what must change in the
#: evaluated files is 3; the same call may succeed later where it is 4.
STATUSES: Final = {
    # Arguments, settings, tokens.
    "bad_argument": USAGE,
    "bad_config": USAGE,
    "bad_request": USAGE,
    "environment_source": USAGE,
    "conflict": USAGE,
    "forbidden": USAGE,
    "forbidden_path": USAGE,
    "forgery": USAGE,
    "not_found": USAGE,
    "other_wish": USAGE,
    "proxy_settings": USAGE,
    "store_dir": USAGE,
    "token": USAGE,
    "trace_file": USAGE,
    "tree_missing": USAGE,
    "working_tree": USAGE,
    "unauthorized": USAGE,
    # What was evaluated, or its closure, is nothing that this farm builds.
    "bad_derivation": EVALUATION_FAILED,
    "bad_source": EVALUATION_FAILED,
    "bad_tree": EVALUATION_FAILED,
    "evaluation": EVALUATION_FAILED,
    "too_large": EVALUATION_FAILED,
    "wish_list": EVALUATION_FAILED,
    # The farm, the way to it, or the store of this machine.
    "bad_stream": INFRASTRUCTURE,
    "bad_upload": INFRASTRUCTURE,
    "client": INFRASTRUCTURE,
    "closure": INFRASTRUCTURE,
    "damaged": INFRASTRUCTURE,
    "derivations": INFRASTRUCTURE,
    "timings": INFRASTRUCTURE,
    "environments": INFRASTRUCTURE,
    "encoded_body": INFRASTRUCTURE,
    "fenced": INFRASTRUCTURE,
    "forbidden_host": INFRASTRUCTURE,
    "held": INFRASTRUCTURE,
    "http": INFRASTRUCTURE,
    "internal": INFRASTRUCTURE,
    "journal": INFRASTRUCTURE,
    "leadership_lost": INFRASTRUCTURE,
    "log": INFRASTRUCTURE,
    "method_not_allowed": INFRASTRUCTURE,
    "missing_member": INFRASTRUCTURE,
    "proxy": INFRASTRUCTURE,
    "refused": INFRASTRUCTURE,
    "remote_off": INFRASTRUCTURE,
    "standby": INFRASTRUCTURE,
    "state_dir": INFRASTRUCTURE,
    "state_dir_busy": INFRASTRUCTURE,
    "stopped": INFRASTRUCTURE,
    "store_full": INFRASTRUCTURE,
    "succession": INFRASTRUCTURE,
    "too_many_uploads": INFRASTRUCTURE,
    "too_slow": INFRASTRUCTURE,
    "unavailable": INFRASTRUCTURE,
    "unknown_upload": INFRASTRUCTURE,
    "unreachable": INFRASTRUCTURE,
    "upload_failed": INFRASTRUCTURE,
    "wrong_offset": INFRASTRUCTURE,
}


def ended_status(state: SubmissionState) -> int:
    """Return the exit status for the end of a submission."""
    from coordinator.api.models import SubmissionState  # noqa: PLC0415 - slow to import; who has a state has it

    ended = {
        SubmissionState.SUCCEEDED: OK,
        SubmissionState.CANCELLED: CANCELLED,
        SubmissionState.SUPERSEDED: SUPERSEDED,
        SubmissionState.EXPIRED: EXPIRED,
    }
    return ended.get(state, BUILD_FAILED)


def status_of(code: str) -> int:
    """Return the exit status for an error's code; a newer coordinator's codes are infrastructure."""
    return STATUSES.get(code, INFRASTRUCTURE)
