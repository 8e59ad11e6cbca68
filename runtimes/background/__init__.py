"""The background model beside a session: delegations go out, injections come back, timers and cues watch the ticks.

Needs `pip install 'tmlc[background]'` only for the endpoint and MCP parts; the rest runs on what tmlc itself needs.
"""
