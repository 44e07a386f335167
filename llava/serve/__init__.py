"""Faces: chat in the terminal, a page, and what a server needs."""
