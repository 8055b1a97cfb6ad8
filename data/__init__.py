"""Shards to batches of dual-rate clips, and everything that makes shards.

datamodule.py      shards to batches, on any number of ranks and workers
datasets.py        shards, prompt files and reference videos as datasets
buckets.py         each video at the shape that fits it, each batch of one
order.py           the order of samples, a pure function
selection.py       which videos are used, and which part of each
clip.py            the dual-rate clip
batch.py           a batch: every key, its shape, and who writes it
interface.py       what the data asks of a model
rejected.py        samples that cannot be used: why, how many, and how many may be
workers.py         the memory and the end of the processes that read
random_numbers.py  random numbers that belong to a sample
codec/             video files to frames and back
shards/            WebDataset shards, wherever they lie
encoded/           encoded shards: made once, read ever after
pack/              captioned videos to shards
toy/               the toy world
"""
