"""Models: who answers a call, over HTTP, as a batch, in this process or scripted."""
