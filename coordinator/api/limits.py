"""Bounds of what a submission may name and say of itself; `api.requests.RootLimits` has the limits of builds."""

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
