"""POST /tokenize."""
