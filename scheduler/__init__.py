"""The pure scheduler core: opaque steps, requirements and edges; standard library only."""
