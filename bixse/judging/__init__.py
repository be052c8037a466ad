"""What a pair is worth, and who says so."""
