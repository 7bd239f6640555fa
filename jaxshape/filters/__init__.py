"""Image to image: smoothing, suppression and degradation of texture."""
