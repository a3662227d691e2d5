"""The signed binary cache, the coordinator's alone: what is published, kept, collected, signed and repaired.

uploads      taking uploads in
pulls        paths had from trusted upstreams
listing      object -> `.ls`
cache        Cache: the front of all below
repair       proving and repairing
statistics   sums; counters: what is counted while it runs
retention    what keeps paths, and the collector
publishing   claims -> truth, signatures and keys
catalog      the database: what is published
errors

Objects and the sending side of uploads are for workers too: `infra.objects`, `infra.upload`. Nothing is imported here.
"""
