"""Examination of a user's machine: what keeps its Nix from fetching, and the line that mends it. No farm is asked."""
