"""Metrics of simulated users and of their conversations: pure functions over texts, dialogues and vectors."""
