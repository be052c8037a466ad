"""Text that did not exist."""
