from hostile_world import reads_are_noticed, world

__all__ = ["reads_are_noticed", "world"]
