"""Does a plug-in keep its interface's promises? ``python -m north_lightning plugins check FILE``."""
