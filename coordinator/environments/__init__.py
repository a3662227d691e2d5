"""Tracked environments: what they consist of over time, how far it can be fetched, and which revision is released."""
