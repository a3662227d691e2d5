"""Observability of a farm: metrics, made from counters and views."""
