"""The signed binary cache: objects, metadata, publishing and reading.

objects     bytes by key: a directory, S3, GCS, Azure
compression the codecs that NARs come in, unpacked within bounds
verify      the one reader of NAR objects: trusts no size or hash that it was told
upload      NAR -> object, streaming                       (workers, intake)
listing     object -> `.ls`
download    object -> NAR, streaming and verified          (workers)
keys        signing keys, from files and the environment
signer      fingerprint -> signatures
metadata    the SQL tables (migrate, migrations: how they came about)
candidates  claims, outcomes and the pure part of deciding
catalog     what is published and can be fetched
publishing  claims -> truth
roots       what keeps paths: pins, submissions, pushes, leases
gc          collecting what nothing keeps (survey, marking, tombstones, deletions)
realisations  what content-addressed outputs became
resigning   new signatures for everything
pulls       what a sender need not send, had from upstreams
closure_pulls  whole closures that nobody sends, had from upstreams
fsck        proving and repairing (upstream: another cache to have NARs from)
inspection  sums
cache       Cache: the front of all this                   (the coordinator)

Nothing is imported here: a worker and `drover cache push` use objects and uploads, and load no database with them.
"""
