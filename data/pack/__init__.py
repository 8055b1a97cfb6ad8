"""Captioned videos to shards: `lightning pack`.

packing.py          the run of it: plan, record, shards
sources.py          the videos of a folder, a table or a file
tables.py           tables of videos and their captions, in the forms of others
shard_sources.py    the videos in shards, ours or others'
probe.py            what a video file is, and whether it is whole
segments.py         long videos cut at key frames, by stream copy
probe_processes.py  both of many videos, in processes that may die of them
captioning.py       captions from a model that looks at frames
"""
