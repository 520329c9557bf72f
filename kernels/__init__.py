"""The arithmetic: functions on tensors for CPUs (cpu/) and NVIDIA GPUs (gpu/, Triton), each with its oracle (oracle/).

Knows no request and no model. Importing this needs no Triton; importing kernels.gpu does.
"""
