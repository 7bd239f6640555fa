"""Deterministic streams of batches and where they come from."""
