"""A checkpoint, the decoder that computes it, and the choice of the next token."""
