"""The live server: sessions of the scheduler over HTTP and WebSocket, in the dialects of existing clients."""
