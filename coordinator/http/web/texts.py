"""Numbers, sizes, ages and dates as people read them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

_MINUTE_S: Final = 60
_HOUR_S: Final = 3600
_DAY_S: Final = 24 * 3600
#: Two ends that are closer than this part of the later one are said as one.
_ONE_END: Final = 0.1
#: Where Nix repeats the end of the log in its message.
_REPEATED: Final = re.compile(r";\s*last \d+ log lines?:.*", re.DOTALL)
#: The last second that a date can name.
_LAST_INSTANT: Final = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


def number_text(count: int) -> str:
    """Return a number with its thousands apart: 12,345."""
    return f"{count:,}"


def bytes_text(size: float) -> str:
    """Return a size with three digits and its unit: 0 B, 1.5 KB, 12.0 MB (powers of 1,000)."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("KB", "MB", "GB"):
        size /= 1000
        if size < 999.5:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:,.1f} TB"


def age_text(seconds: float) -> str:
    """Return a span of time by its two largest units: 42 s, 3 m 07 s, 5 h 20 m, 3 d 4 h. The script does the same."""
    whole = max(0, int(seconds))
    if whole < _MINUTE_S:
        return f"{whole} s"
    if whole < _HOUR_S:
        return f"{whole // 60} m {whole % 60:02} s"
    if whole < _DAY_S:
        return f"{whole // _HOUR_S} h {whole % _HOUR_S // 60:02} m"
    return f"{whole // _DAY_S} d {whole % _DAY_S // _HOUR_S} h"


def seconds_text(seconds: float) -> str:
    """Return how long something took: 0.12 s, 4.5 s, and from ten seconds on as `age_text`."""
    if seconds < 1:
        return f"{max(0.0, seconds):.2f} s"
    return f"{seconds:.1f} s" if seconds < 10 else age_text(seconds)


def date_text(instant: float) -> str:
    """Return Unix seconds as a date in UTC: 2026-11-29 14:07:05 UTC."""
    return f"{datetime.fromtimestamp(min(max(instant, 0.0), _LAST_INSTANT), UTC):%Y-%m-%d %H:%M:%S} UTC"


def clock_text(instant: float) -> str:
    """Return the time of day of Unix seconds in UTC: 14:07."""
    return date_text(instant)[11:16]


def end_text(sooner_s: float, later_s: float) -> str:
    """Return how long something still takes: `in 12 m 00 s to 18 m 00 s`. The script does the same."""
    if later_s <= 0:
        return "later than foreseen"
    sooner_s = max(0.0, sooner_s)
    if later_s - sooner_s <= _ONE_END * later_s or age_text(sooner_s) == age_text(later_s):
        return f"in about {age_text(later_s)}"
    return f"in {age_text(sooner_s)} to {age_text(later_s)}" if sooner_s >= 1 else f"within {age_text(later_s)}"


def short_failure(message: str) -> str:
    """Return a failure's sentence without the end of the log, which stands beside it."""
    return _REPEATED.sub(".", message)
