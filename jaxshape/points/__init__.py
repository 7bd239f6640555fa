"""Functions of point sets: neighbours, and labels refined by them."""
