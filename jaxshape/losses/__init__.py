"""Differentiable penalties, one value per example."""
