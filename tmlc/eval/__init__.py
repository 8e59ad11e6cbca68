"""What an interaction model does in conversation: episodes played on an engine, and what they score. `tmlc eval` is
this."""
