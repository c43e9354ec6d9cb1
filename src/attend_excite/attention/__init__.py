"""Cross-attention: where it is, how it is read, what is made of it."""
