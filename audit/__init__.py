"""The dependencies' known faults and licences, from data in this folder; see ``__main__.py``."""
