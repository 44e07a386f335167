"""Faces for people: chat in the terminal."""
