"""Scenarios of `tmlc profile`: what a case file says, what it plays, and what its conversations show."""
