"""Reports: what was measured or found, as data (JSON) and as tables. Nothing here imports torch."""
