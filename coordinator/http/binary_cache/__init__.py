"""The binary cache over HTTP: what Nix clients and the farm's own workers ask."""
