"""The child program that holds one model. It knows frames and nothing of the daemon.

MLX ends the process when the GPU runs out of memory, without a way to catch it; so each model has a process of its
own, whose memory is truly back when it exits.
"""
