"""How long tests wait for what will happen."""

from __future__ import annotations

#: Seconds; only ends a test that hangs. A bound that is not reached costs nothing, and a machine that is busy may take
#: many times as long as a quiet one, so that a closer one fails by chance. Below pytest's own limit of one test.
PATIENCE_S = 300.0
