"""Generated videos, and pictures of them.

generated.py             a video decoded as it is watched, and saved with its prompt
pictures.py              animated tables, contact sheets, file names
principal_components.py  features as colours
"""
