"""WebDataset shards, wherever they lie.

reader.py   the samples of several shards as one list
writer.py   shards written at once or not at all
index.py    the index beside each shard
records.py  what a sample's .json and .txt say, and which of it is believed
tar.py      what lies in a tar of any origin
remote.py   files behind URLs, in ranges, with retries
pipes.py    shards that a command prints
"""
