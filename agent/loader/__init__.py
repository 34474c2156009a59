"""The child program that holds one model. It depends on the frames only, not on the daemon.

MLX aborts the process when the GPU runs out of memory, and this cannot be caught; so each model has its own process,
whose memory is fully released when it exits.
"""
