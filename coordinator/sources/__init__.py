"""Sources: fixed outputs from anywhere but the network of a worker, before that is tried."""
