"""Rewards: plain functions, expressions and the scorers that ship."""
