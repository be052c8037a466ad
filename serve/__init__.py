"""The HTTP shell: an index and its encoder behind Ray Serve."""
