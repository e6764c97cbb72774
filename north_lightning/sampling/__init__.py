"""The sampler: a vLLM server as sidecar process, its token-in/token-out client, and the weight transports.

Importing this package imports nothing heavy; ``client`` and ``scripted`` never import torch.
"""
