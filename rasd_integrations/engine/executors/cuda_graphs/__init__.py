"""Decoding steps as CUDA graphs."""
