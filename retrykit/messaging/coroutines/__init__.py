"""Handlers that are coroutines: the event loop that they run on, and how workers, which are threads, deal with it."""
