"""Simulated users against the people they stand for (`run.evaluate`), and assistants against simulated users."""
