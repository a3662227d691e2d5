"""The coordinator program: HTTP, intake, engine, journal and command line."""
