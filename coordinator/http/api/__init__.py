"""Handlers of the JSON API: one module for each kind of thing. Decisions are made elsewhere."""
