"""Tokens, secrets and permissions: read, kept and compared. No request and no route is known here."""
