"""The Python that every Marble archive carries: what runs inside a TorchServe worker.

`service` is the only module that knows TorchServe. `engine.Engine` answers requests in-process, with no server.
Nothing here imports torch or transformers unless the torch backend is used.
"""
