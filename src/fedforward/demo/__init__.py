"""A small invented world, and a language model that knows it, for ``fedforward demo``."""
