"""`tmlc bench`: an open-loop load generator for a live server, and what it measures at the client."""
