"""Runs as a page and in the terminal."""
