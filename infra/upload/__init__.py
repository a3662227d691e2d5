"""The upload protocol: its messages and bounds, and the sender. The receiver is `infra.cache.uploads.uploads`."""
