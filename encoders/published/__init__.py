"""The encoders that others have published, and how their weights are read.

base.py          what the families share: sizes, windows, resolution
checkpoint.py    published weights, found and opened, nothing executed
loading.py       networks filled from them, strictly
resize.py        frames resized as image libraries do it
vit.py           the plain video transformer of the next three
vjepa2.py        V-JEPA 2
videomae2.py     VideoMAE 2
fourds.py        4DS
qwen2_5_vl.py    Qwen2.5-VL's vision tower
mobilenet_v2.py  MobileNet V2 of TensorFlow, frame by frame
timm_image.py    any image encoder of timm, frame by frame
"""
