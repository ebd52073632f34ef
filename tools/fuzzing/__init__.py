"""Random requests against the whole API of a service."""
