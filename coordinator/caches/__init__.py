"""The caches of a coordinator: opened, kept tidy, and repaired from workers and upstreams."""
