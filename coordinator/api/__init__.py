"""The HTTP API as both sides know it: models, streams, limits of builds. Client and server share nothing else."""
