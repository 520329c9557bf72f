"""`fen bench load`: what a server withstands. Many clients at once, clients that leave, an engine that hangs."""
