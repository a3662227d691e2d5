"""Repair: proving that a cache holds what it promises, and replacing objects that it has lost."""
