"""How weights are learnt, spread over GPUs and kept.

optimizer.py    AdamW and the learning rates of generator and compressor
module.py       a LightningModule with a network and its EMA, under every strategy
ema.py          the average of the weights
strategies.py   many GPUs: fsdp and fsdp2 by name
checkpoints.py  checkpoints as files and folders, written whole or not at all
"""
