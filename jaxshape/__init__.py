"""Vision systems that learn shape rather than texture."""
