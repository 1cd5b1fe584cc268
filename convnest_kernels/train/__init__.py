"""`python -m convnest_kernels train`: train a small ConvNeSt on real images, and compare.

cli         arguments and exit status
config      what a run is: model, data, schedule
session     a run from start to closing table; resume, signals, saving
loop        steps, validation, learning rate
data        batches in an order that only seed, epoch and step decide; digits, folder
checkpoint  safetensors files, replaced atomically
compare     our backend against eager, each in a process of its own (contender)
display     progress bar and tables
"""
