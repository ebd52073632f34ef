"""Clients that others write, against a server of this package."""
