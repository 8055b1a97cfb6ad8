"""Shards, decoding, dual-rate clips and the toy world."""
