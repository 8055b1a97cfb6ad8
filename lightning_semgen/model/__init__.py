"""The networks and what they compute: plain torch, which knows no Lightning and no config.

flow.py         rectified flow: path, velocity, times, guidance, Euler
positions.py    when and where a token is, and its rotary angles
windows.py      windows of time, within which tokens attend to each other
sizes.py        named sizes of the transformer
blocks.py       a block of the transformer: attention, norms, modulation by time
condition.py    what the velocity depends on beside z_t and t
transformer.py  Wan 2.1's network with semantic tokens in context
generator_network.py  the transformer and, if it is learnt, the text encoder
compressor.py   features to Gaussian semantics, standardised; the way back
wan_weights.py  Wan 2.1's weights as the start of a generator
"""
