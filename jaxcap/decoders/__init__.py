"""Decoders: each turns features into captions, one step function each."""
