"""A small local substituter: it asks for closures at once and fetches NARs ahead of Nix, to make distance cheap."""
