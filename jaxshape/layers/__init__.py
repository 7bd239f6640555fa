"""Flax modules around the functions of the areas."""
