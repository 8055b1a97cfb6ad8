"""What is measured over many batches, one metric a file.

flow_loss_bands.py     the flow loss in bands of t
channel_statistics.py  mean, deviation and KL of the channels of semantics
video_metric.py        what a metric of generated videos promises
table.py               all of them: a row each
adherence.py           whether toy videos show what their prompts say
"""
