"""Which pairs are worth their cost."""
