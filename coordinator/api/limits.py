"""Bounds of what a submission may name; `api.models.RootLimits` has the limits themselves."""

from __future__ import annotations

#: Largest limit that a submission may name.
MAX_LIMIT = 1 << 53
#: Seconds that a submission can say it waits for a worker, short of for ever: a hundred years.
MAX_WAIT_S = 100 * 365 * 24 * 3600
