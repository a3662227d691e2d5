"""Wish lists: packages that people want to fetch, read from the files that say so."""
