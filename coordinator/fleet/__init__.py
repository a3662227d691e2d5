"""The fleet of `drover up`: the Ray cluster and the workers of this machine."""
