"""The ground both programs stand on: Nix formats, the cache, processes, clock, telemetry."""
