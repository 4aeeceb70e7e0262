"""The packaged bank, the packaged scripts, and the ids that no loader hands out."""
