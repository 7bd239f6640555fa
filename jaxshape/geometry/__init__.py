"""Points, rays and pixels: where things of the world come to lie."""
