"""Lessons of earlier builds for the scheduler: how long a package takes, and how fast a worker is."""
