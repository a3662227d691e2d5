"""Reasons for which a lease ends without a result, as the wire names them."""

from __future__ import annotations

from typing import Literal

#: Why a lease ended without a result, as the wire names it: values of `scheduler.model.FailureKind`, whose table there
#: says what follows.
Reason = Literal[
    "permanent",
    "output_rejected",
    "hash_mismatch",
    "timeout",
    "silence",
    "log_limit",
    "output_size",
    "not_deterministic",
    "transient",
    "source_gone",
    "infrastructure",
    "daemon_lost",
    "input_missing",
    "disk_low",
    "upload_failed",
    "killed",
    "connection_lost",
    "returned",
    "cancelled",
]
