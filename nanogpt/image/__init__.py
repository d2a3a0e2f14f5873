"""Building the container's image, and what an image says about itself."""
