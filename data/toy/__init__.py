"""The toy world: videos rendered from captions, and read again.

world.py    one sprite, its attributes and its caption
scenes.py   long clips: one sprite through several scenes
shards.py   both in shards, rendered where they are missing
checker.py  reads colour, shape and direction, scene by scene, from a video's pixels
"""
