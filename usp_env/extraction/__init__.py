"""Implicit profiles out of conversations: the two-stage extractor, its bank files, and the distilled profile generator."""
