"""Releases: a checkpoint of any kind as a folder that vLLM serves, in bfloat16 or FP8, checked before it counts."""
