"""Objects of NARs: where they lie, how they are packed, written, read and verified. No database, no key.

For both programs: what only the coordinator has is `infra.cache`.
"""
