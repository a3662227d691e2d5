"""Demand: what clients of the cache asked for and did not get, and what the farm does about it."""
