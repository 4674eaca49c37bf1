"""The engine: token ids in, token ids out; it knows nothing of text, HTTP or Ray.

`protocol` is what every engine offers. `client` runs one in a process of its own (and imports no
torch); `worker` is that process.
"""
