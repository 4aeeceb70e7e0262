"""Packaged models: where they come from, embedders, and the small trained files that ship."""
