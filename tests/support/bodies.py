"""Bodies that no honest client sends. Each is larger or stranger than any route takes as JSON."""

from __future__ import annotations

from typing import Final

_MANY: Final = 500_000

NASTY: Final[dict[str, bytes]] = {
    "nothing": b"",
    "not JSON": b"drover",
    "half a million ones": b'{"paths":[' + b",".join([b"1"] * _MANY) + b"]}",
    "half a million arrays": b'{"paths":[' + b",".join([b"[]"] * _MANY) + b"]}",
    "half a million objects": b'{"paths":[' + b",".join([b"{}"] * _MANY) + b"]}",
    "half a million keys": b"{" + b",".join(b'"k%d":1' % number for number in range(_MANY)) + b"}",
    "forty keys": b"{" + b",".join(b'"k%d":1' % number for number in range(40)) + b"}",
    "a bare million of ones": b"[" + b",".join([b"1"] * (2 * _MANY)) + b"]",
    "deep arrays": b"[" * 100_000,
    "closed deep arrays": b"[" * 500 + b"]" * 500,
    "deep objects": b'{"paths":' * 100_000,
    "a number of a million digits": b'{"paths":[' + b"7" * 1_000_000 + b"]}",
    "a fraction of a million digits": b'{"paths":[0.' + b"7" * 1_000_000 + b"]}",
    "an exponent of many digits": b'{"paths":[1e' + b"9" * 100_000 + b"]}",
    "no number": b'{"paths":[NaN,Infinity]}',
    "one long string": b'{"paths":["' + b"a" * 1_000_000 + b'"]}',
    "one long key": b'{"' + b"a" * 1_000_000 + b'":1}',
    "a key twice": b'{"paths":[],"paths":[]}',
    "a key twice, written otherwise": b'{"paths" :[],"p\\u0061ths":[]}',
    "half a surrogate": b'{"paths":["\\ud800"]}',
    "bytes that are no UTF-8": b'{"paths":["\xff\xfe"]}',
    "a mark of the byte order": b'\xef\xbb\xbf{"paths":[]}',
    "UTF-16": '{"paths":[]}'.encode("utf-16"),
    "a null byte": b'{"paths":[]}\x00',
    "two documents": b'{"paths":[]}{"paths":[]}',
    "backslashes": b'{"paths":["' + b"\\" * 100_001 + b'"]}',
    "quotes": b'"' * 100_001,
}
