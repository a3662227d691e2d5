"""Bounds of what a submission may name and say of itself; `root_limits` has the limits of builds."""

from __future__ import annotations

#: Largest limit that a submission may name.
MAX_LIMIT = 1 << 53
#: Seconds that a submission can say it waits for a worker, short of for ever: a hundred years.
MAX_WAIT_S = 100 * 365 * 24 * 3600
#: Characters of a branch, of the number of a pull request, of a commit.
MAX_BRANCH = 255
MAX_PULL = 64
MAX_COMMIT = 128
#: Tags of one submission, characters of a key and of a value.
MAX_TAGS = 16
MAX_TAG_KEY = 64
MAX_TAG_VALUE = 256
#: Characters of an idempotency key.
MAX_IDEMPOTENCY_KEY = 255
#: What the key of a tag looks like.
TAG_KEY = r"[A-Za-z0-9][A-Za-z0-9._/-]*"
#: Bounds of a submission's priority; a test holds them to those of the core.
LOWEST_PRIORITY = -5
HIGHEST_PRIORITY = 5
#: Bytes of a label, an attribute path, a path: what people read, and every list shows.
MAX_TEXT_BYTES = 1024
#: Roots of one submission; some 20 MB of JSON.
MAX_ROOTS = 100_000
#: Pairs of one question; outputs are compared at most MAX_OUTPUT_PAIRS at once.
MAX_PAIRS = 50_000
MAX_OUTPUT_PAIRS = 500
#: Derivations of a client's own that one plan counts.
MAX_PLANNED = 20_000
#: Attributes that could not be evaluated which a submission keeps.
MAX_UNEVALUATED = 200


def kept_text(text: str) -> str:
    """Return what the farm keeps of a text."""
    return text.encode(errors="replace")[:MAX_TEXT_BYTES].decode(errors="ignore")
