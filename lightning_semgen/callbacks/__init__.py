"""What goes on beside the training: one idea a file.

progress.py          the progress bar
throughput.py        clips, tokens and FLOPs a second
stop_on_signal.py    SIGUSR1 and SIGTERM: save and end
lost_rank.py         the end of another rank, in one sentence
rejected_samples.py  samples that cannot be used, in a run's files and curves
results.py           files of predict and test
reference_sheet.py   references beside their variants
gallery.py           pictures and metrics at each validation
log_steps.py         when Lightning writes to its loggers
loss_curves.py       losses, learning rates and the gradients' norm
channels.py          the channels of semantics
board.py             a run in TensorBoard, and its row among other runs
"""
