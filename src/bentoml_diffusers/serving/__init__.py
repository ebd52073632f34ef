"""Runners and services over an engine."""
