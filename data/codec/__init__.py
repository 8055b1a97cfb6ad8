"""Video files to frames and back.

decode.py  video bytes to frames, by timestamp
hdr.py     HDR to SDR
mp4.py     frames to H.264
"""
