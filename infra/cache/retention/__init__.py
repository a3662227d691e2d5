"""Retention: roots that keep paths, and the garbage collector, which removes what no root reaches."""
