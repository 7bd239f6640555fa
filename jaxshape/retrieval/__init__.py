"""Search by similarity, and what makes queries and databases better."""
