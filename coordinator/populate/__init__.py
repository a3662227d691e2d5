"""Populating a cache: what of a wish list is pulled, what is built, what drifted and what was proven; pure."""
