"""Pulls: another binary cache that is trusted by its keys, and paths had from it instead of from a sender."""
