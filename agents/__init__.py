"""Agents that act in `usp_env` from outside. They run from a checkout and stay out of the wheel."""
