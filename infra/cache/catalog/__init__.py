"""The catalog: the database of one cache, what is published in it, tombstones, and deletions under way.

Rows and transactions only. What may be published is decided in `publishing`, what may go in `retention`.
"""
