"""Data-Juicer's recipes: what one says, in this package's words."""
