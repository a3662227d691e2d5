"""Stores beside the journal: verified derivations, build logs, and leases of paths that clients need not send."""
