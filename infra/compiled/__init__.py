"""Build of the scheduler's modules as extension modules, for those who ask for it with `./run compile`."""
