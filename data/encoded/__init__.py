"""Encoded shards: what the frozen parts say of clips, made once and read ever after.

options.py     which encoded shards a config asks for
precompute.py  the pass that makes them
encoding.py    what one model writes in that pass
parts.py       how what is encoded of a clip is cut from that of a longer one
shards.py      their format, and the fingerprint of what made them
cuts.py        random clip starts on them
"""
