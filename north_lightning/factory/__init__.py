"""Software tasks made from real repositories: ``python -m north_lightning tasks build``."""
